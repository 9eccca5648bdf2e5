"""Checkpoints around the training step: restored when it starts; saved on schedule, at the end, on a signal."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy

from train.checkpoints import (
    Checkpoint,
    CheckpointConfig,
    TrainingState,
    remove_old_checkpoints,
    trained_weights,
    write_checkpoint,
)
from train.loader import ClipBatch
from train.run_folder import plain_config
from train.stop_signals import StopFlag
from train.story_module import StoryModule

log = logging.getLogger(__name__)


class RunCheckpoints(Callback):
    """Restores a checkpoint when training starts; saves on schedule, at the end, and when asked to stop.

    Lightning's own checkpoints are not used: they are pickles, and they are not marked as complete.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        stop: StopFlag,
        *,
        preset: str,
        resume_from: Checkpoint | None,
    ):
        self.run_dir = run_dir
        self.config = config
        self.stop = stop
        self.preset = preset
        self.resume_from = resume_from
        self.last_step = 0

    def on_fit_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        module.set_up_state(trainer.optimizers[0])
        if isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.world_size > 1:
            raise ValueError(
                "strategy=deepspeed shards the optimizer, which checkpoints do not gather: use devices=1"
            )
        if self.resume_from is None:
            return
        state = self.resume_from.state
        trainer.optimizers[0].load_state_dict(self.resume_from.optimizer_state())
        module.restore(self.resume_from)
        # Lightning has no setter; its own checkpoints restore global_step through the same two counters
        steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = self.last_step = state.step

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.stop.install()  # again: Lightning has put its own SIGTERM handler over it

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step:  # a batch whose gradients are accumulated
            return
        self.last_step = step
        stopping = trainer.strategy.reduce_boolean_decision(self.stop.received is not None, all=False)
        if stopping or step % self.config.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer, module)
        if stopping:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer, module: StoryModule) -> None:
        if trainer.is_global_zero:
            state = TrainingState(
                step=trainer.global_step,
                position=module.position,
                num_ema_updates=module.ema.num_updates,
                skipped_in_a_row=module.skipped_in_a_row,
                num_skipped=module.num_skipped,
                stage=module.stage.name,
                preset=self.preset,
            )
            checkpoint = write_checkpoint(
                self.run_dir,
                state,
                model=trained_weights(module.dit),
                ema={
                    fragment.name: average.view(fragment.shape)
                    for fragment, average in zip(module.trained.fragments, module.ema.average, strict=True)
                },
                optimizer=trainer.optimizers[0].state_dict(),
                dit_config=plain_config(module.dit),
            )
            remove_old_checkpoints(self.run_dir, self.config.keep_last)
            log.info("wrote %s", checkpoint.folder)
        trainer.strategy.barrier()
