"""Attention over packed clips: the tokens of a clip see its own keys and no other clip's.

Legend: N query tokens and M key tokens of all clips, A heads, K head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    q_NAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Tensor:
    """(N, A, K), (M, A, K), (M, A, K) -> (N, A, K); clip i owns q_lengths[i] queries and k_lengths[i] keys.

    One SDPA call per clip: a clip has thousands of tokens, so launches cost nothing and the fastest kernel of the
    device is chosen. Clips of equal lengths that stand side by side share a call.
    """
    q_lengths, k_lengths = list(q_lengths), list(k_lengths)
    if len(set(q_lengths)) == 1 and len(set(k_lengths)) == 1:
        return _attend(q_NAK, k_MAK, v_MAK, len(q_lengths))
    outputs = [
        _attend(q, k, v, 1)
        for q, k, v in zip(
            q_NAK.split(q_lengths), k_MAK.split(k_lengths), v_MAK.split(k_lengths), strict=True
        )
    ]
    return torch.cat(outputs)


def _attend(q_NAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, num_clips: int) -> Tensor:
    q, k, v = (x.unflatten(0, (num_clips, -1)).transpose(1, 2) for x in (q_NAK, k_MAK, v_MAK))  # (B, A, S, K)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
