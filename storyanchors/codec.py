"""Story frames <-> normalised latents. A codec encodes every frame alone: they are never merged in time.

Codecs are plain objects with two verbs, encode and decode; they are not part of what is trained.
Legend: N frames, C latent channels, h w latent size, P pixels' values of one patch (3 p p).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors.torch import save_file
from torch import Tensor, nn

from storyanchors.weights import part_folder, read_json, read_tensors


class PcaCodec:
    """Patches of p x p pixels x 3 colours -> C principal components, fitted in closed form, for tiny models.

    With p = 4 and C = 16 it has WanVAE's channel count, so that a tiny StoryDiT has the paper's 33 input
    channels. All channels share one scale, so that the loss in latents is the loss in pixels.
    """

    def __init__(self, components: Tensor, mean: Tensor, scale: float, patch: int):
        self.components = components  # (C, P), orthonormal rows
        self.mean = mean  # (P,)
        self.scale = scale  # latents have about unit variance over all channels
        self.patch = patch

    @classmethod
    def fit(cls, frames: Tensor, *, latent_channels: int = 16, patch: int = 4) -> "PcaCodec":
        """Principal components of the patches of frames (N, 3, H, W) in [-1, 1]."""
        patches = F.pixel_unshuffle(_checked_frames(frames, patch), patch)  # (N, P, h, w)
        patches = patches.movedim(1, -1).flatten(0, 2).double()
        if latent_channels > patches.shape[1]:
            raise ValueError(
                f"a patch of {patch}x{patch} has {patches.shape[1]} values, "
                f"fewer than {latent_channels} channels"
            )
        mean = patches.mean(0)
        centred = patches - mean
        _, directions = torch.linalg.eigh(centred.T @ centred)  # a direction a column, the largest last
        components = directions.flip(1)[:, :latent_channels].T
        signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()  # eigh leaves it open
        components = components * signs
        scale = (centred @ components.T).square().mean().sqrt().item()
        return cls(components.float().contiguous(), mean.float(), max(scale, 1e-6), patch)

    @property
    def latent_channels(self) -> int:
        return len(self.components)

    @property
    def spatial_stride(self) -> int:
        return self.patch

    def encode(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, H/p, W/p); ValueError where a side is no multiple of p."""
        frames = _checked_frames(frames, self.patch).to(self.mean)
        patches = F.pixel_unshuffle(frames, self.patch)  # (N, P, h, w)
        return F.conv2d(patches - self.mean[:, None, None], self.components[..., None, None]) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, h p, w p), clamped to [-1, 1]."""
        patches = F.conv2d(latents.to(self.mean) * self.scale, self.components.T[..., None, None])
        return F.pixel_shuffle(patches + self.mean[:, None, None], self.patch).clamp(-1, 1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PcaCodec":
        """Moves to a device; stays float32, since nothing is gained by less."""
        self.components, self.mean = self.components.to(device), self.mean.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"components": self.components.contiguous(), "mean": self.mean}
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / "codec.safetensors")
        config = {"_class_name": "PcaCodec", "patch": self.patch, "scale": self.scale}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PcaCodec":
        folder = Path(folder)
        config, tensors = read_json(folder / "config.json"), dict(read_tensors(folder))
        try:
            return cls(tensors["components"], tensors["mean"], config["scale"], config["patch"])
        except KeyError as error:
            raise ValueError(f"{folder} is no PcaCodec: it lacks {error}") from error


class WanCodec:
    """Wan 2.1's VAE (16 channels, stride 8) on single frames, with the mean of the posterior and no sampling.

    Latents are normalised with the published mean and std, computed and returned in float32 unless `to` says
    otherwise. In a one-frame clip a causal 3-D convolution sees zeros before the frame, so it equals the 2-D
    convolution with its last temporal slice: only that slice is kept, and only that is saved again.
    """

    # Frames are independent, so many of them are cut into batches that bound the memory: the widest
    # activation has 96 channels at every pixel, 1.6 GB in float32 here.
    PIXELS_PER_BATCH = 2**22

    def __init__(self, vae: AutoencoderKLWan):
        """Folds vae in place, where it is not folded yet."""
        _fold_convolutions(vae)
        self.vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.mean = torch.tensor(vae.config.latents_mean)[:, None, None]  # (C, 1, 1)
        self.std = torch.tensor(vae.config.latents_std)[:, None, None]
        self.latent_channels = vae.config.z_dim
        self.spatial_stride = 2 ** (len(vae.config.dim_mult) - 1)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, H/8, W/8); ValueError where a side is no multiple of 8."""
        pixels = frames.shape[-2] * frames.shape[-1]
        batches = _checked_frames(frames, self.spatial_stride).split(max(1, self.PIXELS_PER_BATCH // pixels))
        means = [self._run(batch, self.vae.encoder, self.vae.quant_conv) for batch in batches]
        return (torch.cat(means)[:, : self.latent_channels] - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w), clamped to [-1, 1]."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.spatial_stride**2
        latents = latents.to(self.mean) * self.std + self.mean
        batches = latents.split(max(1, self.PIXELS_PER_BATCH // pixels))
        frames = [self._run(batch, self.vae.post_quant_conv, self.vae.decoder) for batch in batches]
        return torch.cat(frames).clamp(-1, 1)

    def _run(self, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        x = x.to(self.mean).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):  # a bf16 training step must not reach in here
            return second(first(x.unsqueeze(2))).squeeze(2).contiguous()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "WanCodec":
        nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own warns of an empty list of modules
        self.mean, self.std = self.mean.to(device, dtype), self.std.to(device, dtype)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folded weights: 45 M of the VAE's 127 M, all that single frames need."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.vae.state_dict().items()}
        save_file(tensors, folder / "codec.safetensors")
        config = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        config["_class_name"] = "WanCodec"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, reference: str | Path) -> "WanCodec":
        """Reads a vae folder of diffusers, the pipeline above it, our own folder, or a Hub id; in float32.

        ValueError for another VAE (Wan 2.2's merges patches) and for tensors that do not fit the config.
        """
        folder = part_folder(reference, "vae")
        config = read_json(folder / "config.json")
        if config.get("is_residual") or config.get("patch_size"):
            raise ValueError(f"{folder} is not the VAE of Wan 2.1 (is_residual or patch_size is set)")
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        _fold_convolutions(vae)
        tensors = {
            name: (tensor[:, :, -1] if tensor.ndim == 5 else tensor).to(torch.float32, copy=True)
            for name, tensor in read_tensors(folder)
            if ".time_conv." not in name
        }
        try:
            vae.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the tensors in {folder} do not fit its config.json: {error}") from error
        return cls(vae)


class FrameConv(nn.Conv2d):
    """A causal 3-D convolution as a one-frame clip (N, C, 1, H, W) sees it, under the same names."""

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        return super().forward(x.squeeze(2)).unsqueeze(2)


def _fold_convolutions(module: nn.Module) -> None:
    """Puts FrameConvs for causal convolutions and drops the temporal ones, which one frame never meets."""
    for name, child in list(module.named_children()):
        if name == "time_conv":
            module.time_conv = None
        elif isinstance(child, WanCausalConv3d):
            with torch.device("meta"):
                conv = FrameConv(child.in_channels, child.out_channels, child.kernel_size[1:], padding="same")
            conv.weight = nn.Parameter(child.weight[:, :, -1].detach().clone())
            conv.bias = child.bias
            setattr(module, name, conv)
        else:
            _fold_convolutions(child)


def load_codec(reference: str | Path) -> PcaCodec | WanCodec:
    """The codec in a folder, a pipeline's folder or on the Hub, by the class that its config.json names."""
    folder = part_folder(reference, "vae")
    classes = {"PcaCodec": PcaCodec, "WanCodec": WanCodec, "AutoencoderKLWan": WanCodec}
    name = read_json(folder / "config.json").get("_class_name")
    if name not in classes:
        expected = ", ".join(classes)
        raise ValueError(f"{folder / 'config.json'} names the class {name!r}, expected one of {expected}")
    return classes[name].from_pretrained(folder)


def _checked_frames(frames: Tensor, stride: int) -> Tensor:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] % stride or frames.shape[3] % stride:
        raise ValueError(
            f"frames must be (N, 3, H, W) with H and W multiples of {stride}, found {tuple(frames.shape)}"
        )
    return frames
