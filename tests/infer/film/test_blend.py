import numpy as np
from PIL import Image

from infer.film.blend import blend_gap
from infer.film.gap import Gap
from storyanchors.story import Event, Story

STORY = Story([Event(1, 2, "rain")])


def test_a_dissolve_is_linear_in_srgb_values_and_the_same_backwards():
    first, last = Image.new("RGB", (4, 4), (0, 100, 250)), Image.new("RGB", (4, 4), (200, 100, 50))
    there, back = blend_gap(Gap(first, last, STORY), 3), blend_gap(Gap(last, first, STORY), 3)
    assert [frame.getpixel((0, 0)) for frame in there] == [(50, 100, 200), (100, 100, 150), (150, 100, 100)]
    assert [frame.tobytes() for frame in there] == [frame.tobytes() for frame in reversed(back)]


def test_steps_are_equal_from_anchor_to_anchor():
    frames = blend_gap(
        Gap(Image.new("L", (1, 1), 0).convert("RGB"), Image.new("RGB", (1, 1), "white"), STORY), 69
    )
    levels = [0, *(int(np.asarray(frame)[0, 0, 0]) for frame in frames), 255]
    assert len(frames) == 69 and set(np.diff(levels)) <= {3, 4}
