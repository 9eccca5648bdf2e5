"""First-block cache: in sampling steps where the network hardly changes, one of its blocks runs, not all.

What a clip's first block adds to its tokens is compared with what it added when the clip last ran through all
blocks. Where the two differ little, the other blocks are left out, and what they added then is added again
(first-block cache of ParaAttention, https://github.com/chengzeyi/ParaAttention, after TeaCache, arXiv
2411.19108). It is settled clip by clip, so that a clip does not depend on those it is packed with, and for
each half of guidance alone. What it costs: benchmarks/results/block_cache_cpu.txt.

Legend: B clips, N video tokens, L caption tokens, D width, K head width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from storyanchors.sequence_parallel import TokenShare, share_tokens


class BlockCache:
    """What the blocks added to each clip when it last ran through all of them; lives for one sampling run."""

    def __init__(self, dit, threshold: float):
        self.dit, self.threshold = dit, threshold
        self.num_forwards = 0  # one for each clip of each forward
        self.num_skipped = 0  # of these, where only the first block ran
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by place: what the first, the others added

    def run_blocks(
        self,
        blocks: Sequence[Callable[..., Tensor]],
        x_ND: Tensor,
        caption_LD: Tensor,
        modulation_B6D: Tensor,
        rope: Tensor,
        share: TokenShare,
        caption_lengths: list[int],
    ) -> Tensor:
        """x after all blocks, each called as StoryBlock is: exact for the clips that are not skipped.

        Clips are told apart by their place in the batch: those of one sampling run keep it, and a forward
        without the second half of guidance leaves the last ones out.
        """
        first_ND = blocks[0](x_ND, caption_LD, modulation_B6D, rope, share, caption_lengths)
        added = (first_ND - x_ND).split(share.lengths)
        stale = self._stale_clips(added)
        self.num_forwards += len(added)
        self.num_skipped += len(added) - len(stale)
        clips = list(first_ND.split(share.lengths))
        if stale:
            picked_ND, *args = first_ND, caption_LD, modulation_B6D, rope, share, caption_lengths
            if len(stale) < len(clips):
                picked_ND, *args = _pick(stale, picked_ND, *args)
            for block in blocks[1:]:
                picked_ND = block(picked_ND, *args)
            for clip, out in zip(stale, picked_ND.split([len(clips[clip]) for clip in stale]), strict=True):
                self._kept[clip] = (added[clip].clone(), out - clips[clip])
                clips[clip] = out
        for clip in set(range(len(clips))) - set(stale):
            clips[clip] = clips[clip] + self._kept[clip][1]
        return torch.cat(clips)

    def _stale_clips(self, added: Sequence[Tensor]) -> list[int]:
        """The clips that must run through all blocks; one wait for the device for all of them."""
        known = [clip for clip, now in enumerate(added) if self._is_known(clip, now)]
        changes = [_relative_change(added[clip], self._kept[clip][0]) for clip in known]
        changed = torch.stack(changes).tolist() if known else []
        reused = {clip for clip, change in zip(known, changed, strict=True) if change < self.threshold}
        return [clip for clip in range(len(added)) if clip not in reused]

    def _is_known(self, clip: int, added: Tensor) -> bool:
        return clip in self._kept and self._kept[clip][0].shape == added.shape


@contextmanager
def block_cache(dit, threshold: float) -> Iterator[BlockCache]:
    """Inside, dit leaves blocks out where their first one changed by less than threshold (relative L1).

    For one sampling run, without gradients; other threads and later runs do not see it. 0 leaves nothing
    out. ValueError for another threshold below 0 or a network whose tokens are split over several processes.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"cache_threshold must be a number from 0 (0 = no cache), found {threshold}")
    if dit.sequence_group is not None:
        raise ValueError("a block cache needs whole clips, but sequence parallelism splits their tokens")
    token = _active.set(BlockCache(dit, threshold))
    try:
        with torch.no_grad():
            yield _active.get()
    finally:
        _active.reset(token)


def active_cache(dit) -> BlockCache | None:
    """The cache of the `with block_cache(dit, ...)` that this thread is in."""
    cache = _active.get()
    return cache if cache is not None and cache.dit is dit else None


_active: ContextVar[BlockCache | None] = ContextVar("block_cache", default=None)


def _relative_change(now: Tensor, before: Tensor) -> Tensor:
    """mean |now - before| / mean |before|: not a number, and so below no threshold, where before is 0."""
    before = before.float()
    return (now.float() - before).abs().mean() / before.abs().mean()


def _pick(
    clips: list[int],
    x_ND: Tensor,
    caption_LD: Tensor,
    modulation_B6D: Tensor,
    rope: Tensor,
    share: TokenShare,
    caption_lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, TokenShare, list[int]]:
    """What a block is called with, of some of the clips."""

    def rows(packed: Tensor, lengths: list[int]) -> Tensor:
        parts = packed.split(lengths)
        return torch.cat([parts[clip] for clip in clips])

    return (
        rows(x_ND, share.lengths),
        rows(caption_LD, caption_lengths),
        modulation_B6D[clips],
        rows(rope, share.lengths),
        share_tokens([share.lengths[clip] for clip in clips], None),
        [caption_lengths[clip] for clip in clips],
    )
