"""The training step of the story frame model, as a LightningModule that holds only the StoryDiT.

Legend: B clips of this rank, F story frames, C latent channels, H W latent size, L caption tokens.
"""

import logging

import lightning as L
import torch
from torch import Tensor

from conf.command import Unhealthy
from storyanchors.caption_cache import embedding_to
from storyanchors.caption_encoder import fit_caption
from storyanchors.clip import levels_to_pixels
from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT
from storyanchors.embedders import CaptionEmbedding
from storyanchors.flops import ClipSize
from storyanchors.flow import add_noise, flow_losses, velocity
from train.clips.clip_reader import LoadedClip
from train.clips.loader import ClipBatch
from train.ema import Ema, EmaConfig
from train.optimizer import OptimizerConfig, build_optimizer, lr_share, set_learning_rates
from train.parts import CaptionEncoder, Codec
from train.processes.data_ranks import sequence_group
from train.processes.strategies import ZeroStrategy
from train.processes.trained_state import TrainedState
from train.stage import ClipDraw, StageConfig, draw_clip, draw_noise

log = logging.getLogger(__name__)


class NonFiniteGradients(Unhealthy):
    """Gradients, or the weights and the average that they have made, are not finite."""


def story_losses(
    dit: StoryDiT,
    latents: list[Tensor],
    noise: list[Tensor],
    sigmas: Tensor,
    cond_masks: list[Tensor],
    conditions: list[ClipConditions],
    captions: list[CaptionEmbedding],
) -> Tensor:
    """The loss of each clip (B,): B x (F, C, H, W) latents and noise, sigmas (B,), B x (F,) masks."""
    noisy = [add_noise(*clip) for clip in zip(latents, noise, sigmas, strict=True)]
    inputs = [stack_condition_channels(*clip) for clip in zip(noisy, latents, cond_masks, strict=True)]
    prediction = dit(inputs, 1000 * sigmas, conditions, captions)
    target = [velocity(*clip) for clip in zip(latents, noise, strict=True)]
    return flow_losses(prediction, target, cond_masks)


class StoryModule(L.LightningModule):
    """codec, caption_encoder and ema are plain objects: the optimizer and the strategy never see them."""

    trained: TrainedState  # from set_up_state on
    ema: Ema

    def __init__(
        self,
        dit: StoryDiT,
        codec: Codec,
        caption_encoder: CaptionEncoder,
        *,
        stage: StageConfig,
        optimizer: OptimizerConfig,
        ema: EmaConfig,
        sigma_shift: float,
        seed: int,
        sequence_parallel: int = 1,
    ):
        super().__init__()
        self.dit = dit
        self.codec = codec
        self.caption_encoder = caption_encoder
        self.stage = stage
        self.optimizer_config = optimizer
        self.ema_config = ema
        self.sigma_shift = sigma_shift
        self.seed = seed
        self.sequence_parallel = sequence_parallel  # ranks that get the same packs and share their tokens
        self.position = 0  # in the data plan, counted in clips
        self.skipped_in_a_row = 0
        self.num_skipped = 0
        self.grad_norm = torch.zeros(())
        self.batch_keys: list[str] = []
        self.clip_losses = torch.zeros(0)  # (B,) of the last pack, and what its clips cost
        self.clip_sizes: list[ClipSize] = []
        self.cut_captions: set[int] = set()  # hashes of those that a warning has named

    def set_up_state(self, optimizer: torch.optim.Optimizer) -> None:
        """What is trained, and its average; called once the strategy has set up network and optimizer."""
        self.trained = TrainedState.of(self.dit, optimizer)
        self.ema = Ema(self.trained, self.ema_config.decay)

    def setup(self, stage: str) -> None:
        """The processes have found each other, and the network is not wrapped yet."""
        if self.sequence_parallel > 1:
            self.dit.set_sequence_parallel(sequence_group(self.sequence_parallel))
            log.info("the tokens of every clip are split over %d ranks", self.sequence_parallel)

    def on_fit_start(self) -> None:
        self.codec.to(self.device, torch.float32)
        # Wan runs its text encoder in bfloat16
        self.caption_encoder.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def transfer_batch_to_device(
        self, batch: ClipBatch, device: torch.device, dataloader_idx: int
    ) -> ClipBatch:
        return batch  # the step moves what it needs

    def on_train_batch_start(self, batch: ClipBatch, batch_idx: int) -> None:
        self.position = batch.next_position
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.batch_keys = []
        self.batch_keys += [clip.key for clip in batch.clips]

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        draws = [self.draw(clip) for clip in batch.clips]
        sigmas = torch.stack([draw.sigma for draw in draws]).to(self.device)  # (B,)
        cond_masks = [draw.cond_mask.to(self.device) for draw in draws]  # B x (F,)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            frames = [levels_to_pixels(clip.frames.to(self.device)) for clip in batch.clips]
            latents = [self.codec.encode(clip).float() for clip in frames]  # B x (F, C, H, W)
            captions = [  # B x (L, text_dim)
                self.embed(clip.key, draw.caption) for clip, draw in zip(batch.clips, draws, strict=True)
            ]
        noise = [draw_noise(clip, draw.noise_seed) for clip, draw in zip(latents, draws, strict=True)]
        conditions = [draw.conditions for draw in draws]
        losses = story_losses(self.dit, latents, noise, sigmas, cond_masks, conditions, captions)
        self.clip_losses = losses.detach()
        self.clip_sizes = [ClipSize.of(*clip) for clip in zip(latents, captions, strict=True)]
        # every clip weighs 1 / num_global_clips, however the ranks share them; strategies average over ranks,
        # and the ranks of a sequence_parallel group hold the same clips
        micro_steps = self.trainer.accumulate_grad_batches  # Lightning divides by them
        num_data_ranks = self.trainer.world_size // self.sequence_parallel
        return losses.sum() * (num_data_ranks * micro_steps / batch.num_global_clips)

    def embed(self, key: str, caption: str) -> CaptionEmbedding:
        """The embedding of a clip's caption; what a caption that is too long loses is said once per clip."""
        try:
            fitted = fit_caption(caption, self.caption_encoder)
            [embedding] = self.caption_encoder.encode([fitted.text])
        except ValueError as error:
            raise ValueError(f"clip {key}: {error}") from error
        if fitted.dropped and hash((key, caption)) not in self.cut_captions:
            self.cut_captions.add(hash((key, caption)))
            log.warning("clip %s: %s", key, fitted.loss)
        return embedding_to(embedding, self.device)

    def draw(self, clip: LoadedClip) -> ClipDraw:
        return draw_clip(
            self.stage,
            seed=self.seed,
            epoch=clip.epoch,
            key=clip.key,
            captions=clip.captions,
            conditions=clip.conditions,
            num_frames=clip.conditions.num_frames,
            sigma_shift=self.sigma_shift,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.dit, self.optimizer_config, self.stage.lr_scale)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm) -> None:
        """Clips, and drops gradients that are not finite: weights and moments then stay as they are.

        Not called under ZeRO, where DeepSpeed does both.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.dit.parameters(), self.optimizer_config.clip_norm)
        if not torch.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
        self.judge_gradients(norm)

    def judge_gradients(self, norm: Tensor) -> None:
        """Counts steps that were skipped; NonFiniteGradients after too many of them in a row.

        norm is of all ranks' gradients together, so that all ranks decide alike.
        """
        self.grad_norm = norm
        if torch.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.num_skipped += 1
        keys = ", ".join(self.batch_keys)
        found = f"gradient norm {norm.item()} at step {self.global_step}, this rank's clips {keys}"
        if self.skipped_in_a_row > self.optimizer_config.max_skipped:
            raise NonFiniteGradients(
                f"{self.skipped_in_a_row} steps in a row without a finite gradient (optimizer.max_skipped="
                f"{self.optimizer_config.max_skipped}); the last: {found}"
            )
        log.warning("step skipped: %s", found)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        set_learning_rates(optimizer, lr_share(self.global_step, self.stage.steps, self.optimizer_config))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:  # ZeRO is called for every micro-step
            return
        if isinstance(self.trainer.strategy, ZeroStrategy):
            self.judge_gradients(self.trainer.strategy.last_norm())
        if self.skipped_in_a_row == 0:
            self.ema.update()
