import av
import numpy as np
import pytest

from data_pipeline.picture import PictureForm, motion_between, motion_luma, story_frame_size, to_story_frame
from data_pipeline.video import VideoError, read_facts, sequential_frames


def first_picture(path) -> av.VideoFrame:
    return next(sequential_frames(read_facts(path), lambda number: number == 5)).picture


def flat_picture(luma: int, blue: int, red: int, height: int = 64) -> av.VideoFrame:
    picture = av.VideoFrame(64, height, "yuv420p")
    for plane, level in zip(picture.planes, (luma, blue, red)):
        plane.update(bytes([level]) * plane.buffer_size)
    return picture


@pytest.mark.parametrize("max_pixels", [256, 4096, 32_768, 409_600])
def test_story_frames_fit_the_budget_the_source_and_the_multiple(max_pixels):
    sides = [7, 16, 64, 100, 480, 804, 854, 1080, 1920, 3000]
    for height in sides:
        for width in sides:
            tall, wide = story_frame_size((height, width), max_pixels)
            assert tall % 16 == 0 and wide % 16 == 0
            assert tall * wide <= max_pixels
            assert tall <= max(height, 16) and wide <= max(width, 16)


@pytest.mark.parametrize(
    ("source", "expected"),
    [((480, 854), (480, 848)), ((1080, 1920), (480, 848)), ((1920, 1080), (848, 480)), ((64, 64), (64, 64))],
)
def test_common_sizes_lose_less_than_a_hundredth(source, expected):
    assert story_frame_size(source, 409_600) == expected
    covered = min(expected[0] * source[1], expected[1] * source[0]) / max(
        expected[0] * source[1], expected[1] * source[0]
    )
    assert covered > 0.99


@pytest.mark.parametrize("degrees", [-90, 90, 180])
def test_rotated_video_is_shown_upright(videos, film, degrees):
    picture = first_picture(videos[f"rotated by {degrees}"])
    form = PictureForm.of(picture, 1.0)
    size = story_frame_size(form.display_size, 409_600)
    assert size == ((160, 96) if degrees % 180 else (96, 160))
    shown = np.asarray(to_story_frame(picture, form, size))
    assert film.number_of(np.rot90(shown, -degrees // 90)) == 5


def test_wide_pixels_become_square(videos):
    picture = first_picture(videos["wide pixels"])
    facts = read_facts(videos["wide pixels"])
    assert facts.sample_aspect == pytest.approx(4 / 3)
    form = PictureForm.of(picture, facts.sample_aspect)
    assert form.display_size == pytest.approx((72, 160))  # the height gives way, nothing is enlarged
    assert to_story_frame(picture, form, (64, 160)).size == (160, 64)


def test_untagged_colours_are_bt601_below_720_lines_and_bt709_from_there():
    shown = {}
    for height in (64, 720):
        picture = flat_picture(120, 90, 200, height)
        form = PictureForm.of(picture, 1.0)
        assert form.colours == {64: "bt601 assumed", 720: "bt709 assumed"}[height]
        shown[height] = np.asarray(to_story_frame(picture, form, (height, 64)))[8, 8]
    np.testing.assert_allclose(shown[64], [236, 77, 44], atol=4)
    np.testing.assert_allclose(shown[720], [250, 91, 41], atol=4)


def test_tagged_colours_and_full_range_are_followed():
    picture = flat_picture(120, 90, 200)
    picture.colorspace, picture.color_range = 1, 2
    form = PictureForm.of(picture, 1.0)
    assert form.colours == "bt709"
    np.testing.assert_allclose(
        np.asarray(to_story_frame(picture, form, (64, 64)))[8, 8], [233, 93, 49], atol=4
    )


def test_what_cannot_be_shown_faithfully_is_refused():
    hdr = flat_picture(120, 128, 128)
    hdr.color_trc = 16
    with pytest.raises(VideoError, match="HDR video"):
        PictureForm.of(hdr, 1.0)
    form = PictureForm.of(flat_picture(120, 128, 128), 1.0)
    with pytest.raises(VideoError, match="frame 7 has 64 x 96 pixels, the frames before it 64 x 64"):
        form.check_same(flat_picture(120, 128, 128, 96), 7)


def test_motion_is_the_mean_luma_difference():
    form = PictureForm.of(flat_picture(16, 128, 128), 1.0)
    black, grey = (motion_luma(flat_picture(level, 128, 128), form) for level in (16, 126))
    assert motion_between(black, black) == 0
    assert motion_between(black, grey) == motion_between(grey, black) == pytest.approx(128, abs=2)
