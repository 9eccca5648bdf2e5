"""Story frames <-> normalised latents. A codec encodes every frame alone: story frames are never merged in time.

Codecs are plain objects with two verbs, encode and decode; they are not part of what is trained.
Legend: N frames, C latent channels, h w latent size, P pixels' values of one patch (3 p p).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor


class PcaCodec:
    """Patches of p x p pixels x 3 colours -> C principal components: a codec fitted in closed form, for tiny models.

    With p = 4 and C = 16 it has WanVAE's channel count, so that a tiny StoryDiT has the paper's 33 input channels. All
    channels share one scale, so that the loss in latents is the loss in pixels.
    """

    def __init__(self, components: Tensor, mean: Tensor, scale: float, patch: int):
        self.components = components  # (C, P), orthonormal rows
        self.mean = mean  # (P,)
        self.scale = scale  # latents have about unit variance over all channels
        self.patch = patch

    @classmethod
    def fit(cls, frames: Tensor, *, latent_channels: int = 16, patch: int = 4) -> "PcaCodec":
        """Principal components of the patches of frames (N, 3, H, W) in [-1, 1]."""
        patches = F.pixel_unshuffle(_checked_frames(frames, patch), patch).movedim(1, -1).flatten(0, 2).double()
        if latent_channels > patches.shape[1]:
            raise ValueError(
                f"a patch of {patch}x{patch} has {patches.shape[1]} values, fewer than {latent_channels} channels"
            )
        mean = patches.mean(0)
        centred = patches - mean
        _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending eigenvalues, one direction a column
        components = directions.flip(1)[:, :latent_channels].T
        signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()  # eigh leaves the sign open
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
        """(N, 3, H, W) in [-1, 1] -> (N, C, H/p, W/p); ValueError where a side is no multiple of the patch."""
        patches = F.pixel_unshuffle(_checked_frames(frames, self.patch).to(self.mean), self.patch)  # (N, P, h, w)
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
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "codec.safetensors")
        return cls(tensors["components"], tensors["mean"], config["scale"], config["patch"])


def _checked_frames(frames: Tensor, stride: int) -> Tensor:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] % stride or frames.shape[3] % stride:
        raise ValueError(
            f"frames must be (N, 3, H, W) with H and W multiples of {stride}, found {tuple(frames.shape)}"
        )
    return frames
