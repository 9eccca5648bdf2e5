"""Reads frame shards and refuses what is not exactly what a writer finished; every error names the file.

Only tars with a marker are seen. Nothing is unpacked: members are read at the places that the .idx gives.
"""

import hashlib
import mmap
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from data_pipeline.shard_writer import ClipEntry, MemberEntry, ShardMarker
from storyanchors.clip import INFO_MEMBER, ClipInfo, check_key, first_problem, frame_member, read_jpeg_size

_BLOCK = tarfile.BLOCKSIZE
_SHARD_NAME = re.compile(r"\d{6}")
_REMEDY = "Delete the three files of this shard and repeat the command that wrote the dataset."
Record = TypeVar("Record", bound=BaseModel)


def finished_shards(frames: Path) -> list[str]:
    """The names of all shards that have their marker, in order."""
    return sorted(path.stem for path in frames.glob("*.json") if _SHARD_NAME.fullmatch(path.stem))


def read_marker(frames: Path, name: str) -> ShardMarker:
    path = frames / f"{name}.json"
    marker = _parse(ShardMarker, path.read_bytes(), path)
    if marker.shard != name:
        raise ValueError(f"{path} is the marker of shard {marker.shard}, expected {name}")
    return marker


def read_entries(frames: Path, marker: ShardMarker) -> list[ClipEntry]:
    """The shard's .idx, line by line; ValueError unless it is byte for byte the one that the marker knows."""
    path = frames / f"{marker.shard}.idx"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != marker.index_sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in the marker. {_REMEDY}")
    entries = [_parse(ClipEntry, line, path) for line in content.splitlines()]
    if len(entries) != marker.num_clips:
        raise ValueError(f"{path} lists {len(entries)} clips, its marker says {marker.num_clips}. {_REMEDY}")
    return entries


def read_clips(frames: Path, marker: ShardMarker) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of every clip; checksums are compared on the way."""
    path = frames / f"{marker.shard}.tar"
    entries = read_entries(frames, marker)
    with open(path, "rb") as tar:
        for entry in entries:
            members = {}
            for member in entry.members:
                tar.seek(member.offset)
                members[member.name] = tar.read(member.size)
                _check_crc(members[member.name], member, entry.key, path)
            yield entry.key, members


def verify_shard(frames: Path, marker: ShardMarker, entries: list[ClipEntry]) -> list[ClipInfo]:
    """Compares every byte of a shard with its marker and index; returns what is known about its clips.

    Key and member names, tar headers, checksums, clip.json and the size in each JPEG's header are checked;
    no image is decoded.
    """
    path = frames / f"{marker.shard}.tar"
    found = path.stat().st_size if path.exists() else 0
    if found != marker.bytes:
        raise ValueError(f"{path} has {found} bytes, its marker says {marker.bytes}: it was cut. {_REMEDY}")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        infos, end = [], 0
        for entry in entries:
            infos.append(_verify_clip(tar, entry, end, path))
            end = _padded(entry.members[-1])
        if any(tar[end:]):
            raise ValueError(f"{path} holds more than its index lists, from byte {end} on. {_REMEDY}")
        if hashlib.sha256(tar).hexdigest() != marker.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in the marker. {_REMEDY}")
    return infos


def _verify_clip(tar: mmap.mmap, entry: ClipEntry, begin: int, path: Path) -> ClipInfo:
    """The clip's members must follow one another from byte `begin`, under the names that a clip has."""
    try:
        check_key(entry.key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    frame_names = [frame_member(number) for number in range(1, len(entry.members))]
    names = [member.name for member in entry.members]
    if names != [*frame_names, INFO_MEMBER] or not frame_names:
        raise ValueError(
            f"{path}: clip {entry.key} has the members {names}, expected 001.jpg, 002.jpg, ..., {INFO_MEMBER}"
        )
    for member in entry.members:
        _verify_header(tar, entry.key, member, begin, path)
        _check_crc(tar[member.offset : member.offset + member.size], member, entry.key, path)
        begin = _padded(member)
    *frames, info_member = entry.members
    try:
        info = ClipInfo.from_json(tar[info_member.offset : info_member.offset + info_member.size])
        _verify_frames(tar, frames, info)
    except ValueError as error:
        raise ValueError(f"{path}: clip {entry.key}: {error}") from error
    if info.key != entry.key:
        raise ValueError(f"{path}: clip {entry.key} has the clip.json of {info.key}")
    return info


def _verify_header(tar: mmap.mmap, key: str, member: MemberEntry, begin: int, path: Path) -> None:
    expected = f"{key}.{member.name}"
    try:
        header = tarfile.TarInfo.frombuf(tar[begin : begin + _BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: no tar header at byte {begin}, expected that of {expected}. {_REMEDY}"
        ) from error
    if (header.name, header.size, header.type) != (expected, member.size, tarfile.REGTYPE):
        raise ValueError(
            f"{path}: byte {begin} begins a member {header.name!r} of {header.size} bytes, "
            f"the index says {expected!r} of {member.size}"
        )
    if member.offset != begin + _BLOCK:
        raise ValueError(
            f"{path}: {expected} begins at byte {begin + _BLOCK}, the index says {member.offset}"
        )


def _verify_frames(tar: mmap.mmap, frames: list[MemberEntry], info: ClipInfo) -> None:
    if len(frames) != info.num_frames:
        raise ValueError(f"found {len(frames)} frames, {INFO_MEMBER} names {info.num_frames}")
    for member, checksum in zip(frames, info.checksums, strict=True):
        content = tar[member.offset : member.offset + member.size]
        width, height = read_jpeg_size(content)
        if (width, height) != (info.width, info.height):
            raise ValueError(
                f"{member.name} has {width} x {height} pixels, expected {info.width} x {info.height}"
            )
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(f"{member.name} is damaged: its SHA-256 is not the one in {INFO_MEMBER}")


def _check_crc(content: bytes, member: MemberEntry, key: str, path: Path) -> None:
    if len(content) != member.size or zlib.crc32(content) != member.crc32:
        raise ValueError(
            f"{path}: {key}.{member.name} is damaged: its checksum is not the one in the index. {_REMEDY}"
        )


def _padded(member: MemberEntry) -> int:
    """Where the next header begins."""
    return -(-(member.offset + member.size) // _BLOCK) * _BLOCK


def _parse(record: type[Record], content: bytes, path: Path) -> Record:
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{path} is not a {record.__name__}: {first_problem(error)}") from error
