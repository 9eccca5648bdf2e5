"""All settings of train/run_stage.py, which other commands read too."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from train.clips.data_config import DataConfig
from train.ema import EmaConfig
from train.optimizer import OptimizerConfig
from train.parts import ModelConfig
from train.processes.network_speed import PreflightConfig
from train.processes.strategies import STRATEGIES
from train.processes.trainer_settings import check_deepspeed, check_trainer
from train.saving.checkpoints import CheckpointConfig
from train.settings import above_zero, at_least
from train.stage import StageConfig
from train.watching.dashboards import DASHBOARDS
from train.watching.held_out_loss import HeldOutConfig
from train.watching.story_samples import SamplesConfig

LONGEST_TIMEOUT_S = 86400


@dataclass
class RunStageConfig:
    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    run_dir: str = MISSING
    init_from: str | None = None  # run, one of its checkpoints, or model folder to begin with
    resume: str = "auto"  # auto | never
    seed: int = 0
    logger: str = "none"  # none | tensorboard | wandb, besides metrics.jsonl
    log_every_n_steps: int = 10
    peak_tflops: float | None = None  # of one device, for MFU; None = by its name, where that is known
    strategy: str = "auto"  # auto | ddp | zero1 | zero2 | zero3
    offload: bool = False  # ZeRO's masters and moments in the host's memory
    collective_timeout_s: float = 600  # how long ranks wait for one that does not answer
    trainer: dict[str, Any] = field(default_factory=dict)  # verbatim to L.Trainer
    deepspeed: dict[str, Any] = field(default_factory=dict)  # over DeepSpeed's own settings
    preflight: PreflightConfig = field(default_factory=PreflightConfig)  # read by train/preflight.py
    plan_report: bool = False  # says what the plan makes of the clips, and ends
    dry_run: bool = False  # says who would train on what, and ends

    def __post_init__(self):
        if self.logger not in DASHBOARDS:
            raise ValueError(f"logger is {self.logger!r}, expected one of {', '.join(DASHBOARDS)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if self.strategy == "zero3" and self.model.compile:
            raise ValueError(
                f"model.compile={self.model.compile} does not go with strategy=zero3, which gathers weights "
                "between a block's operators: expected zero1 or zero2, or model.compile=null"
            )
        if not self.run_dir.strip():
            raise ValueError("run_dir is empty, expected a folder for this run")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected at least 0 and below 2^63")
        if not 0 < self.collective_timeout_s <= LONGEST_TIMEOUT_S:
            raise ValueError(
                f"collective_timeout_s is {self.collective_timeout_s}, expected above 0 and at most "
                f"{LONGEST_TIMEOUT_S}"
            )
        at_least(1, self, "", "log_every_n_steps")
        above_zero(self, "", "peak_tflops")
        check_trainer(self.trainer)
        check_deepspeed(self.strategy, offload=self.offload, deepspeed=self.deepspeed)
