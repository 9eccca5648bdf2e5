"""The endless stream of clips that a stage trains on: position -> (row of the clip index, epoch).

One dataset: epoch after epoch, each a seeded shuffle of all its clips. Several with weights: each has endless
epochs of its own, and a seeded pattern says whose clip is next. Any position is found without walking there.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from train.stable_hash import stable_hash

BLOCK = 10_000  # clips in which every dataset of a mix has its exact share


@dataclass(frozen=True)
class Mix:
    """Several datasets whose rows follow one another in the index, and how often their clips come."""

    num_clips: tuple[int, ...]  # of each dataset
    weights: tuple[float, ...]  # in proportion to the share of the clips in the stream

    def __post_init__(self):
        if len(self.num_clips) != len(self.weights):
            raise ValueError(f"{len(self.num_clips)} datasets have {len(self.weights)} weights")
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of a dataset is {weight}, expected above 0")
        for share in (weight / sum(self.weights) for weight in self.weights):
            if share < 1 / BLOCK:
                raise ValueError(f"a dataset has {share:.2g} of the clips, expected at least {1 / BLOCK:g}")

    @property
    def clips_per_block(self) -> np.ndarray:
        """How many clips of each dataset a block has: the largest remainders are rounded up."""
        exact = np.array(self.weights) / sum(self.weights) * BLOCK
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
        return counts


def epoch_order(num_clips: int, *key: object) -> np.ndarray:
    """The numbers 0 ... num_clips - 1 (num_clips,), shuffled; the key is what seeds the shuffle."""
    philox = np.random.Philox(key=stable_hash("order", *key))
    return np.random.Generator(philox).permutation(np.arange(num_clips, dtype=np.int32))


class ClipStream:
    """A pure function of its arguments; the orders of recent epochs are kept."""

    def __init__(self, num_clips: int, *, seed: int, stage: str, mix: Mix | None):
        if num_clips < 1:
            raise ValueError("there is no clip to plan")
        if mix and (sum(mix.num_clips) != num_clips or min(mix.num_clips) < 1):
            raise ValueError(f"a mix of {mix.num_clips} clips does not describe {num_clips} clips")
        self.key = (seed, stage)
        self.num_clips = mix.num_clips if mix else (num_clips,)
        self.first_rows = np.cumsum((0, *self.num_clips))[:-1]
        self.clips_per_block = mix.clips_per_block if mix else None
        self._order = lru_cache(maxsize=2 * len(self.num_clips))(self._shuffled)
        self._pattern = lru_cache(maxsize=4)(self._block)

    def clips(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, epochs), both (end - start,), of the clips from one position to before another."""
        datasets, places = self._datasets(np.arange(start, end))
        rows, epochs = np.empty_like(places), np.empty_like(places)
        for dataset, num_clips in enumerate(self.num_clips):
            of_dataset = np.flatnonzero(datasets == dataset)
            epochs[of_dataset], within = np.divmod(places[of_dataset], num_clips)
            for epoch in np.unique(epochs[of_dataset]).tolist():
                chosen = epochs[of_dataset] == epoch
                rows[of_dataset[chosen]] = (
                    self.first_rows[dataset] + self._order(dataset, epoch)[within[chosen]]
                )
        return rows, epochs

    def _datasets(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose clip each position has, and the how manieth of that dataset it is."""
        if self.clips_per_block is None:
            return np.zeros_like(positions), positions
        datasets, places = np.empty_like(positions), np.empty_like(positions)
        for block in range(positions[0] // BLOCK, positions[-1] // BLOCK + 1):
            inside = positions // BLOCK == block
            pattern, counts = self._pattern(block)
            within = positions[inside] % BLOCK
            datasets[inside] = pattern[within]
            places[inside] = block * self.clips_per_block[pattern[within]] + counts[within]
        return datasets, places

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The datasets (BLOCK,) of a block's clips, and how many of the same came before in the block."""
        pattern = np.repeat(np.arange(len(self.num_clips)), self.clips_per_block)
        pattern = pattern[epoch_order(BLOCK, "mix", *self.key, block)]
        counts = np.empty_like(pattern)
        for dataset, count in enumerate(self.clips_per_block):
            counts[pattern == dataset] = np.arange(count)
        return pattern, counts

    def _shuffled(self, dataset: int, epoch: int) -> np.ndarray:
        return epoch_order(self.num_clips[dataset], *self.key, dataset, epoch)
