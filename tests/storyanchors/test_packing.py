"""Clips of any sizes in one sequence: which token stands where, and how far it is turned."""

import cmath

import pytest
import torch
from torch import Tensor

from storyanchors.packing import patchify, rope_table, token_counts, unpatchify

GRIDS = [(1, 2, 3), (4, 1, 1), (2, 3, 2)]
PATCH = 2


def clips(channels: int = 3) -> list[Tensor]:
    """Every number is used once, so that a swap cannot go unseen."""
    shapes = [(F, channels, h * PATCH, w * PATCH) for F, h, w in GRIDS]
    numbers = torch.arange(sum(torch.Size(shape).numel() for shape in shapes), dtype=torch.float32)
    parts = numbers.split([torch.Size(shape).numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def test_tokens_run_by_clip_frame_row_and_column_and_hold_one_patch():
    tokens, grids = patchify(clips(), PATCH)
    assert grids == GRIDS
    position = 0
    for clip, (F, h, w) in zip(clips(), GRIDS, strict=True):
        for f in range(F):
            for y in range(0, h * PATCH, PATCH):
                for x in range(0, w * PATCH, PATCH):
                    patch = clip[f, :, y : y + PATCH, x : x + PATCH]  # (C, p, p)
                    assert torch.equal(tokens[position], patch.flatten())
                    position += 1
    assert position == len(tokens) == sum(token_counts(GRIDS))


def test_unpatchify_inverts_patchify_up_to_the_order_inside_a_token():
    tokens, grids = patchify(clips(), PATCH)
    swapped = tokens.unflatten(1, (3, PATCH, PATCH)).permute(0, 2, 3, 1).flatten(1)  # (C, p, p) -> (p, p, C)
    for back, clip in zip(unpatchify(swapped, grids, PATCH), clips(), strict=True):
        assert torch.equal(back, clip)


def test_patches_of_one_pixel_are_the_pixels():
    tokens, grids = patchify(clips(), 1)
    for back, clip in zip(unpatchify(tokens, grids, 1), clips(), strict=True):
        assert torch.equal(back, clip)


def test_patchify_is_the_patch_embedding_of_wan():
    convolution = torch.nn.Conv3d(3, 7, kernel_size=(1, PATCH, PATCH), stride=(1, PATCH, PATCH))
    tokens, _ = patchify(clips(), PATCH)
    by_matrix = tokens @ convolution.weight.flatten(1).T + convolution.bias
    by_convolution = [convolution(clip.transpose(0, 1)).flatten(1).T for clip in clips()]
    torch.testing.assert_close(by_matrix, torch.cat(by_convolution), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_latents_that_do_not_divide_into_patches_are_refused(size):
    with pytest.raises(ValueError, match=f"latents of {size[0]}x{size[1]} do not divide into patches of 2x2"):
        patchify([torch.zeros(2, 3, *size)], 2)


@pytest.mark.parametrize(("head_dim", "axes"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (12, (4, 4, 4))])
def test_rotations_are_those_of_wan(head_dim, axes):
    """Each axis has its own part of the head and its own frequencies 10000^(-2i/d), counted from 0."""
    table = rope_table(GRIDS, head_dim, torch.device("cpu"))
    assert table.shape == (sum(token_counts(GRIDS)), 1, head_dim // 2)
    token = 0
    for F, h, w in GRIDS:
        for position in ((f, y, x) for f in range(F) for y in range(h) for x in range(w)):
            expected = [
                cmath.exp(1j * at / 10000 ** (2 * i / dim))
                for at, dim in zip(position, axes, strict=True)
                for i in range(dim // 2)
            ]
            assert table[token, 0].tolist() == pytest.approx(expected, abs=1e-6)
            token += 1


def test_rotations_of_far_positions_are_exact():
    """Angles are computed in float64: in float32 the last of 4000 frames would be off by 1e-4."""
    table = rope_table([(4000, 1, 1)], 128, torch.device("cpu"))
    expected = cmath.exp(1j * 3999 / 10000 ** (2 / 44))
    assert complex(table[-1, 0, 1]) == pytest.approx(expected, abs=1e-6)


def test_a_clip_is_turned_alike_wherever_it_stands_in_the_pack():
    first, second = (rope_table(grids, 64, torch.device("cpu")) for grids in (GRIDS, GRIDS[::-1]))
    counts = token_counts(GRIDS)
    for a, b in zip(first.split(counts), reversed(second.split(counts[::-1])), strict=True):
        assert torch.equal(a, b)
