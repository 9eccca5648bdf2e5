"""What the machine under a rank can do and holds: its peak speed, where it is known, and its memory."""

import resource
import sys

import torch

# Dense bfloat16 TFLOP/s without sparsity, from the makers' data sheets. The first name found in the
# device's own wins, so longer names stand before shorter ones.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.05,
    "A40": 149.7,
    "RTX 4090": 165.2,
    "MI300X": 1307.4,
}


def peak_flops(device_name: str | None, tflops: float | None = None) -> float | None:
    """FLOP/s of one device that MFU is a share of: tflops where given, else by name; None = not known."""
    if tflops is not None:
        return tflops * 1e12
    words = f" {device_name or ''} ".replace("-", " ")
    found = [peak for name, peak in PEAK_TFLOPS.items() if f" {name} " in words]
    return found[0] * 1e12 if found else None


def device_name(device: torch.device) -> str | None:
    """The maker's name of a GPU; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def start_peak_memory(device: torch.device) -> None:
    """From here on, peak_memory_gib counts anew; a CPU process has one peak for its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use: what torch allocated on a GPU, or what a CPU process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    units_per_gib = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gib
