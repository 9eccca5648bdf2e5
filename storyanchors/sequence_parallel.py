"""Ulysses sequence parallelism: the packed tokens of all clips are split over the ranks of a process group.

A rank holds consecutive tokens of the pack, as many as any other or one less, and does alone what is done for
single tokens: linears, norms, modulation, cross-attention. Around self-attention an all-to-all swaps tokens
for heads, so that a rank attends over whole clips with its share of the heads (arXiv 2309.14509); the number
of ranks must divide the heads. All ranks of the group pass the same arguments to the network, take a backward
of the same loss, and get the whole velocity; then the mean of their gradients, as DDP and ZeRO take it over
all ranks, is the gradient of one process. Every forward and backward is a collective of the group.

Needs torch.distributed alone (NCCL or gloo), and is set by StoryDiT.set_sequence_parallel.
Legend: k ranks of the group, n tokens of this rank, N tokens of all clips, A heads, K head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from storyanchors.activation_checkpointing import MODES
from storyanchors.attention import packed_attention
from storyanchors.packing import cut_segments


class TokenShare(NamedTuple):
    """Which of the packed tokens are on this rank: all of them where there is no group."""

    group: str | None  # its name: a process group can neither be copied nor traced
    sizes: list[int]  # tokens of every rank of the group
    clip_lengths: list[int]  # tokens of every whole clip
    tokens: slice  # this rank's, among those of all clips
    clips: slice  # of which it has tokens
    lengths: list[int]  # tokens that it has of each of these


def share_tokens(clip_lengths: list[int], group: str | None) -> TokenShare:
    """The share of this rank; ValueError where there is not one token for every rank."""
    total, num_ranks, rank = sum(clip_lengths), 1, 0
    if group is not None:
        num_ranks, rank = _size_and_rank(group)
    if total < num_ranks:
        raise ValueError(f"{total} video tokens cannot be split over {num_ranks} ranks of sequence_parallel")
    ends = [total * (number + 1) // num_ranks for number in range(num_ranks)]
    sizes = [end - start for start, end in pairwise([0, *ends])]
    start, end = ends[rank] - sizes[rank], ends[rank]
    clips, lengths = cut_segments(clip_lengths, start, end)
    return TokenShare(group, sizes, clip_lengths, slice(start, end), clips, lengths)


def check_degree(degree: int, num_heads: int, where: str = "sequence_parallel") -> None:
    """ValueError with the degrees that are possible, if this one does not divide the heads."""
    if degree < 1 or num_heads % degree:
        possible = ", ".join(str(d) for d in range(1, num_heads + 1) if num_heads % d == 0)
        raise ValueError(
            f"{where}={degree} does not divide the {num_heads} attention heads; possible: {possible}"
        )


def self_attention(q_nAK: Tensor, k_nAK: Tensor, v_nAK: Tensor, share: TokenShare) -> Tensor:
    """Attention of every whole clip, of which this rank holds a share: (n, A, K) -> (n, A, K)."""
    if share.group is None:
        return packed_attention(q_nAK, k_nAK, v_nAK, share.lengths, share.lengths)
    qkv_n3AK = torch.stack([q_nAK, k_nAK, v_nAK], dim=1)
    q, k, v = tokens_to_heads(qkv_n3AK, share).unbind(1)  # each (N, A/k, K)
    return heads_to_tokens(packed_attention(q, k, v, share.clip_lengths, share.clip_lengths), share)


def tokens_to_heads(x_nSAK: Tensor, share: TokenShare) -> Tensor:
    """This rank's tokens, all heads (n, S, A, K) -> all tokens, this rank's heads (N, S, A/k, K)."""
    num_ranks = len(share.sizes)
    by_rank = x_nSAK.unflatten(2, (num_ranks, -1)).permute(2, 0, 1, 3, 4)  # (k, n, S, A/k, K)
    return _exchange(by_rank.flatten(0, 1), [len(x_nSAK)] * num_ranks, share.sizes, share.group)


def heads_to_tokens(x_NAK: Tensor, share: TokenShare) -> Tensor:
    """Inverse of tokens_to_heads, for one tensor: (N, A/k, K) -> (n, A, K)."""
    num_ranks, num_tokens = len(share.sizes), sum(share.lengths)
    x = _exchange(x_NAK, share.sizes, [num_tokens] * num_ranks, share.group)
    return (
        x.unflatten(0, (num_ranks, num_tokens)).transpose(0, 1).flatten(1, 2)
    )  # (k, n, A/k, K) -> (n, A, K)


def gather_tokens(x_nV: Tensor, share: TokenShare) -> Tensor:
    """The tokens of all ranks on every rank (N, V); the backward sums the gradients of all ranks."""
    if share.group is None:
        return x_nV
    num_ranks = len(share.sizes)
    return _exchange(x_nV.repeat(num_ranks, 1), [len(x_nV)] * num_ranks, share.sizes, share.group)


def agree_on_modes(
    modes: list[str], share: TokenShare, device: torch.device, *, is_sharded: bool
) -> list[str]:
    """The most frugal mode of every block: what one rank exchanges again, its whole group must.

    With weights that are sharded over all ranks (ZeRO-3), a block that runs again gathers them again: then
    all ranks agree.
    """
    if share.group is None and not is_sharded:
        return modes
    numbers = torch.tensor([MODES.index(mode) for mode in modes], device=device)  # in the order of frugality
    group = None if is_sharded else _resolve_process_group(share.group)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    return [MODES[number] for number in numbers.tolist()]


@contextmanager
def whole_sequences(dit) -> Iterator[None]:
    """Inside, the network computes alone: for what the ranks of a group do apart, such as samples."""
    group, dit.sequence_group = dit.sequence_group, None
    try:
        yield
    finally:
        dit.sequence_group = group


def _size_and_rank(group: str) -> tuple[int, int]:
    process_group = _resolve_process_group(group)
    return process_group.size(), process_group.rank()


@torch.library.custom_op("storyanchors::exchange", mutates_args=())
def _exchange(x: Tensor, in_sizes: Sequence[int], out_sizes: Sequence[int], group: str) -> Tensor:
    """Rows for every rank of the group, in its order -> rows from every rank. An operator, so that it is
    one for the compiler, for checkpointing and for autograd alike."""
    out = x.new_empty(sum(out_sizes), *x.shape[1:])
    process_group = _resolve_process_group(group)
    dist.all_to_all_single(out, x.contiguous(), list(out_sizes), list(in_sizes), group=process_group)
    return out


@_exchange.register_fake
def _exchanged_shape(x, in_sizes, out_sizes, group):
    return x.new_empty(sum(out_sizes), *x.shape[1:])


def _keep_sizes(ctx, inputs, output) -> None:
    _, *ctx.sizes, ctx.group = inputs


def _exchange_back(ctx, grad):
    in_sizes, out_sizes = ctx.sizes
    return _exchange(grad, out_sizes, in_sizes, ctx.group), None, None, None


_exchange.register_autograd(_exchange_back, setup_context=_keep_sizes)
