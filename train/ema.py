"""A float32 exponential moving average of the weights that are trained, for samples and hand-over."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from train.processes.trained_state import TrainedState, copy_all


@dataclass
class EmaConfig:
    decay: float = 0.999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}, expected at least 0 and below 1")


class Ema:
    """average has a flat tensor for each fragment of this rank: sharded where the trained state is.

    It starts short and grows: after n updates the decay is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, state: TrainedState, decay: float):
        self.state = state
        self.average = [fragment.weights.clone() for fragment in state.fragments]
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [fragment.weights for fragment in self.state.fragments]
        torch._foreach_lerp_(self.average, weights, 1 - decay)
        self.num_updates += 1

    def load(self, average: list[Tensor], num_updates: int) -> None:
        copy_all(self.average, average)
        self.num_updates = num_updates

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the average; see TrainedState.network_holds."""
        return self.state.network_holds(self.average)
