"""One job at a time per run folder: a lock on <run>/.lock that ends with the process, however it ends."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.saving.naming_errors import naming_errors

log = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the lock inside; ValueError names the job that holds it already.

    The folder is made for it, and removed again where nothing else came into it. The lock is the process's
    own (POSIX): neither its children nor the workers of a killed job keep it.
    """
    for folder in (run_dir, *run_dir.parents):
        if folder.is_file():
            raise NotADirectoryError(f"run_dir {run_dir}: {folder} is a file, expected a folder")
    is_new = not run_dir.exists()
    with naming_errors(f"make run_dir {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
    with naming_errors(f"write {run_dir / LOCK}"):
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with naming_errors(f"write {run_dir / LOCK}"):
            _lock(descriptor, run_dir)
        try:
            yield
        finally:
            if is_new and os.listdir(run_dir) == [LOCK]:
                (run_dir / LOCK).unlink()
                run_dir.rmdir()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS_HERE:
            log.warning("%s cannot be locked (%s): start no second job on it", run_dir, error.strerror)
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ValueError(
            f"{run_dir} is in use by {_holder(descriptor)}: wait for it, or choose another run_dir"
        ) from error
    job = os.environ.get("SLURM_JOB_ID")
    about = {
        "job": job,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%F %T"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it has locked, and not yet written who it is
        return "another job"
    job = f"job {about['job']}, " if about["job"] else ""
    return f"{job}process {about['process']} on {about['host']}, since {about['since']}"
