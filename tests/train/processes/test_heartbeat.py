"""Ranks are processes here, as a thread can neither be killed nor stopped."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from conf.command import HARDWARE, HardwareFault, leave_at_once
from train.processes.heartbeat import Heartbeat


def live(folder: Path, rank: int, world_size: int, task: str) -> None:
    """A rank that begins, then waits for ever, works for two seconds, or fails."""
    sys.stderr = open(folder / f"errors_{rank}", "w", buffering=1)
    heartbeat = Heartbeat(folder, lambda line: leave_at_once(HARDWARE, line), period_s=0.4, stall_s=1.0)
    heartbeat.start("a run", rank, world_size)
    with heartbeat.named():
        heartbeat.note("in the step", 7)
        if task == "fault":
            time.sleep(0.5)
            raise HardwareFault("connection closed")
        if task == "error":
            raise ValueError("no such clip")
        if task == "wait":
            time.sleep(30)
        for step in range(8, 28):
            heartbeat.note("in the step", step)
            time.sleep(0.1)


@pytest.fixture
def ranks(tmp_path):
    """ranks(*tasks): a process for each, all of which have begun to beat."""
    processes = []

    def start(*tasks: str, world_size: int = 3) -> list[multiprocessing.Process]:
        for rank, task in enumerate(tasks):
            arguments = (tmp_path, rank, world_size, task)
            processes.append(multiprocessing.get_context("fork").Process(target=live, args=arguments))
            processes[-1].start()
        while any(beat_of(tmp_path, rank)["step"] < 7 for rank in range(len(tasks))):
            time.sleep(0.02)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.join()


def beat_of(folder: Path, rank: int) -> dict:
    try:
        return json.loads((folder / "heartbeats" / f"rank_{rank:05d}.json").read_text())
    except FileNotFoundError:
        return {"step": -1}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_the_lowest_living_rank_names_who_went_quiet_and_ends_the_run(ranks, tmp_path, sign):
    processes = ranks("wait", "wait", "wait")
    os.kill(processes[0].pid, sign)
    processes[1].join(timeout=20)
    assert processes[1].exitcode == HARDWARE
    errors = (tmp_path / "errors_1").read_text()
    assert "quiet: rank 0 on " in errors and "(step 7, in the step, " in errors
    assert "rank 2" not in errors


def test_a_fault_leaves_with_the_names_of_those_who_cannot_answer(ranks, tmp_path):
    processes = ranks("fault", "wait", "work")
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[0].join(timeout=20)
    errors = (tmp_path / "errors_0").read_text()
    assert "HardwareFault: quiet: rank 1 on " in errors and "; connection closed" in errors
    assert "rank 2" not in errors


def test_a_rank_that_failed_by_itself_is_named_with_its_error(ranks, tmp_path):
    processes = ranks("wait", "error", "wait")
    processes[0].join(timeout=20)
    assert processes[0].exitcode == HARDWARE
    errors = (tmp_path / "errors_0").read_text()
    assert "quiet: rank 1 on" in errors and "failed: no such clip" in errors


def test_ranks_that_work_and_end_are_let_alone(ranks, tmp_path):
    for rank, process in enumerate(ranks("work", "work", "work")):
        process.join(timeout=20)
        assert process.exitcode == 0
        beat = beat_of(tmp_path, rank)
        assert (beat["phase"], beat["step"], beat["rank"]) == ("ended", 27, rank)


def test_beats_of_an_earlier_run_are_not_taken_for_ranks_that_died(ranks, tmp_path):
    (tmp_path / "heartbeats").mkdir()
    old = {"run": "an earlier run", "rank": 1, "host": "n", "pid": 1, "step": 3, "phase": "x"}
    path = tmp_path / "heartbeats" / "rank_00001.json"
    path.write_text(json.dumps(old | {"since": 0.0, "time": 0.0}))
    [process] = ranks("wait", world_size=2)
    process.join(timeout=3)
    assert process.is_alive()
