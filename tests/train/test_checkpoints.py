"""A checkpoint counts only when it is complete; what is skipped is named."""

import json
import logging

import pytest
import torch

from train.checkpoints import (
    MANIFEST,
    TrainingState,
    find_fault,
    newest_checkpoint,
    remove_old_checkpoints,
    write_checkpoint,
)


def write(run_dir, step: int):
    weights = {"weight": torch.full((3, 2), float(step))}
    state = TrainingState(step, 2 * step, step, 0, 0, "continuation", "tiny")
    return write_checkpoint(
        run_dir, state, model=weights, ema=weights, optimizer={"lr": 0.1}, dit_config={"a": [1]}
    )


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_off(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def flipped_bit(folder):
    content = bytearray((folder / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(content)


def lost_file(folder):
    (folder / "optimizer.pt").unlink()


def half_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def other_version(folder):
    (folder / MANIFEST).write_text(json.dumps({"schema_version": 99, "files": {}}))


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path, 7)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.state == TrainingState(7, 14, 7, 0, 0, "continuation", "tiny")
    assert torch.equal(checkpoint.weights("ema")["weight"], torch.full((3, 2), 7.0))
    assert checkpoint.optimizer_state() == {"lr": 0.1} and checkpoint.dit_config == {"a": [1]}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_manifest, MANIFEST),
        (cut_off, "model.safetensors"),
        (flipped_bit, "ema.safetensors"),
        (lost_file, "optimizer.pt"),
        (half_manifest, MANIFEST),
        (other_version, "99"),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_and_named(tmp_path, caplog, damage, named):
    write(tmp_path, 1)
    damaged = write(tmp_path, 2).folder
    damage(damaged)
    assert named in find_fault(damaged)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path).state.step == 1
    assert str(damaged) in caplog.text and named in caplog.text


def test_a_failed_write_leaves_the_others_and_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def disk_full(*args):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2368 vs 2260")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match=r"step_00000002: .*unexpected pos.* MiB are free"):
        write(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert newest_checkpoint(tmp_path).state.step == 1


def test_the_manifest_covers_every_file_and_names_a_whole_folder(tmp_path):
    folder = write(tmp_path, 1).folder
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*files, MANIFEST}


def test_the_last_k_are_kept(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".step_00000004.tmp").mkdir()  # left by a killed process
    remove_old_checkpoints(tmp_path, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]


def test_no_checkpoints_is_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
