"""Which part of a model is on the device when, and what to lower when memory does not suffice.

resident: all parts stay on the device. offload: a part is there only while it works: the caption encoder
before the sampling, the network during it, the codec before (given frames) and after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MEMORY_MODES = ("resident", "offload")


class OutOfMemory(ValueError):
    """What was asked for does not fit into the memory; the message says what to lower."""


@contextmanager
def at_work(part, device: torch.device, memory: str) -> Iterator[None]:
    """The part is on the device inside; with memory offload it leaves for the CPU afterwards."""
    try:
        if memory == "offload":
            part.to(device)
        yield
    finally:
        if memory == "offload":
            part.to("cpu")


@contextmanager
def out_of_memory_explained(task: str, advice: list[str]) -> Iterator[None]:
    """Turns the device's or the CPU's lack of memory into OutOfMemory: what was done, and what would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory while {task}; what helps: {', '.join(advice)}") from error


def memory_advice(
    device: torch.device, dtype: torch.dtype, memory: str, *, num_requests: int = 1, loading: bool = False
) -> list[str]:
    """What a person can lower, in the order of what it costs them; nothing that is set already."""
    advice = ["fewer stories in one call"] if num_requests > 1 else []
    if dtype == torch.float32:
        advice.append("dtype=bfloat16")
    if memory == "resident" and device.type != "cpu":
        advice.append("memory=offload")
    if loading:
        return advice or ["a smaller model or a larger machine"]
    return [*advice, "fewer frames at once (window=)", "a smaller height and width"]


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "bad_alloc"))
