import json
import multiprocessing
import time

import av
import numpy as np
import pytest
from PIL import Image

from infer.film.blend import blend_gap
from infer.film.film import make_film
from infer.film.mp4 import chapters_of
from storyanchors.story import Event, Story
from storyanchors.story_edit import edit_frames, insert_event

INTERVAL = 4
STORY = Story([Event(1, 2, "a fox sleeps"), Event(2, 4, "it rains")], ["a fox"], "ink")


def scene(seed, size=(48, 32)):
    """A picture with soft edges: what half the colour resolution can hold."""
    small = np.random.default_rng(seed).integers(40, 216, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_anchors(folder, seeds=(1, 2, 3, 4), size=(48, 32)):
    folder.mkdir()
    paths = [folder / f"{number:03d}.png" for number in range(1, len(seeds) + 1)]
    for path, seed in zip(paths, seeds, strict=True):
        scene(seed, size).save(path)
    return paths


class Counting:
    """blend_gap that knows how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gap, frame_interval):
        self.calls += 1
        return blend_gap(gap, frame_interval)


def film(anchors, story, out, draw=blend_gap, **changed):
    arguments = (
        dict(settings={"interpolator": "blend"}, frame_interval=INTERVAL, fps=24.0, progress=False) | changed
    )
    return make_film(anchors, story, out, draw=draw, **arguments)


def pixels(image):
    return np.asarray(image, np.float64)


def psnr(first, second):
    return 10 * np.log10(255**2 / np.mean((pixels(first) - pixels(second)) ** 2))


@pytest.mark.parametrize("frame_interval", [0, 1, 4])
def test_anchors_stand_untouched_in_their_places_among_all_frames(tmp_path, frame_interval):
    anchors = write_anchors(tmp_path / "anchors")
    parts = film(anchors, STORY, tmp_path / "film.mp4", frame_interval=frame_interval)
    paths = sorted((parts / "frames").glob("*.png"))
    assert [path.name for path in paths] == [f"{n:06d}.png" for n in range(3 * (frame_interval + 1) + 1)]
    for number, anchor in enumerate(anchors):
        assert paths[number * (frame_interval + 1)].read_bytes() == anchor.read_bytes()
    record = json.loads((parts / "frames" / "film.json").read_text())
    assert (record["num_frames"], record["interpolator"], record["fps"]) == (len(paths), "blend", 24.0)


def test_the_mp4_plays_all_frames_in_order_with_chapters_and_texts(tmp_path):
    anchors = write_anchors(tmp_path / "anchors")
    parts = film(anchors, STORY, tmp_path / "two foxes.mp4", fps=23.976)
    expected = [Image.open(path) for path in sorted((parts / "frames").glob("*.png"))]
    with av.open(tmp_path / "two foxes.mp4") as container:
        [video] = container.streams.video
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(video.average_rate) == pytest.approx(23.976)
        assert container.metadata["title"] == "two foxes"
        assert container.metadata["comment"] == STORY.prompt()
        assert "storyanchors, blend" in container.metadata["description"]
        chapters = [
            (
                round(chapter["start"] * chapter["time_base"] * video.average_rate),
                chapter["metadata"]["title"],
            )
            for chapter in container.chapters()
        ]
        frames = list(container.decode(video))
    assert chapters == [(0, "a fox sleeps"), (5, "a fox sleeps; it rains"), (10, "it rains")]
    assert len(frames) == len(expected) == 16
    assert [frame.pts for frame in frames] == sorted({frame.pts for frame in frames})
    shown = [frame.to_image() for frame in frames]
    for number, image in enumerate(shown):
        assert psnr(image, expected[number]) > 36
        assert number == int(np.argmax([psnr(image, other) for other in expected]))
    assert all(frames[number].key_frame for number in range(0, 16, 5))


def test_chapters_follow_each_other_and_cover_the_film():
    chapters = chapters_of(STORY, 69)
    assert [(chapter.first, chapter.last) for chapter in chapters] == [(0, 69), (70, 139), (140, 210)]
    assert chapters_of(Story([Event(1, 3, "rain")]), 69)[0].last == 140


def test_frames_of_odd_size_keep_their_pixels(tmp_path):
    anchors = write_anchors(tmp_path / "anchors", size=(47, 31))
    parts = film(anchors, STORY, tmp_path / "film.mp4")
    with av.open(tmp_path / "film.mp4") as container:
        first = next(container.decode(video=0)).to_image()
    assert first.size == (48, 32)
    assert psnr(first.crop((0, 0, 47, 31)), Image.open(parts / "frames" / "000000.png")) > 36


def frames_of(parts):
    """Not the mp4: x264 was seen to encode the same pictures to other bytes, in 3 of 50 films."""
    return {path.name: path.read_bytes() for path in (parts / "frames").glob("*.png")}


def test_what_was_drawn_is_not_drawn_again(tmp_path):
    anchors, draw = write_anchors(tmp_path / "anchors"), Counting()
    film(anchors, STORY, tmp_path / "film.mp4", draw)
    first = frames_of(tmp_path / "film.parts")
    film(anchors, STORY, tmp_path / "film.mp4", draw)
    assert draw.calls == 3 and frames_of(tmp_path / "film.parts") == first
    scene(9).save(anchors[3])
    film(anchors, STORY, tmp_path / "film.mp4", draw)
    assert draw.calls == 4  # the gap before the changed frame
    film(anchors, STORY, tmp_path / "film.mp4", draw, settings={"interpolator": "blend", "seed": 1})
    assert draw.calls == 7
    next((tmp_path / "film.parts" / "gaps").glob("*/002.png")).unlink()
    parts = film(anchors, STORY, tmp_path / "film.mp4", draw, settings={"interpolator": "blend", "seed": 1})
    assert draw.calls == 8 and len(list((parts / "frames").glob("*.png"))) == 16


def test_an_edited_story_draws_only_the_gaps_beside_the_edit(tmp_path):
    anchors, draw = write_anchors(tmp_path / "anchors"), Counting()
    story = Story([Event(n, n, f"scene {n}") for n in range(1, 5)])
    film(anchors, story, tmp_path / "film.mp4", draw)
    edited = edit_frames(story, {4: "snow"}).story
    film(anchors, edited, tmp_path / "film.mp4", draw)
    assert draw.calls == 3 + 1  # another text of frame 4
    longer = insert_event(edited, 1, "a bird").story
    scene(9).save(tmp_path / "new.png")
    film([anchors[0], tmp_path / "new.png", *anchors[1:]], longer, tmp_path / "film.mp4", draw)
    assert draw.calls == 4 + 2  # the gaps 2-3 and 3-4 are found again as 3-4 and 4-5


def test_a_film_killed_between_two_gaps_goes_on_and_becomes_the_same(tmp_path):
    anchors, draw = write_anchors(tmp_path / "anchors"), Counting()

    def slowly(gap, frame_interval):
        time.sleep(0.2)
        return blend_gap(gap, frame_interval)

    gaps = tmp_path / "killed.parts" / "gaps"
    process = multiprocessing.get_context("fork").Process(
        target=film, args=(anchors, STORY, tmp_path / "killed.mp4", slowly)
    )
    process.start()
    deadline = time.monotonic() + 30
    while not (gaps.is_dir() and len(list(gaps.glob("[!.]*"))) == 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "killed.mp4").exists() and len(list(gaps.glob("[!.]*"))) == 1
    (gaps / ".half.1234.tmp").mkdir()  # what a kill in the middle of a gap leaves
    film(anchors, STORY, tmp_path / "killed.mp4", draw)
    film(anchors, STORY, tmp_path / "film.mp4")
    assert draw.calls == 2
    assert sorted(path.name for path in gaps.iterdir()) == sorted(
        path.name for path in (tmp_path / "film.parts" / "gaps").iterdir()
    )
    for folder in ("gaps", "frames"):
        for path in (tmp_path / "film.parts" / folder).rglob("*.png"):
            assert (
                tmp_path / "killed.parts" / path.relative_to(tmp_path / "film.parts")
            ).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"frame_interval": -1}, "frame_interval=-1, expected 0 to 1000"),
        ({"frame_interval": 1001}, "frame_interval=1001, expected 0 to 1000"),
        ({"fps": 0.0}, r"fps=0.0, expected 1 to 240"),
        ({"out": "film.avi"}, "must be the name of an .mp4 file"),
        ({"out": "mine.mp4"}, "was not made by this command"),
    ],
)
def test_what_cannot_be_a_film_is_refused_before_anything_is_drawn(tmp_path, changed, expected):
    anchors, draw = write_anchors(tmp_path / "anchors"), Counting()
    (tmp_path / "mine.mp4").write_bytes(b"a film of mine")
    out = tmp_path / changed.pop("out", "film.mp4")
    with pytest.raises(ValueError, match=expected):
        film(anchors, STORY, out, draw, **changed)
    assert draw.calls == 0 and not (tmp_path / "film.mp4").exists()
    assert (tmp_path / "mine.mp4").read_bytes() == b"a film of mine"
