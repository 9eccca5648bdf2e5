"""Heartbeats: each rank notes in <run>/heartbeats/ where it is, so that a hang or a loss can be named.

A thread writes the beat, so a rank whose main thread waits for the others still beats; one that was killed or
stopped, or whose node is gone, does not. When the main thread has not moved for a while, the lowest living
rank looks who went quiet, says so and ends the run: a collective may wait much longer, and the watchdog of
NCCL aborts without a name.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from conf.command import HardwareFault
from train.processes.world import World

log = logging.getLogger(__name__)

FOLDER = "heartbeats"
BEAT_BYTES = 2048  # a beat is overwritten in one write, so that a reader never finds half of one
LATE = 1.5  # periods without a beat, after which a rank is suspected
ENDED, FAILED = "ended", "failed"


@dataclass(frozen=True)
class Beat:
    run: str  # of all ranks; a beat of an earlier start has another
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float  # seconds since 1970 by its own clock: when the phase began
    time: float  # when this beat was written

    def __str__(self) -> str:
        ago = time.time() - self.time
        return f"rank {self.rank} on {self.host} (step {self.step}, {self.phase}, {ago:.0f} s ago)"


class Heartbeat(Callback):
    """Goes before all other callbacks, so that their time belongs to the phase "after the step".

    lost(line) is called from the thread when ranks went quiet while this one's main thread waits. Ranks that
    beat but wait for one another are left to the collectives' own timeout.
    """

    def __init__(
        self,
        run_dir: Path,
        lost: Callable[[str], None],
        *,
        period_s: float = 10.0,
        stall_s: float = 25.0,
    ):
        self.folder = run_dir / FOLDER
        self.lost = lost
        self.period_s, self.stall_s = period_s, stall_s
        self.world_size = 1
        self.beat: Beat | None = None
        self.faulted = False
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        run = trainer.strategy.broadcast(f"{os.getpid()}-{time.time():.3f}")
        self.start(run, trainer.global_rank, trainer.world_size)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.note("in the step", trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.note("after the step", trainer.global_step)

    def start(self, run: str, rank: int, world_size: int) -> None:
        now = time.time()
        host = World.of_this_process().host
        self.world_size = world_size
        self.beat = Beat(run, rank, host, os.getpid(), 0, "starting", now, now)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self.thread.start()

    def note(self, phase: str, step: int) -> None:
        """Where the main thread is now: no more than an assignment."""
        self.beat = replace(self.beat, phase=phase, step=step, since=time.time())

    @contextmanager
    def named(self) -> Iterator[None]:
        """Around the training: a HardwareFault leaves with the names of the ranks that went quiet."""
        try:
            yield
            self._end(ENDED)
        except HardwareFault as fault:
            quiet = self._quiet_after_a_fault()
            self._end(f"{FAILED}: {fault}")
            raise HardwareFault(f"{quiet}; {fault}" if quiet else str(fault)) from fault
        except BaseException as error:
            self._end(f"{FAILED}: {error}")
            raise

    def _quiet_after_a_fault(self) -> str:
        """A rank that has just been killed looks alive until its next beat is due."""
        self.faulted = True  # the main thread looks by itself
        if self.beat is None or self.world_size == 1:
            return ""
        failed = time.time() + LATE * self.period_s / 2
        self.ending.wait(LATE * self.period_s)
        return self._quiet_ranks(failed_before=failed)

    def _quiet_ranks(self, failed_before: float) -> str:
        """Who has not beaten for a while, and does not beat now; "" where a lower rank can say it."""
        suspects = self._suspects(failed_before)
        if not suspects:
            return ""
        self.ending.wait(LATE * self.period_s)
        quiet = [beat for rank, beat in suspects.items() if self._read(rank) == beat]
        names = ", ".join(map(str, quiet[:8])) + (f" and {len(quiet) - 8} more" if len(quiet) > 8 else "")
        return f"quiet: {names}" if quiet else ""

    def _suspects(self, failed_before: float) -> dict[int, Beat]:
        suspects, now = {}, time.time()
        for rank in range(self.world_size):
            beat = self._read(rank)
            if rank == self.beat.rank or beat is None or beat.phase == ENDED:
                continue
            failed = beat.phase.startswith(FAILED)
            is_late = now - beat.time > LATE * self.period_s
            if (failed and beat.since < failed_before) or (not failed and is_late):
                suspects[rank] = beat
            elif rank < self.beat.rank:
                return {}
        return suspects

    def _keep_beating(self) -> None:
        looked = 0.0
        while not self.ending.wait(self.period_s):
            self._write()
            beat, now = self.beat, time.time()
            if self.faulted or now - max(beat.since, looked) < self.stall_s or self.world_size == 1:
                continue
            looked = now
            quiet = self._quiet_ranks(failed_before=now)
            if quiet and self.beat is beat and not self.faulted:  # the main thread still has not moved
                self.lost(f"no progress for {time.time() - beat.since:.0f} s; {quiet}")

    def _end(self, phase: str) -> None:
        if self.beat and self.thread.is_alive():
            self.note(phase, self.beat.step)
            self.ending.set()
            self.thread.join()
            self._write()

    def _write(self) -> None:
        line = json.dumps(asdict(replace(self.beat, time=time.time(), phase=self.beat.phase[:200])))
        try:
            # opened anew each time: NFS shows others a file's content when its writer closes it
            file = os.open(self._path(self.beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(file, line.ljust(BEAT_BYTES - 1).encode() + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            log.warning("heartbeat not written: %s", error)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _read(self, rank: int) -> Beat | None:
        """The last beat of a rank in this run; None where it has not begun or cannot be read."""
        try:
            beat = Beat(**json.loads(self._path(rank).read_text()))
        except (OSError, ValueError):
            return None
        return beat if beat.run == self.beat.run else None
