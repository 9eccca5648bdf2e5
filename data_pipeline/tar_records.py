"""What index_webdataset remembers of each tar in DATASET/tars/: three files per tar, the marker written last.

000007.parquet holds the index rows of its clips, 000007.jsonl the captions of clips and videos, and
000007.json, the marker, where the tar is and what was refused.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data_pipeline.dataset import rename_durably, write_atomically
from data_pipeline.tar_samples import TarContents
from storyanchors.clip import CaptionRecord
from storyanchors.shard_store import ShardStore

TARS_FOLDER = "tars"
_READ_AHEAD = 2**22  # bytes: a header costs no request of its own
_COPY_BYTES = 2**24


class TarVideo(BaseModel):
    """A video in a tar, at [offset, offset + size)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample: str
    key: str
    source: str
    suffix: str
    offset: int
    size: int


class TarRecord(BaseModel):
    """The marker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # six digits, as those of shards
    tar: str  # path or URL
    bytes: int
    num_clips: int  # in place
    videos: tuple[TarVideo, ...]  # in the order of their keys
    rejected: tuple[tuple[str | None, str], ...]  # (sample, or None for the tar itself; reason)


class TarBytes:
    """A tar, read forward in large pieces."""

    def __init__(self, location: str, num_bytes: int):
        self.store, self.location, self.num_bytes = ShardStore(), location, num_bytes
        self._start, self._piece = 0, b""

    def read_at(self, offset: int, size: int) -> bytes:
        """size bytes from an offset on, fewer at the end of the tar."""
        size = min(size, self.num_bytes - offset)
        if size <= 0:  # a tar that is cut inside its padding
            return b""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._piece):
            length = min(max(size, _READ_AHEAD), self.num_bytes - offset)
            self._start, self._piece, begin = offset, self.store.read(self.location, offset, length), 0
        return self._piece[begin : begin + size]


def write_tar_record(
    dataset: Path, name: str, location: str, num_bytes: int, contents: TarContents, schema: pa.Schema
) -> None:
    folder = dataset / TARS_FOLDER
    rows = [{**row, "shard": name, "location": location} for row in contents.rows]
    temporary = folder / f"{name}.parquet.tmp"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    rename_durably(temporary, folder / f"{name}.parquet")
    videos = sorted(contents.videos, key=lambda sample: sample.key)
    captions = [*contents.captions, *(sample.caption for sample in videos)]
    write_atomically(folder / f"{name}.jsonl", "".join(c.to_json() + "\n" for c in captions).encode())
    record = TarRecord(
        name=name,
        tar=location,
        bytes=num_bytes,
        num_clips=len(rows),
        videos=tuple(
            TarVideo(
                sample=sample.name,
                key=sample.key,
                source=sample.source,
                suffix=sample.video.name.rpartition(".")[2].lower(),
                offset=sample.video.offset,
                size=sample.video.size,
            )
            for sample in videos
        ),
        rejected=tuple(contents.rejected),
    )
    content = json.dumps(record.model_dump(mode="json"), indent=1) + "\n"
    write_atomically(folder / f"{name}.json", content.encode())


def read_tar_records(dataset: Path) -> list[TarRecord]:
    paths = sorted((dataset / TARS_FOLDER).glob("*.json"))
    return [TarRecord.model_validate_json(path.read_bytes()) for path in paths]


def read_tar_captions(dataset: Path, name: str) -> list[CaptionRecord]:
    """One per clip in place, and one per video under the beginning of its clips' keys."""
    lines = (dataset / TARS_FOLDER / f"{name}.jsonl").read_bytes().splitlines()
    return [CaptionRecord.from_json(line) for line in lines]


def tables_in_place(dataset: Path, schema: pa.Schema) -> dict[str, pa.Table]:
    """By shard name, the index rows of clips that are used where they lie; none for most datasets."""
    names = [record.name for record in read_tar_records(dataset) if record.num_clips]
    return {name: pq.read_table(dataset / TARS_FOLDER / f"{name}.parquet", schema=schema) for name in names}


def copy_member(record: TarRecord, video: TarVideo, path: Path) -> None:
    """A video out of its tar, for a decoder that wants a file."""
    store, end = ShardStore(), video.offset + video.size
    with open(path, "wb") as file:
        for offset in range(video.offset, end, _COPY_BYTES):
            file.write(store.read(record.tar, offset, min(_COPY_BYTES, end - offset)))
