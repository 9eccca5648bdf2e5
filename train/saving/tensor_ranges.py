"""Flat ranges of tensors in safetensors files: whatever ranks wrote them, any rank reads what it needs.

The header of a file says for each name of which whole tensor the data are a range: where it starts and that
tensor's shape. So a state that was saved by one number of ranks is read by another, without a converter.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
CHUNK = 16 * 2**20  # bytes that are written and hashed at a time, outside of Python's lock
MAX_HEADER = 100 * 2**20  # bytes, as safetensors itself allows


@dataclass(frozen=True)
class TensorRange:
    """The range [start, start + n) of the flattened tensor `name` of `shape`; values (n,) on the CPU."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


@dataclass(frozen=True)
class WrittenFile:
    bytes: int
    sha256: str


def write_ranges(path: Path, ranges: Iterable[TensorRange]) -> WrittenFile:
    """Writes a safetensors file and syncs it to disk; OSError as it comes."""
    ranges = [part for part in ranges if len(part.values)]
    header, offset = {"__metadata__": {"ranges": json.dumps(_describe(ranges))}}, 0
    for part in ranges:
        end = offset + part.values.nbytes
        header[part.name] = {
            "dtype": DTYPES[part.values.dtype], "shape": [len(part.values)], "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for content in (len(text).to_bytes(8, "little") + text, *(_bytes(part.values) for part in ranges)):
            for begin in range(0, len(content), CHUNK):
                file.write(content[begin : begin + CHUNK])
                digest.update(content[begin : begin + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(8 + len(text) + offset, digest.hexdigest())


def read_into(paths: Iterable[Path], ranges: list[TensorRange]) -> None:
    """Fills the values of ranges from files in any order; no more files are opened than are needed.

    ValueError where a tensor has another shape or type than is saved, or a part of it is in no file.
    """
    missing = {part.name: len(part.values) for part in ranges if len(part.values)}
    wanted = {part.name: part for part in ranges}
    for path in paths:
        if not missing:
            return
        saved, data_start = read_header(path)
        with open(path, "rb", buffering=0) as file:
            for name in missing.keys() & saved.keys():
                missing[name] -= _read_overlap(file, path, saved[name], data_start, wanted[name])
                if missing[name] == 0:
                    del missing[name]
    if missing:
        name, count = next(iter(missing.items()))
        raise ValueError(
            f"{count} of {len(wanted[name].values)} numbers of {name} are in none of the checkpoint's files"
        )


def read_whole(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The whole tensors whose ranges are in these files; ValueError as read_into."""
    paths, dtypes = list(paths), {name: dtype for dtype, name in DTYPES.items()}
    whole: dict[str, TensorRange] = {}
    for path in paths:
        for name, saved in read_header(path)[0].items():
            shape = tuple(saved.shape)
            empty = torch.empty(math.prod(shape), dtype=dtypes[saved.dtype])
            whole.setdefault(name, TensorRange(name, shape, 0, empty))
    read_into(paths, list(whole.values()))
    return {name: part.values.view(part.shape) for name, part in whole.items()}


@dataclass(frozen=True)
class SavedRange:
    """Where a range is: numbers [start, start + count) of a tensor of shape, at data_offset of a file."""

    shape: tuple[int, ...]
    start: int
    count: int
    dtype: str
    data_offset: int


def read_header(path: Path) -> tuple[dict[str, SavedRange], int]:
    """(what a file holds by name, where its data begin); ValueError where write_ranges did not make it."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"its header would have {size} bytes")
            header = json.loads(file.read(size))
        described = json.loads(header.pop("__metadata__")["ranges"])
        saved = {
            name: SavedRange(
                tuple(described[name]["shape"]),
                described[name]["start"],
                entry["shape"][0],
                entry["dtype"],
                entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of a checkpoint: {error}") from error
    return saved, 8 + size


def _describe(ranges: list[TensorRange]) -> dict[str, dict]:
    return {part.name: {"start": part.start, "shape": list(part.shape)} for part in ranges}


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.numpy()).cast("B")


def _read_overlap(file, path: Path, saved: SavedRange, data_start: int, part: TensorRange) -> int:
    """Reads what a file has of a range; the number of values read."""
    found, expected = (saved.dtype, saved.shape), (DTYPES[part.values.dtype], part.shape)
    if found != expected:
        raise ValueError(
            f"{path}: {part.name} is {found[0]} {list(found[1])}, expected {expected[0]} {list(expected[1])}"
        )
    begin = max(saved.start, part.start)
    end = min(saved.start + saved.count, part.start + len(part.values))
    if begin >= end:
        return 0
    target = _bytes(part.values[begin - part.start : end - part.start])
    offset = data_start + saved.data_offset + (begin - saved.start) * part.values.itemsize
    for place in range(0, len(target), CHUNK):
        piece = target[place : place + CHUNK]
        if os.preadv(file.fileno(), [piece], offset + place) != len(piece):
            raise ValueError(f"{path}: {part.name} is cut off")
    return end - begin
