"""Writes checkpoints (train/saving/checkpoints.py) while training goes on: whole or not at all.

begin() copies this rank's state to host memory; a thread writes and syncs the files under another name. When
all ranks have finished theirs, the first one commits: manifest last, then the folder gets its name.
"""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.saving.checkpoints import (
    MANIFEST,
    NEWEST,
    SCHEMA_VERSION,
    Checkpoint,
    CheckpointConfig,
    TrainingState,
    remove_checkpoint,
    remove_old_checkpoints,
)
from train.saving.tensor_ranges import TensorRange, WrittenFile, write_ranges

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What a rank has written of a checkpoint, or why it could not."""

    files: dict[str, WrittenFile]
    error: str | None = None
    errno: int | None = None  # of the error


class CheckpointWriter:
    """One rank's part of the checkpoints of a run, at most one at a time.

    attempt is the same word on all ranks of one start of the command, and another for each start: what
    dying processes of an earlier start still write does not meet ours.
    """

    def __init__(self, run_dir: Path, attempt: str):
        self.folder = run_dir / "checkpoints"
        self.attempt = attempt
        self.step: int | None = None  # of the checkpoint in flight
        self._host: dict[tuple[str, str], Tensor] = {}  # kept from save to save: pinning memory is slow
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[Written] | None = None

    @property
    def is_writing(self) -> bool:
        return self._written is not None and not self._written.done()

    @property
    def temporary(self) -> Path:
        return self.folder / f".step_{self.step:08d}.{self.attempt}.tmp"

    def begin(self, step: int, files: dict[str, list[TensorRange]], texts: dict[str, str]) -> None:
        """Starts to write ranges and texts by file name; they may change as soon as this returns."""
        self.step = step
        copies = {name: self._to_host(name, ranges) for name, ranges in files.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies have arrived
        self._written = self._thread.submit(_write, self.temporary, copies, texts)

    def wait(self) -> Written:
        """What begin() started, once it is on disk or has failed."""
        return self._written.result()

    def commit(self, files: dict[str, WrittenFile], config: CheckpointConfig) -> Checkpoint:
        """Names the folder that all ranks have written; files are those of all ranks.

        Older checkpoints are removed while training goes on. OSError leaves all of them as they are.
        """
        folder = self.folder / f"step_{self.step:08d}"
        manifest = {name: asdict(file) for name, file in sorted(files.items())}
        _write_text(
            self.temporary / MANIFEST,
            json.dumps({"schema_version": SCHEMA_VERSION, "files": manifest}, indent=2) + "\n",
        )
        _sync(self.temporary)
        if folder.exists():  # the same step, saved before: by a run that went on from an earlier one
            remove_checkpoint(folder)
        self.temporary.rename(folder)
        newest = self.folder / f".{NEWEST}.tmp"
        _write_text(newest, json.dumps({"step": self.step}) + "\n")
        newest.rename(self.folder / NEWEST)
        _sync(self.folder)
        self._thread.submit(_log_errors, remove_old_checkpoints, self.folder.parent, config)
        return Checkpoint(folder)

    def release(self) -> None:
        """The checkpoint in flight is no longer: it is committed, or given up."""
        self.step = self._written = None

    def give_up(self) -> None:
        """Removes what has been written of the checkpoint in flight, once its thread is done with it."""
        if self._written is not None:
            self._written.result()
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.release()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _to_host(self, file: str, ranges: list[TensorRange]) -> list[TensorRange]:
        copies = []
        for part in ranges:
            host = self._host.get((file, part.name))
            if host is None or host.shape != part.values.shape:
                pinned = part.values.is_cuda
                host = torch.empty(part.values.shape, dtype=part.values.dtype, pin_memory=pinned)
                self._host[file, part.name] = host
            host.copy_(part.values, non_blocking=True)
            copies.append(TensorRange(part.name, part.shape, part.start, host))
        return copies


def describe_state(state: TrainingState, dit_config: dict) -> dict[str, str]:
    """The texts of a checkpoint by file name."""
    return {
        "state.json": json.dumps(asdict(state), indent=2) + "\n",
        "config.json": json.dumps(dit_config, indent=2) + "\n",
    }


def _write(folder: Path, files: dict[str, list[TensorRange]], texts: dict[str, str]) -> Written:
    """Errors are values here: every rank must hear of them."""
    path, needed = folder, sum(part.values.nbytes for ranges in files.values() for part in ranges)
    free = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        written = {}
        for name, ranges in files.items():
            path = folder / name
            written[name] = write_ranges(path, ranges)
        for name, text in texts.items():
            path = folder / name
            written[name] = _write_text(path, text)
        return Written(written)
    except OSError as error:
        at_hand = "" if free is None else f", {free} bytes were free there"
        reason = (
            f"could not write {path}: {error.strerror or error}; this process's part needs {needed} bytes"
        )
        return Written({}, reason + at_hand, error.errno)


def _write_text(path: Path, text: str) -> WrittenFile:
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(len(content), hashlib.sha256(content).hexdigest())


def _log_errors(work, *arguments) -> None:
    try:
        work(*arguments)
    except OSError as error:
        log.warning("could not remove an old checkpoint: %s", error)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
