"""A second job on the same run folder is refused and told who is there; a dead one leaves no lock."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from train.saving.run_lock import LOCK, run_lock

ROOT = Path(__file__).parents[3]
HOLD = "import sys, pathlib, train.saving.run_lock as r\nwith r.run_lock(pathlib.Path(sys.argv[1])): "


def hold(run_dir: Path, then: str = "print('held', flush=True); sys.stdin.read()", **variables: str):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(run_dir)],
        cwd=ROOT, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_and_told_who_is_there(tmp_path):
    process = hold(tmp_path / "run", SLURM_JOB_ID="4711")
    with pytest.raises(ValueError) as error, run_lock(tmp_path / "run"):
        pass
    for word in (str(tmp_path / "run"), "job 4711", f"process {process.pid}", socket.gethostname()):
        assert word in str(error.value)
    process.communicate("")
    with run_lock(tmp_path / "run"):
        pass


def test_neither_a_killed_job_nor_its_orphans_keep_the_lock(tmp_path):
    (tmp_path / "run").mkdir()
    fork = "import os, time; os.fork() or time.sleep(30); print('held', flush=True); sys.stdin.read()"
    process = hold(tmp_path / "run", fork)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with run_lock(tmp_path / "run"):
        pass


def test_a_command_that_writes_nothing_leaves_no_folder(tmp_path):
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).is_file()
    assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").touch()
    with (
        pytest.raises(NotADirectoryError, match="run is a file, expected a folder"),
        run_lock(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named():
    with (
        pytest.raises(OSError, match="could not make run_dir /proc/no-run: ") as error,
        run_lock(Path("/proc/no-run")),
    ):
        pass
    assert error.value.errno == errno.ENOENT
