"""Many clips of any frame count and size in one token sequence, without padding.

Legend: F story frames, C channels, H W latent size, N tokens of all clips, p patch size.
Tokens run by frame, row and column, as in Wan and Step-Video. A grid is (F, H/p, W/p) of one clip.
Lengths stay on the host as Python lists, so that splitting by clip never waits for the device.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def patchify(clips: Sequence[Tensor], patch: int) -> tuple[Tensor, list[Grid]]:
    """Clips (F_i, C, H_i, W_i) -> tokens (N, C*p*p) in (C, p, p) order, and the grid of every clip."""
    tokens, grids = [], []
    for clip in clips:
        F, _, H, W = clip.shape
        if H % patch or W % patch:
            raise ValueError(f"latents of {H}x{W} do not divide into patches of {patch}x{patch}")
        rows = clip.unflatten(-1, (W // patch, patch)).unflatten(-3, (H // patch, patch))
        # (F, C, h, p, w, p) -> (F, h, w, C, p, p)
        tokens.append(rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, clip.shape[1] * patch * patch))
        grids.append((F, H // patch, W // patch))
    return torch.cat(tokens), grids


def unpatchify(tokens_NV: Tensor, grids: Sequence[Grid], patch: int) -> list[Tensor]:
    """Inverse of patchify for the network's output, whose tokens are in (p, p, C) order."""
    clips = []
    for tokens, (F, h, w) in zip(tokens_NV.split(token_counts(grids)), grids, strict=True):
        patches = tokens.reshape(F, h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)  # (F, C, h, p, w, p)
        clips.append(patches.reshape(F, -1, h * patch, w * patch))
    return clips


def token_counts(grids: Sequence[Grid]) -> list[int]:
    return [F * h * w for F, h, w in grids]


def cut_segments(lengths: Sequence[int], start: int, end: int) -> tuple[slice, list[int]]:
    """Tokens start..end of segments of these lengths: the segments they are of, and how many of each."""
    ends = list(accumulate(lengths))
    parts = [min(end, stop) - max(start, stop - length) for length, stop in zip(lengths, ends, strict=True)]
    touched = [number for number, part in enumerate(parts) if part > 0]
    segments = slice(touched[0], touched[-1] + 1)
    return segments, parts[segments]
