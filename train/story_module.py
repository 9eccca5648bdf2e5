"""The training step of the story frame model, as a LightningModule that holds only the StoryDiT.

Legend: B clips of this rank, F story frames, C latent channels, H W latent size, L caption tokens.
"""

import logging

import lightning as L
import torch
from torch import Tensor

from storyanchors.caption_cache import embedding_to
from storyanchors.caption_encoder import fit_caption
from storyanchors.conditioning import stack_condition_channels
from storyanchors.dit import StoryDiT
from storyanchors.embedders import CaptionEmbedding
from storyanchors.flops import ClipSize
from storyanchors.flow import add_noise, flow_losses, velocity
from train.checkpoints import Checkpoint
from train.ema import Ema, EmaConfig
from train.loader import ClipBatch, LoadedClip
from train.optimizer import OptimizerConfig, build_optimizer, lr_share, set_learning_rates
from train.parts import CaptionEncoder, Codec
from train.stage import ClipDraw, StageConfig, draw_clip, draw_noise
from train.trained_state import TrainedState

log = logging.getLogger(__name__)


class NonFiniteGradients(ValueError):
    """The gradients of several steps in a row were not finite."""


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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Everything of a checkpoint but the optimizer's state."""
        state = checkpoint.state
        model, ema = checkpoint.weights("model"), checkpoint.weights("ema")
        names = [fragment.name for fragment in self.trained.fragments]
        weights = [model[name].view(-1) for name in names]
        self.trained.load(weights, self.trained.moments(), self.trained.num_updates)
        self.ema.load([ema[name].view(-1) for name in names], state.num_ema_updates)
        self.position = state.position
        self.skipped_in_a_row, self.num_skipped = state.skipped_in_a_row, state.num_skipped

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
        self.batch_keys = [clip.key for clip in batch.clips]

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        draws = [self.draw(clip) for clip in batch.clips]
        sigmas = torch.stack([draw.sigma for draw in draws]).to(self.device)  # (B,)
        cond_masks = [draw.cond_mask.to(self.device) for draw in draws]  # B x (F,)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            frames = [clip.frames.to(self.device) for clip in batch.clips]
            latents = [self.codec.encode(clip).float() for clip in frames]  # B x (F, C, H, W)
            captions = [  # B x (L, text_dim)
                self.embed(clip.key, draw.caption) for clip, draw in zip(batch.clips, draws, strict=True)
            ]
        noise = [draw_noise(clip, draw.noise_seed) for clip, draw in zip(latents, draws, strict=True)]
        noisy = [add_noise(*clip) for clip in zip(latents, noise, sigmas, strict=True)]
        inputs = [stack_condition_channels(*clip) for clip in zip(noisy, latents, cond_masks, strict=True)]
        prediction = self.dit(inputs, 1000 * sigmas, [draw.conditions for draw in draws], captions)
        target = [velocity(*clip) for clip in zip(latents, noise, strict=True)]
        losses = flow_losses(prediction, target, cond_masks)  # (B,)
        self.clip_losses = losses.detach()
        self.clip_sizes = [ClipSize.of(*clip) for clip in zip(latents, captions, strict=True)]
        # every clip weighs 1 / num_global_clips, however the ranks share them; DDP averages over ranks
        return losses.sum() * (self.trainer.world_size / batch.num_global_clips)

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
        """Clips, and drops gradients that are not finite: weights and moments then stay as they are."""
        self.grad_norm = torch.nn.utils.clip_grad_norm_(
            self.dit.parameters(), self.optimizer_config.clip_norm
        )
        if torch.isfinite(self.grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.num_skipped += 1
        keys = ", ".join(self.batch_keys)
        found = f"gradient norm {self.grad_norm.item()} at step {self.global_step}, clips {keys}"
        if self.skipped_in_a_row > self.optimizer_config.max_skipped:
            raise NonFiniteGradients(
                f"{self.skipped_in_a_row} steps in a row without a finite gradient (optimizer.max_skipped="
                f"{self.optimizer_config.max_skipped}); the last: {found}"
            )
        log.warning("step skipped: %s", found)
        optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        set_learning_rates(optimizer, lr_share(self.global_step, self.stage.steps, self.optimizer_config))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.skipped_in_a_row == 0:
            self.ema.update()
