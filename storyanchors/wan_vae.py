"""Wan 2.1's VAE as single frames see it: a 2-D network whose parts have diffusers' names.

In a one-frame clip a causal 3-D convolution sees zeros before the frame, so it is the 2-D convolution with
its last temporal slice, and nothing is resampled in time. Upsampling by 2 and the convolution after it are
one transposed convolution. Maps are as large as frames, and on a CPU new memory costs more than arithmetic in
it, so maps are overwritten where nothing else needs them.
Legend: N frames, C channels, H W size of a map, h w latent size, z latent channels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The authors' names in diffusers' words, but for decoder.upsamples, whose blocks are counted below.
WAN_VAE_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


@dataclass(frozen=True)
class FrameVaeConfig:
    """Sizes and latent statistics, with the values of Wan 2.1."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None = base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    @property
    def stride(self) -> int:
        """Pixels along a latent pixel's side."""
        return 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "FrameVaeConfig":
        """From diffusers' config of the VAE or from our own; settings that frames do not need are ignored."""
        known = {field.name: settings[field.name] for field in fields(cls) if field.name in settings}
        return cls(**{k: tuple(value) if isinstance(value, list) else value for k, value in known.items()})

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "FrameVaeConfig":
        """Wan 2.1's, at the width and depth of the tensors of frame_vae_tensors."""
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        return cls(
            base_dim=lengths.get("encoder.conv_in.bias", cls.base_dim),
            decoder_base_dim=lengths.get("decoder.norm_out.gamma"),
            num_res_blocks=_resnets_per_level(tensors),
        )


class FrameVae(nn.Module):
    """encode and decode of frames (N, 3, H, W), in channels-last memory; latents are not normalised here."""

    def __init__(self, config: FrameVaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> the posterior's mean (N, z, h, w)."""
        return self.quant_conv(self.encoder(frames))[:, : self.config.z_dim]

    def decode(self, latents: Tensor) -> Tensor:
        """(N, z, h, w) -> (N, 3, H, W)."""
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    def __init__(self, config: FrameVaeConfig):
        super().__init__()
        widths = [config.base_dim * multiple for multiple in (1, *config.dim_mult)]
        levels = list(pairwise(widths))
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential()
        for level, (in_dim, out_dim) in enumerate(levels, 1):
            self.down_blocks.extend(_resnets(in_dim, out_dim, config.num_res_blocks))
            if level < len(levels):
                self.down_blocks.append(Downsample(out_dim))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x, overwrite=True), inplace=True))


class Decoder(nn.Module):
    def __init__(self, config: FrameVaeConfig):
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * multiple for multiple in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.Sequential()
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            in_dim = in_dim // 2 if level else in_dim  # upsampling halves the channels
            is_last = level + 2 == len(widths)
            self.up_blocks.append(UpBlock(in_dim, out_dim, config.num_res_blocks + 1, upsample=not is_last))
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x, overwrite=True), inplace=True))


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(dim, dim), Resnet(dim, dim)])
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, num_resnets: int, *, upsample: bool):
        super().__init__()
        self.resnets = nn.Sequential(*_resnets(in_dim, out_dim, num_resnets))
        self.upsamplers = nn.Sequential(*[Upsample(out_dim)] * upsample)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(self.resnets(x))


class Resnet(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1, self.norm2 = Norm(in_dim), Norm(out_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if in_dim == out_dim else nn.Conv2d(in_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h, overwrite=True), inplace=True))
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """One head as wide as the map, over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim)
        self.to_qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (N, H W, C)
        q, k, v = self.to_qkv(pixels).unsqueeze(1).chunk(3, dim=-1)  # (N, 1, H W, C): one head
        attended = self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x.add_(attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Upsample(nn.Module):
    """Every pixel becomes 2 x 2 of its kind and a 3 x 3 convolution follows: one transposed convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(  # the name of its convolution is resample.1
            nn.Identity(), nn.ConvTranspose2d(dim, dim // 2, 4, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Norm(nn.Module):
    """x / |x| sqrt(C) gamma, with the length |x| over the channels of each pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """(N, C, H, W), channels last in memory, as are the maps that come back."""
        num_channels = len(self.gamma)
        if x.device.type == "cpu" and x.dtype == torch.float32:  # where F.rms_norm is several passes
            lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
            x = x.div_(lengths) if overwrite else x / lengths
            return x.mul_(num_channels**0.5 * self.gamma[:, None, None])
        pixels = x.permute(0, 2, 3, 1)
        return F.rms_norm(pixels, (num_channels,), self.gamma, eps=1e-24 / num_channels).permute(0, 3, 1, 2)


def frame_vae_tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a FrameVae in float32, from that of a FrameVae, of diffusers' VAE or of the authors'.

    The tensors that come back own their memory. What only clips of several frames need is dropped.
    """
    if "encoder.conv1.weight" in stored:
        num_res_blocks = _resnets_per_level(stored)
        stored = {_from_authors(name, num_res_blocks): tensor for name, tensor in stored.items()}
    return {name: _folded(name, tensor) for name, tensor in stored.items() if ".time_conv." not in name}


def _resnets(in_dim: int, out_dim: int, num: int) -> list[Resnet]:
    return [Resnet(in_dim if index == 0 else out_dim, out_dim) for index in range(num)]


def _resnets_per_level(stored: Mapping[str, Tensor]) -> int:
    """Of the encoder, by its numbered blocks: every level but the last of the four ends in a downsampling."""
    numbers = [re.match(r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.", name) for name in stored]
    return (1 + max((int(match[1]) for match in numbers if match), default=0)) // 4


def _from_authors(name: str, num_res_blocks: int) -> str:
    for pattern, ours in WAN_VAE_NAMES:
        name = re.sub(pattern, ours, name)
    if match := re.match(r"decoder\.upsamples\.(\d+)\.", name):
        block, place = divmod(int(match[1]), num_res_blocks + 2)
        part = f"resnets.{place}" if place <= num_res_blocks else "upsamplers.0"
        name = f"decoder.up_blocks.{block}.{part}.{name[match.end() :]}"
    return name


def _folded(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor[:, :, -1] if tensor.ndim == 5 else tensor
    tensor = tensor.to(torch.float32, copy=True)
    if name.endswith(".gamma"):
        return tensor.flatten()
    if ".attentions." in name and tensor.ndim == 4:
        return tensor.flatten(1)
    if ".upsamplers." in name and tensor.shape[2:] == (3, 3):
        return _transposed_kernel(tensor)
    return tensor


def _transposed_kernel(kernel: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (in, out, 4, 4): the kernel mirrored and summed over 2 x 2 neighbours.

    In one dimension, a kernel (a, b, c) over pixels that all come twice: those at an even place see a of the
    left neighbour and b + c of themselves, those at an odd place a + b of themselves and c of the right one.
    """
    kernel = F.pad(kernel.flip(2, 3), (1, 1, 1, 1))
    kernel = kernel[..., :-1] + kernel[..., 1:]
    return (kernel[..., :-1, :] + kernel[..., 1:, :]).transpose(0, 1).contiguous()
