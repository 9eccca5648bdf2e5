import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyanchors.codec import PcaCodec, WanCodec, load_codec

EXACT = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def vae_folder(vae: AutoencoderKLWan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def codec(vae_folder: Path) -> WanCodec:
    return WanCodec.from_pretrained(vae_folder)


def random_frames(num_frames: int, height: int = 48, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def encode_alone(vae: AutoencoderKLWan, frame: Tensor) -> Tensor:
    """The unfolded VAE on a one-frame clip, and the normalisation of diffusers' Wan pipelines."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(frame[None, :, None]).latent_dist.mode()[0, :, 0] - mean) / std


@torch.no_grad()
def decode_alone(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode((latents * std + mean)[None, :, None]).sample[0, :, 0]


def test_frames_encode_to_what_the_unfolded_vae_gives_for_each_alone(codec, vae):
    frames = random_frames(3)
    latents = codec.encode(frames)
    assert latents.shape == (3, 16, 6, 4) == (3, codec.latent_channels, 48 // 8, 32 // codec.spatial_stride)
    torch.testing.assert_close(latents, torch.stack([encode_alone(vae, frame) for frame in frames]), **EXACT)


def test_latents_decode_to_what_the_unfolded_vae_gives_for_each_alone(codec, vae):
    latents = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    frames = codec.decode(latents)
    assert frames.shape == (3, 3, 32, 48)
    torch.testing.assert_close(frames, torch.stack([decode_alone(vae, x) for x in latents]), **EXACT)
    assert frames.abs().max() == 1  # these weights go beyond it: the clamp is at work


def test_batches_bound_the_memory_and_change_nothing(codec, monkeypatch):
    frames = random_frames(5)
    latents = codec.encode(frames)
    monkeypatch.setattr(WanCodec, "PIXELS_PER_BATCH", 2 * 48 * 32)
    torch.testing.assert_close(codec.encode(frames), latents, **EXACT)
    torch.testing.assert_close(codec.decode(latents)[4:], codec.decode(latents[4:]), **EXACT)


def test_the_frames_of_several_clips_are_one_batch(codec, vae):
    clips = [random_frames(3), random_frames(4, seed=1), random_frames(1, seed=2)]
    latents = codec.encode(torch.cat(clips)).split([len(clip) for clip in clips])
    for clip, clip_latents in zip(clips, latents, strict=True):
        alone = torch.stack([encode_alone(vae, frame) for frame in clip])
        torch.testing.assert_close(clip_latents, alone, **EXACT)
    frames = codec.decode(torch.cat(latents))
    torch.testing.assert_close(frames[-1], decode_alone(vae, latents[-1][0]), **EXACT)


def test_frames_and_latents_are_left_as_they_are(codec):
    frames = random_frames(2).contiguous(memory_format=torch.channels_last)
    before = frames.clone()
    latents = codec.encode(frames).contiguous(memory_format=torch.channels_last)
    latents_before = latents.clone()
    codec.decode(latents)
    assert torch.equal(frames, before) and torch.equal(latents, latents_before)


def test_another_dtype_keeps_the_layout_and_nearly_the_numbers(vae):
    exact, codec = WanCodec.from_vae(vae), WanCodec.from_vae(vae).to("cpu", torch.bfloat16)
    frames = random_frames(2)
    latents = codec.encode(frames)
    assert latents.dtype == codec.decode(latents).dtype == torch.bfloat16
    assert codec.network.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    error = latents.float() - exact.encode(frames)
    assert error.square().mean() < 0.1**2 * exact.encode(frames).square().mean()


def test_autocast_does_not_reach_into_the_codec(codec):
    frames = random_frames(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = codec.encode(frames)
        decoded = codec.decode(latents)
    assert torch.equal(latents, codec.encode(frames))
    assert torch.equal(decoded, codec.decode(latents))


def test_the_codec_is_frozen(codec):
    assert not codec.encode(random_frames(1).requires_grad_()).requires_grad


# Tiles


class PixelsAlone(torch.nn.Module):
    """What the VAE would be if it saw every latent pixel alone: tiles of it must not show at all."""

    def encode(self, frames: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(frames, 8)[:, :16]

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(latents[:, :3].repeat_interleave(64, dim=1), 8) / 8


@pytest.fixture
def tiny_tiles(monkeypatch) -> None:
    monkeypatch.setattr(WanCodec, "LARGE_FRAME_PIXELS", 48 * 32 - 1)
    monkeypatch.setattr(WanCodec, "TILE", 4)
    monkeypatch.setattr(WanCodec, "OVERLAP", 2)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (64, 104), (24, 88)])
def test_tiles_cover_a_frame_and_fade_without_a_trace(codec, tiny_tiles, size):
    whole = WanCodec(codec.network)
    whole.network, tiled = PixelsAlone(), WanCodec(codec.network, tiling=True)
    tiled.network = whole.network
    frames = random_frames(2, *size)
    latents = tiled.encode(frames)
    torch.testing.assert_close(latents, whole.encode(frames), **EXACT)
    torch.testing.assert_close(tiled.decode(latents), whole.decode(latents), **EXACT)


def test_only_large_frames_are_tiled_and_only_on_request(vae_folder, codec, tiny_tiles):
    tiled = load_codec(vae_folder, tiling=True)
    small, large = random_frames(1, 48, 24), random_frames(1, 48, 40)
    assert torch.equal(tiled.encode(small), codec.encode(small))
    difference = (tiled.encode(large) - codec.encode(large)).abs()
    assert difference.max() > 1e-3  # these are tiles, since a tile's attention sees no other tile


def test_a_pca_codec_needs_no_tiles(tmp_path):
    PcaCodec.fit(random_frames(4)).save_pretrained(tmp_path)
    assert isinstance(load_codec(tmp_path, tiling=True), PcaCodec)


# Files and folders


def test_only_what_single_frames_need_is_kept_and_saved(codec, vae, tmp_path):
    frames = random_frames(2)
    codec.save_pretrained(tmp_path)
    again = load_codec(tmp_path)
    assert torch.equal(again.encode(frames), codec.encode(frames))
    assert torch.equal(again.decode(codec.encode(frames)), codec.decode(codec.encode(frames)))
    unfolded = sum(parameter.numel() for parameter in vae.parameters())
    assert (
        sum(tensor.numel() for tensor in load_file(tmp_path / "codec.safetensors").values()) < 0.45 * unfolded
    )


def test_a_published_pipeline_folder_is_read(vae_folder):
    assert isinstance(load_codec(vae_folder.parent), WanCodec)


@pytest.mark.parametrize("size", [(44, 32), (32, 20)])
def test_sizes_that_would_lose_pixels_are_refused(codec, size):
    with pytest.raises(ValueError, match=r"multiples of 8, found \(1, 3, "):
        codec.encode(random_frames(1, *size))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"is_residual": True}, "is not the VAE of Wan 2.1"),
        ({"num_res_blocks": 2}, "do not fit its config.json"),
        ({"_class_name": "AutoencoderKL"}, "names the class 'AutoencoderKL', expected one of"),
    ],
)
def test_another_vae_is_refused(vae, tmp_path, config, message):
    vae.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | config))
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path)


def test_a_missing_tensor_is_named(vae_folder, tmp_path):
    tensors = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((vae_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias"):
        WanCodec.from_pretrained(tmp_path)


def test_a_file_without_a_config_is_wans_vae_at_its_own_width(vae_folder, codec):
    from_file = load_codec(vae_folder / "diffusion_pytorch_model.safetensors")
    assert torch.equal(from_file.encode(random_frames(1)), codec.encode(random_frames(1)))


def test_a_pickle_is_refused_unless_asked_for(vae, tmp_path):
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load_codec(tmp_path / "vae.pth")


def test_a_file_of_something_else_is_named(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors do not fit Wan 2\.1's VAE: .* is missing"):
        load_codec(tmp_path / "other.safetensors")


def test_the_folder_of_a_pca_codec_is_told_apart(tmp_path):
    PcaCodec.fit(random_frames(4)).save_pretrained(tmp_path)
    assert isinstance(load_codec(tmp_path), PcaCodec)


# PcaCodec


def smooth_frames(num_frames: int) -> Tensor:
    return torch.nn.functional.interpolate(random_frames(num_frames, 4, 4), (32, 48), mode="bicubic").clamp(
        -1, 1
    )


def test_pca_with_every_component_loses_nothing():
    frames = random_frames(4)
    codec = PcaCodec.fit(frames, latent_channels=48)
    torch.testing.assert_close(codec.decode(codec.encode(frames)), frames, **EXACT)


def test_pca_latents_have_unit_variance_and_the_papers_channels():
    frames = smooth_frames(16)
    codec = PcaCodec.fit(frames)
    latents = codec.encode(frames)
    assert (
        latents.shape == (16, codec.latent_channels, 32 // codec.spatial_stride, 48 // 4) == (16, 16, 8, 12)
    )
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert (codec.decode(latents) - frames).square().mean() < 1e-3  # 16 of 48 numbers carry smooth frames


def test_pca_decoding_loses_nothing_of_the_latents():
    codec = PcaCodec.fit(smooth_frames(16))
    latents = 0.1 * torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-4, rtol=1e-4)


def test_a_saved_pca_codec_gives_the_same_latents(tmp_path):
    codec = PcaCodec.fit(smooth_frames(4))
    codec.save_pretrained(tmp_path)
    assert torch.equal(load_codec(tmp_path).encode(random_frames(2)), codec.encode(random_frames(2)))


def test_pca_refuses_sizes_that_would_lose_pixels():
    with pytest.raises(ValueError, match="multiples of 4"):
        PcaCodec.fit(random_frames(2)).encode(random_frames(1, 30, 32))
