"""Which process this is among all of a run. Standard library only: hundreds of tasks start on two cores.

srun python train/processes/world.py > ranks.jsonl    # a line of each task, as the launcher made it
python train/processes/world.py ranks.jsonl           # are they all there, once, in order? prints the layout
"""

import json
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    launcher: str  # srun | torchrun | none: then this process is alone, or starts the others itself
    rank: int
    size: int
    local_rank: int
    local_size: int
    num_nodes: int
    host: str

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str] = os.environ) -> "World":
        """ValueError for tasks that srun has spread unevenly over its nodes."""
        host = environ.get("SLURMD_NODENAME") or socket.gethostname()
        if "TORCHELASTIC_RUN_ID" in environ:
            size, local_size = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
            rank, local_rank = int(environ["RANK"]), int(environ["LOCAL_RANK"])
            return cls("torchrun", rank, size, local_rank, local_size, size // local_size, host)
        # A batch script and `srun --pty bash` also have SLURM_PROCID, but are no task of many
        if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
            return cls("none", 0, 1, 0, 1, 1, host)
        size, num_nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_STEP_NUM_NODES"])
        if size % num_nodes:
            raise ValueError(f"srun started {size} tasks on {num_nodes} nodes, expected as many on each")
        rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        return cls("srun", rank, size, local_rank, size // num_nodes, num_nodes, host)

    @property
    def node(self) -> int:
        """Ranks are given out node by node, which check_ranks verifies."""
        return self.rank // self.local_size

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on {self.host}"


def describe_task(environ: Mapping[str, str] = os.environ) -> dict[str, str | int]:
    """What a dry run shows of this task: its place, its GPUs, and where it would meet the others."""
    world = asdict(World.of_this_process(environ))
    meeting = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
    return world | {"gpus": environ.get("CUDA_VISIBLE_DEVICES", ""), "meeting": meeting}


def check_ranks(tasks: list[dict[str, str | int]]) -> str:
    """The layout, a line for each node; ValueError names the rank or host that is not as the others."""
    if not tasks:
        raise ValueError("no task has written its line: did srun start any?")
    tasks = sorted(tasks, key=lambda task: task["rank"])
    size, local_size = tasks[0]["size"], tasks[0]["local_size"]
    found = [task["rank"] for task in tasks]
    if found != list(range(size)):
        missing = sorted(set(range(size)) - set(found)) or [rank for rank in found if found.count(rank) > 1]
        raise ValueError(
            f"{len(tasks)} of {size} ranks have written their line; missing or twice: {missing[:8]}"
        )
    if size > 1 and "None" in tasks[0]["meeting"].split(":"):
        raise ValueError(
            f"rank 0 on {tasks[0]['host']} has no MASTER_ADDR or MASTER_PORT: srun has not handed on what "
            "slurm/env.sh sets (expected SLURM_EXPORT_ENV=ALL)"
        )
    for task in tasks:
        here = f"rank {task['rank']} on {task['host']}"
        for name in ("size", "local_size", "num_nodes", "meeting"):
            if task[name] != tasks[0][name]:
                raise ValueError(f"{here} has {name} {task[name]}, rank 0 has {tasks[0][name]}")
        if task["rank"] % local_size != task["local_rank"]:
            raise ValueError(
                f"{here} is number {task['local_rank']} of its node; ranks must be dealt node by node"
            )
        if len(str(task["gpus"]).split(",")) not in (1, local_size):
            raise ValueError(f"{here} sees the GPUs {task['gpus']}, expected its own or {local_size}")
    return "\n".join(_layout(tasks))


def _layout(tasks: list[dict[str, str | int]]) -> list[str]:
    hosts = defaultdict(list)
    for task in tasks:
        hosts[task["host"]].append(task)
    lines = [
        f"{len(tasks)} ranks on {len(hosts)} nodes, {tasks[0]['local_size']} on each; "
        f"they meet at {tasks[0]['meeting']}"
    ]
    for host, here in hosts.items():
        if len(here) != tasks[0]["local_size"]:
            raise ValueError(f"{host} runs {len(here)} ranks, expected {tasks[0]['local_size']}")
        lines.append(
            f"  {host}: ranks {here[0]['rank']}-{here[-1]['rank']}, GPUs {here[0]['gpus'] or 'none'}"
        )
    return lines


def main(arguments: list[str]) -> None:
    if not arguments:
        print(json.dumps(describe_task()), flush=True)
        return
    try:
        lines = Path(arguments[0]).read_text().splitlines()
        print(check_ranks([json.loads(line) for line in lines]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
