"""What torch raises is told apart: a machine's fault, the user's, ours."""

import errno

import pytest
import torch
from torch import distributed

from conf.command import HardwareFault
from train.processes.hardware_faults import hardware_faults

HARDWARE = [
    distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited"),
    distributed.DistNetworkError("The client socket has timed out after 60000ms"),
    torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ..."
    ),
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
    ),
    OSError(errno.ESTALE, "Stale file handle"),
    TimeoutError(errno.ETIMEDOUT, "timed out"),
]
NOT_HARDWARE = [
    RuntimeError("the backend gloo does not know this option"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    FileNotFoundError(errno.ENOENT, "No such file", "a.tar"),
    ValueError("found 3, expected 4"),
    KeyError("latents"),
]


@pytest.mark.parametrize("error", HARDWARE)
def test_a_machines_fault_names_rank_and_host(error, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(HardwareFault, match="rank 0 of 1 on n7") as found, hardware_faults():
        raise error
    assert "\n" not in str(found.value) and found.value.__cause__ is error


@pytest.mark.parametrize("error", NOT_HARDWARE)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as found, hardware_faults():
        raise error
    assert found.value is error


def test_of_a_long_message_the_first_sentence_is_told_in_ascii():
    text = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1"
    with pytest.raises(HardwareFault) as found, hardware_faults():
        raise RuntimeError(f"{text}. \U0001f622 This may mean that ... \nand more")
    assert str(found.value).endswith(f": {text}")


def test_too_little_gpu_memory_is_for_the_user_to_mend():
    with pytest.raises(ValueError, match="lower data"), hardware_faults():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
