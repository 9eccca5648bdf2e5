"""The loss on clips that are never trained on, by noise level and by which frames are given.

Clips, sigmas, masks and noise are fixed by the clips' keys: the same in every run on these clips, on any
number of ranks. So these losses can be compared from step to step, as those of training cannot: each step
meets other clips at other noise levels.
"""

import logging
from dataclasses import dataclass, field
from itertools import product
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from storyanchors.caption_cache import embedding_to
from storyanchors.clip import frames_to_tensor
from storyanchors.conditioning import ClipConditions, MaskPolicy, sample_cond_mask
from storyanchors.embedders import CaptionEmbedding
from storyanchors.flow import shift_sigmas
from storyanchors.sequence_parallel import whole_sequences
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import BrokenSample, ClipReader, caption_texts
from train.clips.loader import ClipBatch
from train.processes.agree import from_first, gather
from train.settings import at_least
from train.stable_hash import stable_hash
from train.stage import draw_noise
from train.story_module import StoryModule, story_losses
from train.watching.callbacks import MetricsLog

log = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 32768  # of several cases together; no gradients are kept, so that is little memory


@dataclass
class HeldOutConfig:
    every_n_steps: int = 500  # 0 = no held-out loss
    num_clips: int = 16  # of the held-out ones, evenly spread over the index
    quantiles: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])  # of training's sigmas

    def __post_init__(self):
        at_least(0, self, "held_out.", "every_n_steps")
        at_least(1, self, "held_out.", "num_clips")
        if not self.quantiles or not all(0 < quantile < 1 for quantile in self.quantiles):
            raise ValueError(f"held_out.quantiles are {self.quantiles}, expected numbers between 0 and 1")


class HeldOutClip(NamedTuple):
    key: str
    latents: Tensor  # (F, C, H, W) on the CPU
    caption: CaptionEmbedding
    conditions: ClipConditions


class Case(NamedTuple):
    """One clip at one noise level with one choice of given frames."""

    row: int  # of the held-out clips
    quantile: float
    policy: MaskPolicy


class HeldOutLoss(Callback):
    """Every n steps, and at the last, with the averaged weights; the ranks share the forwards evenly.

    Under ZeRO-3 a forward is a collective: a rank without a case left computes one that does not count.
    """

    def __init__(self, config: HeldOutConfig, clips: ClipIndex, metrics: MetricsLog):
        self.config = config
        self.clips = clips
        self.metrics = metrics
        self.reader = ClipReader()
        self.encoded: dict[int, HeldOutClip] = {}  # those that this rank has met
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.last_step = trainer.global_step
        rows = from_first(self._readable_rows() if trainer.is_global_zero else [])
        policies = [policy for policy in module.stage.mask_policies if policy.weight > 0]
        self.cases = [Case(*case) for case in product(rows, self.config.quantiles, policies)]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        if self.cases and (step % self.config.every_n_steps == 0 or step == trainer.max_steps):
            with self.metrics.aside("held-out loss", step):
                self.metrics.add(summarize(self.cases, self.measure(trainer, module)))

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: StoryModule) -> list[float]:
        """The loss of every case, on all ranks; packs are the same on any number of ranks."""
        stride = module.codec.spatial_stride * module.dit.config.patch_size[-1]
        tokens = self.clips.num_tokens(stride)
        packs = pack_in_order([int(tokens[case.row]) for case in self.cases], TOKENS_PER_FORWARD)
        own = packs[trainer.global_rank :: trainer.world_size]
        num_rounds = -(-len(packs) // trainer.world_size)
        found = {}
        with module.ema.swapped_in(), whole_sequences(module.dit):
            for pack in own + packs[:1] * (num_rounds - len(own)):
                with trainer.precision_plugin.forward_context():
                    losses = self._losses(module, [self.cases[number] for number in pack])
                found |= dict(zip(pack, losses.tolist(), strict=True))
        merged = {number: loss for part in reversed(gather(found)) for number, loss in part.items()}
        return [merged[number] for number in range(len(self.cases))]

    def _losses(self, module: StoryModule, cases: list[Case]) -> Tensor:
        """(B,)"""
        clips = [self._clip(module, case.row) for case in cases]
        latents = [clip.latents.to(module.device) for clip in clips]
        captions = [embedding_to(clip.caption, module.device) for clip in clips]
        sigmas = torch.tensor([NormalDist().inv_cdf(case.quantile) for case in cases]).sigmoid()
        sigmas = shift_sigmas(sigmas, module.sigma_shift).to(module.device)  # (B,)
        masks = [_mask(clip, case.policy).to(module.device) for clip, case in zip(clips, cases, strict=True)]
        seeds = [stable_hash("held-out noise", c.key, case.quantile) for c, case in zip(clips, cases)]
        noise = [draw_noise(*clip) for clip in zip(latents, seeds, strict=True)]
        conditions = [clip.conditions for clip in clips]
        return story_losses(module.dit, latents, noise, sigmas, masks, conditions, captions)

    def _clip(self, module: StoryModule, number: int) -> HeldOutClip:
        if number not in self.encoded:
            row = self.clips.row(number)
            text = caption_texts(self.reader.caption(row))[module.stage.caption]
            with torch.autocast(module.device.type, enabled=False):
                frames = frames_to_tensor(self.reader.frames(row)).to(module.device)
                latents = module.codec.encode(frames).float().cpu()
                caption = embedding_to(module.embed(row.key, text), torch.device("cpu"))
            self.encoded[number] = HeldOutClip(row.key, latents, caption, row.conditions)
        return self.encoded[number]

    def _readable_rows(self) -> list[int]:
        """Evenly spread over the held-out clips; a broken one is left out."""
        rows = []
        count = min(self.config.num_clips, len(self.clips))
        for number in (place * len(self.clips) // count for place in range(count)):
            row = self.clips.row(number)
            try:
                self.reader.frames(row)
                self.reader.caption(row)
                rows.append(number)
            except BrokenSample as error:
                log.warning("left out of the held-out loss: %s", error)
        return rows


def pack_in_order(tokens: list[int], max_tokens: int) -> list[list[int]]:
    """Numbers of neighbours that have no more tokens together; a larger one is alone."""
    packs, room = [], 0
    for number, size in enumerate(tokens):
        if size > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(number)
        room -= size
    return packs


def summarize(cases: list[Case], losses: list[float]) -> dict[str, float]:
    """Means by noise level and by mask; over all of them the masks weigh what they weigh in training."""
    found = list(zip(cases, losses, strict=True))
    weights = [case.policy.weight for case in cases]
    numbers = {"held_out/loss": fmean(losses, weights)}
    for quantile in dict.fromkeys(case.quantile for case in cases):
        at = [(loss, case.policy.weight) for case, loss in found if case.quantile == quantile]
        numbers[f"held_out/quantile_{quantile:g}"] = fmean(*zip(*at))
    for name in dict.fromkeys(_label(case.policy) for case in cases):
        numbers[f"held_out/mask_{name}"] = fmean(loss for case, loss in found if _label(case.policy) == name)
    return numbers


def _label(policy: MaskPolicy) -> str:
    return policy.name if policy.k is None else f"{policy.name}_{policy.k}"


def _mask(clip: HeldOutClip, policy: MaskPolicy) -> Tensor:
    """The clip's cond_mask (F,) of this policy."""
    seed = stable_hash("held-out mask", clip.key, policy.name, policy.k, policy.p)
    generator = torch.Generator().manual_seed(seed)
    return sample_cond_mask([policy], len(clip.latents), generator)
