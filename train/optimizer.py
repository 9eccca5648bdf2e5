"""The optimizer, its parameter groups, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch import nn

SCHEDULES = ("cosine", "trapezoid")
NEW_PARTS = (
    "story_embedder.",
)  # names of what Wan does not have; the patch embedding's new columns share its tensor

BELOW = {  # the settings that must be at least 0, and what they must stay below
    "lr": math.inf, "new_parts_lr": math.inf, "weight_decay": math.inf, "warmup_steps": math.inf,
    "final_lr_scale": math.inf, "max_skipped": math.inf, "beta1": 1, "beta2": 1,
}  # fmt: skip


@dataclass
class OptimizerConfig:
    lr: float = MISSING  # peak
    new_parts_lr: float | None = None  # peak for the condition embedders; None = lr
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: str = "cosine"  # cosine | trapezoid: constant, then linear over the last decay_share
    decay_share: float = 0.2
    final_lr_scale: float = 0.05  # of the peak, at the last step
    clip_norm: float = 1.0
    max_skipped: int = 5  # steps in a row whose gradient is not finite, before the run stops

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}, expected {' or '.join(SCHEDULES)}")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"optimizer.clip_norm is {self.clip_norm}, expected a number above 0")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"optimizer.decay_share is {self.decay_share}, expected between 0 and 1")
        for name, below in BELOW.items():
            value = getattr(self, name)
            if value not in (None, MISSING) and not 0 <= value < below:  # also for NaN
                raise ValueError(f"optimizer.{name} is {value}, expected at least 0 and below {below}")


def parameter_groups(dit: nn.Module, config: OptimizerConfig, lr_scale: float) -> list[dict]:
    """Groups for AdamW: new parts apart, and no decay on norms, biases and tables."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in dit.named_parameters():
        if parameter.requires_grad:
            is_new = name.startswith(NEW_PARTS)
            decays = parameter.ndim > 1 and "scale_shift_table" not in name and "norm" not in name
            groups.setdefault((is_new, decays), []).append(parameter)
    new_lr = config.lr if config.new_parts_lr is None else config.new_parts_lr
    return [
        {
            "name": "new_parts" if is_new else "base",
            "params": parameters,
            "peak_lr": lr_scale * (new_lr if is_new else config.lr),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_new, decays), parameters in groups.items()
    ]


def build_optimizer(dit: nn.Module, config: OptimizerConfig, lr_scale: float) -> torch.optim.Optimizer:
    groups = parameter_groups(dit, config, lr_scale)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr * lr_scale, betas=betas, eps=1e-8, fused=True)


def lr_share(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The share of the peak learning rate at a step (0-based): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        fall = 0.5 * (1 - math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = max(1.0, config.decay_share * num_steps)
        fall = min(1.0, max(0.0, (step - num_steps + decay_steps) / decay_steps))
    return 1 - (1 - config.final_lr_scale) * fall


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
