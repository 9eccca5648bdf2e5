"""What training changes, as this rank holds it: float32 weights and Adam's moments, one interface for every
strategy, so that the average, checkpoints and samples need not know how a run is sharded.

A fragment is a flat range of one parameter. Every trained number is in exactly one rank's fragments under
ZeRO, and in all ranks' fragments otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them


@dataclass(frozen=True)
class Fragment:
    """The flat range [start, start + n) of the parameter `name` of `shape`; weights (n,) float32, live."""

    name: str
    shape: tuple[int, ...]
    start: int
    weights: Tensor


class TrainedState(ABC):
    """Made after the strategy's setup; its lists are in the order of fragments."""

    fragments: list[Fragment]  # in the order of named_parameters
    is_sharded: bool  # each rank has its own part; otherwise all have all of it

    @staticmethod
    def of(dit: nn.Module, optimizer: torch.optim.Optimizer) -> "TrainedState":
        """ValueError for trained weights that are not float32."""
        from train.processes.zero_state import ReplicatedWeights, ShardedWeights  # which build on this file

        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            return ReplicatedWeights(dit, optimizer)
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return ShardedWeights(dit, optimizer)
        return WholeState(dit, optimizer)

    @abstractmethod
    def moments(self) -> dict[str, list[Tensor]]:
        """{"exp_avg": [...], "exp_avg_sq": [...]}, flat and live; zeros before the first step."""

    @property
    @abstractmethod
    def num_updates(self) -> int:
        """Adam's count of steps."""

    @abstractmethod
    def load(self, weights: list[Tensor], moments: dict[str, list[Tensor]], num_updates: int) -> None:
        """Copies them in; the network then computes with them. Called by all ranks together."""

    @abstractmethod
    def network_holds(self, weights: list[Tensor]) -> AbstractContextManager[None]:
        """Inside, the network computes with these weights; afterwards with its own again, bit for bit.

        Entered and left by all ranks together, and nothing is trained inside.
        """


class WholeState(TrainedState):
    """Every rank holds everything: one process, or DDP."""

    is_sharded = False

    def __init__(self, dit: nn.Module, optimizer: torch.optim.Optimizer):
        named = {name: weight for name, weight in dit.named_parameters() if weight.requires_grad}
        for name, weight in named.items():
            if weight.dtype != torch.float32:
                raise ValueError(f"{name} is trained in {weight.dtype}, expected float32")
        self.parameters = list(named.values())
        self.optimizer = optimizer
        self.fragments = [
            Fragment(name, tuple(weight.shape), 0, weight.data.view(-1)) for name, weight in named.items()
        ]
        for weight in self.parameters:  # as AdamW's first step does, which finds them then
            zeros = {name: torch.zeros_like(weight, requires_grad=False) for name in MOMENTS}
            optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **zeros}

    def moments(self) -> dict[str, list[Tensor]]:
        state = self.optimizer.state
        return {name: [state[weight][name].view(-1) for weight in self.parameters] for name in MOMENTS}

    @property
    def num_updates(self) -> int:
        return int(self.optimizer.state[self.parameters[0]]["step"])

    def load(self, weights: list[Tensor], moments: dict[str, list[Tensor]], num_updates: int) -> None:
        copy_all([fragment.weights for fragment in self.fragments], weights)
        for name, own in self.moments().items():
            copy_all(own, moments[name])
        for weight in self.parameters:
            self.optimizer.state[weight]["step"].fill_(num_updates)

    @contextmanager
    def network_holds(self, weights: list[Tensor]) -> Iterator[None]:
        own = [parameter.data for parameter in self.parameters]
        for parameter, flat in zip(self.parameters, weights, strict=True):
            parameter.data = flat.view(parameter.shape)
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies flat tensors one by one, between devices and types; ValueError where their sizes differ."""
    for target, source in zip(targets, sources, strict=True):
        if target.shape != source.shape:
            raise ValueError(f"a fragment has {len(source)} numbers, expected {len(target)}")
        target.copy_(source)
