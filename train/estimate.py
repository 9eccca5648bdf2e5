"""Prints what a run would need, before anything is launched: memory per GPU, steps, hours, storage.

python train/estimate.py stage=multi_event model=wan-14b cluster=zero3 nodes=8 data.dataset=DATASET
python -m train.estimate stage=multi_event model=wan-1.3b strategy=zero2 nodes=8 data.clips_per_batch=256
python -m train.estimate ... gpu=h200 mfu=0.35 mix.clips=500000 mix.frames=[8,16] mix.sizes=[480x832,720x1280]

It takes the words of run_stage, and nodes, gpus_per_node, gpu and mfu; without data.dataset a mix of clips
(mix.*). The share of the peak that a busy GPU reaches (mfu) is an assumption; everything else is counted.
"""

import json
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from conf.command import run
from storyanchors.caption_encoder import WORDS
from storyanchors.flops import ClipSize, model_flops, train_flops
from train.clips.clip_costs import CAPTION_TOKENS, plan_clips
from train.clips.clip_index import ClipIndex
from train.costs.clip_mix import ClipMix, ClipMixConfig
from train.costs.memory_model import GIB, Layout, Memory, Network, training_memory
from train.costs.training_cost import (
    JPEG_BYTES_PER_PIXEL,
    UMT5_FLOPS_PER_CAPTION,
    WAN_ENCODE_FLOPS_PER_PIXEL,
    PlannedWork,
    StepTime,
    checkpoint_bytes,
    step_time,
)
from train.parts import FITTED_CODEC, ModelConfig, spatial_stride
from train.run_stage import RunStageConfig
from train.watching.hardware import peak_flops

SAMPLED_CLIPS = 200  # of a dataset, for the bytes of a mean one
GPU_GIB = {"h100": 79, "h200": 139, "a100": 79}  # what torch sees of an SXM module; the A100 of 80 GB


@dataclass
class EstimateConfig(RunStageConfig):
    run_dir: str = ""
    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"  # h100 | h200 | a100
    mfu: float = 0.40  # of the dense bfloat16 peak while a GPU computes: assumed
    mix: ClipMixConfig = field(default_factory=ClipMixConfig)  # without data.dataset

    def __post_init__(self):
        super().__post_init__()
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
    def layout(self) -> Layout:
        world_size = self.nodes * self.gpus_per_node
        data_ranks = world_size // self.model.sequence_parallel
        return Layout(
            strategy="ddp" if self.strategy == "auto" and world_size > 1 else self.strategy,
            world_size=world_size,
            offload=self.offload,
            sequence_parallel=self.model.sequence_parallel,
            is_bf16=self.trainer.get("precision") == "bf16-mixed",
            checkpointing=self.model.activation_checkpointing,
            accumulates=(self.data.packs_per_batch or data_ranks) > data_ranks,
            gpu_bytes=GPU_GIB[self.gpu] * GIB,
        )


def main(config: EstimateConfig) -> None:
    estimate = Estimate.of(config)
    for line in (*estimate.lines(), *estimate.memory_lines(), *estimate.advice()):
        print(line)


@dataclass(frozen=True)
class Estimate:
    """What a config would need of the GPUs that it names."""

    config: EstimateConfig
    network: Network
    memory: Memory
    work: PlannedWork
    step: StepTime
    num_clips: int
    longest_clip: int  # tokens
    clip_bytes: float  # of a mean clip on disk

    @classmethod
    def of(cls, config: EstimateConfig) -> "Estimate":
        """ValueError where run_stage would refuse the data or the layout."""
        layout, network = config.layout, Network.of(config.model)
        clips, num_clips, clip_bytes = read_clips(config)
        data_ranks = layout.world_size // layout.sequence_parallel
        num_packs = config.data.packs_per_batch or data_ranks
        if num_packs % data_ranks:
            raise ValueError(f"data.packs_per_batch={num_packs} cannot be shared by {data_ranks} data ranks")
        clips, plan = plan_clips(
            clips,
            config.data,
            config.model.dit_config,
            spatial_stride=spatial_stride(config.model),
            packs_per_batch=num_packs,
            seed=config.seed,
            stage=config.stage.name,
        )
        work = PlannedWork.of(plan, data_ranks)
        text_encoder = encodes_captions(config.model)
        memory = training_memory(network, config.model, layout, work.largest_pack, text_encoder=text_encoder)
        pixels = (clips.numbers("num_frames") * clips.numbers("height") * clips.numbers("width")).mean()
        encoder_flops = UMT5_FLOPS_PER_CAPTION if text_encoder else 0
        codec_flops = 0 if config.model.codec == FITTED_CODEC else WAN_ENCODE_FLOPS_PER_PIXEL * pixels
        step = step_time(
            work,
            network,
            layout,
            train_factor=train_factor(config.model),
            frozen_flops=work.clips * (encoder_flops + codec_flops),
            flops_per_s=config.mfu * peak_flops(config.gpu.upper()),
            gpus_per_node=config.gpus_per_node,
        )
        clip_bytes = float(clip_bytes or JPEG_BYTES_PER_PIXEL * pixels)
        return cls(config, network, memory, work, step, num_clips, int(plan.tokens.max()), clip_bytes)

    @property
    def hours(self) -> float:
        return self.config.stage.steps * self.step.total / 3600

    def lines(self) -> list[str]:
        config, network, work, step = self.config, self.network, self.work, self.step
        world_size, steps = config.layout.world_size, config.stage.steps
        flops, seen = train_factor(config.model) * work.flops, steps * work.clips
        useful = flops / (world_size * step.total * peak_flops(config.gpu.upper()))
        checkpoint = checkpoint_bytes(network)
        kept = config.checkpoint.keep_last + 1 + steps // (config.checkpoint.keep_every_n_steps or steps + 1)
        rate = work.clips * self.clip_bytes / step.total
        source = "of the dataset" if has_dataset(config) else "of mix.*, there is no dataset"
        return [
            f"{config.model.preset}, stage {config.stage.name}, on {config.nodes} x {config.gpus_per_node} "
            f"{config.gpu.upper()}, {config.layout.strategy}: an estimate, not a measurement",
            f"parameters     {network.num_weights / 1e9:.3f} G, {network.num_trained / 1e9:.3f} G trained",
            f"clips          {self.num_clips} {source}, the longest has {self.longest_clip} tokens",
            f"step           {work.clips:.1f} clips, {work.tokens:.0f} tokens, {flops / 1e15:.2f} PFLOP; "
            f"{work.micro_steps} micro-steps, largest pack {work.largest_pack} tokens",
            f"seconds/step   {step.total:.2f}: network {step.network:.2f}, codec and text "
            f"{step.frozen_parts:.2f}, traffic {step.traffic:.2f}, jitter {step.jitter:.2f}",
            f"MFU            {config.mfu:.2f} while computing (assumed), {useful:.3f} in all; "
            f"balance of packs {step.balance:.3f}",
            f"stage          {steps} steps, {seen:.0f} clips ({seen / self.num_clips:.2f} epochs), "
            f"{self.hours:.1f} h, {self.hours * world_size:.0f} GPU-hours",
            f"storage        checkpoint {checkpoint / 1e9:.1f} GB, {kept} at a time: "
            f"{kept * checkpoint / 1e9:.0f} GB; dataset {self.num_clips * self.clip_bytes / 1e12:.2f} TB",
            f"reading        {rate / 1e6:.0f} MB/s in all, {rate / world_size / 1e6:.2f} MB/s a GPU",
        ]

    def memory_lines(self) -> list[str]:
        available, modes = self.config.layout.gpu_bytes, self.memory.block_modes
        kinds = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes))
        lines = [f"memory of a GPU at its worst moment (checkpointing of blocks: {kinds}):"]
        lines += [f"  {name:<29}{size / GIB:8.2f} GiB" for name, size in self.memory.parts.items()]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(f"  {'total':<29}{self.memory.total / GIB:8.2f} of {available / GIB:.0f} GiB: {verdict}")
        if self.memory.host:
            host = sum(self.memory.host.values()) * self.config.gpus_per_node / GIB
            lines.append(f"  {'in the memory of a host':<29}{host:8.2f} GiB ({', '.join(self.memory.host)})")
        return lines

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.config.layout.gpu_bytes

    def advice(self) -> list[str]:
        """The largest pack that fits, and where that is too little what each change would make of it."""
        now = self.most_tokens(self.config)
        lines = [f"largest pack that fits: {now} tokens (data.max_tokens)"]
        if now < self.longest_clip:
            lines += [
                f"  with {words:<52} {self.most_tokens(changed):>8}"
                for words, changed in _changes(self.config)
            ]
        return lines

    def most_tokens(self, config: EstimateConfig) -> int:
        """Of a pack that fits, in steps of 100; 0 where not even the rest does."""
        layout, text_encoder = config.layout, encodes_captions(config.model)
        fits = lambda hundreds: (  # noqa: E731
            training_memory(
                self.network, config.model, layout, 100 * hundreds, text_encoder=text_encoder
            ).total
            <= layout.gpu_bytes
        )
        return 100 * max(0, bisect_left(range(1, 100_000), True, key=lambda hundreds: not fits(hundreds)))


def _changes(config: EstimateConfig) -> list[tuple[str, EstimateConfig]]:
    """What may be changed where memory is too small, the cheapest first, and all of it together."""
    model, steps = config.model, []
    if model.activation_checkpointing in ("none", "selective"):
        steps.append(("model.activation_checkpointing=auto", "model", {"activation_checkpointing": "auto"}))
    if encodes_captions(model):
        words = "model.caption_encoder=FOLDER (precomputed embeddings)"
        steps.append((words, "model", {"caption_encoder": WORDS}))
    stage = config.layout.stage
    steps += [
        (f"strategy=zero{n}", None, {"strategy": f"zero{n}"})
        for n in (2, 3)
        if n > stage and config.layout.world_size > 1
    ]
    heads = model.dit_config.num_attention_heads
    steps += [
        (f"model.sequence_parallel={degree}", "model", {"sequence_parallel": degree})
        for degree in (2, 4, 8)
        if degree > model.sequence_parallel and not heads % degree and not config.gpus_per_node % degree
    ]
    if stage and not config.offload:
        steps.append(("offload=true", None, {"offload": True}))
    changes, together = [], config
    for words, section, values in steps:
        changes.append((words, _replaced(config, section, values)))
        together = _replaced(together, section, values)
    return [*changes, ("all of these, the last of a kind", together)]


def _replaced(config: EstimateConfig, section: str | None, values: dict) -> EstimateConfig:
    return replace(config, **({section: replace(getattr(config, section), **values)} if section else values))


def has_dataset(config: EstimateConfig) -> bool:
    return bool(config.data.dataset or config.data.mix)


def read_clips(config: EstimateConfig) -> tuple[ClipIndex | ClipMix, int, float | None]:
    """The clips to plan with, how many there are, and the bytes of a mean one where that is known."""
    if not has_dataset(config):
        return ClipMix.draw(config.mix, config.seed), config.mix.clips, None
    clips = ClipIndex.open(*config.data.datasets).with_caption(config.stage.caption)
    clips, _ = clips.split(config.data.holdout)
    some = np.linspace(0, len(clips) - 1, min(len(clips), SAMPLED_CLIPS)).astype(int)
    clip_bytes = (
        float(np.mean([sum(clips.row(number).frame_sizes) for number in some])) if len(some) else None
    )
    return clips, len(clips), clip_bytes


def encodes_captions(config: ModelConfig) -> bool:
    """Whether a text encoder takes memory: not the tiny preset's, nor embeddings that were made before."""
    if config.caption_encoder == WORDS or config.preset.startswith("step-"):
        return False
    record = Path(config.caption_encoder) / "config.json"
    return not (
        record.is_file() and json.loads(record.read_text()).get("_class_name") == "PrecomputedCaptions"
    )


def train_factor(config: ModelConfig) -> float:
    """FLOPs of a training step over those of a forward: 3, less under a LoRA."""
    clip = [ClipSize(12, 60, 104, CAPTION_TOKENS)]
    is_lora = config.lora.rank is not None
    return train_flops(config.dit_config, clip, is_lora=is_lora) / model_flops(config.dit_config, clip)


if __name__ == "__main__":
    run(main, EstimateConfig, "run_stage")
