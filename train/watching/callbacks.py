"""What is measured around the training step: metrics.jsonl, which is the truth, and the progress bar."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from storyanchors.dit_config import StoryDiTConfig
from storyanchors.flops import num_tokens, train_flops
from storyanchors.lora import has_lora
from train.clips.loader import ClipBatch
from train.processes.agree import gather
from train.processes.heartbeat import Heartbeat
from train.run_folder import plain_config, write_text
from train.story_module import StoryModule
from train.watching.dashboards import Dashboard, open_dashboard
from train.watching.hardware import device_name, peak_flops, peak_memory_gib, start_peak_memory
from train.watching.loss_spikes import LossSpikes

log = logging.getLogger(__name__)


class MetricsLog(Callback):
    """One JSON line a step: means of every n steps, and what the callbacks before this one have added.

    It stands before the checkpoints in the list of callbacks, so that a run killed at any moment has the
    lines of all steps up to its newest checkpoint; those beyond are taken away when it goes on from there.
    """

    def __init__(
        self,
        run_dir: Path,
        every_n_steps: int,
        *,
        heartbeat: Heartbeat,
        dashboard: str = "none",
        settings: dict[str, Any] | None = None,
        peak_tflops: float | None = None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self.every_n_steps = every_n_steps
        self.heartbeat = heartbeat
        self.dashboard_name, self.settings = dashboard, settings
        self.dashboard: Dashboard | None = None
        self.peak_tflops = peak_tflops
        self.last_step = 0
        self.latest: dict[str, float] = {}
        self.added: dict[str, float] = {}
        self.unwritten = ""

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.last_step = trainer.global_step
        self.peak = peak_flops(device_name(module.device), self.peak_tflops)
        self.sizes = StoryDiTConfig(**plain_config(module.dit))
        self.is_lora = has_lora(module.dit)
        self.spikes = LossSpikes()
        self.window = _Window(module.device)
        if not trainer.is_global_zero:
            return
        if self.path.is_file():
            write_text(self.path, "".join(_lines_up_to(self.path, self.last_step)))
        self.dashboard = open_dashboard(
            self.dashboard_name, self.path.parent, self.settings or {}, self.last_step
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        tokens = sum(num_tokens(self.sizes, clip) for clip in module.clip_sizes)
        flops = train_flops(self.sizes, module.clip_sizes, is_lora=self.is_lora)
        self.window.add(batch, module.clip_losses, tokens, flops)
        step = trainer.global_step
        if step == self.last_step:  # a batch whose gradients are accumulated
            return
        self.last_step = step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.latest = self._measure(trainer, module)
            self.add(self.latest)
            self.window = _Window(module.device)
        if self.added and trainer.is_global_zero:
            self._write(step)
        self.added = {}

    def on_train_end(self, trainer: L.Trainer, module: StoryModule) -> None:
        if self.dashboard:
            self.dashboard.close()

    def add(self, numbers: dict[str, float]) -> None:
        """Numbers for the line of the present step."""
        self.added |= numbers

    def show(self, name: str, pictures: Sequence[Image.Image], texts: Sequence[str]) -> None:
        """Gives pictures of the present step, each with its text, to the dashboard."""
        if self.dashboard:
            self.dashboard.show(name, pictures, texts, self.last_step)

    @contextmanager
    def aside(self, phase: str, step: int) -> Iterator[None]:
        """Around what is no training: its time does not count in rates, and heartbeats name it."""
        start = time.perf_counter()
        self.heartbeat.note(phase, step)
        try:
            yield
        finally:
            self.window.start += time.perf_counter() - start
            self.heartbeat.note("after the step", step)

    def _measure(self, trainer: L.Trainer, module: StoryModule) -> dict[str, float]:
        """Of the window, over all ranks; called on all of them."""
        losses = self.window.losses()  # waits for the device
        seconds = self.window.seconds
        for line in self.spikes.found(self.window.keys, losses):
            log.warning("loss spike up to step %d: %s", trainer.global_step, line)
        own = self.window.sums(losses)
        ranks = gather(own)
        total = {name: sum(rank[name] for rank in ranks) / module.sequence_parallel for name in own}
        numbers = {
            "train/loss": total["loss"] / max(1, total["clips"]),
            "train/grad_norm": float(module.grad_norm),
            **_learning_rates(trainer.optimizers[0]),
            "train/clips": module.position,
            "train/step_s": seconds * trainer.accumulate_grad_batches / self.window.num_packs,
            "train/clips_per_s": total["clips"] / seconds,
            "train/tokens_per_s": total["tokens"] / seconds,
            "train/data_wait_share": max(rank["wait_s"] for rank in ranks) / seconds,
            "train/peak_memory_gib": max(rank["memory_gib"] for rank in ranks),
            "train/skipped_steps": module.num_skipped,
            "train/broken_clips": total["broken"],
        }
        if self.peak:
            numbers["train/mfu"] = total["flops"] / seconds / (len(ranks) * self.peak)
        return numbers

    def _write(self, step: int) -> None:
        """A disk that is full for a while costs no step and no line: what was not written is kept."""
        numbers = {name: value if math.isfinite(value) else None for name, value in self.added.items()}
        self.unwritten += json.dumps({"step": step, **numbers}) + "\n"
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            log.warning("%s: %s; its lines are kept for later", self.path, error.strerror)
            if self.path.is_file():
                os.truncate(self.path, size)
        if self.dashboard:
            self.dashboard.log({name: value for name, value in numbers.items() if value is not None}, step)


class _Window:
    """This rank's packs since the last line; their losses stay on the device until it is written."""

    def __init__(self, device: torch.device):
        start_peak_memory(device)
        self.device = device
        self.start = time.perf_counter()
        self.clip_losses: list[Tensor] = []
        self.keys: list[str] = []
        self.num_packs = self.tokens = self.flops = self.broken = 0
        self.wait_s = 0.0

    def add(self, batch: ClipBatch, clip_losses: Tensor, tokens: int, flops: int) -> None:
        self.num_packs += 1
        self.clip_losses.append(clip_losses)
        self.keys += [clip.key for clip in batch.clips]
        self.tokens += tokens
        self.flops += flops
        self.wait_s += batch.wait_s
        self.broken += len(batch.broken)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def losses(self) -> list[float]:
        return torch.cat(self.clip_losses).tolist()

    def sums(self, losses: list[float]) -> dict[str, float]:
        return {
            "loss": math.fsum(losses),
            "clips": len(self.keys),
            "tokens": self.tokens,
            "flops": self.flops,
            "wait_s": self.wait_s,
            "memory_gib": peak_memory_gib(self.device),
            "broken": self.broken,
        }


class StageProgress(ProgressBar):
    """One line: the stage, its steps, loss, speed and the share of time spent waiting for data."""

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
            mfu = f"MFU {latest['train/mfu']:.1%}, " if "train/mfu" in latest else ""
            self.bar.set_postfix_str(
                f"loss {latest['train/loss']:.4f}, {latest['train/clips_per_s']:.1f} clips/s, {mfu}"
                f"data wait {latest['train/data_wait_share']:.1%}",
                refresh=False,
            )
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.bar.close()


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """train/lr of the base's parameters, train/lr_new_parts of what the base has not."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    names = {"base": "train/lr", "new_parts": "train/lr_new_parts"}
    return {names[name]: rate for name, rate in rates.items()}


def _lines_up_to(path: Path, step: int) -> Iterator[str]:
    """The whole lines of steps up to this one; a machine that lost power may have left half a line."""
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                yield line
        except ValueError:
            log.warning("%s: left out a damaged line: %.60r", path, line)
