"""A float32 exponential moving average of the weights that are trained, for samples and hand-over."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class EmaConfig:
    decay: float = 0.999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}, expected at least 0 and below 1")


class Ema:
    """The average starts short and grows: after n updates the decay is min(decay, (1 + n) / (10 + n))."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float):
        named = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self.names = list(named)
        self.parameters = list(named.values())
        self.average = [parameter.detach().float().clone() for parameter in self.parameters]
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [parameter.detach().float() for parameter in self.parameters]
        torch._foreach_lerp_(self.average, weights, 1 - decay)
        self.num_updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the network holds the average; afterwards its own weights again, also after an error."""
        own = [parameter.data for parameter in self.parameters]
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, weights in zip(self.parameters, own, strict=True):
                parameter.data = weights

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], num_updates: int) -> None:
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state[name])
        self.num_updates = num_updates

    def to(self, device: torch.device) -> None:
        self.average = [average.to(device) for average in self.average]
