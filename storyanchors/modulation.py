"""AdaLN over packed clips: LayerNorm modulated by clip, and gated residuals, each with its own backward.

Gathering a modulation row for every token would keep (N, D) of them in float32, and its backward adds N rows
into B. Here a clip's rows are a LayerNorm's weight and bias (one fused kernel per clip, which also sums their
gradients in float32), and for the backward only the input is kept, in its own dtype.

Legend: B clips, N tokens of all clips, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def modulated_norm(
    x_ND: Tensor,
    scale_BD: Tensor,
    shift_BD: Tensor,
    lengths: Sequence[int],
    *,
    eps: float,
    dtype: torch.dtype,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift by clip, of lengths[i] tokens: float32 math, (N, D) in dtype.

    weight and bias are those of a LayerNorm that has some (Step-Video); they fold into the clip's rows.
    """
    weight_BD, bias_BD = 1 + scale_BD.float(), shift_BD.float()
    if weight_D is not None:
        weight_BD, bias_BD = weight_D.float() * weight_BD, torch.addcmul(bias_BD, bias_D.float(), weight_BD)
    return _ModulatedNorm.apply(x_ND, weight_BD, bias_BD, list(lengths), eps, dtype)


def affine_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm with weight and bias, the same for every token: float32 math, (N, D) in dtype."""
    return _ModulatedNorm.apply(x_ND, weight_D.float()[None], bias_D.float()[None], [len(x_ND)], eps, dtype)


def gated_residual(x_ND: Tensor, y_ND: Tensor, gate_BD: Tensor, lengths: Sequence[int]) -> Tensor:
    """x + gate y with clip i's gate for its lengths[i] tokens: float32 math, (N, D) in x's dtype."""
    return _GatedResidual.apply(x_ND, y_ND, gate_BD.float(), list(lengths))


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_BD, bias_BD, lengths, eps, dtype):
        normed, means, rstds = [], [], []
        for x, weight, bias in zip(x_ND.split(lengths), weight_BD, bias_BD, strict=True):
            y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
            normed.append(y.to(dtype))
            means.append(mean)
            rstds.append(rstd)
        ctx.save_for_backward(x_ND, weight_BD, bias_BD, torch.cat(means), torch.cat(rstds))
        ctx.lengths = lengths
        return torch.cat(normed)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, weight_BD, bias_BD, means, rstds = ctx.saved_tensors
        rows = (tensor.split(ctx.lengths) for tensor in (grad_ND, x_ND, means, rstds))
        grads = [
            torch.ops.aten.native_layer_norm_backward(
                grad.float(), x.float(), x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
            )
            for grad, x, mean, rstd, weight, bias in zip(*rows, weight_BD, bias_BD, strict=True)
        ]
        grad_x, grad_weight, grad_bias = zip(*grads, strict=True)
        grad_x_ND = torch.cat([grad.to(x_ND.dtype) for grad in grad_x])
        return grad_x_ND, torch.stack(grad_weight), torch.stack(grad_bias), None, None, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, y_ND, gate_BD, lengths):
        ctx.save_for_backward(y_ND, gate_BD)
        ctx.lengths = lengths
        parts = zip(x_ND.split(lengths), y_ND.split(lengths), gate_BD, strict=True)
        return torch.cat([torch.addcmul(x.float(), y.float(), gate).to(x_ND.dtype) for x, y, gate in parts])

    @staticmethod
    def backward(ctx, grad_ND):
        y_ND, gate_BD = ctx.saved_tensors
        grads_y, grads_gate = [], []
        for grad, y, gate in zip(grad_ND.split(ctx.lengths), y_ND.split(ctx.lengths), gate_BD, strict=True):
            grad = grad.float()
            grads_y.append((grad * gate).to(y_ND.dtype))
            grads_gate.append((grad * y.float()).sum(0))
        return grad_ND, torch.cat(grads_y), torch.stack(grads_gate), None
