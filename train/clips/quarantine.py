"""What happens to a clip that is broken: it is written down, and another clip takes its place by rule.

The rule is a pure function of the clip's row, so that nothing else changes: the batch has as many clips, no
pack has more tokens than it was planned with, and other ranks need not hear of it.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

MAX_REPLACEMENTS = 16  # tried for one clip
ALWAYS_ALLOWED = 10  # broken clips, however few were read so far


@dataclass(frozen=True)
class BrokenClip:
    """A line of the quarantine."""

    key: str
    shard: str  # path or URL of the file
    member: str
    reason: str
    replacement: str  # key of the clip that took its place
    epoch: int


class Replacements:
    """Which clips may take a clip's place: as many tokens first, then fewer and fewer, never more."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens  # (N,) of every clip of the index

    @cached_property
    def _order(self) -> np.ndarray:
        """All rows by their tokens; equal ones are shuffled: a damaged shard has neighbours."""
        shuffled = np.random.Generator(np.random.Philox(key=0)).permutation(len(self.tokens))
        return shuffled[np.argsort(self.tokens[shuffled], kind="stable")]

    def of(self, row: int) -> Iterator[int]:
        """At most MAX_REPLACEMENTS rows, always the same and in the same order."""
        tokens = self.tokens[self._order]
        first, end = (int(np.searchsorted(tokens, self.tokens[row], side)) for side in ("left", "right"))
        place = first + int(np.flatnonzero(self._order[first:end] == row)[0])
        as_many = chain(range(place - 1, first - 1, -1), range(end - 1, place, -1))
        for other in islice(chain(as_many, range(first - 1, -1, -1)), MAX_REPLACEMENTS):
            yield int(self._order[other])


class Quarantine:
    """FOLDER/rank_00000.jsonl: the broken clips that this rank met; too many stop the run."""

    def __init__(self, folder: Path, rank: int, max_share: float):
        self.path = folder / f"rank_{rank:05d}.jsonl"
        self.max_share = max_share
        self.num_clips = 0
        self.num_broken = 0

    def add(self, broken: list[BrokenClip], *, num_clips: int) -> None:
        """Writes what was broken beside num_clips whole ones; ValueError above max_share of all so far."""
        self.num_clips += num_clips + len(broken)
        if not broken:
            return
        self.num_broken += len(broken)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(clip), sort_keys=True) + "\n" for clip in broken)
        for clip in broken:
            log.warning(
                "%s: %s: %s; clip %s takes its place", clip.shard, clip.member, clip.reason, clip.replacement
            )
        allowed = max(ALWAYS_ALLOWED, self.max_share * self.num_clips) if self.max_share else 0
        if self.num_broken > allowed:
            last = f"{broken[-1].shard}: {broken[-1].member}: {broken[-1].reason}"
            raise ValueError(
                f"{self.num_broken} of {self.num_clips} clips read are broken, more than "
                f"data.max_broken_share={self.max_share} (see {self.path}); the last: {last}"
            )
