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

    One call per clip: a clip of a real model has thousands of tokens, so launches cost nothing, and SDPA
    picks the fastest kernel of the device.
    """
    q_lengths, k_lengths = list(q_lengths), list(k_lengths)
    clips = zip(q_NAK.split(q_lengths), k_MAK.split(k_lengths), v_MAK.split(k_lengths), strict=True)
    return torch.cat([_attend(q, k, v) for q, k, v in clips])


def _attend(q_NAK: Tensor, k_MAK: Tensor, v_MAK: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q_NAK, k_MAK, v_MAK))  # (A, S, K)
    # On a CPU, scores that fit its cache are twice as fast written out (both passes, bf16, 512 tokens).
    if q.device.type == "cpu" and q.shape[1] * k.shape[1] <= 1024 * 1024:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
        return (scores.softmax(-1) @ v).transpose(0, 1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
