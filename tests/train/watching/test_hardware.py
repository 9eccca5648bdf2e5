import pytest
import torch

from train.watching.hardware import device_name, peak_flops, peak_memory_gib


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives(name, tflops):
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", [None, "NVIDIA H2000", "NVIDIA T4", "Tesla V100-SXM2-16GB"])
def test_no_speed_is_invented_for_another_device(name):
    assert peak_flops(name) is None
    assert peak_flops(name, tflops=65) == 65e12


def test_a_cpu_has_no_name_and_counts_what_the_process_had_resident():
    cpu = torch.device("cpu")
    before = peak_memory_gib(cpu)
    block = torch.ones(2**27)  # half a GiB
    assert device_name(cpu) is None
    assert 0.01 < before <= peak_memory_gib(cpu) < 100 and len(block)
