import io

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

BLACK, DULL, SHARP = FrameLook(True, 0.0), FrameLook(False, 1.0), FrameLook(False, 9.0)


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


def test_black_and_blur_are_seen_in_a_jpeg():
    noise = np.random.default_rng(0).integers(0, 255, (72, 128, 3), np.uint8)
    picture = Image.fromarray(noise)
    blurred = picture.resize((32, 18)).resize((128, 72), Image.Resampling.BICUBIC)
    black = Image.new("RGB", (128, 72), (6, 8, 7))
    sharp_look, blurred_look = look_at(encode_jpeg(picture)), look_at(encode_jpeg(blurred))
    assert sharp_look.sharpness > 4 * blurred_look.sharpness
    assert not sharp_look.black and not blurred_look.black and look_at(encode_jpeg(black)).black
    titles = np.zeros((72, 128, 3), np.uint8)
    titles[30:40, 40:90] = 255
    assert not look_at(encode_jpeg(Image.fromarray(titles))).black  # a title card says something


def test_large_frames_are_judged_small():
    buffer = io.BytesIO()
    Image.new("RGB", (4096, 2160), (90, 90, 90)).save(buffer, "JPEG")
    assert look_at(buffer.getvalue()) == FrameLook(False, 0.0)
