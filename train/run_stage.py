"""Trains one stage of the story frame model; started again, it goes on from its newest complete checkpoint.

python train/run_stage.py stage=global_caption model=tiny data.dataset=DATASET run_dir=runs/s1
python train/run_stage.py stage=multi_event model=tiny data.dataset=DATASET run_dir=runs/s2 init_from=runs/s1
python train/run_stage.py stage=continuation model=tiny data.dataset=DATASET run_dir=runs/s3 init_from=runs/s2
"""

if __name__ == "__main__":  # before torch, whose import takes seconds in which a signal would end the process
    from conf.verdict import report_crashes
    from train.processes.stop_signals import StopFlag

    report_crashes()
    StopFlag().install()

import logging
import math
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from conf.command import HARDWARE, Stopped, leave_at_once, run
from storyanchors.caption_encoder import load_token_counter
from storyanchors.lora import cast_base, has_lora
from train.clips.clip_costs import plan_clips
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import check_files
from train.clips.clips_record import check_clips, write_clips
from train.clips.data_config import DataConfig
from train.clips.keys_log import KeysLog
from train.clips.loader import PlannedClips, PlannedLoader, leave_out_uncuttable
from train.clips.quarantine import Quarantine
from train.clips.workers import prefetch_per_worker, start_worker_server
from train.data_plan import DataPlan
from train.dry_run import describe_run
from train.parts import (
    spatial_stride,
)
from train.plan_report import describe_plan
from train.processes.data_ranks import DataRanks
from train.processes.hardware_faults import hardware_faults
from train.processes.heartbeat import Heartbeat
from train.processes.launcher import launch_settings
from train.processes.stop_signals import StopFlag, keep_handlers
from train.processes.strategies import build_strategy
from train.processes.trainer_settings import check_gpu
from train.processes.world import World
from train.run_config import RunStageConfig
from train.run_folder import (
    CONFIG,
    read_settings,
    start_or_resume,
    write_settings,
)
from train.run_start import build_module, log_network
from train.saving.checkpoints import (
    Checkpoint,
    find_damage,
    hashed_files,
)
from train.saving.run_checkpoints import RunCheckpoints, remove_requests
from train.saving.run_lock import run_lock
from train.settings import naming
from train.stage import CAPTION_KINDS
from train.story_module import NonFiniteGradients, StoryModule
from train.watching.callbacks import MetricsLog, StageProgress
from train.watching.held_out_loss import HeldOutLoss
from train.watching.story_samples import StorySamples, read_sample_stories

log = logging.getLogger(__name__)


def main(config: RunStageConfig) -> None:
    if config.dry_run or config.plan_report:
        print(dry_run(config))
        return
    check_gpu(config.trainer, config.strategy)
    run_dir, num_steps = Path(config.run_dir), config.stage.steps
    with run_lock(run_dir) if rank_zero_only.rank == 0 else nullcontext():
        config = with_pinned_packs(config)
        resume_from = start_or_resume(run_dir, asdict(config), resume=config.resume)
        if rank_zero_only.rank == 0:
            remove_requests(run_dir)
        if resume_from and has_done(resume_from, num_steps):
            report(f"{run_dir} has done its {num_steps} steps: {resume_from.folder}")
            return
        with StopFlag() as stop, hardware_faults():
            train(config, resume_from, stop)
    report(f"{run_dir}: {num_steps} steps of stage {config.stage.name} done")


def has_done(checkpoint: Checkpoint, num_steps: int) -> bool:
    """Whether a stage has come to its end, and all of that is sound; else training chooses an older one.

    Every rank compares the hashes by itself, before it has met the others: they find the same.
    NonFiniteGradients where the last step was skipped.
    """
    state = checkpoint.state
    if state.step < num_steps or find_damage(checkpoint.folder, hashed_files(checkpoint.folder)):
        return False
    if state.skipped_in_a_row:
        raise NonFiniteGradients(
            f"{checkpoint.folder} is no end of a stage: its last {state.skipped_in_a_row} steps had no "
            "finite gradient and were skipped"
        )
    return True


def dry_run(config: RunStageConfig) -> str:
    """What a run with these settings would do, on a machine that need not have a GPU."""
    config = with_pinned_packs(replace(config, trainer=config.trainer | {"accelerator": "cpu"}))
    train_clips, held_out = open_clips(config)
    trainer = build_trainer(config, [])
    config = share_packs(config, trainer)
    clips, plan = build_plan(config, train_clips)
    if config.plan_report:
        return describe_plan(
            clips,
            plan,
            held_out=len(held_out),
            dropped=len(train_clips) - len(clips),
            num_steps=config.stage.steps,
        )
    return describe_run(
        clips,
        plan,
        num_nodes=trainer.num_nodes,
        num_on_node=trainer.num_devices,
        num_data_ranks=DataRanks.of(trainer, config.model.sequence_parallel).size,
        num_steps=config.stage.steps,
    )


def train(config: RunStageConfig, resume_from: Checkpoint | None, stop: StopFlag) -> None:
    """Trains to the stage's last step; Stopped when a signal ended it earlier."""
    run_dir, num_steps = Path(config.run_dir), config.stage.steps
    if config.data.num_workers:
        start_worker_server("train.run_stage")  # imports what takes seconds while the network is built
    train_clips, held_out = open_clips(config)
    heartbeat = Heartbeat(run_dir, lost=lambda line: leave_at_once(HARDWARE, f"hardware: {line}"))
    callbacks = build_callbacks(config, stop, heartbeat, train_clips, held_out)
    trainer = build_trainer(config, callbacks)
    config = share_packs(config, trainer)
    train_clips, plan = build_plan(config, train_clips)
    if resume_from:
        check_clips(run_dir, train_clips)
    if stop.received:  # what is left until a time limit may not last for reading weights and a first step
        raise Stopped(f"{stop.received.name} before the weights were read; the same command begins again")
    module = build_module(config, train_clips, is_new=resume_from is None)
    dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
    if has_lora(module.dit):
        cast_base(module.dit, dtype)
    log_network(module.dit, trainer.strategy.root_device, dtype)
    if rank_zero_only.rank == 0:
        write_settings(run_dir, asdict(config))
        write_clips(run_dir, train_clips)
    loader = build_loader(config, module, train_clips, plan, trainer)
    with heartbeat.named(), hardware_faults():
        trainer.fit(module, loader)
    if trainer.global_step < num_steps:
        [checkpoints] = (callback for callback in callbacks if isinstance(callback, RunCheckpoints))
        raise Stopped(
            f"{checkpoints.stopped_by} after step {trainer.global_step}; the same command goes on from there"
        )


def build_trainer(config: RunStageConfig, callbacks: list[Callback]) -> L.Trainer:
    """ValueError for what Lightning or DeepSpeed do not take."""
    settings = config.trainer | launch_settings(World.of_this_process())
    try:
        strategy = build_strategy(
            config.strategy,
            offload=config.offload,
            timeout_s=config.collective_timeout_s,
            deepspeed=config.deepspeed,
            trainer=settings,
            clip_norm=config.optimizer.clip_norm,
        )
        trainer = L.Trainer(
            max_steps=config.stage.steps,
            max_epochs=1,  # one pass of the loader, which has as many batches as the stage has left
            callbacks=callbacks,
            logger=False,
            strategy=strategy,
            default_root_dir=config.run_dir,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            log_every_n_steps=1,  # of what Lightning itself logs, which is nothing
            **settings,
        )
    except (TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(f"Lightning does not take these trainer settings: {error}") from error
    keep_handlers(trainer)
    return trainer


@rank_zero_only
def report(line: str) -> None:
    print(line)


def with_pinned_packs(config: RunStageConfig) -> RunStageConfig:
    """A run keeps the packs of its first start, on any number of ranks, unless other ones are asked for."""
    run_dir = Path(config.run_dir)
    if config.data.packs_per_batch is not None or not (run_dir / CONFIG).is_file():
        return config
    pinned = read_settings(run_dir)["data"]["packs_per_batch"]
    return replace(config, data=replace(config.data, packs_per_batch=pinned))


def share_packs(config: RunStageConfig, trainer: L.Trainer) -> RunStageConfig:
    """With the packs of a batch decided; the trainer takes as many micro-steps as each rank has of them."""
    num_ranks = DataRanks.of(trainer, config.model.sequence_parallel).size
    num_packs = count_packs(config.data, num_ranks)
    trainer.accumulate_grad_batches = num_packs // num_ranks
    return replace(config, data=replace(config.data, packs_per_batch=num_packs))


def count_packs(data: DataConfig, num_ranks: int) -> int:
    """The packs of a batch; ValueError where they, or its clips, cannot be shared by so many data ranks."""
    num_packs = data.packs_per_batch or num_ranks
    if data.clips_per_batch < num_packs:
        raise ValueError(
            f"data.clips_per_batch={data.clips_per_batch} is too few for {num_packs} packs on {num_ranks} "
            f"data ranks, each has at least one clip: expected data.clips_per_batch={num_packs} or more"
        )
    if num_packs % num_ranks:
        ranks = ", ".join(str(n) for n in range(1, num_packs + 1) if num_packs % n == 0)
        multiple = num_ranks * math.ceil(num_packs / num_ranks)
        raise ValueError(
            f"data.packs_per_batch={num_packs} cannot be shared by {num_ranks} ranks: use {ranks} ranks, or "
            f"start a run with data.packs_per_batch={multiple}"
        )
    return num_packs


def open_clips(config: RunStageConfig) -> tuple[ClipIndex, ClipIndex]:
    """(to train on, held out): the clips with this stage's kind of caption, where an encoder takes it."""
    clips = ClipIndex.open(*config.data.datasets)
    if World.of_this_process().local_rank == 0:  # on every node: one may have mounted something else
        check_files(clips.files())
    clips = clips.with_caption(config.stage.caption)
    kinds = CAPTION_KINDS if config.stage.other_caption_share else (config.stage.caption,)
    with naming("model.caption_encoder"):
        counter = load_token_counter(config.model.caption_encoder)
    clips = leave_out_uncuttable(clips, kinds, counter)
    train_clips, held_out = clips.split(config.data.holdout)
    if not len(train_clips):
        raise ValueError(f"data.holdout={config.data.holdout} leaves no clip of {clips} to train on")
    log.info("%d clips to train on, %d held out", len(train_clips), len(held_out))
    return train_clips, held_out


def build_callbacks(
    config: RunStageConfig, stop: StopFlag, heartbeat: Heartbeat, train_clips: ClipIndex, held_out: ClipIndex
) -> list[Callback]:
    """In the order of a step's end: what is added to its line in metrics.jsonl, the line, a checkpoint."""
    run_dir = Path(config.run_dir)
    metrics = MetricsLog(
        run_dir,
        config.log_every_n_steps,
        heartbeat=heartbeat,
        dashboard=config.logger,
        settings=asdict(config),
        peak_tflops=config.peak_tflops,
    )
    callbacks = [heartbeat]
    if config.held_out.every_n_steps and len(held_out):
        callbacks.append(HeldOutLoss(config.held_out, held_out, metrics))
    if config.samples.every_n_steps:
        stories = read_sample_stories(held_out if len(held_out) else train_clips, config.samples.num_stories)
        if stories:
            callbacks.append(StorySamples(run_dir, config.samples, stories, metrics))
        else:
            log.warning("no samples: none of the clips for them has a multi-event caption")
    if config.data.log_keys:
        callbacks.append(KeysLog(run_dir))
    callbacks += [metrics, RunCheckpoints(run_dir, config.checkpoint, stop, preset=config.model.preset)]
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(StageProgress(config.stage.name, metrics))
    return callbacks


def build_plan(config: RunStageConfig, clips: ClipIndex) -> tuple[ClipIndex, DataPlan]:
    """The plan, and the clips that its rows count."""
    if config.data.clips_per_batch > len(clips):
        log.warning(
            "data.clips_per_batch=%d, and there are %d clips: a step meets a clip more than once",
            config.data.clips_per_batch,
            len(clips),
        )
    return plan_clips(
        clips,
        config.data,
        config.model.dit_config,
        spatial_stride=spatial_stride(config.model),
        packs_per_batch=config.data.packs_per_batch,
        seed=config.seed,
        stage=config.stage.name,
    )


def build_loader(
    config: RunStageConfig,
    module: StoryModule,
    clips: ClipIndex,
    plan: DataPlan,
    trainer: L.Trainer,
) -> PlannedLoader:
    """This rank's packs from where a checkpoint leaves the module, for the steps that are left then."""
    data, ranks = config.data, DataRanks.of(trainer, config.model.sequence_parallel)
    pixels_per_token = module.codec.spatial_stride * module.dit.config.patch_size[-1]
    tokens_per_pack = plan.tokens.mean() * data.clips_per_batch / data.packs_per_batch
    prefetch = prefetch_per_worker(
        data.look_ahead * trainer.accumulate_grad_batches,
        tokens_per_pack * 3 * pixels_per_token**2,
        num_workers=data.num_workers,
        prefetch_mb=data.prefetch_mb,
        ranks_per_node=trainer.num_devices,
    )
    return PlannedLoader(
        PlannedClips(clips, plan.tokens),
        partial(plan.packs, rank=ranks.rank, world_size=ranks.size),
        position=lambda: module.position,
        num_packs=lambda: (config.stage.steps - trainer.global_step) * trainer.accumulate_grad_batches,
        quarantine=Quarantine(Path(config.run_dir, "quarantine"), trainer.global_rank, data.max_broken_share),
        num_workers=data.num_workers,
        prefetch=prefetch,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists
    run(main, RunStageConfig, "run_stage")
