"""Which frames two versions of a story share and where they differ, whatever was put in or taken out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# What an alignment costs: a frame without a partner, a pair of other pixels, one that is told otherwise too
ALONE, CHANGED, CHANGED_AND_TOLD_ANEW = 2, 2, 3


@dataclass(frozen=True)
class FramePair:
    """Frames that stand for one another, by number; None where one version has no such frame."""

    a: int | None
    b: int | None
    same: bool  # the same pixels

    @property
    def word(self) -> str:
        """What became of it: same, changed, only in A, only in B."""
        if self.same:
            return "same"
        return "only in B" if self.a is None else "only in A" if self.b is None else "changed"


def pair_frames(
    a: Sequence[Image.Image], b: Sequence[Image.Image], told_a: Sequence[object], told_b: Sequence[object]
) -> list[FramePair]:
    """Every frame of both once, in order, such that as little as may be was changed, put in or taken out.

    told_a and told_b are what the stories tell of each frame: of two frames that both changed, those that are
    told alike belong together.
    """
    pixels_a, pixels_b = ([_fingerprint(frame) for frame in frames] for frames in (a, b))

    def change(i: int, j: int) -> int:
        return (
            0 if pixels_a[i] == pixels_b[j] else CHANGED if told_a[i] == told_b[j] else CHANGED_AND_TOLD_ANEW
        )

    costs = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # of all from frames i and j (from 0) on
    for i in range(len(a), -1, -1):
        for j in range(len(b), -1, -1):
            steps = [costs[i + 1][j] + ALONE] if i < len(a) else []
            steps += [costs[i][j + 1] + ALONE] if j < len(b) else []
            steps += [costs[i + 1][j + 1] + change(i, j)] if i < len(a) and j < len(b) else []
            costs[i][j] = min(steps, default=0)
    pairs, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        if i < len(a) and j < len(b) and costs[i][j] == costs[i + 1][j + 1] + change(i, j):
            pairs.append(FramePair(i + 1, j + 1, change(i, j) == 0))
            i, j = i + 1, j + 1
        elif i < len(a) and costs[i][j] == costs[i + 1][j] + ALONE:
            pairs.append(FramePair(i + 1, None, False))
            i += 1
        else:
            pairs.append(FramePair(None, j + 1, False))
            j += 1
    return pairs


def count_pairs(pairs: Sequence[FramePair]) -> str:
    """In words: 6 same, 1 changed, 1 only in B."""
    words = [pair.word for pair in pairs]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words, reverse=True)))


def _fingerprint(frame: Image.Image) -> bytes:
    frame = frame.convert("RGB")
    return hashlib.sha256(repr(frame.size).encode() + frame.tobytes()).digest()
