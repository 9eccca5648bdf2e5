"""Activation checkpointing: what a block keeps for its backward, and what it computes again.

none keeps all. full keeps a block's input and runs the whole block again. selective also keeps the results of
attention, so that only norms, linears and GELU run again: attention is 36 to 86 % of a block's work. auto
gives none to as many blocks as the free memory of the GPU holds and selective to the others, or full to all
where even that would not fit; on a CPU auto is none.

Legend: N tokens of all clips, D width.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full", "auto")
ATTENTION_OPS = ("scaled_dot_product", "_attn")  # parts of the kernels' names: aten, torch_attn, flash_attn
SHARE_OF_FREE_MEMORY = (
    0.8  # for auto; the rest is for fragmentation and for what the backward makes on its way
)


def run_block(block: Callable[..., Tensor], mode: str, *args) -> Tensor:
    """block(*args), keeping for the backward what the mode (none, selective or full) says."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    if mode == "full":
        return checkpoint(block, *args, use_reentrant=False)
    contexts = _compiled_contexts if torch.compiler.is_compiling() else _eager_contexts
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def block_modes(mode: str, config, x_ND: Tensor, compute_dtype: torch.dtype, parameters) -> list[str]:
    """The mode of every block; auto is settled by this batch's tokens and the memory that is free now."""
    if mode != "auto":
        return [mode] * config.num_layers
    if not (x_ND.is_cuda and torch.is_grad_enabled()):
        return ["none"] * config.num_layers
    sizes = (x_ND.dtype.itemsize, compute_dtype.itemsize)
    return fitting_modes(config, len(x_ND), sizes, _free_memory(x_ND.device) - _gradient_bytes(parameters))


def fitting_modes(config, num_tokens: int, sizes: tuple[int, int], free_bytes: int) -> list[str]:
    """The least recomputing that fits; sizes: see activation_bytes."""
    none, selective = (num_tokens * activation_bytes(config, mode, *sizes) for mode in ("none", "selective"))
    num_blocks, budget = config.num_layers, SHARE_OF_FREE_MEMORY * free_bytes
    if num_blocks * none <= budget:
        return ["none"] * num_blocks
    budget -= none  # what a checkpointed block makes again, all of it at once
    if num_blocks * selective > budget:
        return ["full"] * num_blocks
    num_none = int((budget - num_blocks * selective) / (none - selective))
    return ["none"] * num_none + ["selective"] * (num_blocks - num_none)


def activation_bytes(config, mode: str, residual_size: int, compute_size: int) -> float:
    """Bytes that one block keeps for one token.

    The sizes are those of one number in the residual stream and in the products (4 and 2 under bf16-mixed).
    Counted in eager mode (a test counts again); torch.compile keeps less in mode none.
    """
    D = config.num_attention_heads * config.attention_head_dim
    kept = {
        "none": 3 * residual_size * D + compute_size * (14.5 * D + 2 * config.ffn_dim),
        "selective": residual_size * D + compute_size * 2 * D,
        "full": residual_size * D,
    }
    return kept[mode]


def _free_memory(device: torch.device) -> int:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Gradients that the backward will allocate."""
    absent = (p for p in parameters if p.requires_grad and p.grad is None)
    return sum(p.numel() * p.element_size() for p in absent)


def _is_attention(op) -> bool:
    return any(part in str(op) for part in ATTENTION_OPS)


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


_compiled_contexts = partial(create_selective_checkpoint_contexts, _keep_attention)  # what it understands


class _Keep(TorchDispatchMode):
    """In the forward: keeps what attention gives."""

    def __init__(self, kept: deque):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if _is_attention(op):
            self.kept.append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _GiveBack(_Keep):
    """When the block runs again: in place of attention, what it gave."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.kept.popleft() if _is_attention(op) else op(*args, **(kwargs or {}))


def _eager_contexts() -> tuple[_Keep, _GiveBack]:
    """torch's own contexts want every operator again in its place, but those that gather a sharded network's
    weights (ZeRO-3) come when they are needed."""
    kept: deque = deque()
    return _Keep(kept), _GiveBack(kept)
