"""How story frames are conditioned: the 2c+1 input channels, which frames are given, and a clip's facts.

The mask's polarity is stated here and nowhere else: 1 = the frame is given, 0 = to be generated (paper 2.1).
Legend: B batch, F story frames, C latent channels, H W latent size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipConditions:
    """What is known about a clip (paper 2.1); None = unknown, for which the network learns a vector."""

    fps: float | None = None  # of the source video
    frame_interval: int | None = None  # source frames strictly between two story frames
    motion: float | None = None  # motion score of the clip, see docs/data_format.md
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_frames: int | None = None  # story frames in the clip

    def __post_init__(self):
        for name in ("fps", "height", "width", "num_frames"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0 or unknown (None), found {value!r}")
        for name in ("frame_interval", "motion"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0 on or unknown (None), found {value!r}")
        if (self.height is None) != (self.width is None):
            raise ValueError(
                f"height and width are known together or not at all, found {self.height}, {self.width}"
            )


def stack_condition_channels(noisy_latents: Tensor, cond_latents: Tensor, cond_mask: Tensor) -> Tensor:
    """[noisy C | condition C | mask 1]: (B, F, C, H, W), (B, F, C, H, W), (B, F) -> (B, F, 2C+1, H, W).

    cond_mask is 1 where a frame is given and 0 where it is to be generated; the condition channels of a frame
    to be generated are exact zeros, whatever cond_latents holds there. One clip without the batch axis works
    alike.
    """
    if noisy_latents.shape != cond_latents.shape:
        raise ValueError(
            f"noisy and condition latents differ: {tuple(noisy_latents.shape)}, {tuple(cond_latents.shape)}"
        )
    if cond_mask.shape != noisy_latents.shape[:-3]:
        raise ValueError(
            f"cond_mask has shape {tuple(cond_mask.shape)}, expected {tuple(noisy_latents.shape[:-3])}"
        )
    mask = cond_mask.to(noisy_latents.dtype)[..., None, None, None]  # (B, F, 1, 1, 1)
    # where, not a product: a NaN in an unused condition latent must not reach the network
    cond_latents = torch.where(mask > 0, cond_latents, torch.zeros_like(cond_latents))
    return torch.cat([noisy_latents, cond_latents, mask.expand_as(noisy_latents[..., :1, :, :])], dim=-3)


MASK_POLICIES = ("none", "first", "prefix", "suffix", "first_last", "random_subset", "all_but")


@dataclass
class MaskPolicy:
    """One way to choose the given frames of a training clip, with its share in a mixture.

    none: no frame is given. first: the first. prefix, suffix: the first or last k. first_last: both ends.
    random_subset: each frame with probability p. all_but: all but k. Without k, k is drawn from 1..F-1.
    """

    name: str = "none"
    weight: float = 1.0
    k: int | None = None
    p: float = 0.5

    def __post_init__(self):
        if self.name not in MASK_POLICIES:
            raise ValueError(f"unknown mask policy {self.name!r}, expected one of {', '.join(MASK_POLICIES)}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"weight of mask policy {self.name} must be a number from 0 on, found {self.weight}"
            )
        if self.k is not None and self.k < 1:
            raise ValueError(f"k of mask policy {self.name} must be at least 1, found {self.k}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p of mask policy {self.name} must lie between 0 and 1, found {self.p}")


def sample_cond_mask(policies: list[MaskPolicy], num_frames: int, generator: torch.Generator) -> Tensor:
    """Draws one clip's cond_mask (F,) from a weighted mixture; at least one frame is left to generate."""
    weights = torch.tensor([policy.weight for policy in policies], dtype=torch.float64)
    if not weights.sum() > 0:
        raise ValueError(f"a mask mixture needs a policy of weight above 0, found {policies}")
    policy = policies[int(torch.multinomial(weights, 1, generator=generator))]
    mask = torch.zeros(num_frames)
    if num_frames == 1 or policy.name == "none":
        return mask
    k = policy.k if policy.k is not None else int(torch.randint(1, num_frames, (), generator=generator))
    k = min(k, num_frames - 1)
    match policy.name:
        case "first":
            mask[0] = 1
        case "prefix":
            mask[:k] = 1
        case "suffix":
            mask[num_frames - k :] = 1
        case "first_last":
            mask[0] = 1
            mask[-1] = 0 if num_frames == 2 else 1
        case "all_but":
            mask[:] = 1
            mask[torch.randperm(num_frames, generator=generator)[:k]] = 0
        case "random_subset":
            mask = (torch.rand(num_frames, generator=generator) < policy.p).float()
            if mask.all():
                mask[int(torch.randint(num_frames, (), generator=generator))] = 0
    return mask
