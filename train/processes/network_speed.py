"""How fast the ranks exchange data: inside each node, between neighbouring nodes, and all together.

Speeds are bus bandwidths in GB/s, comparable with the data sheet: an all-reduce of n ranks moves
2 (n - 1) / n of its bytes over each link.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from train.processes.world import World

REPEATS = 5
GPU_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20
LIMIT = timedelta(seconds=60)


@dataclass
class PreflightConfig:
    limit_s: float = 120  # after which a rank that is not through is given up
    inside_gb_s: float = (
        20.0  # between the GPUs of a node, at least; NVLink gives 200 and more, PCIe 10 to 20
    )
    between_gb_s: float = 5.0  # from each GPU to the next node, at least; InfiniBand of 400 Gb/s gives 40

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"preflight.{name} is {value}, expected 0 or more")


@dataclass
class Speeds:
    """GB/s as this rank saw them; None where there is no such neighbour."""

    inside: float | None = None
    between: float | None = None
    overall: float | None = None


def measure(world: World, store: distributed.Store, *, on_gpu: bool) -> Speeds:
    """Collective: every rank of the world calls it."""
    if world.size == 1:
        return Speeds()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=distributed.PrefixStore("network", store),
        rank=world.rank,
        world_size=world.size,
        timeout=LIMIT,
    )
    try:
        data = torch.ones((GPU_BYTES if on_gpu else CPU_BYTES) // 4, device=device)
        speeds = Speeds(overall=_all_reduce_speed(data, None, world.size))
        if world.local_size > 1:
            group, _ = distributed.new_subgroups(world.local_size, timeout=LIMIT)
            speeds.inside = _all_reduce_speed(data, group, world.local_size)
        if world.num_nodes > 1:
            speeds.between = _neighbour_speed(data, world)
        return speeds
    finally:
        distributed.destroy_process_group()


def _all_reduce_speed(data: Tensor, group: distributed.ProcessGroup | None, size: int) -> float:
    seconds = _median_seconds(lambda: distributed.all_reduce(data, group=group), data.device)
    return 2 * (size - 1) / size * data.nbytes / seconds / 1e9


def _neighbour_speed(data: Tensor, world: World) -> float:
    """Every rank sends to the same place in the next node while it receives from the one before."""
    received = torch.empty_like(data)
    after = (world.rank + world.local_size) % world.size
    before = (world.rank - world.local_size) % world.size

    def exchange() -> None:
        operations = [
            distributed.P2POp(distributed.isend, data, after),
            distributed.P2POp(distributed.irecv, received, before),
        ]
        for request in distributed.batch_isend_irecv(operations):
            request.wait()

    return data.nbytes / _median_seconds(exchange, data.device) / 1e9


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    durations = []
    for _ in range(REPEATS + 1):  # the first one connects
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return sorted(durations[1:])[REPEATS // 2]


def find_slow(measured: list[Speeds], hosts: list[str], floors: PreflightConfig) -> str | None:
    """The slowest rank below a floor, in words, by the measured speeds of all ranks."""
    found = {"inside": floors.inside_gb_s, "between": floors.between_gb_s}
    for name, floor in found.items():
        speeds = [(getattr(speed, name), rank) for rank, speed in enumerate(measured)]
        slowest, rank = min((pair for pair in speeds if pair[0] is not None), default=(floor, 0))
        if slowest < floor:
            place = f"inside {hosts[rank]}"
            if name == "between":
                num_on_each = hosts.count(hosts[0])
                place = f"between {hosts[rank - num_on_each]} and {hosts[rank]}"
            return (
                f"the network {place} gives {slowest:.1f} GB/s to rank {rank}, expected {floor:g} "
                f"(preflight.{name}_gb_s)"
            )
    return None
