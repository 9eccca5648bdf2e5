"""What some ranks have written others read, however each splits it; safetensors reads the files too."""

import hashlib
import itertools

import pytest
import torch
from safetensors.torch import load_file

from train.saving.tensor_ranges import TensorRange, read_header, read_into, read_whole, write_ranges

WHOLE = {"a": torch.randn(7, 3), "b": torch.randn(5), "c": torch.randn(()), "d": torch.randn(2, 2, 4)}


def shares(num_ranks: int, cuts: int = 0) -> list[list[TensorRange]]:
    """The tensors laid end to end and cut into num_ranks parts, as ZeRO cuts them."""
    total = sum(tensor.numel() for tensor in WHOLE.values())
    borders = [
        total * rank // num_ranks + (cuts if 0 < rank < num_ranks else 0) for rank in range(num_ranks + 1)
    ]
    ranks = []
    for begin, end in itertools.pairwise(borders):
        ranges, offset = [], 0
        for name, tensor in WHOLE.items():
            first, last = max(begin - offset, 0), min(end - offset, tensor.numel())
            if first < last:
                values = tensor.flatten()[first:last].clone()
                ranges.append(TensorRange(name, tuple(tensor.shape), first, values))
            offset += tensor.numel()
        ranks.append(ranges)
    return ranks


def write(folder, num_ranks: int):
    paths = [folder / f"model-{rank:05d}-of-{num_ranks:05d}.safetensors" for rank in range(num_ranks)]
    for path, ranges in zip(paths, shares(num_ranks), strict=True):
        write_ranges(path, ranges)
    return paths


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize(("readers", "cuts"), [(1, 0), (2, 0), (2, 1), (4, 0), (7, -1)])
def test_any_number_of_ranks_reads_what_any_other_has_written(tmp_path, writers, readers, cuts):
    paths = write(tmp_path, writers)
    for expected in shares(readers, cuts):
        found = [
            TensorRange(p.name, p.shape, p.start, torch.full_like(p.values, torch.nan)) for p in expected
        ]
        read_into(paths, found)
        for part, wanted in zip(found, expected, strict=True):
            assert torch.equal(part.values, wanted.values)


@pytest.mark.parametrize("writers", [1, 3])
def test_the_parts_make_the_whole(tmp_path, writers):
    whole = read_whole(write(tmp_path, writers))
    assert whole.keys() == WHOLE.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in WHOLE.items())


def test_a_rank_that_finds_everything_in_its_own_file_opens_no_other(tmp_path):
    paths = write(tmp_path, 3)
    own = [TensorRange(p.name, p.shape, p.start, torch.empty_like(p.values)) for p in shares(3)[1]]
    paths[0].unlink(), paths[2].unlink()
    read_into([paths[1], paths[2], paths[0]], own)


def test_the_files_are_safetensors_and_their_record_is_true(tmp_path):
    values = {
        "f": torch.randn(3),
        "d": torch.randn(2).double(),
        "i": torch.arange(4),
        "u": torch.arange(5).byte(),
    }
    path = tmp_path / "x.safetensors"
    written = write_ranges(path, [TensorRange(name, (len(v),), 0, v) for name, v in values.items()])
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in values.items())
    assert written.bytes == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(tensor, values[name]) for name, tensor in read_whole([path]).items())


def test_a_rank_without_a_share_writes_an_empty_file(tmp_path):
    write_ranges(tmp_path / "x.safetensors", [TensorRange("a", (3,), 0, torch.empty(0))])
    assert read_header(tmp_path / "x.safetensors")[0] == {} == load_file(tmp_path / "x.safetensors")


def test_a_part_that_nobody_wrote_is_named(tmp_path):
    paths = write(tmp_path, 3)
    with pytest.raises(ValueError, match=r"\d+ of 21 numbers of a are in none of the checkpoint's files"):
        read_into(paths[1:], [TensorRange("a", (7, 3), 0, torch.empty(21))])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (TensorRange("a", (3, 7), 0, torch.empty(21)), r"a is F32 \[7, 3\], expected F32 \[3, 7\]"),
        (TensorRange("a", (7, 3), 0, torch.empty(21).double()), r"expected F64 \[7, 3\]"),
    ],
)
def test_another_shape_or_type_is_refused(tmp_path, wanted, message):
    with pytest.raises(ValueError, match=message):
        read_into(write(tmp_path, 1), [wanted])


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02\x00\x00\x00\x00\x00\x00\x00{}", b"pickle" * 9])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a file of a checkpoint"):
        read_header(path)


def test_a_file_cut_off_is_refused(tmp_path):
    [path] = write(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut off"):
        read_whole([path])
