"""Rotary positions and the norms of queries and keys, against their definitions."""

import cmath

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storyanchors.dit_config import StoryDiTConfig
from storyanchors.packing import token_counts
from storyanchors.rotary import normed_heads, rope_table, rotate

GRIDS = [(3, 2, 4), (1, 5, 2), (4, 3, 3)]


def rotations(grids: list[tuple[int, int, int]], axes: tuple[int, int, int]) -> Tensor:
    """(N, 1, K/2) complex numbers."""
    return torch.view_as_complex(rope_table(grids, axes, torch.device("cpu")))


@pytest.mark.parametrize(("head_dim", "axes"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (12, (4, 4, 4))])
def test_rotations_are_those_of_wan(head_dim, axes):
    """Each axis has its own part of the head and its own frequencies 10000^(-2i/d), counted from 0."""
    table = rotations(GRIDS, StoryDiTConfig(2, head_dim, 1, 8, 8).rope_axes)
    assert table.shape == (sum(token_counts(GRIDS)), 1, head_dim // 2)
    token = 0
    for num_frames, h, w in GRIDS:
        for position in ((f, y, x) for f in range(num_frames) for y in range(h) for x in range(w)):
            expected = [
                cmath.exp(1j * at / 10000 ** (2 * i / dim))
                for at, dim in zip(position, axes, strict=True)
                for i in range(dim // 2)
            ]
            assert table[token, 0].tolist() == pytest.approx(expected, abs=1e-6)
            token += 1


def test_rotations_of_far_positions_are_exact():
    """Angles are computed in float64: in float32 the last of 4000 frames would be off by 1e-4."""
    table = rotations([(4000, 1, 1)], (44, 42, 42))
    expected = cmath.exp(1j * 3999 / 10000 ** (2 / 44))
    assert complex(table[-1, 0, 1]) == pytest.approx(expected, abs=1e-6)


def test_a_clip_is_turned_alike_wherever_it_stands_in_the_pack():
    first, second = (rotations(grids, (24, 20, 20)) for grids in (GRIDS, GRIDS[::-1]))
    counts = token_counts(GRIDS)
    for a, b in zip(first.split(counts), reversed(second.split(counts[::-1])), strict=True):
        assert torch.equal(a, b)


def plain_normed_heads(y: Tensor, weight: Tensor, rope: Tensor | None, head_dim: int) -> Tensor:
    """Torch's own norm, then the rotation written out on pairs."""
    groups = y.unflatten(-1, (-1, len(weight)))
    heads = (F.rms_norm(groups, (len(weight),), eps=1e-6) * weight).reshape(len(y), -1, head_dim)
    if rope is None:
        return heads
    (even, odd), (cos, sin) = heads.unflatten(-1, (-1, 2)).unbind(-1), rope.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@pytest.mark.parametrize("norm_dim", [48, 12])  # across four heads, or each alone
@pytest.mark.parametrize("rotated", [True, False])
def test_normed_heads_and_their_gradients_are_those_of_torchs_norm_and_a_rotation(norm_dim, rotated):
    generator = torch.Generator().manual_seed(0)
    rope = rope_table(GRIDS, (4, 4, 4), torch.device("cpu")) if rotated else None
    y = torch.randn(sum(token_counts(GRIDS)), 48, generator=generator)
    weight = torch.randn(norm_dim, generator=generator)
    target = torch.randn(len(y), 4, 12, generator=generator)

    def outcome(function) -> tuple[Tensor, ...]:
        arguments = y.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(*arguments)
        return out, *torch.autograd.grad(out, arguments, target)

    ours = outcome(lambda y, w: normed_heads(y, w, rope, head_dim=12, eps=1e-6, dtype=torch.float32))
    plain = outcome(lambda y, w: plain_normed_heads(y, w, rope, 12))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_a_compiler_sees_the_same_rotation_in_real_numbers():
    rope = rope_table(GRIDS, (4, 4, 4), torch.device("cpu"))
    heads = torch.randn(len(rope), 2, 12, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)(heads, rope)
    torch.testing.assert_close(compiled, rotate(heads, rope))


def test_rotating_back_undoes_the_rotation():
    rope = rope_table(GRIDS, (4, 4, 4), torch.device("cpu"))
    heads = torch.randn(len(rope), 2, 12, generator=torch.Generator().manual_seed(0))
    back = rotate(rotate(heads, rope), rope * torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(back, heads)
