"""slurm/label_shards.sbatch with srun and scontrol that only write down how they were called."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm/label_shards.sbatch"


def submit(tmp_path: Path, *arguments: str, status: int = 0, shortest_s: int = 0, **more: str):
    """(exit status, calls of srun and scontrol); `status` is what the labeling command ends with."""
    for name, ending in (("srun", f"exit {status}"), ("scontrol", "kill $PPID")):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n{ending}\n')
        tool.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "78",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "8",
        "LABEL_SHORTEST_S": str(shortest_s),
    }
    ended = subprocess.run(
        ["bash", SCRIPT, *arguments], env=environment | more, capture_output=True, text=True, timeout=30
    )
    calls = tmp_path / "calls"
    return ended.returncode, calls.read_text().splitlines() if calls.exists() else [], ended.stderr


def test_the_command_that_is_run_is_one_that_could_be_typed(tmp_path):
    status, calls, _ = submit(tmp_path, "label_events", "dataset=a b", "run=r", PYTHON="py")
    assert (status, calls) == (0, ["srun --ntasks=1 py data_pipeline/label_events.py dataset=a b run=r"])


@pytest.mark.parametrize("stopped", [75, 138, 143])
def test_a_task_that_was_told_to_stop_is_queued_again(tmp_path, stopped):
    _, calls, _ = submit(tmp_path, "label_events", status=stopped)
    assert calls[1:] == ["scontrol requeue 70_8"]


@pytest.mark.parametrize(("ended", "shortest_s"), [(0, 0), (1, 0), (137, 0), (75, 300)])
def test_a_task_that_is_done_that_failed_or_that_cannot_begin_is_not(tmp_path, ended, shortest_s):
    status, calls, _ = submit(tmp_path, "label_events", status=ended, shortest_s=shortest_s)
    assert status == ended and len(calls) == 1


def test_a_command_that_is_not_there_is_named(tmp_path):
    status, calls, said = submit(tmp_path, "label_event")
    assert (status, calls) == (1, []) and "data_pipeline/label_event.py" in said


def test_its_lines_for_slurm_give_the_drain_enough_time():
    header = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in header and "--open-mode=append" in header
    [signal] = [line for line in header if line.startswith("--signal")]
    assert (
        signal.startswith("--signal=SIGUSR1@") and int(signal.rpartition("@")[2]) >= 90 + 60
    )  # grace_s, and late
