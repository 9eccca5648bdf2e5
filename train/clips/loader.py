"""Packs of clips in the order of the data plan, read and decoded by worker processes ahead of training.

The loader has no state: the plan's position says what is next. A broken clip is replaced by rule and noted in
the run's quarantine (train/clips/quarantine.py); what cannot be read at all stops the run.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from torch.utils.data import DataLoader, Dataset

from storyanchors.caption_encoder import TokenCounter, fit_caption
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import BrokenSample, ClipReader, LoadedClip, caption_texts
from train.clips.quarantine import BrokenClip, Quarantine, Replacements
from train.clips.workers import Workers, start_worker, start_worker_server
from train.data_plan import PlannedClip, PlannedPack

log = logging.getLogger(__name__)


@dataclass
class ClipBatch:
    """A pack as this rank holds it."""

    clips: list[LoadedClip]
    num_global_clips: int
    next_position: int
    num_tokens: int = 0  # video tokens of the clips
    wait_s: float = 0.0  # how long the training loop waited for it
    broken: list[BrokenClip] = field(default_factory=list)  # those that others replace


class PlannedClips(Dataset):
    """What the workers run: a planned pack -> its clips, or the error that stopped them, as a value.

    tokens (N,) of every clip of the index decide which clip may replace another.
    """

    def __init__(self, index: ClipIndex, tokens: np.ndarray, reader: ClipReader | None = None):
        self.index = index
        self.tokens = tokens
        self.reader = reader or ClipReader()
        self.replacements = Replacements(tokens)

    def __getitem__(self, pack: PlannedPack) -> ClipBatch | OSError | ValueError:
        batch = ClipBatch([], pack.num_global_clips, pack.next_position)
        try:
            for planned in pack.clips:
                self._add(planned, batch)
        except (OSError, ValueError) as error:
            return error  # raised again in the main process, without a worker's traceback
        return batch

    def _add(self, planned: PlannedClip, batch: ClipBatch) -> None:
        """Puts the clip, or the first of its replacements that is whole, into the batch."""
        errors: list[tuple[str, BrokenSample]] = []
        for number in chain([planned.row], self.replacements.of(planned.row)):
            row = self.index.row(number)
            try:
                batch.clips.append(self.reader.load(row, planned.epoch))
            except BrokenSample as error:
                errors.append((row.key, error))
                continue
            batch.num_tokens += int(self.tokens[number])
            batch.broken += [
                BrokenClip(key, error.path, error.member, error.reason, row.key, planned.epoch)
                for key, error in errors
            ]
            return
        raise ValueError(
            f"clip {errors[0][0]} is broken ({errors[0][1]}), and so are the {len(errors) - 1} clips that "
            f"may take its place; the last: {errors[-1][1]}"
        )


class PlannedLoader:
    """Iterates a rank's packs in the plan's order, whatever the number of workers, and times each wait.

    packs(position) are the planned ones from there on; position() and num_packs() are asked for when an
    iteration begins, which is after a checkpoint was restored. prefetch: packs each worker has under way.
    """

    def __init__(
        self,
        clips: PlannedClips,
        packs: Callable[[int], Iterator[PlannedPack]],
        *,
        position: Callable[[], int],
        num_packs: Callable[[], int],
        quarantine: Quarantine,
        num_workers: int,
        prefetch: int = 1,
    ):
        self.clips = clips
        self.packs = packs
        self.position = position
        self.num_packs = num_packs
        self.quarantine = quarantine
        self.num_workers = num_workers
        self.prefetch = prefetch

    def __len__(self) -> int:
        return self.num_packs()

    def __iter__(self) -> Iterator[ClipBatch]:
        num_packs = len(self)
        packs = islice(self.packs(self.position()), num_packs)
        with Workers() as workers:
            batches = iter(self._start(packs))
            workers.note_started()
            for _ in range(num_packs):
                start = time.perf_counter()
                batch = _next(batches, workers)
                batch.wait_s = time.perf_counter() - start
                self.quarantine.add(batch.broken, num_clips=len(batch.clips))
                yield batch

    def _start(self, packs: Iterator[PlannedPack]) -> DataLoader:
        if not self.num_workers:
            return DataLoader(self.clips, sampler=packs, batch_size=None)
        start_worker_server()
        return DataLoader(
            self.clips,
            sampler=packs,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch,
            worker_init_fn=start_worker,
            multiprocessing_context="forkserver",
        )


def _next(batches: Iterator[ClipBatch | OSError | ValueError], workers: Workers) -> ClipBatch:
    try:
        batch = next(batches)
    except (RuntimeError, EOFError, OSError) as error:  # the last two where its clips were on their way
        if reason := workers.explain_end():
            raise ValueError(reason) from error
        raise
    if isinstance(batch, Exception):
        raise batch
    return batch


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
