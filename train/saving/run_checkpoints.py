"""Checkpoints around the training step: restored at the start, saved on schedule, on request, at the end."""

import logging
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer
from torch import Tensor

from conf.command import HardwareFault
from train.clips.loader import ClipBatch
from train.processes.agree import from_first, gather, largest, num_ranks
from train.processes.hardware_faults import TRANSIENT
from train.processes.stop_signals import StopFlag
from train.processes.trained_state import MOMENTS
from train.run_folder import plain_config
from train.saving.checkpoint_writer import CheckpointWriter, Written, describe_state
from train.saving.checkpoints import CheckpointConfig, TrainingState, expected_step, remove_leftovers
from train.saving.restore import (
    choose_checkpoint,
    read_rng_state,
    restore,
    rng_state,
    seed_rng,
    set_rng_state,
)
from train.saving.tensor_ranges import TensorRange
from train.stable_hash import stable_hash
from train.story_module import NonFiniteGradients, StoryModule

log = logging.getLogger(__name__)

SAVE, SAVE_QUIT = "save", "save_quit"  # files in the run folder that ask for a checkpoint


class RunCheckpoints(Callback):
    """Goes on from the newest sound checkpoint, and saves without holding up the steps.

    Lightning's own checkpoints are not used: they are pickles, and they are not marked as complete. All that
    ranks must agree on is decided by one small collective at the end of a step: a signal to any of them,
    what the first one was asked for, and whether the files of the save in flight are written.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, stop: StopFlag, *, preset: str):
        self.run_dir = run_dir
        self.config = config
        self.stop = stop
        self.preset = preset
        self.stopped_by: str | None = None  # in words, once the run was asked to end
        self.last_step = self.saved_step = self.position = 0
        self.last_save = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        module.set_up_state(trainer.optimizers[0])
        rank = trainer.global_rank
        self.is_first = rank == 0
        if self.is_first:
            remove_leftovers(self.run_dir)
        self.writer = CheckpointWriter(self.run_dir, attempt=from_first(uuid4().hex[:8]))
        checkpoint = choose_checkpoint(self.run_dir, rank)
        self.rng = None
        if checkpoint is None:
            return
        restore(module, checkpoint, rank)
        self.rng = read_rng_state(checkpoint, rank, num_ranks())
        step = checkpoint.state.step
        if self.is_first:
            expected = expected_step(self.run_dir)
            if expected is not None and expected > step:
                log.warning("step %d was saved, and is no more: going on from step %d", expected, step)
            log.info("going on from %s", checkpoint.folder)
        # Lightning has no setter; its own checkpoints restore global_step through the same two counters
        steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = self.last_step = self.saved_step = step
        self.position = module.position

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        [signal_number] = largest([int(self.stop.received or 0)], trainer.strategy.root_device)
        self.stop_for(trainer, signal_number)  # received before there was a step

    def on_train_batch_start(
        self, trainer: L.Trainer, module: StoryModule, batch: ClipBatch, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # not before: starting the loader draws a number
            seed_rng(stable_hash("global generators", module.seed, trainer.global_rank))
            if self.rng is not None:
                set_rng_state(self.rng)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step:  # a batch whose gradients are accumulated
            return
        self.last_step, self.position = step, module.position
        signal_number, quitting, saving, writing = largest(self.wishes(trainer), trainer.strategy.root_device)
        if self.writer.step is not None and not writing:
            self.finish_save()
        self.stop_for(trainer, signal_number, quitting)
        if saving or trainer.should_stop or self.config.is_due(step):
            self.save(trainer, module)
        if self.stopped_by and self.writer.step is not None:
            self.finish_save()  # before a dashboard is closed, which may take longer than a scheduler waits

    def stop_for(self, trainer: L.Trainer, signal_number: int, quitting: bool = False) -> None:
        if signal_number or quitting:
            self.stopped_by = signal.Signals(signal_number).name if signal_number else SAVE_QUIT
            trainer.should_stop = True

    def wishes(self, trainer: L.Trainer) -> list[int]:
        """[number of a stop signal, save_quit, save, whether this rank still writes]; files are used up."""
        asked = {SAVE: False, SAVE_QUIT: False}
        minutes = self.config.every_minutes
        if trainer.is_global_zero:
            for name in asked:
                with suppress(FileNotFoundError):
                    (self.run_dir / name).unlink()
                    asked[name] = True
            asked[SAVE] |= minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        received = self.stop.received or 0
        return [int(received), asked[SAVE_QUIT], asked[SAVE], self.writer.is_writing]

    def on_train_end(self, trainer: L.Trainer, module: StoryModule) -> None:
        if self.stopped_by is None and self.last_step < trainer.max_steps:
            if not any(isinstance(callback, Timer) for callback in trainer.callbacks):
                raise RuntimeError(f"the batches ended after step {self.last_step} of {trainer.max_steps}")
            self.stopped_by = "trainer.max_time"
        if self.saved_step < self.last_step:
            self.save(trainer, module)
        if self.writer.step is not None:
            self.finish_save()
        self.writer.close()
        trainer.strategy.barrier()  # srun ends the others when one leaves, and the first has more to close

    def on_exception(self, trainer: L.Trainer, module: StoryModule, exception: BaseException) -> None:
        # only who commits: a rank that has lost another one would remove what the first one just commits
        if hasattr(self, "writer") and self.is_first:
            self.writer.give_up()

    def save(self, trainer: L.Trainer, module: StoryModule) -> None:
        """Copies this rank's state and starts to write it; waits for the save before, if one is in flight."""
        if self.writer.step is not None:
            self.finish_save()
        self.check_finite(trainer, module)
        state = TrainingState(
            step=self.last_step,
            position=self.position,
            num_updates=module.trained.num_updates,
            num_ema_updates=module.ema.num_updates,
            skipped_in_a_row=module.skipped_in_a_row,
            num_skipped=module.num_skipped,
            stage=module.stage.name,
            preset=self.preset,
        )
        texts = describe_state(state, plain_config(module.dit)) if trainer.is_global_zero else {}
        self.writer.begin(self.last_step, self.files(trainer.global_rank, module), texts)
        self.saved_step, self.last_save = self.last_step, time.monotonic()

    def check_finite(self, trainer: L.Trainer, module: StoryModule) -> None:
        """NonFiniteGradients on all ranks where what would be saved is not finite, or its end was skipped."""
        own = [*(fragment.weights for fragment in module.trained.fragments), *module.ema.average]
        [is_broken] = largest([int(not _all_finite(own))], trainer.strategy.root_device)
        found = f"after step {self.last_step} of {trainer.max_steps}"
        if is_broken:
            raise NonFiniteGradients(
                f"{found} weights or their average are not finite; nothing is saved of it"
            )
        if module.skipped_in_a_row and self.last_step >= trainer.max_steps:
            raise NonFiniteGradients(
                f"{found} the stage is not done: its last {module.skipped_in_a_row} steps had no finite "
                "gradient and were skipped; the end is not saved"
            )

    def files(self, rank: int, module: StoryModule) -> dict[str, list[TensorRange]]:
        """What this rank writes; of what all ranks hold, the first one writes everything."""
        own = [TensorRange(name, tuple(t.shape), 0, t.flatten()) for name, t in rng_state().items()]
        files = {f"rng-{rank:05d}-of-{num_ranks():05d}.safetensors": own}
        if module.trained.is_sharded or rank == 0:
            part = f"{rank:05d}-of-{num_ranks():05d}" if module.trained.is_sharded else "00000-of-00001"
            model = [TensorRange(f.name, f.shape, f.start, f.weights) for f in module.trained.fragments]
            moments = module.trained.moments()
            files |= {
                f"model-{part}.safetensors": model,
                f"ema-{part}.safetensors": _of_others(model, module.ema.average),
                f"optimizer-{part}.safetensors": [
                    moment for name in MOMENTS for moment in _of_others(model, moments[name], f"{name}/")
                ],
            }
        return files

    def finish_save(self) -> None:
        """Waits for the files of all ranks; the first rank commits them.

        OSError on all ranks where one could not write; HardwareFault where that may pass by itself.
        """
        written = gather(self.writer.wait())
        failed = next((other for other in written if other.error), None)
        if self.is_first and failed is None:
            try:
                files = {name: file for other in written for name, file in other.files.items()}
                log.info("wrote %s", self.writer.commit(files, self.config).folder)
            except OSError as error:
                failed = Written({}, f"could not commit {self.writer.temporary}: {error}", error.errno)
        failed = from_first(failed)
        if failed is not None:
            if self.is_first:
                self.writer.give_up()
            kind = HardwareFault if failed.errno in TRANSIENT else OSError
            raise kind(f"{failed.error}. The older checkpoints are whole; the same command goes on from them")
        self.writer.release()


def remove_requests(run_dir: Path) -> None:
    """What an earlier start was asked for and did not come to would end this one after its first step."""
    for name in (SAVE, SAVE_QUIT):
        with suppress(FileNotFoundError):
            (run_dir / name).unlink()
            log.info("removed %s: it was asked of an earlier start", run_dir / name)


def _all_finite(tensors: list[Tensor]) -> bool:
    """Of one device; by smallest and largest numbers, which needs no memory and one wait for the device."""
    bounds = [bound for tensor in tensors if len(tensor) for bound in torch.aminmax(tensor)]
    return not bounds or bool(torch.stack(bounds).isfinite().all())


def _of_others(ranges: list[TensorRange], values: list[Tensor], prefix: str = "") -> list[TensorRange]:
    """The same ranges of other tensors."""
    return [
        TensorRange(prefix + part.name, part.shape, part.start, tensor)
        for part, tensor in zip(ranges, values, strict=True)
    ]
