"""From prompt and noise to latents, our sampler computes what diffusers' WanPipeline computes."""

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from storyanchors.caption_encoder import Umt5Encoder
from storyanchors.conditioning import ClipConditions
from storyanchors.diffusers_export import save_diffusers_wan
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.flow import sampling_sigmas
from storyanchors.packed_sampling import NoisyClip, sample_clips
from storyanchors.story_request import SamplerSettings


class OurSigmas(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on our sigmas; its own end at 1/1000 before 0."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        super().set_timesteps(sigmas=sampling_sigmas(num_inference_steps, 3.0)[:-1].tolist(), device=device)


@pytest.fixture(scope="module")
def encoder() -> Umt5Encoder:
    words = ["\u2581the", "\u2581", *"abcdefghijklmnopqrstuvwxyz[].-12"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -9.0) for word in words)]
    sizes = dict(d_model=24, d_kv=8, num_heads=2, d_ff=32, num_layers=1)
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **sizes))
    return Umt5Encoder(model, T5Tokenizer(vocab=vocabulary, extra_ids=0))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_latents_are_those_of_diffusers_pipeline(
    encoder, vae: AutoencoderKLWan, tmp_path, guidance_scale
):
    torch.manual_seed(0)
    dit = StoryDiT(StoryDiTConfig(2, 12, 2, 32, text_dim=24, freq_dim=32)).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    save_diffusers_wan(dit, tmp_path)
    transformer = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    scheduler = OurSigmas(num_train_timesteps=1000)
    pipeline = WanPipeline(encoder.tokenizer, encoder.model, vae, scheduler, transformer)
    pipeline.set_progress_bar_config(disable=True)
    noise, caption = torch.randn(3, 16, 4, 6), "[1-2] the fox sleeps.\nthe end"  # (F, C, h, w)
    expected = pipeline(
        caption,
        negative_prompt="",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        latents=noise.movedim(1, 0)[None],
        output_type="latent",
    ).frames[0]  # (C, F, h, w)
    clip = NoisyClip(noise, torch.zeros_like(noise), torch.zeros(3), ClipConditions())
    own, negative = encoder.encode([caption, ""])
    settings = SamplerSettings(num_steps=4, guidance_scale=guidance_scale, shift=3.0)
    with torch.inference_mode():
        negative = None if guidance_scale == 1 else negative
        [latents] = sample_clips(dit, [clip], [own], negative, settings, lambda *_: None)
    assert (latents - noise).abs().max() > 0.1
    torch.testing.assert_close(latents, expected.movedim(0, 1), atol=1e-3, rtol=1e-3)
