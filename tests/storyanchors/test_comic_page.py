import random
import time
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from storyanchors.comic_page import CAPTION, choose_rows, draw_comic_page, story_title
from storyanchors.story import Event, Story


def plain_frames(num, size=(64, 64)):
    return [Image.new("RGB", size, (90, 120, 180 - n)) for n in range(1, num + 1)]


def frames_per_row(rows, num_frames):
    firsts = [first for first, _ in rows]
    return [after - first for first, after in zip(firsts, [*firsts[1:], num_frames + 1])]


def area(page, colour):
    return int((np.asarray(page) == colour).all(-1).sum())


@pytest.mark.parametrize(
    "num, size", [(1, (64, 64)), (6, (64, 64)), (5, (854, 480)), (4, (304, 720)), (2, (640, 160))]
)
def test_every_frame_has_a_panel_of_its_own_shape_large_enough_to_see(num, size):
    frames = plain_frames(num, size)
    page = draw_comic_page(frames, Story([Event(1, num, "A fox.")]))
    colours = np.asarray(page).astype(np.int32) @ (65536, 256, 1)
    assert page.width <= 1320
    for frame in frames:
        ys, xs = np.nonzero(colours == np.dot(frame.getpixel((0, 0)), (65536, 256, 1)))
        width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
        assert min(width, height) >= 90
        assert abs(width / height - size[0] / size[1]) < 0.1 * size[0] / size[1]
        assert len(xs) > 0.55 * width * height  # the rest is caption and number


def test_panels_are_read_from_the_left_and_from_above():
    random.seed(0)
    for num in range(1, 40):
        rows = choose_rows(
            num, random.choice([1.0, 16 / 9, 0.5]), {1, *random.sample(range(1, num + 1), num // 3)}
        )
        counts = frames_per_row(rows, num)
        assert rows[0][0] == 1 and sum(counts) == num and all(1 <= count <= 5 for count in counts)
        assert all(count == 3 or layout == str(count) for (_, layout), count in zip(rows, counts))


def test_a_longer_story_has_panels_of_several_sizes():
    for aspect in (1.0, 16 / 9):
        layouts = [layout for _, layout in choose_rows(12, aspect, set(range(1, 13)))]
        assert len(set(layouts)) > 1 and any(layout.startswith("large") for layout in layouts)
        assert all(a != b for a, b in pairwise(layouts))


def test_every_event_is_told_once_and_more_text_needs_more_room():
    frames = plain_frames(6)
    one, two, long = (
        draw_comic_page(frames, Story(events))
        for events in (
            [Event(1, 6, "A fox.")],
            [Event(1, 3, "A fox."), Event(4, 6, "A fox.")],
            [Event(1, 3, "A fox runs. " * 30), Event(4, 6, "A fox.")],
        )
    )
    assert 0 < 1.9 * area(one, CAPTION) < area(two, CAPTION) < area(long, CAPTION)


def test_long_texts_and_words_stay_on_the_page():
    story = Story([Event(n, n, "W" * 300) for n in range(1, 4)], ["X" * 300, "Y" * 90], "Z" * 500)
    page = np.asarray(draw_comic_page(plain_frames(3), story))
    assert not (page < 60).all(-1)[:, -20:].any() and page.shape[0] < 2500


def test_the_title_is_in_the_storys_own_words():
    def title(subjects, style=""):
        return story_title(Story([Event(1, 2, "x")], subjects, style))

    assert title(["a red fox, old", "the moon"]) == "A red fox & the moon"
    assert title(["a girl with a spear"]) == "A girl"
    assert title(["a", "b", "c", "d"]) == "A, b & c, ..."
    assert title([], "ink drawing") == "Ink drawing" and title([]) == "A story in 2 frames"
    assert len(title(["word " * 50])) < 50


def test_a_hundred_frames_are_laid_out_at_once():
    start = time.process_time()
    choose_rows(100, 1.0, set(range(1, 101, 3)))
    assert time.process_time() - start < 1
