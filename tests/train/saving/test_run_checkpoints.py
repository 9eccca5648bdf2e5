"""When a run saves, what it goes on from, and when it refuses to."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.command import HardwareFault, Stopped
from train.ema import Ema
from train.saving import checkpoint_writer, run_checkpoints
from train.saving.checkpoints import MANIFEST, newest_checkpoint
from train.story_module import NonFiniteGradients

ROOT = Path(__file__).parents[3]
STAGE_3 = ["stage=continuation", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3"]


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def flip_a_bit(folder: Path, kind: str = "optimizer") -> None:
    [path] = folder.glob(f"{kind}-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def two_steps(three_steps, tmp_path) -> Path:
    """The finished run without its last checkpoint: it has a step to do."""
    run_dir = tmp_path / "run"
    shutil.copytree(three_steps, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000003")
    return run_dir


def bits(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / MANIFEST).read_text())["files"]


def test_a_damaged_checkpoint_is_named_set_aside_and_made_again(train, three_steps, two_steps, caplog):
    flip_a_bit(two_steps / "checkpoints" / "step_00000002")
    with caplog.at_level("INFO"):
        train(two_steps, *STAGE_3)
    assert "step_00000002: optimizer-00000-of-00001.safetensors is damaged" in caplog.text
    assert f"going on from {two_steps / 'checkpoints' / 'step_00000001'}" in caplog.text
    assert (two_steps / "checkpoints" / "damaged_step_00000002").is_dir()
    assert bits(two_steps, 2) == bits(three_steps, 2) and bits(two_steps, 3) == bits(three_steps, 3)


def test_a_finished_run_whose_end_is_damaged_makes_it_again(train, three_steps, tmp_path, capsys):
    run_dir = shutil.copytree(three_steps, tmp_path / "run")
    flip_a_bit(run_dir / "checkpoints" / "step_00000003")
    train(run_dir, *STAGE_3)
    assert "has done its 3 steps" not in capsys.readouterr().out
    assert (run_dir / "checkpoints" / "damaged_step_00000003").is_dir()
    assert bits(run_dir, 3) == bits(three_steps, 3)


def test_a_run_whose_last_step_is_skipped_is_not_done(train, tmp_path):
    more = [*STAGE_3, "stage.steps=2", "optimizer.lr=1e30"]  # the second step has no finite gradient
    for _ in range(2):
        with pytest.raises(NonFiniteGradients, match="after step 2 of 2 the stage is not done: its last 1"):
            train(tmp_path / "run", *more)
        assert steps(tmp_path / "run") == [1]


def test_a_stage_cut_short_at_a_skipped_step_is_not_done_either(train, tmp_path):
    with pytest.raises(NonFiniteGradients):
        train(tmp_path / "run", *STAGE_3, "stage.steps=3", "optimizer.lr=1e30")
    assert steps(tmp_path / "run") == [1, 2]
    with pytest.raises(NonFiniteGradients, match="step_00000002 is no end of a stage: its last 1"):
        train(tmp_path / "run", *STAGE_3, "stage.steps=2", "optimizer.lr=1e30")


def test_an_average_that_is_not_finite_is_never_saved(train, tmp_path, monkeypatch):
    update = Ema.update

    def spoil(self):
        update(self)
        if self.num_updates == 2:
            self.average[0][0] = float("nan")

    monkeypatch.setattr(Ema, "update", spoil)
    with pytest.raises(NonFiniteGradients, match="after step 2 of 3 weights or their average are not finite"):
        train(tmp_path / "run", *STAGE_3)
    assert steps(tmp_path / "run") == [1]


@pytest.mark.parametrize("kind", ["state.json", "optimizer"])
def test_a_run_whose_checkpoints_all_are_damaged_does_not_start_anew(train, two_steps, kind):
    for step in (1, 2):
        folder = two_steps / "checkpoints" / f"step_{step:08d}"
        (folder / kind).unlink() if kind.endswith("json") else flip_a_bit(folder, kind)
    with pytest.raises(
        ValueError, match=r"no checkpoint of .*step_00000002: .*step_00000001: .*resume=never"
    ):
        train(two_steps, *STAGE_3)
    assert steps(two_steps) == [1, 2]
    train(two_steps, *STAGE_3, "resume=never")
    names = {path.name for path in (two_steps / "checkpoints").iterdir()}
    assert names >= {"step_00000003", "damaged_step_00000001", "damaged_step_00000002"}


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(train, two_steps):
    for step in (1, 2):
        shutil.rmtree(two_steps / "checkpoints" / f"step_{step:08d}")
    with pytest.raises(
        ValueError, match=r"has had a checkpoint of step 3, and there is none now.*resume=never"
    ):
        train(two_steps, *STAGE_3)


def test_a_newer_checkpoint_that_is_gone_is_noticed(train, two_steps, caplog):
    with caplog.at_level("WARNING"):
        train(two_steps, *STAGE_3)
    assert "step 3 was saved, and is no more: going on from step 2" in caplog.text


def test_a_run_killed_before_its_first_checkpoint_starts_again(train, three_steps, two_steps):
    shutil.rmtree(two_steps / "checkpoints")
    train(two_steps, *STAGE_3)
    assert bits(two_steps, 3) == bits(three_steps, 3)


def test_milestones_are_saved_and_kept(train, tmp_path):
    keep = ["checkpoint.every_n_steps=3", "checkpoint.keep_last=1", "checkpoint.keep_every_n_steps=2"]
    train(tmp_path / "run", "stage=continuation", "stage.steps=7", *keep)
    assert steps(tmp_path / "run") == [2, 4, 6, 7]


def test_a_checkpoint_is_due_after_so_many_minutes(train, tmp_path, monkeypatch):
    monkeypatch.setattr(run_checkpoints.time, "monotonic", iter(range(0, 10**6, 40)).__next__)  # 40 s a look
    keep = ["checkpoint.every_minutes=1", "checkpoint.keep_last=9"]
    train(tmp_path / "run", "stage=continuation", "stage.steps=6", *keep)
    assert len(steps(tmp_path / "run")) > 1


def ask(run_dir: Path, monkeypatch, name: str, at_step: int) -> None:
    """Puts the file `name` into the run folder while the step is trained."""
    original = run_checkpoints.RunCheckpoints.wishes

    def wishes(self, trainer):
        if trainer.global_step == at_step:
            (run_dir / name).touch()
        return original(self, trainer)

    monkeypatch.setattr(run_checkpoints.RunCheckpoints, "wishes", wishes)


def test_touch_save_saves_and_goes_on(train, tmp_path, monkeypatch):
    ask(tmp_path / "run", monkeypatch, "save", at_step=2)
    train(tmp_path / "run", "stage=continuation", "stage.steps=5")
    assert steps(tmp_path / "run") == [2, 5]
    assert not (tmp_path / "run" / "save").exists()


def test_touch_save_quit_saves_and_ends(train, tmp_path, monkeypatch):
    ask(tmp_path / "run", monkeypatch, "save_quit", at_step=2)
    with pytest.raises(Stopped, match="save_quit after step 2"):
        train(tmp_path / "run", "stage=continuation", "stage.steps=5")
    assert steps(tmp_path / "run") == [2]
    assert not (tmp_path / "run" / "save_quit").exists()


def test_what_an_earlier_start_was_asked_for_does_not_end_this_one(train, two_steps, caplog):
    for name in ("save", "save_quit"):
        (two_steps / name).touch()
    with caplog.at_level("INFO"):
        train(two_steps, *STAGE_3, "stage.steps=4")
    assert (
        f"removed {two_steps / 'save_quit'}" in caplog.text
        and f"removed {two_steps / 'save'}:" in caplog.text
    )
    assert steps(two_steps)[-1] == 4


def test_a_disk_that_is_full_at_the_start_is_named_with_what_was_written(train, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # which fails a write as a full disk does
    for size, name in ((0, r"run/\.lock"), (1000, "the codec and the caption encoder to .*run")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=f"could not write .*{name}: .*File too large"):
                train(tmp_path / "run", "stage=continuation")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_trainers_time_limit_saves_and_says_so(train, tmp_path):
    more = ["stage=continuation", "stage.steps=100000", "+trainer.max_time='00:00:00:02'"]
    with pytest.raises(Stopped, match=r"trainer\.max_time after step"):
        train(tmp_path / "run", *more)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.state.step >= 1 and checkpoint.state.position > 0


def test_a_signal_before_the_first_step_ends_the_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(run_checkpoints, "restore", None)  # nothing to restore
    original = run_checkpoints.RunCheckpoints.on_train_start

    def on_train_start(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, trainer, module)

    monkeypatch.setattr(run_checkpoints.RunCheckpoints, "on_train_start", on_train_start)
    with pytest.raises(Stopped, match="SIGTERM after step 0"):
        train(tmp_path / "run", "stage=continuation")
    assert newest_checkpoint(tmp_path / "run") is None


def fail_at_step_2(monkeypatch, number: int, words: str) -> None:
    write = checkpoint_writer.write_ranges

    def write_ranges(path, ranges):
        if "step_00000002" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"half")
            raise OSError(number, words)
        return write(path, ranges)

    monkeypatch.setattr(checkpoint_writer, "write_ranges", write_ranges)


def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoints(
    train, three_steps, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at_step_2(patch, errno.ENOSPC, "No space left on device")
        told = r"step_00000002.*optimizer.*No space left on device.*needs \d+ bytes, \d+ bytes were free"
        with pytest.raises(OSError, match=told):
            train(run_dir, *STAGE_3)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "newest.json",
        "step_00000001",
    ]
    train(run_dir, *STAGE_3)
    assert bits(run_dir, 3) == bits(three_steps, 3)


def test_a_file_system_that_fails_for_a_while_is_hardware_not_the_user(train, tmp_path, monkeypatch):
    fail_at_step_2(monkeypatch, errno.EIO, "Input/output error")
    with pytest.raises(HardwareFault, match="Input/output error"):
        train(tmp_path / "run", *STAGE_3)
    assert steps(tmp_path / "run") == [1]


def test_training_goes_on_while_a_checkpoint_is_written(train, three_steps, tmp_path, monkeypatch):
    write = checkpoint_writer.write_ranges
    trained: list[int] = []
    seen: dict[str, int] = {}

    def slow(path, ranges):
        if "step_00000001" in str(path) and path.name.startswith("model"):
            while max(trained) < 2:  # waits for the next step, which must not wait for it
                time.sleep(0.01)
            seen["step"] = max(trained)
        return write(path, ranges)

    original = run_checkpoints.RunCheckpoints.on_train_batch_end

    def on_train_batch_end(self, trainer, *args):
        trained.append(trainer.global_step)
        original(self, trainer, *args)

    monkeypatch.setattr(checkpoint_writer, "write_ranges", slow)
    monkeypatch.setattr(run_checkpoints.RunCheckpoints, "on_train_batch_end", on_train_batch_end)
    train(tmp_path / "run", *STAGE_3)
    assert seen["step"] == 2
    assert bits(tmp_path / "run", 1) == bits(three_steps, 1)


def test_a_second_job_on_the_run_is_refused(train, tmp_path):
    then = "print(flush=True); sys.stdin.read()"
    hold = (
        f"import pathlib, sys, train.saving.run_lock as r\nwith r.run_lock(pathlib.Path(sys.argv[1])): {then}"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(ValueError, match=f"is in use by process {first.pid} on"):
        train(tmp_path / "run", "stage=continuation")
    first.communicate()
