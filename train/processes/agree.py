"""What the ranks of a run tell each other outside of training: small, rare, alike on every strategy."""

from typing import TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


def num_ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def gather(value: Value) -> list[Value]:
    """Every rank's value, on every rank, in their order."""
    if num_ranks() == 1:
        return [value]
    values: list[Value | None] = [None] * num_ranks()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """The first rank's value, on every rank."""
    if num_ranks() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def largest(numbers: list[int], device: torch.device) -> list[int]:
    """The largest of each number over the ranks: one collective."""
    if num_ranks() == 1:
        return numbers
    tensor = torch.tensor(numbers, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return tensor.tolist()


def raise_together(error: str | None) -> None:
    """OSError on all ranks where one has an error: none is left waiting for the others."""
    errors = [
        f"rank {rank}: {text}" if num_ranks() > 1 else text for rank, text in enumerate(gather(error)) if text
    ]
    if errors:
        raise OSError(errors[0])
