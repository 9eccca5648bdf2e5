"""Which tensor of a Wan 2.1 or Step-Video checkpoint becomes which parameter of StoryDiT, and how.

Mostly a matter of names. Three things are more: Step-Video fuses queries, keys and values head by head, it
pairs the channels that RoPE rotates otherwise, and image-to-video networks have further input channels.
Legend: D width, A heads, K head width, p patch size, C latent channels.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from storyanchors.dit_config import STEP_VIDEO, StoryDiTConfig

PATCH = "patch_embedding.weight"  # (D, input channels, 1, p, p)
TABLE = "scale_shift_table"  # (1, 6, D) of a block, (1, 2, D) of the output


@dataclass(frozen=True)
class Layout:
    """The names of one kind of checkpoint, in StoryDiT's words; {} where they are the same."""

    name: str
    marker: str  # the tensor that tells this layout from those that layout_of asks for later
    patch: str = PATCH
    modules: dict[str, str] = field(default_factory=dict)
    blocks: str = "blocks"
    block_modules: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # in a block: one tensor for several
    switches: dict[str, Any] = field(default_factory=dict)  # of StoryDiTConfig, as this base model has them


@dataclass(frozen=True)
class Move:
    """One parameter and where in the stored tensor it is: a part of num_parts that alternate by head."""

    parameter: str
    part: int = 0
    num_parts: int = 1


WAN_SWITCHES = dict(
    qk_norm="rms_norm_across_heads", cross_attn_norm=True, linear_bias=True, norm_affine=False, norm_eps=1e-6,
    rope_axes_dim=None, text_norm=False, reversed_flow=False,
)  # fmt: skip
WAN = Layout(
    name="Wan 2.1, the authors' layout",
    marker="head.head.weight",
    modules={
        "patch_embedding": "patch_embedding",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "head.head": "proj_out",
        "head.modulation": TABLE,
    },
    # Their norm3, the affine one before cross-attention, is diffusers' norm2; the others have no parameters.
    block_modules={
        "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
        "self_attn.o": "attn1.to_out.0", "self_attn.norm_q": "attn1.norm_q",
        "self_attn.norm_k": "attn1.norm_k", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
        "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "cross_attn.norm_q": "attn2.norm_q",
        "cross_attn.norm_k": "attn2.norm_k", "norm3": "norm2", "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2", "modulation": TABLE,
    },
    switches=WAN_SWITCHES,
)  # fmt: skip
STEP = Layout(
    name="Step-Video",
    marker="adaln_single.linear.weight",
    patch="pos_embed.proj.weight",
    modules={
        "pos_embed.proj": "patch_embedding",
        "adaln_single.linear": "condition_embedder.time_proj",
        "adaln_single.emb.timestep_embedder": "condition_embedder.time_embedder",
        "adaln_single.emb.motion_score_embedder": "story_embedder.motion",
        "adaln_single.emb.fps_embedder": "story_embedder.fps",
        "adaln_single.emb.nframe_embedder": "story_embedder.num_frames",
        "adaln_single.emb.resolution_embedder": "story_embedder.resolution",
        "caption_projection": "condition_embedder.text_embedder",
        "clip_projection": "condition_embedder.clip_embedder",
        "proj_out": "proj_out",
        "scale_shift_table": TABLE,
    },
    blocks="transformer_blocks",
    # Their norm2 is the one before the feed-forward; before cross-attention there is none.
    block_modules={
        "norm1": "norm1", "norm2": "norm3", "attn1.wo": "attn1.to_out.0", "attn1.q_norm": "attn1.norm_q",
        "attn1.k_norm": "attn1.norm_k", "attn2.wq": "attn2.to_q", "attn2.wo": "attn2.to_out.0",
        "attn2.q_norm": "attn2.norm_q", "attn2.k_norm": "attn2.norm_k", "ff": "ffn",
        "scale_shift_table": TABLE,
    },
    fused={
        "attn1.wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn2.wkv": ("attn2.to_k", "attn2.to_v"),
    },
    # text widths and RoPE's axes are seen in the tensors
    switches={name: value for name, value in STEP_VIDEO.items() if not name.endswith("_dim")},
)  # fmt: skip
DIFFUSERS = Layout(name="Wan 2.1, diffusers' layout", marker=PATCH, switches=WAN_SWITCHES)
OWN = Layout(name="StoryDiT", marker=PATCH)

# Wan's image-to-video networks also attend to 257 CLIP tokens of the first image. StoryDiT is given frames
# through its input channels alone, and does without.
IMAGE_BRANCH = re.compile(
    r"(img_emb|condition_embedder\.image_embedder)\..+"
    r"|blocks\.\d+\.(cross_attn\.(k_img|v_img|norm_k_img)|attn2\.(add_k_proj|add_v_proj|norm_added_k))\.\w+"
)
# Step-Video rotates channel j of an axis with channel j + half the axis, Wan and StoryDiT 2j with 2j + 1.
ROTATED = re.compile(r"blocks\.\d+\.attn1\.(to_q|to_k|norm_q|norm_k)\.weight")


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout of a base model with these names, None for another kind of network."""
    return next((layout for layout in (WAN, STEP, DIFFUSERS) if layout.marker in names), None)


def moves(theirs: str, layout: Layout) -> list[Move]:
    """Where the tensor of this name goes; [] for a name that the layout does not know."""
    if not layout.modules:
        return [Move(theirs)]
    prefix, table, name = "", layout.modules, theirs
    if match := re.fullmatch(rf"{layout.blocks}\.(\d+)\.(.+)", theirs):
        prefix, table, name = f"blocks.{match[1]}.", layout.block_modules, match[2]
        for module, parts in layout.fused.items():
            if name == f"{module}.weight":
                return [Move(f"{prefix}{ours}.weight", i, len(parts)) for i, ours in enumerate(parts)]
    for module, ours in table.items():
        if name == module or name.startswith(f"{module}."):
            return [Move(prefix + ours + name.removeprefix(module))]
    return []


def stored_shape(move: Move, layout: Layout, shape: tuple[int, ...], in_channels: int) -> tuple[int, ...]:
    """Shape of the stored tensor, from the parameter's and the checkpoint's number of input channels."""
    if move.parameter == PATCH:
        shape = (shape[0], in_channels, *shape[2:])
    if layout is STEP and move.parameter == PATCH:
        shape = (*shape[:2], *shape[3:])  # a 2-D convolution
    if layout is STEP and move.parameter.endswith(TABLE):
        shape = shape[1:]
    return (move.num_parts * shape[0], *shape[1:])


def take(stored: Tensor, move: Move, layout: Layout, config: StoryDiTConfig) -> Tensor:
    """The parameter's values, with all the input columns that a StoryDiT has."""
    if move.num_parts > 1:
        heads = stored.unflatten(0, (config.num_attention_heads, move.num_parts, -1))  # (A, parts, K, D)
        stored = heads[:, move.part].flatten(0, 1)
    if layout is STEP and ROTATED.fullmatch(move.parameter):
        order = neighbouring_pairs(config.rope_axes)
        stored = stored.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
    if layout is STEP and move.parameter.endswith(TABLE):
        stored = stored[None]
    if move.parameter == PATCH:
        stored = story_columns(stored, config.latent_channels)
        stored = stored.unsqueeze(2) if layout is STEP else stored  # (D, 2C+1, 1, p, p)
    return stored


def neighbouring_pairs(axes: tuple[int, int, int]) -> list[int]:
    """Old position of every channel of a head when pairs (j, j + half) of an axis become (2j, 2j + 1)."""
    order, first = [], 0
    for dim in axes:
        order += torch.arange(first, first + dim).unflatten(0, (2, -1)).T.flatten().tolist()
        first += dim
    return order


def input_columns(in_channels: int, latent_channels: int, layout: Layout) -> str | None:
    """What a base model's input channels become, in words; None where they are no known set."""
    known = {latent_channels: "the noisy latents' columns; condition and mask are zero"}
    if layout is STEP:  # TI2V
        known[2 * latent_channels] = "the noisy and condition latents' columns; mask is zero"
    else:  # I2V, first-last-frame and Fun-InP: [noisy C | mask 4 | condition C]
        known[2 * latent_channels + 4] = (
            "the noisy and condition latents' columns; mask is the sum of its four"
        )
    return known.get(in_channels)


def story_columns(weight: Tensor, latent_channels: int) -> Tensor:
    """(D, C or 2C or 2C+4 or 2C+1, ...) -> (D, 2C+1, ...), [noisy C | condition C | mask 1].

    Wan's mask has four channels, one for each video frame of a latent frame, and stands before the condition.
    A story frame has one image: it is given for all four or for none, which makes their columns one, the sum.
    """
    C = latent_channels
    if weight.shape[1] == 2 * C + 1:
        return weight
    noisy, rest = weight[:, :C], weight[:, C:]
    mask, condition = rest[:, :-C], rest[:, -C:] if rest.shape[1] else torch.zeros_like(noisy)
    mask = mask.sum(1, keepdim=True, dtype=torch.float32)  # of no columns: zero
    return torch.cat([noisy.float(), condition.float(), mask], dim=1)
