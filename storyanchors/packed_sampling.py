"""Clips of any lengths and sizes through one sampler: their noise, what is given of them, the network.

Legend: F story frames, C latent channels, h w latent size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from storyanchors.block_cache import block_cache
from storyanchors.clip import frames_to_tensor
from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT
from storyanchors.embedders import CaptionEmbedding
from storyanchors.flow import sampling_sigmas
from storyanchors.sampling import SAMPLERS, acts_at, guided
from storyanchors.story_request import SamplerSettings, StoryRequest

OnStep = Callable[[int, list[Tensor]], None]  # (steps done, the clips' guesses of their clean latents)


@dataclass(frozen=True)
class NoisyClip:
    """What the sampler needs of one request."""

    noise: Tensor  # (F, C, h, w)
    cond_latents: Tensor  # (F, C, h, w)
    cond_mask: Tensor  # (F,), 1 = given
    conditions: ClipConditions


def noisy_clip(request: StoryRequest, codec, device: torch.device) -> NoisyClip:
    """The noise of a request whose sizes are filled in, drawn from its seed, and its given frames encoded."""
    size = (request.height // codec.spatial_stride, request.width // codec.spatial_stride)
    shape = (request.num_frames, codec.latent_channels, *size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)).to(device)
    cond_latents, cond_mask = torch.zeros_like(noise), torch.zeros(request.num_frames, device=device)
    if request.given:
        rows = torch.tensor(list(request.given), device=device) - 1
        pixels = frames_to_tensor(list(request.given.values())).to(device)
        cond_latents[rows] = codec.encode(pixels).to(noise.dtype)
        cond_mask[rows] = 1
    return NoisyClip(noise, cond_latents, cond_mask, request.conditions)


def needs_guidance(settings: SamplerSettings) -> bool:
    """Whether guidance acts at any step, so that the negative prompt is read. No setting may be None."""
    sigmas = sampling_sigmas(settings.num_steps, settings.shift)[:-1]
    return any(acts_at(sigma, settings.guidance_scale, settings.guidance_interval) for sigma in sigmas)


def sample_clips(
    dit: StoryDiT,
    clips: list[NoisyClip],
    captions: list[CaptionEmbedding],
    negative: CaptionEmbedding | None,
    settings: SamplerSettings,
    on_step: OnStep,
) -> list[Tensor]:
    """Latents (F, C, h, w) of every clip, in one packed forward per step, which guidance makes twice as long.

    captions are the clips' embeddings and negative that of the negative prompt, None where guidance does not
    act. All clips are one flat tensor to the sampler.
    """
    captions = [*captions, *([negative] * len(clips) if negative is not None else [])]
    shapes = [clip.noise.shape for clip in clips]

    def unpack(latents: Tensor) -> list[Tensor]:
        parts = latents.split([shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(latents: Tensor, sigma: Tensor, times: int = 1) -> Tensor:
        """Velocities with the clips' captions; with times=2 those with the negative one come behind them."""
        inputs = times * [
            stack_condition_channels(noisy, clip.cond_latents, clip.cond_mask)
            for noisy, clip in zip(unpack(latents), clips, strict=True)
        ]
        timesteps = (1000 * sigma).to(latents.device, torch.float32).expand(len(inputs))
        conditions = times * [clip.conditions for clip in clips]
        velocity = dit(inputs, timesteps, conditions, captions[: len(inputs)])
        return torch.cat([clip_velocity.float().flatten() for clip_velocity in velocity])

    guidance = (settings.guidance_scale, settings.guidance_interval)
    denoise = guided(forward, lambda *args: forward(*args, times=2).chunk(2), *guidance)
    noise = torch.cat([clip.noise.flatten() for clip in clips])
    sigmas = sampling_sigmas(settings.num_steps, settings.shift)
    threshold = settings.cache_threshold
    with block_cache(dit, threshold) if threshold else nullcontext():
        run = SAMPLERS[settings.sampler]
        return unpack(run(denoise, noise, sigmas, lambda step, guess: on_step(step, unpack(guess))))
