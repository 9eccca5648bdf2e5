"""<run>/keys/rank_00000.jsonl: the clips of each step, to prove that none is lost or seen twice."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from train.clips.loader import ClipBatch
from train.run_folder import write_text
from train.story_module import StoryModule


class KeysLog(Callback):
    """One line a step: {"step": n, "clips": [[epoch, key], ...]}.

    It stands before the checkpoints, as MetricsLog does: the lines up to a checkpoint are there when it is.
    Lines beyond the checkpoint that a run goes on from are taken away, also those of ranks it no longer has.
    """

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "keys"
        self.last_step = 0
        self.clips: list[tuple[int, str]] = []

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.last_step = trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob("rank_*.jsonl"):
                lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                write_text(
                    path, "".join(line for line in lines if json.loads(line)["step"] <= self.last_step)
                )
        trainer.strategy.barrier()  # no rank writes before that is done
        self.path = self.folder / f"rank_{trainer.global_rank:05d}.jsonl"

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        self.clips += [(clip.epoch, clip.key) for clip in batch.clips]
        if trainer.global_step == self.last_step:  # a batch whose gradients are accumulated
            return
        self.last_step = trainer.global_step
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": self.last_step, "clips": self.clips}) + "\n")
        self.clips = []
