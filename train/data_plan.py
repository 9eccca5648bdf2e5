"""Which clips are in the batch at a position, and which of them a rank computes together: pure functions.

A position is a place in the endless stream of clips (train/clip_stream.py), counted in clips: it is all that
a checkpoint keeps of the data. A window of the stream is dealt into packs of nearly equal cost, and the packs
into global batches; the world size only decides who computes which pack. Nothing is dropped, nothing padded.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from train.clip_stream import ClipStream, Mix
from train.stable_hash import stable_hash


class PlannedClip(NamedTuple):
    row: int  # of the clip index
    epoch: int


@dataclass(frozen=True)
class PlannedBatch:
    """One optimizer step: its packs, dearest first, and where it begins and ends in the stream."""

    packs: tuple[tuple[PlannedClip, ...], ...]
    start: int
    end: int

    @property
    def num_global_clips(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PlannedPack:
    """One micro-batch of one rank."""

    clips: tuple[PlannedClip, ...]
    num_global_clips: int  # of its whole batch: every clip weighs 1 / num_global_clips in the step
    next_position: int  # the end of its whole batch


class DataPlan:
    """The batches of a stage: a pure function of the arguments; recent windows are kept.

    tokens (N,) and costs (N,) belong to the clips of the index, costs in any unit. A window of look_ahead *
    clips_per_batch clips becomes look_ahead batches of packs_per_batch packs, more where max_tokens, the most
    tokens of a pack, demands it. ValueError for settings that cannot be met.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        costs: np.ndarray,
        *,
        seed: int,
        stage: str,
        clips_per_batch: int,
        packs_per_batch: int,
        max_tokens: int | None = None,
        look_ahead: int = 4,
        mix: Mix | None = None,
    ):
        if clips_per_batch < packs_per_batch:
            raise ValueError(f"clips_per_batch={clips_per_batch} is too few for {packs_per_batch} packs")
        self.window_clips = look_ahead * clips_per_batch
        if max_tokens is not None:
            if self.window_clips % packs_per_batch:
                raise ValueError(
                    f"with max_tokens, look_ahead * clips_per_batch = {look_ahead} * {clips_per_batch} must "
                    f"be a multiple of packs_per_batch={packs_per_batch}: every clip may need its own pack"
                )
            if (largest := int(tokens.max())) > max_tokens:
                raise ValueError(f"a clip has {largest} tokens, max_tokens={max_tokens} is less")
        self.tokens, self.costs = tokens, costs
        self.key = (seed, stage)
        self.packs_per_batch = packs_per_batch
        self.max_tokens = max_tokens
        self.look_ahead = look_ahead
        self.stream = ClipStream(len(tokens), seed=seed, stage=stage, mix=mix)
        self._window = lru_cache(maxsize=2)(self._solve)

    def batch(self, position: int) -> PlannedBatch:
        """The batch that begins at a position; ValueError where none begins."""
        batches = self._window(position // self.window_clips)
        if position not in batches:
            raise ValueError(
                f"no batch of the data plan begins at clip {position}: the position is of a run with other "
                "data or other data settings"
            )
        return batches[position]

    def packs(self, position: int, *, rank: int, world_size: int) -> Iterator[PlannedPack]:
        """One rank's packs from a position on, without end; the ranks of a micro-step have similar ones."""
        if self.packs_per_batch % world_size:
            raise ValueError(f"packs_per_batch={self.packs_per_batch} cannot be shared by {world_size} ranks")
        while True:
            batch = self.batch(position)
            for first in range(0, self.packs_per_batch, world_size):
                # there and back again: who got the dearest of one micro-step gets the cheapest of the next
                backwards = first // world_size % 2
                place = first + (world_size - 1 - rank if backwards else rank)
                yield PlannedPack(batch.packs[place], batch.num_global_clips, batch.end)
            position = batch.end

    def _solve(self, number: int) -> dict[int, PlannedBatch]:
        """The batches of a window by their position."""
        position = number * self.window_clips
        rows, epochs = self.stream.clips(position, position + self.window_clips)
        clips = list(map(PlannedClip, rows.tolist(), epochs.tolist()))
        packs = pack_clips(
            self.tokens[rows], self.costs[rows], self.packs_per_batch, self.look_ahead, self.max_tokens
        )
        groups = [packs[i : i + self.packs_per_batch] for i in range(0, len(packs), self.packs_per_batch)]
        order = np.random.Generator(np.random.Philox(key=stable_hash("window", *self.key, number)))
        batches = {}
        for group in order.permutation(len(groups)).tolist():
            of_batch = tuple(tuple(clips[place] for place in pack) for pack in groups[group])
            end = position + sum(map(len, of_batch))
            batches[position] = PlannedBatch(of_batch, position, end)
            position = end
        return batches


def pack_clips(
    tokens: np.ndarray, costs: np.ndarray, packs_per_batch: int, num_batches: int, max_tokens: int | None
) -> list[list[int]]:
    """The clips' numbers in num_batches * packs_per_batch packs of similar cost, the dearest pack first.

    More batches where the clips do not fit under max_tokens; every clip must fit alone.
    """
    if max_tokens is not None:
        num_batches = max(num_batches, math.ceil(int(tokens.sum()) / (max_tokens * packs_per_batch)))
    while (packs := _deal(tokens, costs, num_batches * packs_per_batch, max_tokens)) is None:
        num_batches += 1
    return packs


def _deal(
    tokens: np.ndarray, costs: np.ndarray, num_packs: int, max_tokens: int | None
) -> list[list[int]] | None:
    """Longest processing time first: the dearest clip left goes to the cheapest pack that has room for it.

    None when a clip finds no room.
    """
    order = np.argsort(-costs, kind="stable")
    least = np.minimum.accumulate(tokens[order][::-1])[::-1].tolist()  # tokens of any clip from here on
    tokens, costs = tokens.tolist(), costs.tolist()
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [math.inf if max_tokens is None else max_tokens] * num_packs
    heap = [(0.0, number) for number in range(num_packs)]  # (cost, pack)
    for clip, least_left in zip(order.tolist(), least, strict=True):
        too_full = []
        while heap and room[heap[0][1]] < tokens[clip]:
            pack = heapq.heappop(heap)
            if room[pack[1]] >= least_left:
                too_full.append(pack)
        if not heap:
            return None
        cost, number = heap[0]
        packs[number].append(clip)
        room[number] -= tokens[clip]
        heapq.heapreplace(heap, (cost + costs[clip], number))
        for pack in too_full:
            heapq.heappush(heap, pack)
    loads = [sum(costs[clip] for clip in pack) for pack in packs]
    return [packs[number] for number in sorted(range(num_packs), key=lambda number: -loads[number])]
