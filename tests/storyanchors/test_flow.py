"""Rectified flow: what noise, velocity, sigmas and loss have to do with one another."""

import math

import pytest
import torch
from torch import Tensor

from storyanchors.flow import (
    add_noise,
    flow_losses,
    sample_sigmas,
    sampling_sigmas,
    shift_sigmas,
    velocity,
)

SHIFTS = [0.3, 1.0, 3.0, 12.0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sigma_0_is_the_data_and_1_the_noise():
    latents, noise = randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[1], noise[1])


def test_velocity_is_the_derivative_of_the_noisy_latents_by_sigma():
    latents, noise, sigma = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1), randn(1)[0].sigmoid()
    _, derivative = torch.func.jvp(
        lambda s: add_noise(latents, noise, s), (sigma,), (torch.ones_like(sigma),)
    )
    torch.testing.assert_close(derivative, velocity(latents, noise))


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_the_exact_velocity_leads_from_any_sigma_to_the_data(sigma):
    latents, noise = randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1)
    noisy = add_noise(latents, noise, torch.full((2,), sigma, dtype=torch.float64))
    torch.testing.assert_close(noisy - sigma * velocity(latents, noise), latents)
    torch.testing.assert_close(noisy + (1 - sigma) * velocity(latents, noise), noise)


def test_each_clip_has_its_own_sigma_and_one_clip_may_come_without_a_batch():
    latents, noise, sigmas = randn(4, 3, 2, 5, 5), randn(4, 3, 2, 5, 5, seed=1), torch.linspace(0, 1, 4)
    noisy = add_noise(latents, noise, sigmas)
    for b in range(4):
        torch.testing.assert_close(add_noise(latents[b], noise[b], sigmas[b]), noisy[b])


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_keeps_both_ends_and_the_order(shift):
    sigmas = shift_sigmas(torch.linspace(0, 1, 101, dtype=torch.float64), shift)
    assert sigmas[0] == 0 and float(sigmas[-1]) == pytest.approx(1, abs=1e-15) and (sigmas.diff() > 0).all()
    middle = float(shift_sigmas(torch.tensor(0.5, dtype=torch.float64), shift))
    assert middle == pytest.approx(shift / (1 + shift))  # more noise for shift > 1, less for shift < 1


@pytest.mark.parametrize("a", SHIFTS)
@pytest.mark.parametrize("b", SHIFTS)
def test_shifts_one_after_another_multiply(a, b):
    sigmas = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, a), b), shift_sigmas(sigmas, a * b))
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, a), 1 / a), sigmas)


@pytest.mark.parametrize("shift", SHIFTS)
def test_signal_to_noise_is_divided_by_the_shift(shift):
    """SD3 Eq. 23 in other words: (1 - sigma) / sigma, the ratio of data to noise, is divided by the shift."""
    sigmas = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = shift_sigmas(sigmas, shift)
    torch.testing.assert_close((1 - shifted) / shifted, (1 - sigmas) / sigmas / shift)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_shift_that_is_no_number_above_0_is_refused(shift):
    with pytest.raises(ValueError, match=f"shift must be a number above 0, found {shift}"):
        shift_sigmas(torch.rand(3), shift)


@pytest.mark.parametrize("shift", SHIFTS)
def test_sampling_goes_from_noise_to_data_in_shifted_steps(shift):
    sigmas = sampling_sigmas(20, shift)
    assert sigmas.shape == (21,) and sigmas.dtype == torch.float32
    assert (sigmas[0], sigmas[-1]) == (1, 0) and (sigmas.diff() < 0).all()
    torch.testing.assert_close(shift_sigmas(sigmas, 1 / shift).diff(), torch.full((20,), -1 / 20))
    assert sampling_sigmas(1, shift).tolist() == [1, 0]


def test_sampling_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least one step, found num_steps=0"):
        sampling_sigmas(0, 1.0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_training_sigmas_are_logit_normal_around_the_shift(shift):
    sigmas = sample_sigmas(4000, torch.Generator().manual_seed(0), shift=shift)
    assert sigmas.shape == (4000,) and 0 < sigmas.min() and sigmas.max() < 1
    logits = sigmas.double().logit()
    assert float(logits.mean()) == pytest.approx(math.log(shift), abs=0.06)
    assert float(logits.std()) == pytest.approx(1, abs=0.06)


def test_training_sigmas_depend_on_their_generator_alone():
    torch.manual_seed(1)
    first = sample_sigmas(5, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    assert torch.equal(first, sample_sigmas(5, torch.Generator().manual_seed(3)))


MASK = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0.0]])


def clips(seed: int) -> Tensor:
    return randn(3, 3, 4, 2, 6, seed=seed).float()


def test_the_loss_is_the_mean_square_of_generated_frames_by_clip():
    prediction, target = clips(0), clips(1)
    square = (prediction - target) ** 2
    by_hand = torch.stack([square[0, 1:].mean(), square[1].mean(), square[2, 2:].mean()])
    torch.testing.assert_close(flow_losses(prediction, target, MASK), by_hand)
    assert not flow_losses(target, target, MASK).any()


def test_given_frames_neither_count_nor_have_a_gradient():
    prediction, target = clips(0).requires_grad_(), clips(1)
    given = MASK[..., None, None, None] == 1
    elsewhere = torch.where(given, 1e6, prediction)
    assert torch.equal(flow_losses(elsewhere, target, MASK), flow_losses(prediction, target, MASK))
    flow_losses(prediction, target, MASK).sum().backward()
    assert not prediction.grad[given.expand_as(prediction)].any()
    assert prediction.grad[~given.expand_as(prediction)].all()


def test_a_clip_weighs_the_same_whatever_is_given_and_however_large_it_is():
    """An error of 1 everywhere in one clip and of 0 in the other costs 1 and 0."""
    for given, frames, size in [(0, 4, 8), (3, 4, 8), (0, 30, 2), (29, 30, 20), (0, 1, 2)]:
        mask = torch.arange(frames) < given
        wrong, right = torch.ones(frames, 4, size, size), torch.zeros(2, 4, 6, 6)
        loss = flow_losses([wrong, right], [torch.zeros_like(wrong), right], [mask.float(), torch.zeros(2)])
        assert loss.tolist() == [1, 0]


def test_a_list_of_clips_costs_what_the_tensor_costs():
    prediction, target = clips(0), clips(1)
    assert torch.equal(
        flow_losses(list(prediction), list(target), list(MASK)), flow_losses(prediction, target, MASK)
    )


def test_half_precision_is_compared_in_float32():
    prediction, target = clips(0).bfloat16(), clips(1).bfloat16()
    loss = flow_losses(prediction, target, MASK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, flow_losses(prediction.float(), target.float(), MASK))


def test_a_clip_with_nothing_to_generate_is_refused():
    with pytest.raises(ValueError, match="a clip of 3 frames has none to generate"):
        flow_losses(clips(0), clips(1), torch.ones(3, 3))
    with pytest.raises(ValueError):
        flow_losses(clips(0), clips(1), MASK[:2])
