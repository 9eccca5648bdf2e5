"""What of trainer.* and deepspeed.* a user may set; the rest would fight what run_stage sets by itself."""

import re
from typing import Any

import torch

PRECISIONS = ("32-true", "bf16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
TAKEN = (
    "accelerator", "devices", "num_nodes", "precision", "max_time", "deterministic", "benchmark", "profiler",
    "detect_anomaly", "enable_model_summary", "enable_progress_bar",
)  # fmt: skip
INSTEAD = {  # of keys that are not taken
    "max_steps": "stage.steps", "strategy": "strategy", "default_root_dir": "run_dir", "logger": "logger",
    "gradient_clip_val": "optimizer.clip_norm", "accumulate_grad_batches": "data.packs_per_batch",
    "log_every_n_steps": "log_every_n_steps", "enable_checkpointing": "checkpoint.every_n_steps",
    "fast_dev_run": "stage.steps", "limit_train_batches": "stage.steps", "overfit_batches": "stage.steps",
}  # fmt: skip
INSTEAD_OF_DEEPSPEEDS = {  # None = fixed
    "train_batch_size": "data.clips_per_batch", "train_micro_batch_size_per_gpu": "data.clips_per_batch",
    "gradient_accumulation_steps": "data.packs_per_batch", "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer.*", "scheduler": "optimizer.schedule", "fp16": "trainer.precision",
    "bf16": "trainer.precision", "bfloat16": "trainer.precision", "amp": "trainer.precision",
    "torch_autocast": "trainer.precision", "data_types": "trainer.precision",
    "zero_allow_untested_optimizer": None, "zero_force_ds_cpu_optimizer": None, "prescale_gradients": None,
    "gradient_predivide_factor": None, "sequence_parallel_size": "model.sequence_parallel",
}  # fmt: skip


def check_trainer(settings: dict[str, Any]) -> None:
    """ValueError for a key of trainer.* that is not passed on, and for a value that is none of its own."""
    for key in settings:
        if key not in TAKEN:
            hint = f"use {INSTEAD[key]}" if key in INSTEAD else f"expected one of {', '.join(TAKEN)}"
            raise ValueError(f"trainer.{key} is not passed on, since run_stage settles it: {hint}")
    for key, allowed in (("precision", PRECISIONS), ("accelerator", ACCELERATORS)):
        if settings.get(key, allowed[0]) not in allowed:
            raise ValueError(f"trainer.{key} is {settings[key]!r}, expected {' or '.join(allowed)}")
    _check_counts(settings)
    max_time = settings.get("max_time")
    is_time = isinstance(max_time, str) and re.fullmatch(r"\d+:\d\d:\d\d:\d\d", max_time)
    if max_time is not None and not (is_time and re.search("[1-9]", max_time)):
        raise ValueError(f"trainer.max_time is {max_time!r}, expected DD:HH:MM:SS, as 00:03:55:00, or null")


def _check_counts(settings: dict[str, Any]) -> None:
    num_nodes, devices = settings.get("num_nodes", 1), settings.get("devices", 1)
    if not _is_count(num_nodes):
        raise ValueError(f"trainer.num_nodes is {num_nodes!r}, expected at least 1")
    are_numbers = isinstance(devices, list) and devices and all(type(n) is int and n >= 0 for n in devices)
    if not (_is_count(devices) or are_numbers or devices == "auto"):
        raise ValueError(f"trainer.devices is {devices!r}, expected at least 1, auto or a list like [0,2]")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def check_deepspeed(strategy: str, *, offload: bool, deepspeed: dict[str, Any]) -> None:
    """ValueError for settings of ZeRO without it, and for those of DeepSpeed that other keys decide."""
    if (offload or deepspeed) and not strategy.startswith("zero"):
        given = "offload=true" if offload else f"deepspeed.{next(iter(deepspeed))}"
        raise ValueError(f"{given} is for strategy=zero1, zero2 or zero3, found strategy={strategy}")
    for key in deepspeed:
        if key in INSTEAD_OF_DEEPSPEEDS:
            instead = INSTEAD_OF_DEEPSPEEDS[key]
            raise ValueError(f"deepspeed.{key} is set by run_stage{f': use {instead}' if instead else ''}")
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"deepspeed.zero_optimization is {zero!r}, expected keys, such as overlap_comm")
    if "stage" in zero:
        raise ValueError("deepspeed.zero_optimization.stage is set by run_stage: use strategy")


def check_gpu(settings: dict[str, Any], strategy: str) -> None:
    """ValueError where a GPU is asked for and there is none."""
    accelerator = settings.get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        same = f" strategy={strategy}" if strategy.startswith("zero") else ""
        raise ValueError(
            f"trainer.accelerator={accelerator}, and there is no GPU here: cluster=cpu{same} tries it on the "
            "CPU"
        )
