from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.video import (
    Inexact,
    VideoError,
    plan_is_worthwhile,
    planned_frames,
    read_facts,
    sequential_frames,
)

FORMS = [
    "h264 with B-frames",
    "H.264 with open groups",
    "one I-frame",
    "intra refresh",
    "HEVC",
    "VP9",
    "MPEG-4 in avi",
    "MPEG-2 programme stream",
    "transport stream",
    "no timestamps",
    "no duration",
    "variable frame rate",
    "faststart",
    "late start",
    "edit list",
    "wide pixels",
]
PLANNED = [
    "h264 with B-frames",
    "HEVC",
    "VP9",
    "MPEG-4 in avi",
    "transport stream",
    "no duration",
    "faststart",
]


def wanted(number: int) -> bool:
    return number % 70 == 0


def numbers(frames, film) -> list[tuple[int, int]]:
    return [(one.number, film.number_of(one.picture.to_ndarray(format="rgb24"))) for one in frames]


@pytest.mark.parametrize("form", FORMS)
def test_frame_k_is_the_kth_presented_frame(videos, film, form):
    first = 10 if form == "edit list" else 0  # the first ten frames are cut away, so they are not presented
    expected = [(number, first + number) for number in range(0, 215 - first, 70)]
    facts = read_facts(videos[form])
    assert numbers(sequential_frames(facts, wanted), film) == expected
    try:
        if facts.presented is not None:
            assert numbers(planned_frames(facts, wanted), film) == expected
    except Inexact:
        assert form not in PLANNED


@pytest.mark.parametrize("form", PLANNED)
def test_both_ways_decode_the_same_pixels_at_the_same_times(videos, form):
    facts = read_facts(videos[form])
    assert plan_is_worthwhile(facts, wanted)
    both = zip(planned_frames(facts, wanted), sequential_frames(facts, wanted), strict=True)
    for planned, sequential in both:
        assert planned.seconds == sequential.seconds
        assert np.array_equal(
            planned.picture.to_ndarray(format="rgb24"), sequential.picture.to_ndarray(format="rgb24")
        )


def test_dense_frames_are_not_worth_a_plan(videos):
    facts = read_facts(videos["h264 with B-frames"])
    assert not plan_is_worthwhile(facts, lambda number: True)
    assert not plan_is_worthwhile(read_facts(videos["no timestamps"]), wanted)


def test_seconds_and_fps_follow_the_timestamps(videos):
    facts = read_facts(videos["variable frame rate"])
    times = [one.seconds for one in planned_frames(facts, wanted)]
    np.testing.assert_allclose(times, [(40 * k + 5 * (k % 7)) / 1000 for k in range(0, 215, 70)], atol=1e-3)
    assert facts.fps == pytest.approx(214 / (40 * 214 + 5 * (214 % 7)) * 1000, rel=1e-3)
    for form in ("late start", "no duration", "transport stream"):
        facts = read_facts(videos[form])
        assert facts.fps == pytest.approx(24, rel=1e-3)
        assert next(iter(planned_frames(facts, wanted))).seconds == 0


def test_a_recording_that_begins_in_the_middle_of_a_group_counts_from_its_first_picture(
    videos, film, tmp_path
):
    content = videos["transport stream"].read_bytes()
    begun = tmp_path / "begun.ts"
    begun.write_bytes(content[188 * 60 :])
    found = numbers(sequential_frames(read_facts(begun), lambda number: True), film)
    first = found[0][1]
    assert first > 0
    assert found == [(number, first + number) for number in range(215 - first)]


def cut(source: Path, path: Path, share: float) -> Path:
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def broken_files(videos, folder: Path) -> dict[str, Path]:
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:5,\nhttp://localhost/x.ts\n#EXT-X-ENDLIST\n")
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:9,\n{videos['transport stream']}\n#EXT-X-ENDLIST\n")
    flipped = bytearray(videos["h264 with B-frames"].read_bytes())
    for at in np.random.default_rng(0).integers(2000, len(flipped) // 2, 30):
        flipped[at] ^= 0x55
    (folder / "flipped.mp4").write_bytes(flipped)
    return {
        "no such file": folder / "nowhere.mp4",
        "0 bytes": folder / "empty.mp4",
        "moov atom not found": cut(videos["h264 with B-frames"], folder / "cut.mp4", 0.5),
        "not readable as a video": folder / "text.mp4",
        "Invalid data": folder / "playlist.mp4",
        "^not readable": folder / "list.m3u8",
        "of 215 is not whole": cut(videos["faststart"], folder / "download.mp4", 0.5),
        "File ended prematurely": cut(videos["VP9"], folder / "cut.webm", 0.5),
        "damaged near frame": folder / "flipped.mp4",
        "no video stream": sound_only(folder / "sound.mp4"),
    }


def sound_only(path: Path) -> Path:
    with av.open(path, "w") as output:
        stream = output.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.rate = 48000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def test_a_broken_file_is_refused_with_its_reason(videos, tmp_path):
    for reason, path in broken_files(videos, tmp_path).items():
        with pytest.raises(VideoError, match=reason):
            for _ in sequential_frames(read_facts(path), wanted):
                pass


def test_damage_never_passes_the_planned_way(videos, tmp_path):
    facts = read_facts(broken_files(videos, tmp_path)["damaged near frame"])
    with pytest.raises(Inexact):
        list(planned_frames(facts, lambda number: number % 7 == 0))
