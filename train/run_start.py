"""What a run starts with: the network with its first weights, the frozen parts, and where they come from."""

import logging
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from storyanchors.attention import describe_kernel
from storyanchors.dit import StoryDiT
from storyanchors.lora import add_lora
from storyanchors.weights import load_base_weights
from train.clips.clip_index import ClipIndex
from train.parts import (
    CODEC,
    FITTED_CODEC,
    build_dit,
    check_parts,
    fit_codec,
    open_caption_encoder,
    open_codec,
    save_own_parts,
    spatial_stride,
)
from train.run_config import RunStageConfig
from train.run_folder import (
    check_base,
    describe_base,
    plain_config,
    read_init_from,
    read_provenance,
    write_provenance,
)
from train.saving.checkpoints import load_trained_weights
from train.saving.naming_errors import naming_errors
from train.settings import naming
from train.story_module import StoryModule

log = logging.getLogger(__name__)


def build_module(config: RunStageConfig, clips: ClipIndex, *, is_new: bool) -> StoryModule:
    """The network and its frozen parts; a new run also saves those parts and where its weights come from."""
    run_dir = Path(config.run_dir)
    is_read = not is_new or config.init_from or config.model.base_weights
    is_first = rank_zero_only.rank == 0  # whose weights every strategy gives to the other ranks
    dit = build_dit(config.model, config.seed, unfilled=bool(is_read) or not is_first)
    handed_over = base = None
    if config.model.lora.rank is not None:  # also when a run goes on: its checkpoints hold the LoRA alone
        load_base(dit, config.model.base_weights)
        base = describe_base(dit, config.model.base_weights, config.model.lora)
        if not is_new:
            check_base(base, read_provenance(run_dir)["base"], run_dir)
        add_lora(dit, config.model.lora, seed=config.seed)
    elif is_first and is_new and config.model.base_weights and not config.init_from:
        load_base(dit, config.model.base_weights)
    if is_new and config.init_from:
        handed_over = read_init_from(config.init_from, plain_config(dit), config.model.preset, base)
        if is_first:
            load_trained_weights(dit, handed_over.read_weights())
    if is_new and not handed_over and config.model.codec == FITTED_CODEC:
        codec = fit_codec(config.model, clips, config.seed)
    else:
        codec = open_codec(config.model, handed_over.codec if handed_over else run_dir / CODEC)
    caption_encoder = open_caption_encoder(config.model)
    check_parts(dit, codec, caption_encoder)
    if codec.spatial_stride != (expected := spatial_stride(config.model)):
        raise ValueError(f"model.codec has latents of {codec.spatial_stride} pixels, expected {expected}")
    if is_new and is_first:
        with naming_errors(f"write the codec and the caption encoder to {run_dir}"):
            save_own_parts(config.model, run_dir, codec, caption_encoder)
        write_provenance(
            run_dir,
            stage=config.stage.name,
            preset=config.model.preset,
            frame_size=clips.common_frame_size(),
            handed_over=handed_over,
            base=base,
        )
    return StoryModule(
        dit,
        codec,
        caption_encoder,
        stage=config.stage,
        optimizer=config.optimizer,
        ema=config.ema,
        sigma_shift=config.model.sigma_shift,
        seed=config.seed,
        sequence_parallel=config.model.sequence_parallel,
    )


def load_base(dit: StoryDiT, base_weights: str) -> None:
    with naming("model.base_weights"):
        log.info("%s", load_base_weights(dit, base_weights))


def log_network(dit: StoryDiT, device: torch.device, dtype: torch.dtype) -> None:
    """How much of the network is trained, and what computes its attention."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in dit.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    kernel = describe_kernel(device, dtype, dit.config.attention_head_dim)
    log.info("%.2f M of %.2f M parameters are trained; attention: %s", trained / 1e6, total / 1e6, kernel)
