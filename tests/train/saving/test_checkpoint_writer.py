"""A checkpoint is written whole or not at all, and while it is written memory may change."""

import json
import logging
import resource
import threading

import pytest
import torch

from train.saving import checkpoint_writer
from train.saving.checkpoint_writer import CheckpointWriter
from train.saving.checkpoints import MANIFEST, CheckpointConfig, newest_checkpoint
from train.saving.tensor_ranges import TensorRange

KEEP = CheckpointConfig(keep_last=2)


def ranges(tensor: torch.Tensor, name: str = "weight") -> list[TensorRange]:
    return [TensorRange(name, tuple(tensor.shape), 0, tensor.view(-1))]


def begin(writer: CheckpointWriter, step: int, tensor: torch.Tensor) -> None:
    writer.begin(step, {"model-00000-of-00001.safetensors": ranges(tensor)}, {"state.json": "{}\n"})


def save(run_dir, step: int, config: CheckpointConfig = KEEP) -> None:
    writer = CheckpointWriter(run_dir, "attempt")
    begin(writer, step, torch.full((3, 2), float(step)))
    writer.commit(writer.wait().files, config)
    writer.close()


def names(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_changes_after_begin_is_not_what_is_saved(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoint_writer.write_ranges
    monkeypatch.setattr(checkpoint_writer, "write_ranges", lambda *args: go_on.wait(10) and write(*args))
    writer, weight = CheckpointWriter(tmp_path, "attempt"), torch.ones(3, 2)
    begin(writer, 1, weight)
    assert writer.is_writing  # and begin has returned
    weight.fill_(2)
    go_on.set()
    writer.commit(writer.wait().files, KEEP)
    writer.close()
    assert newest_checkpoint(tmp_path).weights("model")["weight"].eq(1).all()


def test_nothing_is_a_checkpoint_before_it_is_committed(tmp_path):
    writer = CheckpointWriter(tmp_path, "attempt")
    begin(writer, 1, torch.ones(2))
    files = writer.wait().files
    assert newest_checkpoint(tmp_path) is None
    writer.commit(files, KEEP)
    assert newest_checkpoint(tmp_path).folder.name == "step_00000001"
    writer.close()


def test_the_manifest_covers_every_file_and_names_a_whole_folder(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_00000001"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*files, MANIFEST}


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_00000001" / "state.json").unlink()
    save(tmp_path, 1)
    assert newest_checkpoint(tmp_path).folder.name == "step_00000001"
    assert names(tmp_path) == ["newest.json", "step_00000001"]


def test_the_last_k_and_the_milestones_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, CheckpointConfig(keep_last=2, keep_every_n_steps=3))
    kept = ["step_00000003", "step_00000006", "step_00000007"]
    assert names(tmp_path) == ["newest.json", *kept]


@pytest.fixture
def small_files():
    """No file may grow beyond 4 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_says_where_and_how_much_and_leaves_the_others(tmp_path, small_files):
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, "attempt")
    begin(writer, 2, torch.ones(5000))
    error = writer.wait().error
    assert "step_00000002" in error and "model-00000-of-00001.safetensors: File too large" in error
    assert "needs 20000 bytes" in error and "bytes were free there" in error
    writer.give_up()
    writer.close()
    assert names(tmp_path) == ["newest.json", "step_00000001"]
    assert newest_checkpoint(tmp_path).folder.name == "step_00000001"


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise PermissionError(13, "not yours", "step_00000001")

    monkeypatch.setattr(checkpoint_writer, "remove_old_checkpoints", refuse)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 1)
    assert "could not remove an old checkpoint" in caplog.text and "step_00000001" in caplog.text
