import pytest
import torch

from storyanchors.checkpoint_layouts import (
    DIFFUSERS,
    STEP,
    WAN,
    Move,
    input_columns,
    layout_of,
    moves,
    neighbouring_pairs,
    story_columns,
    take,
)
from storyanchors.dit_config import STEP_VIDEO, StoryDiTConfig

CONFIG = StoryDiTConfig(
    **(STEP_VIDEO | dict(text_dim=8, clip_text_dim=None, rope_axes_dim=(8, 4, 4))),
    num_attention_heads=3, attention_head_dim=16, num_layers=1, ffn_dim=192, latent_channels=4,
)  # fmt: skip


def rotate(x: torch.Tensor, angles: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    rotated = x.clone()
    for (i, j), angle in zip(pairs, angles, strict=True):
        rotated[i] = x[i] * angle.cos() - x[j] * angle.sin()
        rotated[j] = x[i] * angle.sin() + x[j] * angle.cos()
    return rotated


def test_pairs_of_halves_and_pairs_of_neighbours_give_the_same_scores():
    """Rotating halves and then comparing is comparing what was reordered and rotated by neighbours."""
    axes, halves, first = (8, 4, 4), [], 0
    for dim in axes:
        halves += [(first + j, first + dim // 2 + j) for j in range(dim // 2)]
        first += dim
    neighbours = [(2 * j, 2 * j + 1) for j in range(8)]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    angles_q, angles_k = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    order = neighbouring_pairs(axes)
    score = rotate(q, angles_q, halves) @ rotate(k, angles_k, halves)
    ours = rotate(q[order], angles_q, neighbours) @ rotate(k[order], angles_k, neighbours)
    torch.testing.assert_close(ours, score)
    unordered = rotate(q, angles_q, neighbours) @ rotate(k, angles_k, neighbours)
    assert (unordered - score).abs() > 0.1


def test_a_fused_weight_is_split_head_by_head():
    heads = [[[100 * head + 10 * part + 1.0] * 16 for part in range(3)] for head in range(3)]
    fused = torch.tensor(heads).flatten()[:, None].expand(-1, 48)  # (3 heads x q k v x 16, 48)
    targets = moves("transformer_blocks.0.attn1.wqkv.weight", STEP)
    assert [move.parameter for move in targets] == [f"blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    for part, move in enumerate(targets):
        rows = take(fused, move, STEP, CONFIG)[:, 0].unflatten(0, (3, 16))
        assert rows.unique(dim=1).flatten().tolist() == [
            10 * part + 1,
            100 + 10 * part + 1,
            200 + 10 * part + 1,
        ]


@pytest.mark.parametrize(
    "layout, theirs, ours",
    [
        (WAN, "blocks.3.norm3.bias", "blocks.3.norm2.bias"),
        (WAN, "blocks.3.modulation", "blocks.3.scale_shift_table"),
        (WAN, "head.modulation", "scale_shift_table"),
        (STEP, "transformer_blocks.3.norm2.bias", "blocks.3.norm3.bias"),
        (STEP, "transformer_blocks.3.ff.net.0.proj.weight", "blocks.3.ffn.net.0.proj.weight"),
        (STEP, "adaln_single.linear.bias", "condition_embedder.time_proj.bias"),
        (DIFFUSERS, "blocks.3.norm2.bias", "blocks.3.norm2.bias"),
    ],
)
def test_names_are_put_in_diffusers_words(layout, theirs, ours):
    assert moves(theirs, layout) == [Move(ours)]


@pytest.mark.parametrize(
    "layout, name",
    [
        (WAN, "blocks.3.norm1.weight"),
        (WAN, "vace_blocks.0.after_proj.weight"),
        (STEP, "transformer_blocks.3.attn1.wqkv.bias"),
        (STEP, "caption_norm.weight"),
    ],
)
def test_a_name_that_a_layout_does_not_have_goes_nowhere(layout, name):
    assert moves(name, layout) == []


@pytest.mark.parametrize(
    "layout, names",
    [
        (WAN, {"head.head.weight", "patch_embedding.weight"}),
        (STEP, {"adaln_single.linear.weight", "proj_out.weight"}),
        (DIFFUSERS, {"proj_out.weight", "patch_embedding.weight"}),
        (None, {"encoder.conv1.weight"}),
    ],
)
def test_a_layout_is_told_by_its_names(layout, names):
    assert layout_of(names) is layout


def test_input_columns_are_put_in_the_order_of_the_papers():
    noisy, mask, condition = (
        torch.randn(6, 4, 1, 2, 2),
        torch.randn(6, 4, 1, 2, 2),
        torch.randn(6, 4, 1, 2, 2),
    )
    zeros = torch.zeros(6, 4, 1, 2, 2)
    for stored, expected in (
        ([noisy], [noisy, zeros, zeros[:, :1]]),
        ([noisy, condition], [noisy, condition, zeros[:, :1]]),
        ([noisy, mask, condition], [noisy, condition, mask.sum(1, keepdim=True)]),
        ([noisy, condition, mask[:, :1]], [noisy, condition, mask[:, :1]]),
    ):
        assert torch.equal(story_columns(torch.cat(stored, 1), 4), torch.cat(expected, 1))


def test_the_four_mask_columns_are_summed_in_float32():
    mask = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)[None, :, None, None, None]
    stored = torch.cat([torch.zeros(1, 4, 1, 1, 1, dtype=torch.bfloat16)] * 2, 1)
    stored = torch.cat([stored[:, :4], mask, stored[:, 4:]], 1)
    assert story_columns(stored, 4)[0, -1].item() == 259  # 256 if each addition were rounded


@pytest.mark.parametrize("layout, channels", [(WAN, 32), (STEP, 36), (DIFFUSERS, 48), (DIFFUSERS, 20)])
def test_other_numbers_of_input_channels_are_not_guessed_at(layout, channels):
    assert input_columns(channels, 16, layout) is None
