"""Which clips are in the batch at a position: pure functions of (index, seed, stage, position).

The epochs of a stage form one endless stream of clips, each epoch a seeded shuffle of all of them. A position
is a place in that stream, counted in clips: it is all that a checkpoint keeps of the data, whatever the
number of ranks and workers. Nothing is dropped: a batch may run over the border between two epochs.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def stable_hash(*parts: object) -> int:
    """A 63-bit integer from the parts, the same on every machine and in every run."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class PlannedClip:
    row: int  # of the clip index
    epoch: int


@dataclass(frozen=True)
class PlannedBatch:
    """The clips that one rank reads of a global batch, and where that batch begins and ends in the stream."""

    clips: tuple[PlannedClip, ...]
    start: int
    end: int

    @property
    def num_global_clips(self) -> int:
        return self.end - self.start


@lru_cache(maxsize=4)
def epoch_order(num_clips: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """The rows (num_clips,) of one epoch, shuffled."""
    philox = np.random.Philox(key=stable_hash("order", seed, stage, epoch))
    return np.random.Generator(philox).permutation(num_clips)


def plan_batch(
    num_tokens: np.ndarray,
    position: int,
    *,
    seed: int,
    stage: str,
    clips_per_batch: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> PlannedBatch:
    """The global batch that begins at a position, and this rank's share of it.

    num_tokens (N,) holds the tokens of every clip of the index. A batch ends after clips_per_batch clips, or
    before the clip that would bring it over max_tokens, but not before it has one clip for every rank.
    """
    clips, tokens = [], 0
    while len(clips) < clips_per_batch:
        epoch, place = divmod(position + len(clips), len(num_tokens))
        row = int(epoch_order(len(num_tokens), seed, stage, epoch)[place])
        tokens += int(num_tokens[row])
        if max_tokens is not None and tokens > max_tokens and len(clips) >= world_size:
            break
        clips.append(PlannedClip(row, epoch))
    return PlannedBatch(tuple(clips[rank::world_size]), position, position + len(clips))
