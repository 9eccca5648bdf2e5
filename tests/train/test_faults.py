"""What goes wrong around a run: the status that a batch script reads, one line that names it, nothing lost.

Of damaged clips see also test_quarantine.py, of checkpoints test_checkpoint_writer.py, of settings
tests/conf/test_command.py and tests/test_bad_input.py, of signals tests/slurm.
"""

import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from conf import command
from conf.command import HARDWARE, STOPPED, UNHEALTHY, run
from data_pipeline.build_index import build_index
from train.run_stage import RunStageConfig, main
from train.saving.checkpoints import newest_checkpoint

ROOT = Path(__file__).parents[2]
STAGE_3 = ["stage=continuation", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3"]
LINE = re.compile(r"^(error|stopped|hardware|unhealthy): .*$", re.MULTILINE)


def complete_checkpoints(run_dir: Path) -> dict[str, dict]:
    """Sizes and SHA-256 of what is saved, each compared with the file."""
    found = {}
    for manifest in sorted(run_dir.glob("checkpoints/step_*/MANIFEST.json")):
        files = json.loads(manifest.read_text())["files"]
        for name, expected in files.items():
            content = (manifest.parent / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == expected["sha256"], f"{manifest.parent / name}"
        found[manifest.parent.name] = files
    return found


def unfinished(three_steps: Path, run_dir: Path) -> dict[str, dict]:
    """A copy of the run that stopped after two of its three steps; returns what it has saved."""
    shutil.copytree(three_steps, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000003")
    return complete_checkpoints(run_dir)


@pytest.fixture
def start(arguments, monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """start(run_dir, *arguments) -> (exit status, the line that says why) of train/run_stage.py."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # as the script itself sets it

    def call(run_dir: Path, *more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["run_stage", *arguments(run_dir, *STAGE_3, *more)])
        capfd.readouterr()
        try:
            run(main, RunStageConfig, "run_stage")
        except SystemExit as exit:
            printed = capfd.readouterr().err
            assert "Traceback" not in printed
            [line] = [match.group() for match in LINE.finditer(printed)]
            return exit.code, line
        return 0, ""

    return call


# The data set


def cut_all(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:1000])


def cut_captions(dataset: Path) -> None:
    [captions] = dataset.glob("captions/truth/*.jsonl")
    captions.write_bytes(captions.read_bytes().replace(b'"schema_version": 1', b'"schema_version": 9'))


def tar_of(dataset: Path) -> Path:
    return dataset / "frames" / "000000.tar"


DATA = {
    "a tar of other bytes": (
        lambda dataset: tar_of(dataset).write_bytes(b"\xff" * tar_of(dataset).stat().st_size),
        r"error: .*clips .*000000\.tar: .*story-world-.*crc32 is \w+, the index expects",
    ),
    "a tar that is cut short": (
        lambda dataset: cut_all(tar_of(dataset)),
        r"error: .*000000\.tar.*(cut short|bytes)",
    ),
    "a missing shard": (
        lambda dataset: tar_of(dataset).unlink(),
        r"error: .*missing.*frames/000000\.tar",
    ),
    "captions of another schema version": (
        cut_captions,
        r"error: .*captions/truth/000000\.jsonl: .*schema version 9 is not known, expected 1",
    ),
    "an index of another version": (
        lambda dataset: (dataset / "index.arrow").write_bytes(b"ARROW2"),
        r"error: .*index\.arrow is damaged",
    ),
}


@pytest.mark.parametrize("fault", DATA)
def test_a_fault_of_the_data_set_is_named_and_the_run_goes_on_once_it_is_mended(
    start, three_steps, dataset, tmp_path, fault
):
    spoil, message = DATA[fault]
    saved = unfinished(three_steps, tmp_path / "run")
    spoiled = shutil.copytree(dataset, tmp_path / "spoiled")
    spoil(spoiled)
    status, line = start(tmp_path / "run", f"data.dataset={spoiled}")
    assert (status, bool(re.search(message, line))) == (1, True), line
    assert complete_checkpoints(tmp_path / "run") == saved
    assert start(tmp_path / "run") == (0, "")
    assert complete_checkpoints(tmp_path / "run") == complete_checkpoints(three_steps)


def test_captions_of_another_schema_version_are_not_indexed(dataset, tmp_path):
    spoiled = shutil.copytree(dataset, tmp_path / "spoiled")
    cut_captions(spoiled)
    with pytest.raises(ValueError, match=r"000000\.jsonl.*schema version 9 is not known, expected 1"):
        build_index(spoiled, "truth")


def test_an_unknown_key_in_a_file_of_settings_is_named(start, three_steps, tmp_path, monkeypatch):
    saved = unfinished(three_steps, tmp_path / "run")
    monkeypatch.setattr(command, "CONF_DIR", shutil.copytree(command.CONF_DIR, tmp_path / "conf"))
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\ndata: {max_tokns: 9}\n")
    status, line = start(tmp_path / "run", "experiment=mine")
    named = "unknown key 'data.max_tokns' for conf/experiment/mine.yaml; did you mean 'data.max_tokens'?"
    assert (status, line) == (1, f"error: {named}")
    assert complete_checkpoints(tmp_path / "run") == saved


# The checkpoints and the disk


def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(start, three_steps, tmp_path):
    """The limit of a process on the size of its files, which fails a write as a full disk does."""
    saved = unfinished(three_steps, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        status, line = start(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and re.search(r"error: could not write .*step_00000003.*File too large", line), line
    assert complete_checkpoints(tmp_path / "run") == saved
    assert start(tmp_path / "run") == (0, "")
    assert complete_checkpoints(tmp_path / "run") == complete_checkpoints(three_steps)


def test_a_checkpoint_of_another_network_is_refused_and_stays(start, three_steps, tmp_path):
    saved = unfinished(three_steps, tmp_path / "run")
    saved_in = tmp_path / "run" / "checkpoints" / "step_00000002"
    status, line = start(tmp_path / "next", "model.num_layers=2", f"init_from={saved_in}")
    assert status == 1 and re.search(r"num_layers=1, .* expects 2", line), line
    status, line = start(tmp_path / "run", "model.num_layers=2")
    assert status == 1 and re.search(r"num_layers=1, found .*num_layers=2", line), line
    assert complete_checkpoints(tmp_path / "run") == saved


# Training itself


def test_gradients_that_stay_infinite_end_the_run_and_leave_what_was_saved(start, three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "run")
    more = ["optimizer.lr=1e30", "optimizer.max_skipped=1", "stage.steps=9"]
    status, line = start(tmp_path / "bad", *more)
    assert status == UNHEALTHY
    assert re.search(r"unhealthy: 2 steps in a row without a finite gradient .* clips? .*story-world-", line)
    assert newest_checkpoint(tmp_path / "bad") is not None
    complete_checkpoints(tmp_path / "bad")


# Processes


@dataclass
class Processes:
    """A run in a process of its own, and what it has started."""

    process: subprocess.Popen
    run_dir: Path
    printed: Path

    def wait_for_checkpoint(self) -> None:
        while not list(self.run_dir.glob("checkpoints/step_*/MANIFEST.json")):
            assert self.process.poll() is None, self.printed.read_text()
            time.sleep(0.02)

    def children(self, of: int, word: str) -> list[int]:
        """Processes that one has started, whose command line has the word."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == of and word in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:  # it has ended meanwhile
                continue
        return found

    def end(self) -> int:
        """The status; TimeoutExpired when it takes longer than a minute."""
        return self.process.wait(timeout=60)

    def reasons(self) -> list[str]:
        return [match.group() for match in LINE.finditer(self.printed.read_text())]


@pytest.fixture
def launch(arguments):
    """launch(run_dir, *arguments) -> train/run_stage.py, running; killed with all it started at the end."""
    launched: list[subprocess.Popen] = []

    def call(run_dir: Path, *more: str) -> Processes:
        words = [sys.executable, "train/run_stage.py", *arguments(run_dir, *STAGE_3, *more)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        printed = run_dir.with_suffix(".stderr")
        with open(printed, "w") as stderr:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stderr=stderr, start_new_session=True
            )
        launched.append(process)
        return Processes(process, run_dir, printed)

    yield call
    for process in launched:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


ENDLESS = ["stage.steps=100000"]
TWO = ["strategy=ddp", "trainer.devices=2"]


def goes_on(start, run_dir: Path) -> bool:
    """Whether one process can take what was saved two steps further."""
    step = newest_checkpoint(run_dir).state.step
    return (
        start(run_dir, f"stage.steps={step + 2}") == (0, "") and newest_checkpoint(run_dir).state.step > step
    )


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_others_within_a_minute(launch, start, tmp_path, signal_number):
    running = launch(tmp_path / "run", *ENDLESS, *TWO)
    running.wait_for_checkpoint()
    [other] = running.children(running.process.pid, "run_stage.py")
    os.kill(other, signal_number)
    assert running.end() == HARDWARE
    [line] = running.reasons()
    assert re.search(r"hardware: .*quiet: rank 1 on .* \(step \d+, ", line), line
    assert complete_checkpoints(tmp_path / "run") and goes_on(start, tmp_path / "run")


@pytest.mark.slow
def test_the_first_rank_may_be_the_lost_one(launch, start, tmp_path):
    running = launch(tmp_path / "run", *ENDLESS, *TWO)
    running.wait_for_checkpoint()
    [other] = running.children(running.process.pid, "run_stage.py")
    running.process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{other}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    [line] = running.reasons()
    assert re.search(r"hardware: .*quiet: rank 0 on .* \(step \d+, ", line), line
    assert complete_checkpoints(tmp_path / "run") and goes_on(start, tmp_path / "run")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_ranks_at_once(launch, start, tmp_path):
    running = launch(tmp_path / "run", *ENDLESS, *TWO)
    running.wait_for_checkpoint()
    for _ in range(2):
        os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.005)
    assert running.end() == STOPPED
    assert all(line.startswith("stopped: ") for line in running.reasons()) and running.reasons()
    assert complete_checkpoints(tmp_path / "run") and goes_on(start, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_data_worker_is_named(launch, start, tmp_path):
    """As the kernel does it when the memory is full."""
    running = launch(tmp_path / "run", *ENDLESS, "data.num_workers=1")
    running.wait_for_checkpoint()
    [worker] = [
        worker
        for server in running.children(running.process.pid, "multiprocessing.forkserver")
        for worker in running.children(server, "")
    ]
    os.kill(worker, signal.SIGKILL)
    assert running.end() == 1
    [line] = running.reasons()
    assert f"a data worker (pid {worker}) was killed (SIGKILL), as the kernel does where memory" in line
    assert complete_checkpoints(tmp_path / "run") and goes_on(start, tmp_path / "run")
