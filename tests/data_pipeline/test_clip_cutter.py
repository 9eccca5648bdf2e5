import numpy as np
import pytest

from data_pipeline.clip_cutter import Recipe, Video, cut_video
from data_pipeline.shard_reader import read_clips, read_marker
from storyanchors.clip import StoryClip

RECIPE = Recipe(frame_interval=69, max_frames=24, min_frames=3, max_pixels=409_600)


def cut(path, recipe, folder, progress=lambda clips: None) -> tuple[list[StoryClip], object]:
    """The clips of one video, read back from the shard, and its report."""
    folder.mkdir(exist_ok=True)
    cut_video(Video("a/film.mp4", path, "film-0123"), recipe, folder, "000000", progress)
    marker = read_marker(folder, "000000")
    clips = [StoryClip.from_members(members) for _, members in read_clips(folder, marker)]
    return clips, marker.videos[0]


def test_the_story_frames_are_exactly_source_frames_0_70_140(videos, film, tmp_path):
    for number, form in enumerate(videos):
        if form == "edit list" or form.startswith(("rotated", "wide")):
            continue  # numbered otherwise, or not readable as numbers
        [clip], report = cut(videos[form], RECIPE, tmp_path / str(number))
        assert [film.number_of(frame) for frame in clip.frames] == [0, 70, 140, 210], form
        assert clip.info.frame_numbers == (0, 70, 140, 210)
        assert report.rejected is None and report.num_frames == 4 and report.source_frames == 215


@pytest.mark.parametrize("frame_interval", [0, 1, 6, 139])
def test_any_interval(videos, film, tmp_path, frame_interval):
    recipe = Recipe(frame_interval, 999, 1, 409_600)
    [clip], report = cut(videos["h264 with B-frames"], recipe, tmp_path)
    expected = list(range(0, 215, frame_interval + 1))
    assert list(clip.info.frame_numbers) == [film.number_of(frame) for frame in clip.frames] == expected
    assert report.decoding == ("sequential" if frame_interval <= 6 else "planned")


def test_a_long_video_gives_several_clips_and_a_short_rest_is_reported(videos, film, tmp_path):
    heard = []
    recipe = Recipe(frame_interval=9, max_frames=6, min_frames=5, max_pixels=409_600)  # 22 story frames
    clips, report = cut(videos["h264 with B-frames"], recipe, tmp_path, heard.append)
    assert [clip.info.key for clip in clips] == ["film-0123-00000", "film-0123-00001", "film-0123-00002"]
    assert [number for clip in clips for number in clip.info.frame_numbers] == list(range(0, 180, 10))
    assert (report.num_clips, report.num_frames, report.short_rest) == (3, 18, 4)
    assert heard == [1, 2, 3]


def test_a_video_shorter_than_a_clip_is_a_short_rest(videos, tmp_path):
    clips, report = cut(videos["VP9"], Recipe(139, 24, 4, 409_600), tmp_path)
    assert clips == [] and report.short_rest == 2 and report.rejected is None


def test_clips_before_the_damage_do_not_count(videos, tmp_path):
    heard = []
    recipe = Recipe(frame_interval=0, max_frames=3, min_frames=1, max_pixels=409_600)
    flipped = bytearray(videos["h264 with B-frames"].read_bytes())
    for at in np.random.default_rng(0).integers(2000, len(flipped) // 2, 30):
        flipped[at] ^= 0x55
    (tmp_path / "flipped.mp4").write_bytes(flipped)
    clips, report = cut(tmp_path / "flipped.mp4", recipe, tmp_path / "part", heard.append)
    assert clips == [] and "damaged near frame" in report.rejected
    assert heard[0] == 1 and heard[-1] == 0


def test_the_facts_of_a_clip(videos, tmp_path):
    [clip], report = cut(videos["rotated by -90"], RECIPE, tmp_path)
    info = clip.info
    assert (info.source, info.frame_interval, info.height, info.width) == ("a/film.mp4", 69, 160, 96)
    assert info.fps == pytest.approx(24) and info.seconds == pytest.approx(
        [0, 70 / 24, 140 / 24, 210 / 24], abs=1e-5
    )
    assert (report.rotation, report.codec, report.colours) == (270, "h264", "bt601 assumed")


def test_motion_is_measured_to_the_next_source_frame(film, tmp_path):
    """The same film moves as much at any interval between its story frames."""
    scores = {}
    for interval in (9, 29):
        path = film.write(tmp_path / f"{interval}.mp4", 99, crf="1")
        [clip], _ = cut(path, Recipe(interval, 24, 1, 409_600), tmp_path / str(interval))
        scores[interval] = clip.info.motion
    assert 0.5 < scores[9] == pytest.approx(scores[29], rel=0.6)
