"""Writes frame shards: plain WebDataset tars whose bytes depend on nothing but the clips.

A shard is three files: 000007.tar holds the clips, 000007.idx says where each member lies (one JSON line per
clip), 000007.json is the marker, written last: a tar without its marker does not exist for readers.
"""

import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.dataset import rename_durably, write_atomically
from storyanchors.clip import INFO_MEMBER, check_key

SCHEMA_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE


class MemberEntry(BaseModel):
    """Where the bytes of one member lie in the tar."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # without the key: "001.jpg" or "clip.json"
    offset: int = Field(ge=_BLOCK)
    size: int = Field(gt=0)
    crc32: int


class ClipEntry(BaseModel):
    """One line of a shard's .idx."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    members: tuple[MemberEntry, ...]


class VideoReport(BaseModel):
    """What became of one source video; `rejected` says why it gave no clip, None where it is whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    video: str
    rejected: str | None = None
    num_clips: int = 0
    num_frames: int = 0  # story frames in the clips
    short_rest: int = 0  # story frames at the end that were too few for a clip
    source_frames: int = 0
    source_seconds: float = 0.0
    codec: str = ""
    decoding: str = ""  # "planned": only what the story frames need; "sequential": every frame
    colours: str = ""  # colour matrix that was used, "assumed" where the video does not say
    rotation: int = 0  # degrees, counter-clockwise, already applied to the frames
    interlaced: bool = False


class ShardMarker(BaseModel):
    """What a whole shard looks like, with the reports of the videos that it is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    shard: str
    num_clips: int
    num_frames: int
    bytes: int
    sha256: str
    index_sha256: str
    videos: tuple[VideoReport, ...] = ()


class ShardWriter:
    """Writes the clips of one shard in key order; nothing is seen under a final name before finish().

    with ShardWriter(folder, "000007") as shard:
        shard.add(key, clip.to_members())
        shard.finish()
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._path = folder / f"{name}.tar.tmp"
        self._file = open(self._path, "wb", buffering=0)  # a full disk is noticed where it happens
        self._sha256 = hashlib.sha256()
        self._entries: list[ClipEntry] = []

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """ValueError for a key that is not above the one before."""
        if self._entries and key <= self._entries[-1].key:
            raise ValueError(
                f"clips are written in the order of their keys: {key} after {self._entries[-1].key}"
            )
        check_key(key)
        entries = []
        for name in sorted(members):
            content = members[name]
            self._write(_tar_header(f"{key}.{name}", len(content)))
            place = MemberEntry(
                name=name, offset=self._file.tell(), size=len(content), crc32=zlib.crc32(content)
            )
            self._write(content + bytes(-len(content) % _BLOCK))
            entries.append(place)
        self._entries.append(ClipEntry(key=key, members=tuple(entries)))

    def finish(self, videos: list[VideoReport] | None = None) -> ShardMarker:
        """Makes the shard exist: tar, index, marker, each whole before the next one begins."""
        self._write(bytes(2 * _BLOCK))  # the end of a tar
        os.fsync(self._file.fileno())
        num_bytes = self._file.tell()
        index = "".join(_json_line(entry) for entry in self._entries).encode()
        marker = ShardMarker(
            shard=self.name,
            num_clips=len(self._entries),
            num_frames=sum(member.name != INFO_MEMBER for entry in self._entries for member in entry.members),
            bytes=num_bytes,
            sha256=self._sha256.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            videos=tuple(videos or ()),
        )
        rename_durably(self._path, self.folder / f"{self.name}.tar")
        write_atomically(self.folder / f"{self.name}.idx", index)
        content = json.dumps(marker.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
        write_atomically(self.folder / f"{self.name}.json", content.encode())
        return marker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)  # gone already after finish()

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as full:
            raise OSError(full.errno, full.strerror, str(self._path)) from full
        self._sha256.update(content)


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # owner 0, no time, mode 644: nothing of this machine
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _json_line(entry: ClipEntry) -> str:
    return json.dumps(entry.model_dump(mode="json"), sort_keys=True) + "\n"
