"""The clips of datasets as rows of their indexes: which may be trained on, and where their bytes lie.

The tables stay mapped files; a process holds the numbers of the chosen rows and the columns it asks for.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storyanchors.conditioning import ClipConditions
from storyanchors.index_file import MAPPED_FILE, PARQUET_BYTES, PARQUET_FILE
from storyanchors.shard_store import ShardStore, join, local_copy, printable
from train.stable_hash import stable_hash

log = logging.getLogger(__name__)

WRITE_IT = "write it again with data_pipeline/build_index.py"

CAPTION_COLUMNS = {
    "global": "global_caption_words",
    "multi_event": "story_words",
}  # 0 or null: the clip has none

TOKEN_COLUMNS = {
    "global": "global_caption_tokens",
    "multi_event": "story_tokens",
}  # null where build_index counted none

CONDITION_COLUMNS = ("fps", "frame_interval", "motion", "height", "width", "num_frames")


@dataclass(frozen=True)
class ClipRow:
    """One row of an index: byte ranges of the frames in their tar, and of the caption line."""

    dataset: str
    key: str
    shard: str
    location: str | None  # of the tar; None = DATASET/frames/SHARD.tar
    frame_offsets: list[int]
    frame_sizes: list[int]
    frame_crc32: list[int]
    conditions: ClipConditions
    caption_run: str | None
    caption_offset: int | None
    caption_size: int | None


def tar_path(dataset: str, shard: str, location: str | None) -> str:
    return location or join(dataset, "frames", f"{shard}.tar")


def captions_path(dataset: str, run: str, shard: str) -> str:
    return join(dataset, "captions", run, f"{shard}.jsonl")


ROW_COLUMNS = tuple(name for name in ClipRow.__annotations__ if name not in ("dataset", "conditions"))
INDEX_COLUMNS = {
    *ROW_COLUMNS, *CONDITION_COLUMNS, *CAPTION_COLUMNS.values(), *TOKEN_COLUMNS.values(), "source"
}  # fmt: skip


class ClipIndex:
    """The rows that a stage uses, dataset by dataset, in the order of each index (sorted by key)."""

    def __init__(self, datasets: Sequence[str], tables: Sequence[pa.Table], chosen: Sequence[np.ndarray]):
        self.datasets = tuple(datasets)
        self.tables = tuple(tables)
        self.chosen = tuple(chosen)  # the numbers of the rows in each table
        self.ends = tuple(accumulate(map(len, chosen)))

    @classmethod
    def open(cls, *datasets: str | Path) -> "ClipIndex":
        """ValueError for an index that is missing, damaged, or lacks a column."""
        tables = []
        for dataset in datasets:
            table = open_index(str(dataset))
            if missing := sorted(INDEX_COLUMNS - set(table.column_names)):
                path = printable(join(str(dataset), MAPPED_FILE))
                raise ValueError(f"{path} lacks the column {missing[0]}: {WRITE_IT}")
            tables.append(table)
        return cls(list(map(str, datasets)), tables, [np.arange(len(table)) for table in tables])

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which maps the files itself: a table would be copied whole."""
        files = [(len(table), table.schema.metadata) for table in self.tables]
        return {"datasets": self.datasets, "chosen": self.chosen, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tables = [open_index(dataset) for dataset in state["datasets"]]
        for dataset, table, file in zip(state["datasets"], tables, state["files"], strict=True):
            if (len(table), table.schema.metadata) != file:
                raise ValueError(f"the index of {printable(dataset)} was written again while the run started")
        self.__init__(state["datasets"], tables, state["chosen"])

    def files(self) -> list[str]:
        """Paths or URLs of all tars and caption files that the indexes name, each once."""
        found = set()
        for dataset, table in zip(self.datasets, self.tables, strict=True):
            kinds = table.select(["shard", "location", "caption_run"]).group_by(
                ["shard", "location", "caption_run"]
            )
            for row in kinds.aggregate([]).to_pylist():
                found.add(tar_path(dataset, row["shard"], row["location"]))
                if row["caption_run"] is not None:
                    found.add(captions_path(dataset, row["caption_run"], row["shard"]))
        return sorted(found)

    def __len__(self) -> int:
        return self.ends[-1]

    def __str__(self) -> str:
        return ", ".join(self.datasets)

    @property
    def num_clips(self) -> tuple[int, ...]:
        """Of each dataset."""
        return tuple(map(len, self.chosen))

    def numbers(self, column: str) -> np.ndarray:
        """A column of whole numbers (N,); 0 where the index has none."""
        values = [
            pc.fill_null(table[column], 0).to_numpy()[chosen]
            for table, chosen in zip(self.tables, self.chosen, strict=True)
        ]
        return np.concatenate(values).astype(np.int64)

    def texts(self, column: str) -> list[str | None]:
        """A column of texts, N of them."""
        columns = zip(self.tables, self.chosen, strict=True)
        return [text for table, chosen in columns for text in table[column].take(chosen).to_pylist()]

    def only(self, kept: np.ndarray) -> "ClipIndex":
        """The rows where kept (N,) is true."""
        parts = np.split(kept, self.ends[:-1])
        chosen = [rows[part] for rows, part in zip(self.chosen, parts, strict=True)]
        return ClipIndex(self.datasets, self.tables, chosen)

    def with_caption(self, kind: str) -> "ClipIndex":
        """The clips that have a caption of this kind; ValueError when there is none."""
        kept = self.only(self.numbers(CAPTION_COLUMNS[kind]) > 0)
        if not len(kept):
            raise ValueError(f"none of the {len(self)} clips of {self} has a {kind} caption")
        if len(kept) < len(self):
            log.warning(
                "%d of %d clips have no %s caption and are left out", len(self) - len(kept), len(self), kind
            )
        return kept

    def rows_above(self, kind: str, max_tokens: int) -> list[int]:
        """Numbers of the rows whose caption has more tokens, as far as build_index has counted them."""
        return np.flatnonzero(self.numbers(TOKEN_COLUMNS[kind]) > max_tokens).tolist()

    def without(self, numbers: set[int]) -> "ClipIndex":
        return self.only(~np.isin(np.arange(len(self)), list(numbers)))

    def split(self, holdout: float) -> tuple["ClipIndex", "ClipIndex"]:
        """(to train on, held out): a share of the source videos, chosen by hash, is never trained on."""
        if not holdout:
            return self, self.only(np.zeros(len(self), dtype=bool))
        columns = zip(self.tables, self.chosen, strict=True)
        held_out = np.concatenate([_held_out(table["source"], holdout)[chosen] for table, chosen in columns])
        if not held_out.any():
            log.warning(
                "no source video is held out with data.holdout=%g, by chance: there is no held-out loss, and "
                "samples are of clips that are trained on; more data or a larger data.holdout changes that",
                holdout,
            )
        return self.only(~held_out), self.only(held_out)

    def num_tokens(self, pixels_per_token: int) -> np.ndarray:
        """Video tokens (N,) of every clip; a token covers a square of that many pixels on a side."""
        frames, height, width = (self.numbers(name) for name in ("num_frames", "height", "width"))
        return frames * (height // pixels_per_token) * (width // pixels_per_token)

    def fingerprint(self) -> str:
        """Differs for other clips, another order of them, or other sizes."""
        digest = hashlib.sha256()
        for column in ("num_frames", "height", "width"):
            digest.update(self.numbers(column).tobytes())
        for table, chosen in zip(self.tables, self.chosen, strict=True):
            start = 0
            for chunk in table["key"].chunks:  # one at a time, so that few texts are in memory at once
                first, last = np.searchsorted(chosen, (start, start + len(chunk)))
                keys = chunk.take(chosen[first:last] - start).to_pylist()
                digest.update("".join(f"{key}\n" for key in keys).encode())
                start += len(chunk)
        return digest.hexdigest()

    def frame_bytes(self) -> np.ndarray:
        """Bytes (N,) of every clip's frames in their files."""
        columns = zip(self.tables, self.chosen, strict=True)
        return np.concatenate([_list_sums(table["frame_sizes"])[chosen] for table, chosen in columns])

    def common_frame_size(self) -> tuple[int, int]:
        """(height, width) of most clips, in pixels; the largest of several that are as frequent."""
        sizes = (self.numbers("height") << 32) + self.numbers("width")  # one number sorts faster than two
        kinds, counts = np.unique(sizes, return_counts=True)
        most = int(kinds[np.flatnonzero(counts == counts.max())[-1]])
        return most >> 32, most & 0xFFFFFFFF

    def row(self, number: int) -> ClipRow:
        dataset = int(np.searchsorted(self.ends, number, side="right"))
        place = self.chosen[dataset][number - (self.ends[dataset] - len(self.chosen[dataset]))]
        columns = [*ROW_COLUMNS, *CONDITION_COLUMNS]
        [values] = self.tables[dataset].select(columns).slice(int(place), 1).to_pylist()
        conditions = ClipConditions(**{name: values[name] for name in CONDITION_COLUMNS})
        return ClipRow(
            dataset=self.datasets[dataset],
            conditions=conditions,
            **{name: values[name] for name in ROW_COLUMNS},
        )


def _held_out(column: pa.ChunkedArray, holdout: float) -> np.ndarray:
    """Which rows (N,) are of a held-out source; chunk by chunk, so that few texts are in memory at once."""
    parts = [np.zeros(0, dtype=bool)]
    for chunk in column.chunks:
        encoded = chunk.dictionary_encode()
        sources = encoded.dictionary.to_pylist()
        chosen = [stable_hash("holdout", source) / 2**63 < holdout for source in sources]
        parts.append(np.array(chosen, dtype=bool)[encoded.indices.to_numpy()])
    return np.concatenate(parts)


def _list_sums(column: pa.ChunkedArray) -> np.ndarray:
    """The sum (N,) of each list of a column, chunk by chunk."""
    parts = [np.zeros(0, dtype=np.int64)]
    for chunk in column.chunks:
        ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
        sums = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy(zero_copy_only=False))])
        parts.append(np.diff(sums[np.concatenate([[0], ends])]))
    return np.concatenate(parts)


def open_index(dataset: str) -> pa.Table:
    """All rows of a dataset, in the mapped file; of a dataset at a URL, in a copy on this machine.

    ValueError where there is no index, it is damaged, or it is not that of the index.parquet beside it.
    """
    path, parquet = join(dataset, MAPPED_FILE), join(dataset, PARQUET_FILE)
    shown = printable(path)
    try:
        _, found = (ShardStore().size(file) for file in (path, parquet))
        copy = str(local_copy(path))
    except FileNotFoundError as error:
        raise ValueError(f"no index at {shown}: write it with data_pipeline/build_index.py") from error
    try:
        table = pa.ipc.open_file(pa.memory_map(copy)).read_all()
    except (pa.ArrowInvalid, OSError) as error:  # Arrow says so with one or the other
        raise ValueError(f"{shown} is damaged ({error}): {WRITE_IT}") from error
    expected = int((table.schema.metadata or {}).get(PARQUET_BYTES, 0))
    if found != expected:
        beside = f"{printable(parquet)} has {found} bytes"
        raise ValueError(f"{beside}, {shown} was written with one of {expected}: {WRITE_IT}")
    return table
