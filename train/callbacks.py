"""What happens around the training step: metrics.jsonl and the progress bar."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from train.loader import ClipBatch
from train.run_folder import write_text
from train.story_module import StoryModule


class MetricsLog(Callback):
    """metrics.jsonl: a JSON line of means every n steps; a resumed run continues it without a step twice."""

    def __init__(self, run_dir: Path, every_n_steps: int):
        self.path = run_dir / "metrics.jsonl"
        self.every_n_steps = every_n_steps
        self.window = _Window()
        self.last_step = 0
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.last_step = trainer.global_step
        if trainer.is_global_zero and self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_text(
                self.path, "".join(line for line in lines if json.loads(line)["step"] <= self.last_step)
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, module: StoryModule, batch: ClipBatch, batch_idx: int
    ) -> None:
        self.window.batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        self.window.add(outputs["loss"].detach(), batch)
        step = trainer.global_step
        if step == self.last_step:  # a batch whose gradients are accumulated
            return
        self.last_step = step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.latest = {
                "train/loss": float(trainer.strategy.reduce(self.window.loss, reduce_op="mean")),
                "train/grad_norm": float(module.grad_norm),
                "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
                "train/clips_per_s": self.window.num_clips / self.window.seconds,
                "train/data_wait_share": self.window.wait_s / self.window.seconds,
                "train/skipped_steps": module.num_skipped,
            }
            self.write(trainer, self.latest)
            self.window = _Window()

    def write(self, trainer: L.Trainer, numbers: dict[str, float]) -> None:
        """Appends one line for the present step, here and in the run's other loggers."""
        if not trainer.is_global_zero:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": trainer.global_step, **numbers}) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def show(self, trainer: L.Trainer, name: str, picture: Image.Image) -> None:
        """Gives a picture of the present step to the run's other loggers."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [picture], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")


class _Window:
    """The batches since the last line; their losses stay on the device until the line is written."""

    def __init__(self):
        self.losses: list[Tensor] = []
        self.num_clips = 0
        self.wait_s = 0.0
        self.work_s = 0.0
        self.batch_started = 0.0

    def add(self, loss: Tensor, batch: ClipBatch) -> None:
        self.losses.append(loss)
        self.num_clips += batch.num_global_clips
        self.wait_s += batch.wait_s
        self.work_s += time.perf_counter() - self.batch_started

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).mean()

    @property
    def seconds(self) -> float:
        return self.wait_s + self.work_s


class StageProgress(ProgressBar):
    """One line: the stage, its steps, loss, clips/s and the share of time spent waiting for data."""

    def __init__(self, stage: str, metrics: MetricsLog):
        super().__init__()
        self.stage = stage
        self.metrics = metrics
        self.bar: tqdm | None = None
        self.enabled = True

    def disable(self) -> None:  # Lightning calls it on every rank but the first
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=self.stage,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs fewer lines
            disable=not self.enabled,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        if latest := self.metrics.latest:
            self.bar.set_postfix_str(
                f"loss {latest['train/loss']:.4f}, {latest['train/clips_per_s']:.1f} clips/s, "
                f"data wait {latest['train/data_wait_share']:.1%}",
                refresh=False,
            )
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.bar.close()
