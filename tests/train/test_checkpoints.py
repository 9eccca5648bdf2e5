"""A checkpoint counts only when it is complete; what is skipped is named."""

import json
import logging

import pytest
import torch

from train.checkpoints import (
    MANIFEST,
    TrainingState,
    find_fault,
    load_trained_weights,
    newest_checkpoint,
    remove_old_checkpoints,
    trained_weights,
    weights_sha256,
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


def half_frozen() -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    net[0].requires_grad_(False)
    return net


def test_only_what_is_trained_is_saved_and_put_back():
    first, second = half_frozen(), half_frozen()
    frozen = second[0].weight.clone()
    weights = trained_weights(first)
    assert weights.keys() == {"1.weight", "1.bias"}
    load_trained_weights(second, weights)
    assert torch.equal(second[1].weight, first[1].weight) and torch.equal(second[0].weight, frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.bias": None}, r"1\.bias has shape none among the saved weights, expected \[1\]"),
        ({"0.weight": torch.zeros(3, 2)}, r"0\.weight has shape \[3, 2\] .* expected none"),
        ({"1.weight": torch.zeros(3, 1)}, r"1\.weight has shape \[3, 1\] .* expected \[1, 3\]"),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(change, message):
    net = half_frozen()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in trained_weights(net).items()} | change
    with pytest.raises(ValueError, match=message):
        load_trained_weights(net, {name: tensor for name, tensor in weights.items() if tensor is not None})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_hash_of_weights_sees_bits_names_and_types():
    net = half_frozen()
    first = weights_sha256(net)
    assert weights_sha256(net) == first
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nextafter(net[0].weight[0, 0], torch.tensor(9.0))
    second = weights_sha256(net)
    renamed, half = torch.nn.ModuleList(net), net.to(torch.bfloat16)
    third = weights_sha256(half)
    assert len({first, second, third}) == 3
    assert weights_sha256(torch.nn.Sequential(torch.nn.Identity(), *renamed)) != third


def test_what_is_left_out_of_the_hash_does_not_change_it():
    net = half_frozen()
    first = weights_sha256(net, leave_out=("0",))
    with torch.no_grad():
        net[0].weight.zero_()
    assert weights_sha256(net, leave_out=("0",)) == first != weights_sha256(net)
