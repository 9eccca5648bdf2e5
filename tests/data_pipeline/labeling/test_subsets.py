import numpy as np
import pytest
from PIL import Image

from data_pipeline.labeling.subsets import (
    FrameLook,
    balanced_subsets,
    evenly_chosen,
    look_at,
    representative_frame,
)
from storyanchors.clip import encode_jpeg

BLACK, DULL, SHARP = FrameLook(True, 0), FrameLook(False, 1), FrameLook(False, 9)


@pytest.mark.parametrize("num_frames", range(1, 200))
def test_subsets_are_the_fewest_of_12_frames_and_differ_by_one_at_most(num_frames):
    subsets = balanced_subsets(num_frames)
    assert [frame for first, last in subsets for frame in range(first, last + 1)] == [
        *range(1, num_frames + 1)
    ]
    sizes = [last - first + 1 for first, last in subsets]
    assert max(sizes) <= 12 and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-num_frames // 12)
    assert sizes == sorted(sizes, reverse=True)  # so no later subset has a number that counting from 1 gives


def test_22_frames_are_two_times_eleven():
    assert balanced_subsets(22) == [(1, 11), (12, 22)]


@pytest.mark.parametrize("num_frames", range(1, 60))
def test_of_too_many_frames_the_ends_and_evenly_chosen_ones_are_sent(num_frames):
    assert evenly_chosen(num_frames, None) == evenly_chosen(num_frames, 60) == [*range(1, num_frames + 1)]
    for most in range(2, num_frames):
        chosen = evenly_chosen(num_frames, most)
        gaps = np.diff(chosen)
        assert (chosen[0], chosen[-1], len(chosen)) == (1, num_frames, most)
        assert gaps.min() > 0 and gaps.max() - gaps.min() <= 1
    assert evenly_chosen(5, 1) == [3]


def chosen(first, last, looks=(), used=()):
    looks = dict(looks)
    return representative_frame(first, last, set(used), lambda frame: looks.get(frame, DULL))


def test_the_middle_frame_stands_for_an_event():
    assert chosen(3, 7) == 5
    assert chosen(3, 6) == 4  # of two middle ones the first
    assert chosen(9, 9) == 9


def test_a_sharper_neighbour_stands_for_it_but_none_farther_away():
    assert chosen(1, 9, {6: SHARP}) == 6
    assert chosen(1, 9, {7: SHARP}) == 5


def test_black_and_used_frames_are_passed_over():
    assert chosen(1, 5, {3: BLACK}) == 2
    assert chosen(1, 5, {2: BLACK, 3: BLACK}, used=[4]) == 1
    assert chosen(1, 3, {1: BLACK, 3: BLACK}, used=[2]) == 2  # better twice than black
    assert chosen(1, 3, {1: BLACK, 2: BLACK, 3: BLACK}, used=[2]) == 1
    assert chosen(2, 2, {2: BLACK}, used=[2]) == 2


def jpeg_of(pixels) -> bytes:
    return encode_jpeg(Image.fromarray(np.asarray(pixels).clip(0, 255).astype(np.uint8)))


def test_a_blurred_frame_is_less_sharp():
    rng = np.random.default_rng(0)
    for contrast in (8, 40, 90):
        picture = Image.fromarray(rng.normal(128, contrast, (180, 320, 3)).clip(0, 255).astype(np.uint8))
        for scale in (0.7, 0.4, 0.1):  # of the detail that is left
            small = picture.resize((int(320 * scale), int(180 * scale)), Image.Resampling.BOX)
            blurred = small.resize(picture.size, Image.Resampling.BICUBIC)
            assert look_at(encode_jpeg(blurred)).sharpness < look_at(encode_jpeg(picture)).sharpness


def test_black_frames_are_seen_also_with_grain_and_letters_are_not_black():
    grain = np.random.default_rng(0).normal(6, 3, (480, 848, 3))
    assert look_at(jpeg_of(grain)).black and look_at(jpeg_of(np.zeros((480, 848, 3)))).black
    letters = grain.copy()
    letters[230:242, 400:440:4] = 235  # ten strokes, one pixel wide
    assert not look_at(jpeg_of(letters)).black
    assert not look_at(jpeg_of(grain + 60)).black and not look_at(jpeg_of(grain + 245)).black
    assert not look_at(jpeg_of(grain * 12)).black
