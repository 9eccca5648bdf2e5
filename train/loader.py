"""Batches of clips read by offset from frame shards, in the order of the data plan.

A clip's bytes are read with pread, so nothing is unpacked and no tar is walked; every payload's checksum is
compared with the index before it is decoded. The loader has no state: the plan's position says what is next.
"""

import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from storyanchors.caption_encoder import TokenCounter, fit_caption
from storyanchors.clip import CaptionRecord, decode_jpeg, frame_member, frames_to_tensor
from storyanchors.conditioning import ClipConditions
from train.clip_index import ClipIndex, ClipRow
from train.data_plan import PlannedPack
from train.stop_signals import ignore_stop_signals

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 64


@dataclass
class LoadedClip:
    key: str
    epoch: int
    frames: Tensor  # (F, 3, H, W) in [-1, 1]
    conditions: ClipConditions
    captions: dict[str, str]  # by kind, those that the clip has


@dataclass
class ClipBatch:
    clips: list[LoadedClip]  # of this rank
    num_global_clips: int
    next_position: int
    wait_s: float = 0.0  # how long the training loop waited for it


class BrokenSample(ValueError):
    """A clip whose bytes are not what the index says; the message names shard, key and member."""


class ClipReader:
    """Frames and captions of index rows, from the files of their datasets."""

    def __init__(self):
        self._files: dict[Path, int] = {}

    def frames(self, row: ClipRow) -> list[Image.Image]:
        """The clip's story frames, or BrokenSample."""
        path = Path(row.location or Path(row.dataset, "frames", f"{row.shard}.tar"))
        size = (row.conditions.width, row.conditions.height)
        ranges = zip(row.frame_offsets, row.frame_sizes, row.frame_crc32, strict=True)
        return [
            self._frame(path, *byte_range, size, f"{path}: member {row.key}.{frame_member(number)}")
            for number, byte_range in enumerate(ranges, start=1)
        ]

    def _frame(
        self, path: Path, offset: int, num_bytes: int, crc32: int, size: tuple[int, int], where: str
    ) -> Image.Image:
        data = self._read(path, offset, num_bytes, where)
        if (found := zlib.crc32(data)) != crc32:
            raise BrokenSample(f"{where}: crc32 is {found:08x}, the index expects {crc32:08x}")
        try:
            return decode_jpeg(data, size)
        except ValueError as error:
            raise BrokenSample(f"{where}: {error}") from error

    def caption(self, row: ClipRow) -> CaptionRecord:
        """The clip's captions; an empty record where the index knows none."""
        if row.caption_run is None:
            return CaptionRecord(row.key)
        path = Path(row.dataset, "captions", row.caption_run, f"{row.shard}.jsonl")
        where = f"{path}: caption of clip {row.key}"
        try:
            record = CaptionRecord.from_json(self._read(path, row.caption_offset, row.caption_size, where))
        except ValueError as error:
            raise BrokenSample(f"{where}: {error}") from error
        if record.key != row.key:
            raise BrokenSample(f"{where}: the line belongs to {record.key}; write the index again")
        return record

    def _read(self, path: Path, offset: int, size: int, where: str) -> bytes:
        if path not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY)
        data = os.pread(self._files[path], size, offset)
        if len(data) != size:
            raise BrokenSample(f"{where}: {len(data)} bytes at offset {offset}, the index expects {size}")
        return data


def leave_out_uncuttable(index: ClipIndex, kinds: Iterable[str], encoder: TokenCounter) -> ClipIndex:
    """Without the clips whose caption is too long for the encoder however it is cut, with a warning.

    Known of datasets whose tokens build_index has counted; a run without counts stops at such a clip.
    """
    reader, left_out = ClipReader(), {}
    for kind in kinds if encoder.max_tokens else ():
        for number in index.rows_above(kind, encoder.max_tokens):
            row = index.row(number)
            try:
                fit_caption(caption_texts(reader.caption(row))[kind], encoder)
            except ValueError as error:
                left_out[number] = f"{row.key}: {error}"
    if not left_out:
        return index
    first = next(iter(left_out.values()))
    log.warning("%d of %d clips are left out, such as %s", len(left_out), len(index), first)
    return index.without(set(left_out))


def caption_texts(record: CaptionRecord) -> dict[str, str]:
    """The clip's text of each kind that it has."""
    texts = {"global": record.global_caption, "multi_event": record.story.prompt() if record.story else ""}
    return {kind: text for kind, text in texts.items() if text}


class PlannedClips(Dataset):
    """What the workers run: a planned pack -> its clips, or the error that stopped them, as a value."""

    def __init__(self, index: ClipIndex):
        self.index = index
        self.reader = ClipReader()

    def __getitem__(self, planned: PlannedPack) -> ClipBatch | OSError | ValueError:
        try:
            clips = [self._load(clip.row, clip.epoch) for clip in planned.clips]
        except (
            OSError,
            ValueError,
        ) as error:  # raised again in the main process, without a worker's traceback
            return error
        return ClipBatch(clips, planned.num_global_clips, planned.next_position)

    def _load(self, number: int, epoch: int) -> LoadedClip:
        row = self.index.row(number)
        frames = frames_to_tensor(self.reader.frames(row))
        captions = caption_texts(self.reader.caption(row))
        return LoadedClip(row.key, epoch, frames, row.conditions, captions)


class PlannedLoader:
    """Iterates so many packs in the plan's order, whatever the number of workers, and times each wait."""

    def __init__(
        self, clips: PlannedClips, packs: Iterator[PlannedPack], num_packs: int, *, num_workers: int
    ):
        self.num_packs = num_packs
        self.loader = DataLoader(
            clips,
            sampler=islice(packs, num_packs),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        return self.num_packs

    def __iter__(self) -> Iterator[ClipBatch]:
        batches = iter(self.loader)
        for _ in range(len(self)):
            start = time.perf_counter()
            batch = next(batches)
            if isinstance(batch, Exception):
                raise batch
            batch.wait_s = time.perf_counter() - start
            yield batch


def _start_worker(worker_id: int) -> None:
    ignore_stop_signals()  # a signal to the process group must not kill the reader of the step in flight
    torch.set_num_threads(1)
