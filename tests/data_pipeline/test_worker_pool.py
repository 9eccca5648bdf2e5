import errno
import os
import signal
import time

import pytest

from data_pipeline.worker_pool import run_isolated


def outcomes(work, tasks, workers=2, timeout_s=30.0) -> dict:
    return dict(run_isolated(work, tasks, workers=workers, timeout_s=timeout_s, tick=lambda: None))


def test_a_process_that_dies_takes_nothing_with_it(tmp_path):
    def work(task: str) -> None:
        if task == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "exit":
            os._exit(3)
        if task == "sleep":
            time.sleep(60)
        (tmp_path / task).touch()

    tasks = ["a", "crash", "b", "exit", "sleep", "c"]
    found = outcomes(work, tasks, timeout_s=1.0)
    assert found == {
        "a": None,
        "b": None,
        "c": None,
        "crash": "its decoder was ended by SIGKILL",
        "exit": "its decoder ended with status 3",
        "sleep": "not done after 1 s (timeout_s)",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_full_disk_ends_the_job_and_its_processes(tmp_path):
    def work(task: int) -> None:
        if task == 0:
            raise OSError(errno.ENOSPC, "No space left on device", "x.tar")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(OSError, match="No space left on device"):
        outcomes(work, [1, 0])
    assert time.monotonic() - started < 20


def test_an_unexpected_error_is_named_and_does_not_stop_the_others():
    def work(task: int) -> None:
        if task == 1:
            raise KeyError("colour")

    assert outcomes(work, [1, 2]) == {1: "unexpected KeyError: 'colour'", 2: None}
