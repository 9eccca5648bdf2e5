"""AdaLN by clip against its definition in float64, the gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from storyanchors.modulation import affine_norm, gated_residual, modulated_norm

LENGTHS, WIDTH = [300, 1, 700], 24
EPS = 1e-6


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def rows(table_BD: Tensor) -> Tensor:
    """The clip's row for every token: what our functions never make."""
    return table_BD.repeat_interleave(torch.tensor(LENGTHS), dim=0)


def outcome(
    function, arguments: list[Tensor], target: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The result and the gradients of every argument, for float64 arguments if dtype says so."""
    arguments = [argument.to(dtype or argument.dtype).requires_grad_() for argument in arguments]
    out = function(*arguments)
    return [out, *torch.autograd.grad(out, arguments, target.to(out.dtype))]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def norm_by_definition(x: Tensor, scale: Tensor, shift: Tensor, weight=None, bias=None) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, bias, EPS) * (1 + rows(scale)) + rows(shift)


def packed_norm(dtype: torch.dtype):
    def function(x, scale, shift, weight=None, bias=None):
        affine = dict(weight_D=weight, bias_D=bias)
        return modulated_norm(x, scale, shift, LENGTHS, eps=EPS, dtype=dtype, **affine)

    return function


@pytest.mark.parametrize("affine", [False, True])
def test_a_modulated_norm_and_its_gradients_are_those_of_the_definition(affine):
    shapes = [(sum(LENGTHS), WIDTH), (3, WIDTH), (3, WIDTH)] + [(WIDTH,), (WIDTH,)] * affine
    arguments, target = draw(*shapes), draw((sum(LENGTHS), WIDTH))[0]
    exact = outcome(norm_by_definition, arguments, target, torch.float64)
    found = outcome(packed_norm(torch.float32), arguments, target)
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-6


def test_under_bf16_the_gradients_of_scale_and_shift_are_summed_in_float32():
    """A gather of bf16 rows adds up thousands of tokens in bf16: errors of several per cent."""
    x, target = draw((sum(LENGTHS), WIDTH), (sum(LENGTHS), WIDTH), dtype=torch.bfloat16)
    scale, shift = draw((3, WIDTH), (3, WIDTH))
    exact = outcome(norm_by_definition, [x, scale, shift], target, torch.float64)
    found = outcome(packed_norm(torch.bfloat16), [x, scale, shift], target)
    assert found[0].dtype == found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    assert max(relative_error(one, other) for one, other in zip(found[:2], exact[:2], strict=True)) < 5e-3
    assert max(relative_error(one, other) for one, other in zip(found[2:], exact[2:], strict=True)) < 1e-5

    gathered = lambda x, scale, shift: F.layer_norm(x, (WIDTH,), eps=EPS) * (1 + rows(scale)) + rows(shift)  # noqa: E731
    naive = outcome(gathered, [x, scale.bfloat16(), shift.bfloat16()], target)
    assert relative_error(naive[2], exact[2]) > 2e-3


def test_a_gated_residual_and_its_gradients_are_those_of_the_definition():
    arguments = draw((sum(LENGTHS), WIDTH), (sum(LENGTHS), WIDTH), (3, WIDTH))
    target = draw((sum(LENGTHS), WIDTH))[0]
    exact = outcome(lambda x, y, gate: x + rows(gate) * y, arguments, target, torch.float64)
    found = outcome(lambda x, y, gate: gated_residual(x, y, gate, LENGTHS), arguments, target)
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-6


def test_the_residual_stream_keeps_its_dtype():
    x, gate = draw((sum(LENGTHS), WIDTH), (3, WIDTH))
    assert gated_residual(x, x.bfloat16(), gate, LENGTHS).dtype == torch.float32
    assert gated_residual(x.bfloat16(), x.bfloat16(), gate, LENGTHS).dtype == torch.bfloat16


def test_an_affine_norm_is_a_layer_norm():
    arguments, target = draw((9, WIDTH), (WIDTH,), (WIDTH,)), draw((9, WIDTH))[0]
    ours = outcome(lambda x, w, b: affine_norm(x, w, b, eps=EPS, dtype=torch.float32), arguments, target)
    torchs = outcome(lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, EPS), arguments, target)
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_input_is_kept_for_the_backward():
    """Neither the normalised tokens nor a modulation row for each of them: what a pack's memory goes into."""
    x, scale, shift = draw((sum(LENGTHS), WIDTH), (3, WIDTH), (3, WIDTH))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_norm(torch.float32)(*(tensor.requires_grad_() for tensor in (x, scale, shift)))
    assert sum(kept.values()) < 1.2 * x.nbytes
