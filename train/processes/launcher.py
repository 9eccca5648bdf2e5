"""How Lightning learns of the other processes: from srun, from torchrun, or by starting them itself."""

import os
import subprocess
import threading
import time
from functools import partial
from typing import Any

from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies.launchers import subprocess_script

from conf.command import HARDWARE, STOPPED, leave_at_once
from train.processes.world import World

GRACE_S = 45  # a rank notices the end of another by itself, and can say more
FIRST_RANK = "STORYANCHORS_FIRST_RANK"  # the process that has started the others


def launch_settings(world: World) -> dict[str, Any]:
    """Arguments of L.Trainer. srun and torchrun decide how many processes there are; else the config does.

    Lightning takes any process with SLURM_NTASKS for one of srun's, also in a shell on a node; its handlers
    of Slurm's signals would save inside the handler and queue the job again, behind the batch script's back.
    """
    settings = {"plugins": [_environment(world)]}
    if world.launcher == "none":
        # Lightning's own watch sends this process SIGKILL within five seconds, also while it saves
        subprocess_script._launch_process_observer = watch_ranks
        if int(os.environ.get("LOCAL_RANK", 0)):
            watch_first_rank(int(os.environ[FIRST_RANK]))
        else:
            os.environ[FIRST_RANK] = str(os.getpid())
        return settings
    return settings | {"devices": world.local_size, "num_nodes": world.num_nodes}


def _environment(world: World) -> ClusterEnvironment:
    if world.launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if world.launcher == "torchrun" else LightningEnvironment()


def watch_ranks(processes: list[subprocess.Popen]) -> None:
    """Ends this process, the first rank, when one that it has started failed and it does not notice."""
    threading.Thread(target=partial(_watch, processes), name="rank watch", daemon=True).start()


def _watch(processes: list[subprocess.Popen]) -> None:
    while not (failed := [process for process in processes if process.poll() not in (None, 0, STOPPED)]):
        if all(process.returncode is not None for process in processes):
            return
        time.sleep(1)
    time.sleep(GRACE_S)
    for process in processes:
        process.kill()
    reason = f"rank {processes.index(failed[0]) + 1} ended with status {failed[0].returncode}"
    if failed[0].returncode == 1:
        leave_at_once(1, f"error: {reason}, and has said why")
    leave_at_once(HARDWARE, f"hardware: {reason}")


def watch_first_rank(process: int) -> None:
    """Ends this process when the one that has started it is gone: it may be waiting for it half an hour."""
    threading.Thread(target=_watch_first, args=(process,), name="first rank watch", daemon=True).start()


def _watch_first(process: int) -> None:
    while os.getppid() == process:
        time.sleep(1)
    time.sleep(GRACE_S)
    leave_at_once(HARDWARE, "hardware: the first rank, which started this one, is gone")
