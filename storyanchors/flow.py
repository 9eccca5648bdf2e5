"""Rectified flow between data and noise: pure functions, noise and sigma are arguments (SD3, 2403.03206).

sigma is 0 for data and 1 for noise: noisy = (1 - sigma) latents + sigma noise, and velocity = noise -
latents, so that d noisy / d sigma = velocity. The network's timestep is 1000 sigma. Step-Video's opposite
sign lives in weights.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(B, ...), (B, ...), (B,) -> (B, ...); a scalar sigma noises one clip without the batch axis."""
    sigmas = sigmas.reshape(-1, *[1] * (latents.ndim - 1)) if sigmas.ndim else sigmas
    return (1 - sigmas) * latents + sigmas * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: the derivative of the noisy latents by sigma."""
    return noise - latents


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Moves sigmas toward noise for larger pictures (SD3 Eq. 23); 0 and 1 stay, shift 1 changes nothing."""
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a number above 0, found {shift}")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(num: int, generator: torch.Generator, *, shift: float = 1.0) -> Tensor:
    """Training sigmas (num,): logit-normal (SD3 section 3.1), then shifted."""
    return shift_sigmas(torch.randn(num, generator=generator).sigmoid(), shift)


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """The num_steps + 1 sigmas of a sampling run, from 1 (noise) to 0 (data); shifted once."""
    if num_steps < 1:
        raise ValueError(f"sampling needs at least one step, found num_steps={num_steps}")
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def flow_losses(
    prediction: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    cond_mask: Tensor | Sequence[Tensor],
) -> Tensor:
    """Mean squared error of each clip's frames to be generated (B,), in float32.

    (B, F, C, H, W), (B, F, C, H, W), (B, F), or lists of clips of different sizes. Given frames (mask 1) do
    not count, and a clip's loss does not grow with its size or with how many frames were given.
    """
    losses = []
    for clip_prediction, clip_target, clip_mask in zip(prediction, target, cond_mask, strict=True):
        generated = clip_mask == 0
        if not generated.any():
            raise ValueError(f"a clip of {len(clip_mask)} frames has none to generate: the loss is undefined")
        error = (clip_prediction.float() - clip_target.float()).square().flatten(1).mean(1)  # (F,)
        losses.append(error[generated].mean())
    return torch.stack(losses)
