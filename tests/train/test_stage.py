"""What a stage draws for a clip is a function of (seed, stage, epoch, clip)."""

from dataclasses import replace

import pytest
import torch

from storyanchors.conditioning import ClipConditions, MaskPolicy
from train.stage import StageConfig, draw_clip, draw_noise

CONDITIONS = ClipConditions(fps=24, frame_interval=69, motion=1.0, height=64, width=64, num_frames=6)
CAPTIONS = {"global": "all of it", "multi_event": "[1-6] an event"}


def stage(**changes) -> StageConfig:
    policies = [MaskPolicy("none"), MaskPolicy("random_subset"), MaskPolicy("prefix")]
    return StageConfig(
        **{"name": "s", "caption": "multi_event", "mask_policies": policies, "steps": 1} | changes
    )


def draw(config: StageConfig, *, seed=0, epoch=0, key="clip", captions=CAPTIONS, conditions=CONDITIONS):
    about_clip = {"captions": captions, "conditions": conditions, "num_frames": 6}
    return draw_clip(config, seed=seed, epoch=epoch, key=key, sigma_shift=1.0, **about_clip)


def test_a_draw_repeats_whatever_the_global_generator_holds():
    torch.manual_seed(1)
    first = draw(stage())
    torch.manual_seed(2)
    again = draw(stage())
    assert torch.equal(first.cond_mask, again.cond_mask) and first.sigma == again.sigma
    assert (first.caption, first.conditions, first.noise_seed) == (
        again.caption,
        again.conditions,
        again.noise_seed,
    )
    latents = torch.zeros(6, 4, 2, 2)
    assert torch.equal(draw_noise(latents, first.noise_seed), draw_noise(latents, again.noise_seed))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"key": "clop"}])
def test_seed_epoch_and_clip_each_change_the_draw(other):
    assert draw(stage()).sigma != draw(stage(), **other).sigma
    assert draw(stage()).noise_seed != draw(stage(), **other).noise_seed


def test_dropout_shares_are_those_of_the_stage():
    config = stage(caption_dropout=0.3, conditions_dropout=0.2, other_caption_share=0.4)
    draws = [draw(config, epoch=epoch) for epoch in range(2000)]
    share = lambda found: sum(map(found, draws)) / len(draws)  # noqa: E731
    assert share(lambda d: d.caption == "") == pytest.approx(0.3, abs=0.04)
    assert share(lambda d: d.caption == CAPTIONS["global"]) == pytest.approx(0.7 * 0.4, abs=0.04)
    for name in ("fps", "frame_interval", "motion", "height", "num_frames"):
        assert share(lambda d, name=name: getattr(d.conditions, name) is None) == pytest.approx(0.2, abs=0.04)
    assert all((d.conditions.height is None) == (d.conditions.width is None) for d in draws)


def test_without_dropout_everything_known_is_told():
    drawn = draw(stage(caption_dropout=0.0, conditions_dropout=0.0))
    assert (drawn.caption, drawn.conditions) == (CAPTIONS["multi_event"], CONDITIONS)


def test_a_clip_without_the_other_caption_shows_its_own():
    config = stage(other_caption_share=1.0, caption_dropout=0.0)
    assert draw(config).caption == CAPTIONS["global"]
    assert draw(config, captions={"multi_event": "[1-6] an event"}).caption == CAPTIONS["multi_event"]


def test_dense_clips_have_masks_of_their_own_where_the_stage_says_so():
    dense = replace(CONDITIONS, frame_interval=6)
    own = stage(mask_policies=[MaskPolicy("none")], dense_mask_policies=[MaskPolicy("first_last")])
    assert draw(own).cond_mask.tolist() == [0] * 6
    assert draw(own, conditions=dense).cond_mask.tolist() == [1, 0, 0, 0, 0, 1]
    unknown = replace(CONDITIONS, frame_interval=None)
    assert draw(own, conditions=unknown).cond_mask.tolist() == [0] * 6
    assert draw(stage(mask_policies=[MaskPolicy("none")]), conditions=dense).cond_mask.tolist() == [0] * 6
