"""Clips of any sizes in one sequence: which token stands where, and how far it is turned."""

import pytest
import torch
from torch import Tensor

from storyanchors.packing import patchify, token_counts, unpatchify

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
