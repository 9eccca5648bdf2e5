"""model_flops against torch's own count of the real network, and the sizes of the base models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.dit_config import PRESETS
from storyanchors.flops import ClipSize, model_flops, train_flops
from storyanchors.lora import LoraSettings, add_lora

SIZES = dict(
    num_attention_heads=2, attention_head_dim=32, num_layers=3, ffn_dim=80, text_dim=24, latent_channels=4
)
STEP = dict(
    clip_text_dim=12, text_norm=True, norm_affine=True, cross_attn_norm=False, qk_norm="rms_norm",
    linear_bias=False, rope_axes_dim=(16, 8, 8), reversed_flow=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "switches", [{}, {"frame_number_embedding": True}, {"patch_size": (1, 1, 1)}, STEP], ids=str
)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_flops_are_those_that_torch_counts(switches, mode):
    config = StoryDiTConfig(**SIZES, **switches)
    clip_tokens = 5 if config.clip_text_dim else 0
    clips = [
        ClipSize(3, 8, 12, 7, clip_tokens),
        ClipSize(1, 4, 4, 30, clip_tokens),
        ClipSize(5, 8, 4, 1, clip_tokens),
    ]
    inputs = [torch.zeros(c.num_frames, config.in_channels, c.height, c.width) for c in clips]
    captions = [torch.zeros(c.caption_tokens, config.text_dim) for c in clips]
    if config.clip_text_dim:
        captions = [(torch.zeros(clip_tokens, config.clip_text_dim), text) for text in captions]
    dit = StoryDiT(config)
    dit.set_activation_checkpointing(mode)
    with FlopCounterMode(display=False) as counter:
        dit(inputs, torch.full((3,), 500.0), None, captions)
    assert counter.get_total_flops() == model_flops(config, clips)


def test_a_training_step_costs_what_torch_counts_where_all_is_trained_and_about_that_with_a_lora():
    config = StoryDiTConfig(**SIZES)
    latents, caption = torch.zeros(3, 4, 8, 12), torch.zeros(7, config.text_dim)
    clips = [ClipSize.of(latents, caption)]
    assert clips == [ClipSize(3, 8, 12, 7)]
    ratios = []
    for is_lora in (False, True):
        dit = StoryDiT(config)
        if is_lora:
            add_lora(dit, LoraSettings(rank=1))
        with FlopCounterMode(display=False) as counter:
            inputs = [torch.zeros(3, config.in_channels, 8, 12)]
            dit(inputs, torch.full((1,), 500.0), None, [caption])[0].sum().backward()
        ratios.append(counter.get_total_flops() / train_flops(config, clips, is_lora=is_lora))
    assert ratios == [pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.12)]


def test_the_cost_of_a_wan_clip_is_the_known_one():
    """480 x 832, 8 frames, 512 text tokens: 61.26 TFLOP for Wan 2.1 1.3B, with 17 input channels fewer."""
    config = StoryDiTConfig.preset("wan-1.3b")
    assert model_flops(config, [ClipSize(8, 60, 104, 512)]) / 1e12 == pytest.approx(61.2577, abs=0.01)


# Our input channels and embedders come on top of the base model, whose counts the authors' code gives
@pytest.mark.parametrize(
    ("preset", "base_parameters"),
    [("wan-1.3b", 1_418_996_800), ("wan-14b", 14_288_491_584), ("step-4b", 4.025e9), ("step-30b", 29.34e9)],
)
def test_presets_have_the_base_models_sizes(preset, base_parameters):
    with torch.device("meta"):
        dit = StoryDiT(StoryDiTConfig.preset(preset))
    patch = dit.patch_embedding.weight
    added = patch[:, dit.config.latent_channels :].numel()
    own = sum(p.numel() for name, p in dit.named_parameters() if not name.startswith("story_embedder."))
    tolerance = 0 if isinstance(base_parameters, int) else 1e-3
    assert own - added == pytest.approx(base_parameters, rel=tolerance)
    assert {"tiny", preset} <= PRESETS.keys()
