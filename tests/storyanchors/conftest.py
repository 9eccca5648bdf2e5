"""Tiny random Wan parts, made by diffusers itself: what the code here has to agree with."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from storyanchors.dit_config import StoryDiTConfig

# 2 heads of 32: a width that 6 does not divide, so that the uneven RoPE split (12/10/10) is tested as well
SIZES = dict(num_attention_heads=2, attention_head_dim=32, num_layers=3, ffn_dim=96, text_dim=24)


@pytest.fixture
def config() -> StoryDiTConfig:
    return StoryDiTConfig(**SIZES, latent_channels=4)


@pytest.fixture(scope="session")
def wan() -> WanTransformer3DModel:
    """A base model of that size; norms and biases are random too, or a swap of two would go unseen."""
    model = WanTransformer3DModel(**SIZES, in_channels=4, out_channels=4).eval()
    return randomize(model, std=0.2)


@pytest.fixture(scope="session")
def vae() -> AutoencoderKLWan:
    return randomize(AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval(), std=0.3)


def randomize(module: torch.nn.Module, *, std: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)
    return module
