"""Samplers: from noise to latents along the velocity a network predicts. One signature for all of them.

sampler(denoise, noise, sigmas, callback) -> latents, where denoise(latents, sigma) -> velocity has the shape
of latents and sigmas run from 1 (noise) to 0 (data), as `flow.sampling_sigmas` makes them. Samplers treat
every number alone, so clips of different shape are sampled as one flat tensor that denoise splits.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (latents, sigma as a scalar tensor) -> velocity
Callback = Callable[[int, Tensor], None]  # (steps done, the present guess of the clean latents) -> None


def euler(denoise: Denoise, noise: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """First order: one straight line per step."""
    latents = noise
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        velocity = denoise(latents, sigma)
        if callback:
            callback(step, latents - sigma * velocity)
        latents = latents + (next_sigma - sigma) * velocity
    return latents


def unipc(denoise: Denoise, noise: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """UniPC of order 2 (arXiv 2302.04867), the solver Wan is published with, through diffusers' scheduler.

    The scheduler would shift sigmas again and look steps up by rounded timesteps; it is given ours instead.
    """
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(sigmas=sigmas[:-1].double().cpu().numpy())
    scheduler.sigmas = sigmas.float().cpu().clamp(max=1 - 1e-6)  # log(1 - sigma) must be finite
    scheduler.set_begin_index(0)
    latents = noise
    for step, (sigma, timestep) in enumerate(zip(sigmas, scheduler.timesteps, strict=False), start=1):
        velocity = denoise(latents, sigma)
        if callback:
            callback(step, latents - sigma * velocity)
        # the scheduler needs two axes, a flat tensor has one
        latents = scheduler.step(velocity[None], timestep, latents[None]).prev_sample[0]
    return latents


SAMPLERS = {"euler": euler, "unipc": unipc}


def guided(
    conditional: Denoise,
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598) as a denoise function.

    both(latents, sigma) -> (velocity with the caption, velocity without it), from one packed forward. It is
    called only where it counts: at the sigmas of the interval, ends included (arXiv 2404.07724), unless scale
    is 1. Elsewhere the conditional velocity is the answer.
    """

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        if not acts_at(sigma, scale, interval):
            return conditional(latents, sigma)
        with_caption, without = both(latents, sigma)
        return torch.lerp(without, with_caption, scale)

    return denoise


def acts_at(sigma: Tensor | float, scale: float, interval: tuple[float, float]) -> bool:
    """Whether guidance changes the velocity at this sigma."""
    low, high = interval
    return scale != 1 and low <= float(sigma) <= high
