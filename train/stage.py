"""What a training stage is, and what it draws for a clip: caption, conditions, mask, sigma and noise.

Every draw comes from generators keyed by (seed, stage, epoch, clip), never from the global one, so that a
resumed run draws the same numbers again, on any number of ranks and workers.
"""

from dataclasses import dataclass, field, replace

import torch
from omegaconf import MISSING
from torch import Tensor

from storyanchors.conditioning import ClipConditions, MaskPolicy, sample_cond_mask
from storyanchors.flow import sample_sigmas
from train.settings import at_least
from train.stable_hash import stable_hash

CAPTION_KINDS = ("global", "multi_event")
DENSE_BELOW = 24  # source frames between two frames: clips closer than that show one motion, not a story


@dataclass
class StageConfig:
    """One of the progressive stages (paper 2.3)."""

    name: str = MISSING
    caption: str = MISSING  # global | multi_event
    other_caption_share: float = 0.0  # how often the other kind is shown instead, where a clip has it
    mask_policies: list[MaskPolicy] = field(default_factory=list)
    dense_mask_policies: list[MaskPolicy] = field(default_factory=list)  # frame_interval < 24; [] = the same
    caption_dropout: float = 0.1  # how often the text is empty, for classifier-free guidance
    conditions_dropout: float = 0.1  # how often each clip condition is unknown
    steps: int = MISSING
    lr_scale: float = 1.0  # times the model's learning rate

    def __post_init__(self):
        if self.caption not in (*CAPTION_KINDS, MISSING):
            raise ValueError(f"stage.caption is {self.caption!r}, expected {' or '.join(CAPTION_KINDS)}")
        if self.steps != MISSING:
            at_least(1, self, "stage.", "steps")
        at_least(0, self, "stage.", "lr_scale")
        if self.name != MISSING and not any(policy.weight > 0 for policy in self.mask_policies):
            raise ValueError(
                f"stage.mask_policies is {self.mask_policies}, expected a policy of weight above 0: "
                "[{name: none}] gives no frame"
            )
        for name in ("other_caption_share", "caption_dropout", "conditions_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"stage.{name} is {getattr(self, name)}, expected a share between 0 and 1")

    @property
    def gives_frames(self) -> bool:
        return any(policy.name != "none" and policy.weight > 0 for policy in self.mask_policies)


@dataclass(frozen=True)
class ClipDraw:
    """What chance decides about one clip in one epoch."""

    caption: str
    conditions: ClipConditions
    cond_mask: Tensor  # (F,)
    sigma: Tensor  # ()
    noise_seed: int


def draw_clip(
    stage: StageConfig,
    *,
    seed: int,
    epoch: int,
    key: str,
    captions: dict[str, str],
    conditions: ClipConditions,
    num_frames: int,
    sigma_shift: float,
) -> ClipDraw:
    """captions holds the clip's text of each kind that it has, at least the stage's own."""
    generator = torch.Generator().manual_seed(stable_hash("draw", seed, stage.name, epoch, key))
    chances = torch.rand(2 + 5, generator=generator).tolist()
    kind = stage.caption
    if chances[0] < stage.other_caption_share:
        other = CAPTION_KINDS[1 - CAPTION_KINDS.index(kind)]
        kind = other if other in captions else kind
    return ClipDraw(
        caption="" if chances[1] < stage.caption_dropout else captions[kind],
        conditions=_drop_conditions(
            conditions, [chance < stage.conditions_dropout for chance in chances[2:]]
        ),
        cond_mask=sample_cond_mask(_mask_policies(stage, conditions), num_frames, generator),
        sigma=sample_sigmas(1, generator, shift=sigma_shift)[0],
        noise_seed=stable_hash("noise", seed, stage.name, epoch, key),
    )


def _mask_policies(stage: StageConfig, conditions: ClipConditions) -> list[MaskPolicy]:
    is_dense = conditions.frame_interval is not None and conditions.frame_interval < DENSE_BELOW
    return stage.dense_mask_policies if is_dense and stage.dense_mask_policies else stage.mask_policies


def draw_noise(latents: Tensor, seed: int) -> Tensor:
    """Noise in the form of one clip's latents, drawn on their own device."""
    generator = torch.Generator(latents.device).manual_seed(seed)
    return torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)


def _drop_conditions(conditions: ClipConditions, drop: list[bool]) -> ClipConditions:
    names = [("fps",), ("frame_interval",), ("motion",), ("height", "width"), ("num_frames",)]
    unknown = {name: None for dropped, group in zip(drop, names, strict=True) if dropped for name in group}
    return replace(conditions, **unknown)
