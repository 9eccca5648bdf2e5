from itertools import pairwise

import pytest
import torch
from PIL import Image

from infer.film.gap import Gap, gaps_between
from infer.film.strides import MAX_STRIDES, draw_gaps, plan_levels
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.generator import StoryGenerator
from storyanchors.story import Event, Story

STORY = Story([Event(1, 1, "a fox sleeps"), Event(2, 3, "it rains")], ["a fox"], "ink")


def picture(level):
    return Image.new("RGB", (24, 16), (level, 255 - level, 128))


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    dit = StoryDiT(StoryDiTConfig(1, 12, 1, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    codec = PcaCodec.fit(torch.rand(8, 3, 16, 24) * 2 - 1, latent_channels=4)
    return StoryGenerator(
        dit, codec, WordEncoder(), frame_size=(16, 24), num_steps=1, guidance_scale=1.0, shift=1.0
    )


@pytest.fixture
def gaps() -> list[Gap]:
    return gaps_between([picture(level) for level in (10, 120, 230)], STORY)


def test_a_gap_of_70_steps_is_ten_strides_of_seven_and_ten_times_seven_of_one():
    coarse, fine = plan_levels(70)
    assert coarse == [tuple(range(0, 71, 7))]
    assert fine == [tuple(range(first, first + 8)) for first in range(0, 70, 7)]


@pytest.mark.parametrize("num_steps", [*range(1, 160), 280, 701, 1001])
def test_every_step_is_drawn_once_between_steps_that_are_known(num_steps):
    known = {0, num_steps}
    for clips in plan_levels(num_steps):
        drawn = [step for clip in clips for step in clip[1:-1]]
        assert all({clip[0], clip[-1]} <= known and 3 <= len(clip) <= MAX_STRIDES + 1 for clip in clips)
        strides = [{after - before for before, after in pairwise(clip)} for clip in clips]
        assert all(max(stride) - min(stride) <= 1 for stride in strides)
        assert len(set(drawn)) == len(drawn) and not known & set(drawn)
        known |= set(drawn)
    assert known == set(range(num_steps + 1))


def test_a_gap_is_filled_alone_as_among_others(generator, gaps):
    both = draw_gaps(generator, gaps, 13, conditions=ClipConditions(24.0), seed=3)
    assert [len(frames) for frames in both] == [13, 13]
    [alone] = draw_gaps(generator, gaps[1:], 13, conditions=ClipConditions(24.0), seed=3)
    differences = [
        abs(a - b)
        for first, second in zip(both[1], alone, strict=True)
        for a, b in zip(first.tobytes(), second.tobytes(), strict=True)
    ]
    assert max(differences) <= 2  # a rounding step in the coarse frames, and another in the fine ones


def test_clips_are_told_their_stride_and_only_the_last_the_next_event(generator, gaps):
    calls = []
    hook = generator.dit.register_forward_pre_hook(lambda _, args: calls.append(args))
    draw_gaps(generator, gaps[:1], 13, conditions=ClipConditions(24.0))
    hook.remove()
    (coarse, _, [coarse_told], _), (fine, _, fine_told, captions) = calls
    size = dict(height=16, width=24)
    assert coarse_told == ClipConditions(24.0, 6, num_frames=3, **size)
    assert fine_told == [ClipConditions(24.0, 0, num_frames=8, **size)] * 2
    assert [len(clip) for clip in (*coarse, *fine)] == [3, 8, 8]
    for clip in (*coarse, *fine):
        assert clip[:, -1, 0, 0].tolist() == [1.0] + [0.0] * (len(clip) - 2) + [
            1.0
        ]  # the mask: both ends given
    expected = [
        Story([Event(1, 8, "a fox sleeps")], ["a fox"], "ink"),
        Story([Event(1, 7, "a fox sleeps"), Event(8, 8, "it rains")], ["a fox"], "ink"),
    ]
    for caption, story in zip(captions, expected, strict=True):
        assert caption.equal(generator.caption_encoder.encode([story.prompt()])[0])
