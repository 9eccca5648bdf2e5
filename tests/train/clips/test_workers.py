"""Worker processes: what kills one is said in a line, stop signals pass them by, and none outlives its run.

A script with the workers of a real PlannedLoader runs as a process of its own.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.clips.workers import prefetch_per_worker

ROOT = Path(__file__).parents[3]
SCRIPT = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
import torch
from train.clips.loader import ClipBatch, PlannedLoader
from train.clips.quarantine import Quarantine

class Clips:
    def __getitem__(self, number):
        if number == 2 and sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2 and sys.argv[1] == "hangs":
            time.sleep(600)
        return ClipBatch([torch.zeros(1000)], 1, number)

if __name__ == "__main__":
    loader = PlannedLoader(
        Clips(), lambda position: iter(range(position, 1000)), position=lambda: 0, num_packs=lambda: 1000,
        quarantine=Quarantine(Path("."), 0, 0.001), num_workers=2, prefetch=2,
    )
    try:
        for batch in loader:
            print(batch.next_position, os.getpid(), flush=True)
            if sys.argv[1] == "is killed" and batch.next_position == 1:
                time.sleep(1)  # its next packs are ready, and are fetched from it
                for worker in multiprocessing.active_children():
                    worker.kill()
            if sys.argv[1] == "hangs" and batch.next_position == 1:
                raise ValueError("the training loop failed")
            time.sleep(0.02)
    except ValueError as error:
        print("error:", error, flush=True)
        sys.exit(1)
"""


@pytest.fixture
def start(tmp_path):
    """start(what) runs the script in a session of its own, and ends what is left of it afterwards."""
    script, started = tmp_path / "script.py", []
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(what: str) -> subprocess.Popen:
        command = [sys.executable, str(script), what]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment, cwd=tmp_path
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def members(session: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, in_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(in_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "is killed"])
def test_a_worker_that_is_killed_is_an_error_in_one_line_and_no_hang(start, how):
    process = start(how)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "was killed (SIGKILL), as the kernel does where memory runs out" in output
    assert "lower data.num_workers or data.prefetch_mb" in output
    wait_for(lambda: not members(process.pid))


@pytest.mark.slow
def test_a_run_that_fails_does_not_wait_for_a_worker_that_hangs(start):
    process = start("hangs")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1 and "the training loop failed" in output
    wait_for(lambda: not members(process.pid))


@pytest.mark.slow
def test_workers_do_not_notice_stop_signals_and_go_with_a_run_that_is_killed(start):
    process = start("works")
    for line in process.stdout:
        if line.startswith("5 "):
            break
    others = set(members(process.pid)) - {process.pid}
    assert len(others) >= 3  # two workers and the fork server
    for pid in others:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
    for line in process.stdout:
        if line.startswith("60 "):
            break
    assert others <= set(members(process.pid))
    process.kill()
    wait_for(lambda: not members(process.pid))


def test_prefetch_is_what_the_plan_looks_ahead_as_far_as_memory_allows():
    assert prefetch_per_worker(16, 1e6, num_workers=2, prefetch_mb=4096) == 8
    assert prefetch_per_worker(16, 1e6, num_workers=2, prefetch_mb=5) == 2
    assert prefetch_per_worker(1, 1e6, num_workers=4, prefetch_mb=4096) == 1
    with pytest.raises(ValueError, match=r"/dev/shm has .* MB left for this rank"):
        prefetch_per_worker(1, 1e13, num_workers=4, prefetch_mb=4096)
