"""Packed attention is full attention under a mask that separates the clips."""

import pytest
import torch
from torch import Tensor

from storyanchors.attention import (
    FLASH_2,
    FLASH_3,
    SDPA,
    TORCH_VARLEN,
    choose_kernel,
    describe_kernel,
    packed_attention,
)

HEADS, WIDTH = 2, 8


def tokens(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, HEADS, WIDTH, generator=generator, dtype=torch.float64)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    """Written out over the whole pack; the mask is block-diagonal."""
    clip_of_q, clip_of_k = (
        torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in (q_lengths, k_lengths)
    )
    scores = torch.einsum("nak,mak->anm", q, k) / WIDTH**0.5
    scores = scores.masked_fill(clip_of_q[:, None] != clip_of_k, -torch.inf)
    return torch.einsum("anm,mak->nak", scores.softmax(-1), v)


# Above 1024 x 1024 scores a clip takes the device's kernel, below it is written out: both in the last case
CASES = {
    "one clip": ([7], [7]),
    "self-attention": ([3, 1, 12], [3, 1, 12]),
    "captions": ([6, 4, 2], [1, 9, 5]),
    "both ways of computing": ([1100, 5, 1030], [1000, 3, 1030]),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_attention_is_full_attention_under_a_block_diagonal_mask(case):
    q_lengths, k_lengths = CASES[case]
    q, k, v = tokens(sum(q_lengths), 0), tokens(sum(k_lengths), 1), tokens(sum(k_lengths), 2)
    packed = packed_attention(q, k, v, q_lengths, k_lengths)
    torch.testing.assert_close(packed, masked_attention(q, k, v, q_lengths, k_lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_forward_alone_gives_the_same(case, dtype):
    """Without gradients float32 takes SDPA, and bf16 writes many queries out part by part."""
    q_lengths, k_lengths = CASES[case]
    q, k, v = (tokens(sum(n), i).to(dtype) for i, n in enumerate((q_lengths, k_lengths, k_lengths)))
    expected = masked_attention(q.double(), k.double(), v.double(), q_lengths, k_lengths)
    with torch.no_grad():
        found = packed_attention(q, k, v, q_lengths, k_lengths)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_gradients_stay_within_a_clip():
    q_lengths, k_lengths = [4, 3], [2, 5]
    q, k, v = (x.requires_grad_() for x in (tokens(7, 0), tokens(7, 1), tokens(7, 2)))
    packed_attention(q, k, v, q_lengths, k_lengths)[:4].square().sum().backward()
    for x, own in ((q, 4), (k, 2), (v, 2)):
        assert x.grad[:own].any() and not x.grad[own:].any()


def test_both_ways_of_computing_have_the_same_gradients():
    """The same queries against the same keys: once below the limit, once above it by copies of all keys."""
    q, k, v = (x.float().requires_grad_() for x in (tokens(700, 0), tokens(800, 1), tokens(800, 2)))
    small = packed_attention(q, k, v, [700], [800])
    large = packed_attention(
        q, k.repeat(2, 1, 1), v.repeat(2, 1, 1), [700], [1600]
    )  # copies share the weight
    torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-4)
    one, other = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (small, large))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), [([4, 3], [7]), ([4, 4], [7, 1]), ([7], [6])])
def test_lengths_that_do_not_add_up_are_refused(q_lengths, k_lengths):
    with pytest.raises((ValueError, RuntimeError)):
        packed_attention(tokens(7, 0), tokens(7, 1), tokens(7, 2), q_lengths, k_lengths)


# The choice of a kernel; none of these runs on a CPU

HOPPER, AMPERE = (9, 0), (8, 0)
ALL = (FLASH_3, FLASH_2, TORCH_VARLEN)
LONG, SHORT = [18720, 12480], [1500, 900, 1600]


@pytest.mark.parametrize(
    ("capability", "lengths", "installed", "expected"),
    [
        (HOPPER, LONG, ALL, FLASH_3),
        (HOPPER, LONG, (FLASH_2, TORCH_VARLEN), SDPA),  # cuDNN's kernel is faster than FlashAttention 2
        (HOPPER, SHORT, (FLASH_2, TORCH_VARLEN), FLASH_2),
        (HOPPER, SHORT, (TORCH_VARLEN,), TORCH_VARLEN),
        (HOPPER, SHORT[:1], (FLASH_2, TORCH_VARLEN), SDPA),
        (AMPERE, SHORT, ALL, FLASH_2),
        (AMPERE, LONG, ALL, SDPA),
        (AMPERE, SHORT, (), SDPA),
    ],
)
def test_the_kernel_follows_the_clips_and_what_is_installed(capability, lengths, installed, expected):
    assert choose_kernel(capability, torch.bfloat16, 128, lengths, installed) == expected


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 128), (torch.bfloat16, 512), (torch.bfloat16, 36)]
)
def test_what_flash_kernels_do_not_take_goes_to_sdpa(dtype, head_dim):
    assert choose_kernel(HOPPER, dtype, head_dim, SHORT, ALL) == SDPA


def test_the_kernel_is_named_for_the_log():
    assert describe_kernel(torch.device("cpu"), torch.float32, 64) == "SDPA for each clip (flash_attention)"
