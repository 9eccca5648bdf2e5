"""Queries and keys of self- and cross-attention: RMS normalisation, then rotary positions (RoPE).

Legend: N tokens of all clips, A heads, K head width, D = A K.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from storyanchors.packing import Grid


def rope_table(grids: Sequence[Grid], axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """(N, 1, K/2, 2) cosines and sines in float32; axes: the numbers of a head for time, height and width."""
    return torch.cat([_rope_of_grid(grid, axes, device) for grid in grids])[:, None]


def normed_heads(
    y_ND: Tensor, weight: Tensor, rope: Tensor | None, *, head_dim: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """RMSNorm, then rotation by the rope table: float32 math, (N, A, K) in dtype.

    The norm runs over as many numbers as its weight has: D for all heads together (Wan), K for each head
    (Step-Video). For the backward only y is kept, in its own dtype, and one factor for each norm.
    """
    # cast out here: torch 2.11's compiler gets the gradients of a function wrong whose last step is a cast
    # that has nothing to do
    return _NormedHeads.apply(y_ND, weight.float(), rope, head_dim, eps).to(dtype)


def rotate(x_NAK: Tensor, rope: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i+1) of every head by the token's angles, in float32."""
    pairs = x_NAK.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)).flatten(-2)
    # the same in real numbers, which a compiler fuses with the norm before and the cast behind
    (x, y), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weight, rope, head_dim, eps):
        y = y_ND.float().unflatten(-1, (-1, len(weight)))
        rstd = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(y_ND, weight, rope, rstd)
        heads_NAK = (y * rstd * weight).view(len(y_ND), -1, head_dim)
        return heads_NAK if rope is None else rotate(heads_NAK, rope)

    @staticmethod
    def backward(ctx, grad_NAK):
        y_ND, weight, rope, rstd = ctx.saved_tensors
        grad_NAK = grad_NAK.contiguous()
        if rope is not None:
            grad_NAK = rotate(grad_NAK, rope * rope.new_tensor([1.0, -1.0]))  # back by the same angles
        grad = grad_NAK.reshape(len(y_ND), -1, len(weight))
        normed = y_ND.float().unflatten(-1, (-1, len(weight))) * rstd
        grad_weight = (grad * normed).sum((0, 1))
        grad = grad * weight
        grad_y = rstd * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return grad_y.view(y_ND.shape).to(y_ND.dtype), grad_weight, None, None, None


@lru_cache(maxsize=256)
def _rope_of_grid(grid: Grid, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, axes, strict=True)):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        positions = torch.arange(size, dtype=torch.float64)
        angles.append((positions[:, None] * frequencies).reshape(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)  # float64: bf16 angles would be off by up to 0.1 rad
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(device, torch.float32)
