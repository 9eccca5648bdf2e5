"""StoryDiT against numbers that the authors' own code computed once (tests/golden/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.dit_config import STEP_VIDEO
from storyanchors.weights import load_base_weights

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = dict(atol=1e-5, rtol=1e-5)
TEXT_LENGTH = 512  # rows that Wan's text is padded to

WAN = StoryDiTConfig(
    num_attention_heads=2, attention_head_dim=32, num_layers=2, ffn_dim=96, text_dim=24, latent_channels=4
)
STEP = dict(STEP_VIDEO, num_attention_heads=3, attention_head_dim=16, num_layers=2, ffn_dim=192)
STEP |= dict(text_dim=20, clip_text_dim=12, rope_axes_dim=(8, 4, 4), latent_channels=4)
STEP_T2V = StoryDiTConfig(**STEP, patch_size=(1, 2, 2))
STEP_TI2V = StoryDiTConfig(**STEP, patch_size=(1, 1, 1))


def loaded(name: str, config: StoryDiTConfig) -> StoryDiT:
    torch.manual_seed(0)
    dit = StoryDiT(config).eval()
    load_base_weights(dit, GOLDEN / name)
    return dit


def vectors(name: str) -> list[dict[str, Tensor]]:
    """One dictionary per clip."""
    stored = load_file(GOLDEN / f"{name}_vectors.safetensors")
    clips = 1 + max(int(key.rsplit("_", 1)[1]) for key in stored if key[-1].isdigit())
    by_clip = [
        {key.rsplit("_", 1)[0]: x for key, x in stored.items() if key.endswith(f"_{i}")} for i in range(clips)
    ]
    for i, clip in enumerate(by_clip):
        clip |= {"time": stored["timesteps"][i]} if "timesteps" in stored else {}
    return by_clip


def inputs_of(clip: dict[str, Tensor]) -> Tensor:
    noisy = clip["noisy"]
    condition, mask = torch.zeros_like(noisy), torch.zeros(len(noisy))
    if "first_frame" in clip:
        condition[0], mask[0] = clip["first_frame"], 1
    return stack_condition_channels(noisy, clip.get("condition", condition), clip.get("mask", mask))


@torch.no_grad()
def run_wan(dit: StoryDiT, clips: list[dict[str, Tensor]], text_length: int = TEXT_LENGTH) -> list[Tensor]:
    captions = [torch.zeros(text_length, WAN.text_dim) for _ in clips]
    for caption, clip in zip(captions, clips, strict=True):
        caption[: len(clip["caption"])] = clip["caption"]
    return dit([inputs_of(clip) for clip in clips], torch.stack([c["time"] for c in clips]), None, captions)


@torch.no_grad()
def run_step(dit: StoryDiT, clips: list[dict[str, Tensor]]) -> list[Tensor]:
    """In our terms: time runs from data to noise, size is in pixels, and a caption has its own rows only."""
    pixels = STEP_VIDEO["resolution_divisor"] // dit.config.patch_size[1]
    conditions = [
        ClipConditions(
            fps=clip["fps"].item() if "fps" in clip else None,
            motion=clip["motion"].item() if "motion" in clip else None,
            num_frames=len(clip["noisy"]),
            height=clip["noisy"].shape[2] * pixels,
            width=clip["noisy"].shape[3] * pixels,
        )
        for clip in clips
    ]
    captions = [(c["clip_caption"], c["padded_caption"][: int(c["caption_length"])]) for c in clips]
    timesteps = torch.stack([1000 * (1 - clip["time"]) for clip in clips])
    return dit([inputs_of(clip) for clip in clips], timesteps, conditions, captions)


def check(velocities: list[Tensor], expected: list[Tensor]) -> None:
    for velocity, output in zip(velocities, expected, strict=True):
        torch.testing.assert_close(velocity, output, **TOLERANCE)


def differ(velocities: list[Tensor], expected: list[Tensor]) -> float:
    return min((v - e).abs().max().item() for v, e in zip(velocities, expected, strict=True))


def test_wan_text_to_video_is_the_authors():
    clips = vectors("wan_t2v")
    *velocities, late = run_wan(loaded("wan_t2v", WAN), clips)
    check(velocities, [clip["output"] for clip in clips[:-1]])
    # their sinusoid is computed in float64, diffusers' and ours in float32, which tells at a late timestep
    assert clips[-1]["time"] > 700
    torch.testing.assert_close(late, clips[-1]["output"], atol=5e-5, rtol=1e-5)


def test_wan_attends_to_the_zeros_behind_a_text():
    clips, dit = vectors("wan_t2v"), loaded("wan_t2v", WAN)
    assert differ(run_wan(dit, clips, text_length=16), [clip["output"] for clip in clips]) > 1e-2


def test_wan_image_to_video_is_the_authors_without_its_image_branch():
    """The vectors were made with an image branch that adds nothing: what is left is what we load."""
    clips = vectors("wan_i2v")
    assert all(clip["mask"].any() for clip in clips)
    check(run_wan(loaded("wan_i2v", WAN), clips), [clip["output"] for clip in clips])


def test_step_video_text_to_video_is_the_authors():
    clips = vectors("step_t2v")
    assert [("fps" in clip) for clip in clips] == [True, True, False]
    check(run_step(loaded("step_t2v", STEP_T2V), clips), [-clip["output"] for clip in clips])


def test_step_video_image_to_video_is_the_authors():
    clips = vectors("step_ti2v")
    check(run_step(loaded("step_ti2v", STEP_TI2V), clips), [-clip["output"] for clip in clips])


def reverse_pairs(dit: StoryDiT) -> None:
    """Queries and keys back in Step-Video's own order of channels."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15])
    for block in dit.blocks:
        for linear, norm in ((block.attn1.to_q, block.attn1.norm_q), (block.attn1.to_k, block.attn1.norm_k)):
            linear.weight.data = linear.weight.data.unflatten(0, (3, 16))[:, order].flatten(0, 1)
            norm.weight.data = norm.weight.data[order]


def unfuse_by_thirds(dit: StoryDiT) -> None:
    """Keys as if they followed all the queries, where they alternate with them head by head."""
    stored = load_file(GOLDEN / "step_t2v" / "diffusion_pytorch_model.safetensors")
    for i, block in enumerate(dit.blocks):
        block.attn1.to_v.weight.data = stored[f"transformer_blocks.{i}.attn1.wqkv.weight"][96:].float()


def exchange_the_norms(dit: StoryDiT) -> None:
    """The feed-forward's norm in place of the one before self-attention."""
    for block in dit.blocks:
        block.norm1, block.norm3 = block.norm3, block.norm1


@pytest.mark.parametrize("spoil", [reverse_pairs, unfuse_by_thirds, exchange_the_norms])
def test_a_wrong_reading_of_step_videos_weights_shows(spoil):
    clips, dit = vectors("step_t2v"), loaded("step_t2v", STEP_T2V)
    spoil(dit)
    assert differ(run_step(dit, clips), [-clip["output"] for clip in clips]) > 1e-2


def other_sign(clip: dict[str, Tensor]) -> None:
    clip["output"] = -clip["output"]


def other_direction_of_time(clip: dict[str, Tensor]) -> None:
    clip["time"] = 1 - clip["time"]


def attended_padding(clip: dict[str, Tensor]) -> None:
    clip["caption_length"] = torch.tensor(len(clip["padded_caption"]))


def other_fps(clip: dict[str, Tensor]) -> None:
    clip["fps"] = clip.get("fps", torch.tensor(0.0)) + 1


@pytest.mark.parametrize("spoil", [other_sign, other_direction_of_time, attended_padding, other_fps])
def test_a_wrong_reading_of_step_videos_inputs_shows(spoil):
    clips, dit = vectors("step_t2v"), loaded("step_t2v", STEP_T2V)
    for clip in clips:
        spoil(clip)
    assert differ(run_step(dit, clips), [-clip["output"] for clip in clips]) > 1e-2


def test_the_vectors_are_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 2_000_000
