"""What a run's config would need of the GPUs that it names: the data plan, memory, seconds, bytes."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from storyanchors.caption_encoder import WORDS
from storyanchors.flops import ClipSize, model_flops, train_flops
from train.clips.clip_costs import CAPTION_TOKENS, plan_clips
from train.clips.clip_index import ClipIndex
from train.costs.clip_mix import ClipMix, ClipMixConfig
from train.costs.memory_model import GIB, Layout, Memory, Network, training_memory
from train.costs.training_cost import (
    JPEG_BYTES_PER_PIXEL,
    SAVE_BYTES_PER_S,
    STOP_MARGIN_S,
    UMT5_FLOPS_PER_CAPTION,
    WAN_ENCODE_FLOPS_PER_PIXEL,
    PlannedWork,
    StepTime,
    checkpoint_bytes,
    step_time,
)
from train.parts import FITTED_CODEC, ModelConfig, spatial_stride
from train.run_config import RunStageConfig
from train.watching.hardware import peak_flops

SAMPLED_CLIPS = 200  # of a dataset, for the bytes of a mean one
GPU_GIB = {"h100": 79, "h200": 139, "a100": 79}  # what torch sees of an SXM module; the A100 of 80 GB


@dataclass
class EstimateConfig(RunStageConfig):
    # step-4b and step-30b leave these to the user; to count, any will do
    WHERE_MISSING: ClassVar = {"model.codec": "CODEC", "model.caption_encoder": "CAPTIONS"}

    run_dir: str = "unused"
    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"  # h100 | h200 | a100
    mfu: float = 0.40  # of the dense bfloat16 peak while a GPU computes: assumed
    mix: ClipMixConfig = field(default_factory=ClipMixConfig)  # without data.dataset

    def __post_init__(self):
        super().__post_init__()
        self.gpu = self.gpu.lower()
        if self.gpu not in GPU_GIB:
            raise ValueError(f"gpu is {self.gpu!r}, expected one of {', '.join(GPU_GIB)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}, expected above 0 and at most 1")
        if min(self.nodes, self.gpus_per_node) < 1:
            raise ValueError(
                f"nodes={self.nodes} gpus_per_node={self.gpus_per_node}, expected at least 1 of each"
            )
        if self.gpus_per_node % self.model.sequence_parallel:
            raise ValueError(
                f"model.sequence_parallel={self.model.sequence_parallel} does not divide the "
                f"{self.gpus_per_node} GPUs of a node"
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.model.sequence_parallel

    @property
    def layout(self) -> Layout:
        return Layout(
            strategy="ddp" if self.strategy == "auto" and self.world_size > 1 else self.strategy,
            world_size=self.world_size,
            offload=self.offload,
            sequence_parallel=self.model.sequence_parallel,
            is_bf16=self.trainer.get("precision") == "bf16-mixed",
            checkpointing=self.model.activation_checkpointing,
            accumulates=(self.data.packs_per_batch or self.data_ranks) > self.data_ranks,
            gpu_bytes=GPU_GIB[self.gpu] * GIB,
        )

    @property
    def has_dataset(self) -> bool:
        return bool(self.data.dataset or self.data.mix)

    def memory(self, pack_tokens: int) -> Memory:
        """Of one GPU with a largest pack of so many tokens."""
        network, text_encoder = Network.of(self.model), encodes_captions(self.model)
        return training_memory(network, self.model, self.layout, pack_tokens, text_encoder=text_encoder)


@dataclass(frozen=True)
class Clips:
    """What a run would train on."""

    index: ClipIndex | ClipMix
    number: int  # of the whole dataset: the plan needs no more than a part of a mix
    clip_bytes: float  # of a mean clip on disk

    @classmethod
    def of(cls, config: EstimateConfig) -> "Clips":
        if not config.has_dataset:
            index = ClipMix.draw(config.mix, config.model.preset, config.seed)
            return cls(index, config.mix.clips, JPEG_BYTES_PER_PIXEL * float(_pixels(index).mean()))
        index = ClipIndex.open(*config.data.datasets).with_caption(config.stage.caption)
        index, _ = index.split(config.data.holdout)
        some = np.linspace(0, len(index) - 1, min(len(index), SAMPLED_CLIPS)).astype(int)
        sizes = [sum(index.row(number).frame_sizes) for number in some]
        return cls(index, len(index), float(np.mean(sizes)) if sizes else 0.0)


@dataclass(frozen=True)
class Estimate:
    config: EstimateConfig
    clips: Clips
    memory: Memory
    work: PlannedWork
    step: StepTime
    longest_clip: int  # tokens

    @classmethod
    def of(cls, config: EstimateConfig, clips: Clips | None = None) -> "Estimate":
        """clips: those of the config, where they were read before. ValueError where run_stage refuses."""
        clips, data_ranks = clips or Clips.of(config), config.data_ranks
        num_packs = config.data.packs_per_batch or data_ranks
        if num_packs % data_ranks:
            multiple = data_ranks * math.ceil(num_packs / data_ranks)
            raise ValueError(
                f"data.packs_per_batch={num_packs} cannot be shared by {data_ranks} data ranks: expected a "
                f"multiple, as {multiple}"
            )
        index, plan = plan_clips(
            clips.index,
            config.data,
            config.model.dit_config,
            spatial_stride=spatial_stride(config.model),
            packs_per_batch=num_packs,
            seed=config.seed,
            stage=config.stage.name,
        )
        work = PlannedWork.of(plan, data_ranks)
        step = step_time(
            work,
            Network.of(config.model),
            config.layout,
            train_factor=train_factor(config.model),
            frozen_flops=work.clips * _frozen_flops(config.model, float(_pixels(index).mean())),
            flops_per_s=config.mfu * peak_flops(config.gpu.upper()),
            gpus_per_node=config.gpus_per_node,
        )
        return cls(config, clips, config.memory(work.largest_pack), work, step, int(plan.tokens.max()))

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.config.layout.gpu_bytes

    @property
    def hours(self) -> float:
        return self.config.stage.steps * self.step.total / 3600

    @property
    def stop_seconds(self) -> int:
        """From the stop signal to the end of the job: the step that runs, a save, and a margin."""
        save = checkpoint_bytes(Network.of(self.config.model)) / SAVE_BYTES_PER_S
        return math.ceil(self.step.total + save + STOP_MARGIN_S)


def encodes_captions(model: ModelConfig) -> bool:
    """Whether a text encoder takes memory: not the tiny preset's, nor embeddings that were made before."""
    if model.caption_encoder == WORDS or model.preset.startswith("step-"):
        return False
    record = Path(model.caption_encoder) / "config.json"
    return not (
        record.is_file() and json.loads(record.read_text()).get("_class_name") == "PrecomputedCaptions"
    )


def train_factor(model: ModelConfig) -> float:
    """FLOPs of a training step over those of a forward: 3, less under a LoRA."""
    clip = [ClipSize(12, 60, 104, CAPTION_TOKENS)]
    is_lora = model.lora.rank is not None
    return train_flops(model.dit_config, clip, is_lora=is_lora) / model_flops(model.dit_config, clip)


def _frozen_flops(model: ModelConfig, pixels: float) -> float:
    """Of codec and text encoder for a clip of so many pixels."""
    codec = 0 if model.codec == FITTED_CODEC else WAN_ENCODE_FLOPS_PER_PIXEL * pixels
    return codec + (UMT5_FLOPS_PER_CAPTION if encodes_captions(model) else 0)


def _pixels(index: ClipIndex | ClipMix) -> np.ndarray:
    return index.numbers("num_frames") * index.numbers("height") * index.numbers("width")
