"""A checkpoint counts only when it is complete; what is skipped is named."""

import json
import logging

import pytest
import torch

from train.saving.checkpoint_writer import CheckpointWriter, describe_state
from train.saving.checkpoints import (
    MANIFEST,
    Checkpoint,
    CheckpointConfig,
    TrainingState,
    checkpoint_to_take,
    expected_step,
    find_damage,
    find_fault,
    hashed_files,
    load_trained_weights,
    newest_checkpoint,
    remove_leftovers,
    set_aside,
    trained_weights,
    weights_sha256,
)
from train.saving.tensor_ranges import TensorRange

MODEL, OPTIMIZER = "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"


def write(run_dir, step: int, skipped: int = 0) -> Checkpoint:
    kinds = ("model", "ema", "optimizer")
    values = torch.full((6,), float(step))
    state = TrainingState(step, 2 * step, step, step, skipped, 0, "continuation", "tiny")
    writer = CheckpointWriter(run_dir, "attempt")
    files = {
        f"{kind}-00000-of-00001.safetensors": [TensorRange("weight", (3, 2), 0, values)] for kind in kinds
    }
    writer.begin(step, files, describe_state(state, {"a": [1]}))
    checkpoint = writer.commit(writer.wait().files, CheckpointConfig(keep_last=9))
    writer.close()
    return checkpoint


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_off(folder):
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1])


def flipped_bit(folder):
    content = bytearray((folder / MODEL).read_bytes())
    content[-1] ^= 1
    (folder / MODEL).write_bytes(content)


def lost_file(folder):
    (folder / OPTIMIZER).unlink()


def half_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def other_version(folder):
    (folder / MANIFEST).write_text(json.dumps({"schema_version": 99, "files": {}}))


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path, 7)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.state == TrainingState(7, 14, 7, 7, 0, 0, "continuation", "tiny")
    assert torch.equal(checkpoint.weights("ema")["weight"], torch.full((3, 2), 7.0))
    assert checkpoint.dit_config == {"a": [1]} and expected_step(tmp_path) == 7


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_manifest, MANIFEST),
        (cut_off, MODEL),
        (flipped_bit, MODEL),
        (lost_file, OPTIMIZER),
        (half_manifest, MANIFEST),
        (other_version, "99"),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_and_named(tmp_path, caplog, damage, named):
    write(tmp_path, 1)
    damaged = write(tmp_path, 2).folder
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path).state.step == 1
    assert str(damaged) in caplog.text and named in caplog.text


def other_step(folder):
    (folder / "state.json").write_text((folder / "state.json").read_text().replace("step", "stop"))


def test_a_size_and_the_numbers_are_seen_at_once_and_a_bit_of_weights_by_its_hash(tmp_path):
    cut, flipped, other = (write(tmp_path, step).folder for step in (1, 2, 3))
    cut_off(cut), flipped_bit(flipped), other_step(other)
    assert MODEL in find_fault(cut) and find_fault(flipped) is None and "state.json" in find_fault(other)
    assert MODEL in find_damage(flipped, hashed_files(flipped))


def test_who_needs_the_average_alone_does_not_read_the_rest(tmp_path):
    flipped_bit(write(tmp_path, 2).folder)
    assert newest_checkpoint(tmp_path, "ema").state.step == 2
    assert newest_checkpoint(tmp_path, "model") is None


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    write(tmp_path, 4)
    (tmp_path / "checkpoints" / ".step_00000004.1a2b.tmp").mkdir()
    (tmp_path / "checkpoints" / ".trash-step_00000003").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "newest.json",
        "step_00000004",
    ]


def test_what_is_set_aside_is_neither_counted_nor_lost(tmp_path):
    for _ in range(2):
        set_aside(write(tmp_path, 4).folder)
    assert newest_checkpoint(tmp_path) is None
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"newest.json", "damaged_step_00000004", "damaged_step_00000004_2"}


def test_no_checkpoints_is_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None and expected_step(tmp_path) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every_n_steps": 0}, "at least 1"),
        ({"keep_every_n_steps": 0}, "at least 1"),
        ({"every_minutes": 0}, "above 0"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(setting, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**setting)


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


def take(run_dir, name: str | None = None) -> int:
    option = "step={step}"
    return checkpoint_to_take(run_dir, "model", name=name, option=option).state.step


def test_what_is_shipped_is_the_newest_ever_written_or_what_was_named(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        take(tmp_path)
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000003" / OPTIMIZER).write_bytes(b"\0" * 999)  # another size
    assert take(tmp_path, "step_00000002") == 2
    with pytest.raises(ValueError, match=r"step_00000003, the newest .*optimizer.* sound one with step=2$"):
        take(tmp_path)
    set_aside(tmp_path / "checkpoints" / "step_00000003")
    with pytest.raises(ValueError, match=r"step_00000003, .*it is not there.* with step=2$"):
        take(tmp_path)
    flipped_bit(tmp_path / "checkpoints" / "step_00000002")
    with pytest.raises(ValueError, match=r"it is not there.* with step=1$"):
        take(tmp_path)
    with pytest.raises(ValueError, match=r"step_00000002: model.* is damaged"):
        take(tmp_path, "step_00000002")
    write(tmp_path, 4)
    assert take(tmp_path) == 4


def test_the_end_of_a_run_that_diverged_is_not_shipped_unless_named(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2, skipped=1)
    with pytest.raises(ValueError, match=r"its last 1 steps had no finite gradient.* with step=1$"):
        take(tmp_path)
    assert take(tmp_path, "step_00000002") == 2
