"""The 2c+1 input, the mask's polarity, and the policies that choose which frames are given."""

import math

import pytest
import torch

from storyanchors.conditioning import (
    MASK_POLICIES,
    ClipConditions,
    MaskPolicy,
    sample_cond_mask,
    stack_condition_channels,
)

B, F, C, H, W = 3, 5, 4, 6, 2
MASKS = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0.0]])


def latents() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, F, C, H, W, generator=generator) for _ in range(2))


def test_channels_are_noisy_then_condition_then_mask_and_1_is_given():
    noisy, cond = latents()
    inputs = stack_condition_channels(noisy, cond, MASKS)
    assert inputs.shape == (B, F, 2 * C + 1, H, W)
    assert torch.equal(inputs[:, :, :C], noisy)  # of every frame, given or not
    for b in range(B):
        for f in range(F):
            given = MASKS[b, f] == 1
            assert torch.equal(inputs[b, f, C : 2 * C], cond[b, f] if given else torch.zeros(C, H, W))
            assert torch.equal(inputs[b, f, 2 * C], torch.full((H, W), float(given)))


def test_what_stands_where_no_frame_is_given_does_not_matter():
    noisy, cond = latents()
    spoiled = torch.where(MASKS[..., None, None, None] == 1, cond, torch.nan)
    assert torch.equal(
        stack_condition_channels(noisy, spoiled, MASKS), stack_condition_channels(noisy, cond, MASKS)
    )


def test_gradients_reach_the_given_condition_latents_only():
    noisy, cond = latents()
    cond.requires_grad_()
    stack_condition_channels(noisy, cond, MASKS).sum().backward()
    assert torch.equal(cond.grad, MASKS[..., None, None, None].expand_as(cond))


def test_one_clip_is_stacked_as_in_a_batch():
    noisy, cond = latents()
    batch = stack_condition_channels(noisy, cond, MASKS)
    for b in range(B):
        assert torch.equal(stack_condition_channels(noisy[b], cond[b], MASKS[b]), batch[b])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.bfloat16])
def test_a_mask_of_any_kind_means_the_same(kind):
    noisy, cond = latents()
    inputs = stack_condition_channels(noisy, cond, MASKS.to(kind))
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, stack_condition_channels(noisy, cond, MASKS))


def test_shapes_that_do_not_fit_are_refused():
    noisy, cond = latents()
    with pytest.raises(ValueError, match=r"differ: \(3, 5, 4, 6, 2\), \(3, 4, 4, 6, 2\)"):
        stack_condition_channels(noisy, cond[:, :4], MASKS)
    with pytest.raises(ValueError, match=r"cond_mask has shape \(3, 4\), expected \(3, 5\)"):
        stack_condition_channels(noisy, cond, MASKS[:, :4])
    with pytest.raises(ValueError, match=r"cond_mask has shape \(3, 5\), expected \(5,\)"):
        stack_condition_channels(noisy[0], cond[0], MASKS)


def draw(policies: list[MaskPolicy], num_frames: int, num: int = 300) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    masks = [sample_cond_mask(policies, num_frames, generator) for _ in range(num)]
    assert all(mask.shape == (num_frames,) and mask.dtype == torch.float32 for mask in masks)
    return [[int(value) for value in mask] for mask in masks]


def prefixes(lengths: range) -> set[tuple[int, ...]]:
    return {tuple([1] * k + [0] * (5 - k)) for k in lengths}


WHAT_IS_GIVEN = {  # of five frames: exactly these masks come up
    "none": (MaskPolicy("none"), {(0, 0, 0, 0, 0)}),
    "first": (MaskPolicy("first"), {(1, 0, 0, 0, 0)}),
    "first_last": (MaskPolicy("first_last"), {(1, 0, 0, 0, 1)}),
    "prefix of 2": (MaskPolicy("prefix", k=2), {(1, 1, 0, 0, 0)}),
    "suffix of 2": (MaskPolicy("suffix", k=2), {(0, 0, 0, 1, 1)}),
    "prefix of 9": (MaskPolicy("prefix", k=9), {(1, 1, 1, 1, 0)}),
    "suffix of 9": (MaskPolicy("suffix", k=9), {(0, 1, 1, 1, 1)}),
    "prefix": (MaskPolicy("prefix"), prefixes(range(1, 5))),
    "suffix": (MaskPolicy("suffix"), {mask[::-1] for mask in prefixes(range(1, 5))}),
    "all but 1": (MaskPolicy("all_but", k=1), {tuple(int(i != k) for i in range(5)) for k in range(5)}),
    "random_subset of all": (
        MaskPolicy("random_subset", p=1.0),
        {tuple(int(i != k) for i in range(5)) for k in range(5)},
    ),
    "random_subset of none": (MaskPolicy("random_subset", p=0.0), {(0, 0, 0, 0, 0)}),
}


@pytest.mark.parametrize("case", WHAT_IS_GIVEN)
def test_each_policy_gives_the_frames_of_its_name(case):
    policy, expected = WHAT_IS_GIVEN[case]
    assert set(map(tuple, draw([policy], 5))) == expected


@pytest.mark.parametrize("k", [1, 2, 3])
def test_all_but_k_leaves_k_frames_anywhere(k):
    masks = draw([MaskPolicy("all_but", k=k)], 5, num=500)
    assert {sum(mask) for mask in masks} == {5 - k}
    assert len(set(map(tuple, masks))) == math.comb(5, k)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_a_random_subset_gives_each_frame_with_its_probability(p):
    masks = torch.tensor(draw([MaskPolicy("random_subset", p=p)], 8, num=2000), dtype=torch.float64)
    torch.testing.assert_close(masks.mean(0), torch.full((8,), p, dtype=torch.float64), atol=0.04, rtol=0)


@pytest.mark.parametrize("name", MASK_POLICIES)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 9])
def test_a_frame_is_always_left_to_generate(name, num_frames):
    for policy in (MaskPolicy(name), MaskPolicy(name, k=1), MaskPolicy(name, k=99, p=1.0)):
        assert all(0 in mask for mask in draw([policy], num_frames, num=40))


def test_a_mixture_draws_each_policy_by_its_weight():
    mixture = [MaskPolicy("none", 1), MaskPolicy("first", 3), MaskPolicy("suffix", 0, k=1)]
    masks = draw(mixture, 4, num=2000)
    assert masks.count([1, 0, 0, 0]) / 2000 == pytest.approx(0.75, abs=0.04)
    assert masks.count([0, 0, 0, 0]) + masks.count([1, 0, 0, 0]) == 2000


def test_a_mask_depends_on_its_generator_alone():
    mixture = [MaskPolicy(name) for name in MASK_POLICIES]
    torch.manual_seed(1)
    first = draw(mixture, 7)
    torch.manual_seed(2)
    assert draw(mixture, 7) == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(name="frist"), "unknown mask policy 'frist', expected one of none, first, prefix"),
        (dict(name="first", weight=-1.0), "of mask policy first must be a number from 0 on, found -1.0"),
        (dict(name="first", weight=math.inf), "found inf"),
        (dict(name="prefix", k=-1), "k of mask policy prefix must be at least 1, found -1"),
        (dict(name="all_but", k=0), "k of mask policy all_but must be at least 1, found 0"),
        (dict(name="random_subset", p=1.5), "p of mask policy random_subset must lie between 0 and 1"),
        (dict(name="random_subset", p=math.nan), "found nan"),
    ],
)  # fmt: skip
def test_a_wrong_policy_says_what_was_expected(wrong, message):
    with pytest.raises(ValueError) as error:
        MaskPolicy(**wrong)
    assert message in str(error.value)


@pytest.mark.parametrize("mixture", [[], [MaskPolicy("first", 0.0)]])
def test_a_mixture_without_weight_is_refused(mixture):
    with pytest.raises(ValueError, match="needs a policy of weight above 0"):
        sample_cond_mask(mixture, 4, torch.Generator())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(fps=0), "fps must be a number above 0 or unknown (None), found 0"),
        (dict(fps=math.inf), "found inf"),
        (dict(fps=math.nan), "found nan"),
        (dict(num_frames=-1), "num_frames must be a number above 0"),
        (dict(height=0, width=64), "height must be"),
        (dict(motion=-0.1), "motion must be a number from 0 on or unknown (None), found -0.1"),
        (dict(motion=math.nan), "found nan"),
        (dict(frame_interval=-1), "frame_interval must be a number from 0 on"),
        (dict(height=64), "height and width are known together or not at all, found 64, None"),
        (dict(width=64), "found None, 64"),
    ],
)  # fmt: skip
def test_impossible_conditions_are_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        ClipConditions(**wrong)
    assert message in str(error.value)


def test_nothing_still_and_adjacent_frames_are_possible():
    ClipConditions()
    ClipConditions(fps=23.976, frame_interval=0, motion=0.0, height=16, width=16, num_frames=1)
