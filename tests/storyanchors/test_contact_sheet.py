import numpy as np
import pytest
from PIL import Image

from storyanchors.contact_sheet import GIVEN, MAX_FRAME_PX, draw_comparison, draw_contact_sheet
from storyanchors.story import Event, Story

STORY = Story(
    [
        Event(1, 2, "A fox sleeps."),
        Event(2, 5, "It runs " + "on and " * 30 + "on."),
        Event(5, 9, "Snow falls."),
    ],
    ["a fox"],
    "ink drawing",
)


def plain_frames(num, size=(64, 64)):
    return [Image.new("RGB", size, (10 * n, 200, 255 - n)) for n in range(1, num + 1)]


def count_colour(page, colour):
    return int((np.asarray(page) == colour).all(-1).sum())


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (720, 304), (304, 720), (2048, 2048)])
@pytest.mark.parametrize("num", [1, 2, 9])
def test_every_frame_is_on_the_page_large_enough_to_see(num, size):
    page = draw_contact_sheet(plain_frames(num, size), STORY)
    for frame in plain_frames(num, size):
        area = count_colour(page, frame.getpixel((0, 0)))
        assert area >= min(size[0] * size[1], 100 * 60)
        assert area <= max(MAX_FRAME_PX**2, 9 * size[0] * size[1])
    assert page.width < 1400


def test_small_frames_keep_hard_pixels():
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    page = draw_contact_sheet([checker], Story([Event(1, 1, "x")]))
    inside = np.asarray(page)[60:140, 40:140]
    assert set(np.unique(inside)) == {0, 255}


def test_only_given_frames_are_marked():
    frames = plain_frames(9)
    assert count_colour(draw_contact_sheet(frames, STORY), GIVEN) == 0
    one, two = (
        count_colour(draw_contact_sheet(frames, STORY, given=given), GIVEN) for given in ({3}, {3, 9})
    )
    assert 0 < one < two


def test_long_words_and_narrow_bars_stay_on_the_page():
    story = Story([Event(1, 1, "W" * 300), Event(2, 2, "short")])
    page = np.asarray(draw_contact_sheet(plain_frames(2), story))
    ink = (page < 60).all(-1)
    assert ink.any() and not ink[:, -20:].any()


def test_a_comparison_has_a_row_for_every_version():
    rows = [("truth", plain_frames(6)), ("generated", plain_frames(5))]
    page = draw_comparison(rows)
    first, last = plain_frames(6)[0].getpixel((0, 0)), plain_frames(6)[5].getpixel((0, 0))
    assert count_colour(page, first) == 2 * count_colour(page, last)
