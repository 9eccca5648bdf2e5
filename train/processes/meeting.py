"""Where the ranks of a job tell each other what they found, before any of them relies on a collective."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from torch import distributed

from conf.command import HardwareFault
from conf.verdict import HARDWARE, write_verdict
from train.processes.world import World


class Meeting:
    """A store on the first node; ranks that stay silent are named."""

    def __init__(self, world: World, limit_s: float):
        self.world = world
        self.deadline = time.monotonic() + 0.8 * limit_s  # the watchdog has the last word
        self.store = distributed.TCPStore(
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            int(os.environ.get("MASTER_PORT", 0)),
            world.size,
            is_master=world.rank == 0,
            timeout=timedelta(seconds=limit_s),
            wait_for_workers=False,
        )

    def gather(self, topic: str, value: dict[str, Any]) -> list[dict[str, Any]]:
        """The values of all ranks, in their order, on the first rank; elsewhere the own one.

        HardwareFault on the first rank names those from which nothing came.
        """
        self.store.set(f"{topic}/{self.world.rank}", json.dumps(value))
        if self.world.rank:
            return [value]
        silent = set(range(self.world.size))
        while silent:
            silent -= {rank for rank in silent if self.store.check([f"{topic}/{rank}"])}
            if silent and time.monotonic() > self.deadline:
                names = ", ".join(
                    f"rank {rank} on {host_of(rank, self.world)}" for rank in sorted(silent)[:8]
                )
                raise HardwareFault(
                    f"no word ({topic}) from {len(silent)} of {self.world.size} ranks: {names}"
                )
            time.sleep(0.02)
        return [json.loads(self.store.get(f"{topic}/{rank}")) for rank in range(self.world.size)]

    def agree(self, topic: str) -> bool:
        """The first rank says that it came as far as here; the others wait for that. False: it never did."""
        if self.world.rank == 0:
            self.store.set(topic, "yes")
            self._wait_for_all(topic)
            return True
        with contextlib.suppress(distributed.DistError):  # the first rank has ended, and the store with it
            while time.monotonic() < self.deadline:
                if self.store.check([topic]):
                    self.store.set(f"{topic}/heard/{self.world.rank}", "yes")
                    return True
                time.sleep(0.02)
        return False

    def _wait_for_all(self, topic: str) -> None:
        """The store ends with the first rank, which must not be before all have heard."""
        heard = [f"{topic}/heard/{rank}" for rank in range(1, self.world.size)]
        while heard and not self.store.check(heard) and time.monotonic() < self.deadline:
            time.sleep(0.02)


class Watchdog:
    """As a context: ends this process when it takes longer than limit_s, and says in what it was stuck."""

    def __init__(self, world: World, limit_s: float):
        self.world = world
        self.limit_s = limit_s
        self.phase = "meeting the other ranks"
        self._timer = threading.Timer(limit_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "Watchdog":
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        reason = f"hardware: preflight of {self.world} was still {self.phase} after {self.limit_s:g} s"
        print(reason, file=sys.stderr, flush=True)
        write_verdict(HARDWARE, reason)
        os._exit(HARDWARE)


def host_of(rank: int, world: World) -> str:
    """The host that Slurm gave to a rank, also to one that never came."""
    node, nodes = rank // world.local_size, os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        return f"node {node}"
    names = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True
    ).stdout.split()
    return names[node] if node < len(names) else f"node {node}"
