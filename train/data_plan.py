"""Which clips are in the batch at a position, and which of them a rank computes together: pure functions.

A position is a place in the endless stream of clips (train/clips/clip_stream.py), counted in clips: it is all
that a checkpoint keeps of the data. A window of the stream is dealt into packs of nearly equal cost, and the
packs into global batches; the world size only decides who computes which pack. Nothing is dropped or padded.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from train.clips.clip_stream import ClipStream, Mix
from train.stable_hash import stable_hash

Pack = TypeVar("Pack")
COST_STEPS = 2**31  # the dearest clip of a window in whole numbers, which add up alike on every machine


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
            raise ValueError(
                f"data.clips_per_batch={clips_per_batch} is too few for {packs_per_batch} packs, each has at "
                f"least one clip: expected data.clips_per_batch={packs_per_batch} or more"
            )
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
        self.mix = mix
        self.stream = ClipStream(len(tokens), seed=seed, stage=stage, mix=mix)
        self._window = lru_cache(maxsize=2)(self._solve)

    def batch(self, position: int) -> PlannedBatch:
        """The batch that begins at a position; ValueError where none begins."""
        window, packs = self._at(position)
        return PlannedBatch(tuple(map(window.clips, packs)), position, position + sum(map(len, packs)))

    def packs(self, position: int, *, rank: int, world_size: int) -> Iterator[PlannedPack]:
        """One rank's packs from a position on, without end."""
        if self.packs_per_batch % world_size:
            raise ValueError(f"packs_per_batch={self.packs_per_batch} cannot be shared by {world_size} ranks")
        while True:
            window, packs = self._at(position)
            num_global_clips = sum(map(len, packs))
            position += num_global_clips
            for pack in packs_of_rank(packs, rank, world_size):
                yield PlannedPack(window.clips(pack), num_global_clips, position)

    def _at(self, position: int) -> tuple["_Window", list[list[int]]]:
        window = self._window(position // self.window_clips)
        if position not in window.batches:
            raise ValueError(
                f"no batch of the data plan begins at clip {position}: the position is of a run with other "
                "data or other data settings"
            )
        return window, window.batches[position]

    def _solve(self, number: int) -> "_Window":
        position = number * self.window_clips
        rows, epochs = self.stream.clips(position, position + self.window_clips)
        packs = pack_clips(
            self.tokens[rows], self.costs[rows], self.packs_per_batch, self.look_ahead, self.max_tokens
        )
        groups = [packs[i : i + self.packs_per_batch] for i in range(0, len(packs), self.packs_per_batch)]
        order = np.random.Generator(np.random.Philox(key=stable_hash("window", *self.key, number)))
        batches = {}
        for group in order.permutation(len(groups)).tolist():
            batches[position] = groups[group]
            position += sum(map(len, groups[group]))
        return _Window(rows.tolist(), epochs.tolist(), batches)


class _Window(NamedTuple):
    """The clips of a window by their place in it, and its batches by their position: packs of places."""

    rows: list[int]
    epochs: list[int]
    batches: dict[int, list[list[int]]]

    def clips(self, pack: list[int]) -> tuple[PlannedClip, ...]:
        return tuple(PlannedClip(self.rows[place], self.epochs[place]) for place in pack)


def packs_of_rank(packs: Sequence[Pack], rank: int, world_size: int) -> list[Pack]:
    """A rank's packs of a batch, one for each micro-step, in which all ranks have similar ones."""
    micro_steps = range(len(packs) // world_size)
    # there and back again: who got the dearest of one micro-step gets the cheapest of the next
    places = [rank if step % 2 == 0 else world_size - 1 - rank for step in micro_steps]
    return [packs[step * world_size + place] for step, place in zip(micro_steps, places, strict=True)]


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
    # A pack is one whole number, so that the heap compares quickly: its load above, its own number below.
    bits = num_packs.bit_length()
    mask = (1 << bits) - 1
    order = np.argsort(-costs, kind="stable")
    steps = [step << bits for step in np.rint(costs[order] * (COST_STEPS / costs.max())).astype(int).tolist()]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = list(range(num_packs))
    if max_tokens is None:
        for clip, step in zip(order.tolist(), steps, strict=True):
            pack = heap[0]
            packs[pack & mask].append(clip)
            heapq.heapreplace(heap, pack + step)
    elif not _fill(packs, heap, order.tolist(), steps, tokens[order], mask, max_tokens):
        return None
    return [packs[pack & mask] for pack in sorted(heap, key=lambda pack: (-(pack >> bits), pack))]


def _fill(
    packs: list[list[int]],
    heap: list[int],
    order: list[int],
    steps: list[int],
    tokens: np.ndarray,
    mask: int,
    max_tokens: int,
) -> bool:
    """The same with a cap; False when a clip finds no room. steps and tokens are in that order."""
    least_left = np.minimum.accumulate(tokens[::-1])[::-1].tolist()  # of this clip and all after it
    room, full = [max_tokens] * len(packs), []
    for clip, step, num_tokens, least in zip(order, steps, tokens.tolist(), least_left, strict=True):
        passed_over = []
        while heap and room[heap[0] & mask] < num_tokens:
            pack = heapq.heappop(heap)
            (passed_over if room[pack & mask] >= least else full).append(pack)
        if not heap:
            return False
        pack = heap[0]
        packs[pack & mask].append(clip)
        room[pack & mask] -= num_tokens
        heapq.heapreplace(heap, pack + step)
        for pack in passed_over:
            heapq.heappush(heap, pack)
    heap += full
    return True
