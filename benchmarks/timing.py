"""Paired timings: the candidates take turns in one process, so that what disturbs one disturbs all."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import diffusers
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate (CPU time of the process on a CPU), and its largest memory."""

    p10: float
    median: float
    p90: float
    peak_gib: float | None  # of a GPU

    def __str__(self) -> str:
        memory = "" if self.peak_gib is None else f"  {self.peak_gib:6.1f} GiB"
        return f"{self.median:9.4f} s  ({self.p10:.4f} to {self.p90:.4f}){memory}"


def take_turns(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Runs every candidate once a round, warmup rounds first."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peaks = dict.fromkeys(candidates, 0.0)
    for number in range(warmup + rounds):
        for name, candidate in candidates.items():
            elapsed, peak = _run(candidate, device)
            if number >= warmup:
                seconds[name].append(elapsed)
                peaks[name] = max(peaks[name], peak)
    return {
        name: Timing(_quantile(times, 0.1), median(times), _quantile(times, 0.9), peaks[name] or None)
        for name, times in seconds.items()
    }


def describe_machine(device: torch.device) -> str:
    """What a reader must know to compare figures."""
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {cudnn}, {versions}"
    return f"{_cpu_name()}, {torch.get_num_threads()} thread(s), {versions}"


def _run(candidate: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds and GiB of one call. CPU time leaves out what other programs take of a shared machine."""
    if device.type != "cuda":
        start = time.process_time()
        candidate()
        return time.process_time() - start, 0.0
    torch.cuda.reset_peak_memory_stats(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    candidate()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated(device) / 2**30


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()
