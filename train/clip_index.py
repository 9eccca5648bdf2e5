"""The clips of a dataset as rows of its index.parquet: which may be trained on, and where their bytes lie."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storyanchors.conditioning import ClipConditions
from train.data_plan import stable_hash

log = logging.getLogger(__name__)

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
    """One row of the index: byte ranges of the frames in their shard, and of the caption line."""

    key: str
    shard: str
    frame_offsets: list[int]
    frame_sizes: list[int]
    frame_crc32: list[int]
    conditions: ClipConditions
    caption_run: str | None
    caption_offset: int | None
    caption_size: int | None


INDEX_COLUMNS = {
    *(set(ClipRow.__annotations__) - {"conditions"}), *CONDITION_COLUMNS, *CAPTION_COLUMNS.values(), "source"
}  # fmt: skip


class ClipIndex:
    """The rows of a dataset's index that a stage uses, in the index's order (sorted by key)."""

    def __init__(self, dataset: Path, table: pa.Table):
        self.dataset = dataset
        self.table = table

    @classmethod
    def open(cls, dataset: str | Path) -> "ClipIndex":
        path = Path(dataset) / "index.parquet"
        if not path.is_file():
            raise ValueError(
                f"no index at {path}: write it with data_pipeline/build_index.py dataset={dataset}"
            )
        table = pq.read_table(path, memory_map=True)
        if missing := sorted(INDEX_COLUMNS - set(table.column_names)):
            raise ValueError(f"{path} lacks the column {missing[0]}: write it again with build_index.py")
        return cls(Path(dataset), table)

    def __len__(self) -> int:
        return self.table.num_rows

    def with_caption(self, kind: str) -> "ClipIndex":
        """The clips that have a caption of this kind; ValueError when there is none."""
        has_caption = pc.greater(pc.fill_null(self.table[CAPTION_COLUMNS[kind]], 0), 0)
        kept = ClipIndex(self.dataset, self.table.filter(has_caption))
        if not len(kept):
            raise ValueError(f"none of the {len(self)} clips of {self.dataset} has a {kind} caption")
        if len(kept) < len(self):
            log.warning(
                "%d of %d clips have no %s caption and are left out", len(self) - len(kept), len(self), kind
            )
        return kept

    def rows_above(self, kind: str, max_tokens: int) -> list[int]:
        """Numbers of the rows whose caption has more tokens, as far as build_index has counted them."""
        if TOKEN_COLUMNS[kind] not in self.table.column_names:
            return []
        above = pc.greater(pc.fill_null(self.table[TOKEN_COLUMNS[kind]], 0), max_tokens)
        return np.flatnonzero(above.to_numpy()).tolist()

    def without(self, numbers: set[int]) -> "ClipIndex":
        kept = pa.array([number not in numbers for number in range(len(self))])
        return ClipIndex(self.dataset, self.table.filter(kept))

    def split(self, holdout: float) -> tuple["ClipIndex", "ClipIndex"]:
        """(to train on, held out): a share of the source videos, chosen by hash, is never trained on."""
        sources = self.table["source"].to_pylist()
        held_out = {s for s in set(sources) if stable_hash("holdout", s) / 2**63 < holdout}
        mask = np.array([source in held_out for source in sources], dtype=bool)
        return tuple(ClipIndex(self.dataset, self.table.filter(pa.array(part))) for part in (~mask, mask))

    def num_tokens(self, pixels_per_token: int) -> np.ndarray:
        """Video tokens (N,) of every clip; a token covers a square of that many pixels on a side."""
        columns = (self.table[name].to_numpy() for name in ("num_frames", "height", "width"))
        frames, height, width = (column.astype(np.int64) for column in columns)
        return frames * (height // pixels_per_token) * (width // pixels_per_token)

    def common_frame_size(self) -> tuple[int, int]:
        """(height, width) of most clips, in pixels."""
        sizes = self.table.group_by(["height", "width"]).aggregate([([], "count_all")]).to_pylist()
        most = max(sizes, key=lambda size: (size["count_all"], size["height"], size["width"]))
        return most["height"], most["width"]

    def row(self, number: int) -> ClipRow:
        values = {name: self.table[name][number].as_py() for name in self.table.column_names}
        conditions = ClipConditions(**{name: values[name] for name in CONDITION_COLUMNS})
        return ClipRow(
            conditions=conditions,
            **{name: values[name] for name in ClipRow.__annotations__ if name != "conditions"},
        )
