"""Attention over packed clips: the tokens of a clip see its own keys and no other clip's.

On a GPU the kernel is chosen by what is installed and how long the clips are: FlashAttention 3, where it is
installed, on Hopper; else one SDPA call per clip, which launches cuDNN's kernel on Hopper (torch 2.11 on) and
FlashAttention 2 elsewhere; a variable-length kernel, one launch for all clips, where many clips are short.

Legend: N query tokens and M key tokens of all clips, A heads, K head width.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

SDPA = "SDPA for each clip"
FLASH_3 = "flash-attn 3, variable lengths"
FLASH_2 = "flash-attn 2, variable lengths"
TORCH_VARLEN = "torch varlen_attn"

SHORT_CLIP = (
    2048  # tokens: below it, with several clips, a launch for each costs more than the best kernel saves
)
CACHED_SCORES = 1024 * 1024  # of one head


def packed_attention(
    q_NAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Tensor:
    """(N, A, K), (M, A, K), (M, A, K) -> (N, A, K); clip i has q_lengths[i] queries, k_lengths[i] keys."""
    kernel = SDPA
    if q_NAK.is_cuda and not torch.compiler.is_compiling():
        capability, head_dim = torch.cuda.get_device_capability(q_NAK.device), q_NAK.shape[-1]
        kernel = choose_kernel(capability, q_NAK.dtype, head_dim, q_lengths, installed_kernels())
    if kernel != SDPA:
        return _varlen(kernel, q_NAK, k_MAK, v_MAK, tuple(q_lengths), tuple(k_lengths))
    q_lengths, k_lengths = list(q_lengths), list(k_lengths)
    clips = zip(q_NAK.split(q_lengths), k_MAK.split(k_lengths), v_MAK.split(k_lengths), strict=True)
    attended = [_attend(q, k, v) for q, k, v in clips]
    return attended[0] if len(attended) == 1 else torch.cat(attended)  # cat would copy the only one


def choose_kernel(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    q_lengths: Sequence[int],
    installed: Sequence[str],
) -> str:
    """The kernel for clips of these lengths on a GPU of this compute capability."""
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 256 or head_dim % 8:
        return SDPA
    if capability[0] == 9 and FLASH_3 in installed:
        return FLASH_3
    if len(q_lengths) > 1 and sum(q_lengths) < SHORT_CLIP * len(q_lengths):
        return next((kernel for kernel in (FLASH_2, TORCH_VARLEN) if kernel in installed), SDPA)
    return SDPA


@lru_cache(maxsize=1)
def installed_kernels() -> tuple[str, ...]:
    """The variable-length kernels that can be imported here; each needs a GPU to run."""
    modules = {
        FLASH_3: "flash_attn_interface",
        FLASH_2: "flash_attn",
        TORCH_VARLEN: "torch.nn.attention.varlen",
    }
    return tuple(kernel for kernel, module in modules.items() if importlib.util.find_spec(module))


def describe_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int = 16384) -> str:
    """What a clip of num_tokens runs, for a log: our choice and, for SDPA, the kernel that torch picks."""
    kernel = SDPA
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        kernel = choose_kernel(capability, dtype, head_dim, [num_tokens], installed_kernels())
    if kernel != SDPA:
        return kernel
    probe = torch.empty(1, 1, 128, head_dim, device=device, dtype=dtype)
    picked = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(probe, probe, probe))
    return f"{SDPA} ({picked.name.lower()})"


def _attend(q_NAK: Tensor, k_MAK: Tensor, v_MAK: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q_NAK, k_MAK, v_MAK))  # (A, S, K)
    rows = CACHED_SCORES // k.shape[1]
    # On a CPU, scores that fit its cache are twice as fast written out: in both passes together, and in a
    # forward alone in bf16 (in float32 SDPA's forward is up to twice as fast).
    if q.device.type == "cpu" and (torch.is_grad_enabled() or q.dtype == torch.bfloat16):
        if q.shape[1] <= rows:
            return _written_out(q, k, v).transpose(0, 1)
        if rows and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return torch.cat([_written_out(part, k, v) for part in q.split(rows, 1)], 1).transpose(0, 1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)).softmax(-1) @ v


def _varlen(
    kernel: str,
    q_NAK: Tensor,
    k_MAK: Tensor,
    v_MAK: Tensor,
    q_lengths: tuple[int, ...],
    k_lengths: tuple[int, ...],
) -> Tensor:
    q_ends, k_ends = _boundaries(q_lengths, q_NAK.device), _boundaries(k_lengths, q_NAK.device)
    args = (q_NAK, k_MAK, v_MAK, q_ends, k_ends, max(q_lengths), max(k_lengths))
    if kernel == FLASH_3:
        from flash_attn_interface import flash_attn_varlen_func

        out = flash_attn_varlen_func(*args)
        return out[0] if isinstance(out, tuple) else out  # early builds also return the softmax statistics
    if kernel == FLASH_2:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*args)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*args)


@lru_cache(maxsize=256)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0 and the running sums of the lengths, int32 on the device, copied once and without waiting for it."""
    sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return sums.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sums.to(device)
