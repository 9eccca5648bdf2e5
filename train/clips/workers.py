"""The processes that read and decode: how they start, what they must not notice, how they end.

They start from a fork server, not from the training process: a fork of that one would inherit locks of
threads that do not exist in it (fsspec's event loop, wandb, a checkpoint being written), memory registered
with the network card, and with ZeRO's offloading a second copy of every page of state that is written to.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import shutil
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from train.processes.stop_signals import STOP_SIGNALS

SHARED_MEMORY = "/dev/shm"
END_IS_KNOWN_S = 5.0  # after it, to the process that started it


def start_worker_server(*modules: str) -> None:
    """Starts the fork server, which imports these modules meanwhile; nothing new where it runs already.

    Stop signals go to every process of a job; blocked here, they stay so in the server and in its workers.
    """
    multiprocessing.forkserver.set_forkserver_preload(["train.clips.loader", *modules])
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the line above unblocks two of them
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def start_worker(worker_id: int) -> None:
    """What a worker does first."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose training process was killed must not stay: the fork server would keep both."""
    multiprocessing.parent_process().join()
    os._exit(1)


class Workers:
    """As a context: the child processes started inside end with it, whatever they are doing."""

    def __enter__(self) -> "Workers":
        self._earlier = set(multiprocessing.active_children())
        self.processes: list[BaseProcess] = []
        atexit.register(self._kill)  # before multiprocessing waits for them
        return self

    def note_started(self) -> None:
        self.processes = [child for child in multiprocessing.active_children() if child not in self._earlier]

    def __exit__(self, *error: object) -> None:
        self._kill()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def explain_end(self) -> str:
        """Why a worker is gone; "" while all are there. Waits a moment for the news of an end to arrive."""
        wait([process.sentinel for process in self.processes], END_IS_KNOWN_S)
        ended = [process for process in self.processes if process.exitcode is not None]
        if not ended:
            return ""
        if ended[0].exitcode == -signal.SIGKILL:
            how = "was killed (SIGKILL), as the kernel does where memory runs out"
        elif ended[0].exitcode == -signal.SIGBUS:
            how = f"was killed (SIGBUS), as the kernel does where {SHARED_MEMORY} is full"
        else:
            how = f"ended with status {ended[0].exitcode}"
        return f"a data worker (pid {ended[0].pid}) {how}: lower data.num_workers or data.prefetch_mb"


def prefetch_per_worker(
    num_packs: int, bytes_per_pack: float, *, num_workers: int, prefetch_mb: int, ranks_per_node: int = 1
) -> int:
    """How many packs each worker may have under way, so that num_packs are in all, as far as memory allows.

    Clips wait in shared memory, which containers keep small: ValueError where one pack each is too much.
    """
    if not num_workers:
        return 0
    room = shutil.disk_usage(SHARED_MEMORY).free / ranks_per_node
    if num_workers * bytes_per_pack > room:
        raise ValueError(
            f"{SHARED_MEMORY} has {room / 1e6:.0f} MB left for this rank, {num_workers} packs of clips are "
            f"{num_workers * bytes_per_pack / 1e6:.0f} MB: enlarge it (docker run --shm-size), lower "
            "data.num_workers, or read without workers (data.num_workers=0)"
        )
    fitting = int(min(prefetch_mb * 1e6, room) / bytes_per_pack)
    return max(1, min(num_packs, fitting) // num_workers)
