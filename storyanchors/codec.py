"""Story frames <-> normalised latents. A codec encodes every frame alone: they are never merged in time.

Codecs are plain objects with two verbs, encode and decode; they are not part of what is trained.
Legend: N frames, C latent channels, h w latent size, P pixels' values of one patch (3 p p).
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from storyanchors.wan_vae import FrameVae, FrameVaeConfig, frame_vae_tensors
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
    otherwise; a GPU's float32 convolutions are TF32, unless torch.backends.cudnn.allow_tf32 is False.
    """

    # Frames are independent, so many of them are cut into batches that bound the memory: the widest
    # activation has 96 channels at every pixel, 1.6 GB in float32 here, and three or four live at a time.
    PIXELS_PER_BATCH = 2**22
    # Frames of more pixels than a 1080p frame are cut into tiles where `tiling` says so.
    LARGE_FRAME_PIXELS = 2**21
    TILE, OVERLAP = 160, 16  # in latent pixels: 1280 and 128 pixels of the frame

    def __init__(self, network: FrameVae, *, tiling: bool = False):
        """Freezes the network. tiling bounds the memory that a large frame takes, see LARGE_FRAME_PIXELS.

        It is not for training: attention then sees one tile, and neighbours fade into each other. At 1152 x
        1920 with random weights that changed latents by 0.2 % (rms, of their std) and pixels by 1.4 %.
        """
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.tiling = tiling
        self.mean = torch.tensor(network.config.latents_mean)[:, None, None]  # (C, 1, 1)
        self.std = torch.tensor(network.config.latents_std)[:, None, None]
        self.latent_channels = network.config.z_dim
        self.spatial_stride = network.config.stride

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, H/8, W/8); ValueError where a side is no multiple of 8."""
        frames = _checked_frames(frames, self.spatial_stride)
        return (self._run(self.network.encode, frames, self.spatial_stride, 1) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w), clamped to [-1, 1]."""
        latents = latents.to(self.mean) * self.std + self.mean
        return self._run(self.network.decode, latents, 1, self.spatial_stride).clamp(-1, 1)

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, unit_in: int, unit_out: int) -> Tensor:
        """function of x (N, C, H, W), where a latent pixel is unit_in pixels wide in x, unit_out after it."""
        scale = (self.spatial_stride // unit_in) ** 2  # pixels of a frame for each of x

        def in_batches(x: Tensor) -> Tensor:
            batches = x.split(max(1, self.PIXELS_PER_BATCH // (scale * x.shape[-2] * x.shape[-1])))
            return torch.cat([self._run_batch(function, batch) for batch in batches])

        if self.tiling and scale * x.shape[-2] * x.shape[-1] > self.LARGE_FRAME_PIXELS:
            sizes = (unit_in, unit_out, self.TILE, self.OVERLAP)
            return _blended_tiles(lambda rows: _blended_tiles(in_batches, rows, -1, *sizes), x, -2, *sizes)
        return in_batches(x)

    def _run_batch(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.to(self.mean).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):  # a bf16 training step must not reach in here
            return function(x).contiguous()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "WanCodec":
        self.network.to(device=device, dtype=dtype)
        self.mean, self.std = self.mean.to(device, dtype), self.std.to(device, dtype)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folded weights: 46 M of the VAE's 127 M, all that single frames need."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, folder / "codec.safetensors")
        config = {"_class_name": "WanCodec", **dataclasses.asdict(self.network.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, reference: str | Path, *, tiling: bool = False, allow_pickle: bool = False
    ) -> "WanCodec":
        """Reads Wan 2.1's VAE in float32, in diffusers' layout, in the authors' or in ours.

        reference is a vae folder with its config.json, the pipeline above it, a Hub id, or one file:
        .safetensors, or the authors' Wan2.1_VAE.pth, which is a pickle and read (tensors only) where
        allow_pickle says so. ValueError for another VAE (Wan 2.2's merges patches) and for tensors that are
        missing, unknown or of another shape.
        """
        if Path(reference).is_file():
            tensors = frame_vae_tensors(dict(read_tensors(Path(reference), allow_pickle=allow_pickle)))
            config = FrameVaeConfig.of_tensors(tensors)
        else:
            folder = part_folder(reference, "vae")
            config = _frame_vae_config(folder / "config.json")
            tensors = frame_vae_tensors(dict(read_tensors(folder)))
        with torch.device("meta"):
            network = FrameVae(config)
        _check_tensors(network, tensors, reference)
        network.load_state_dict(tensors, assign=True)
        return cls(network, tiling=tiling)

    @classmethod
    def from_vae(cls, vae: AutoencoderKLWan) -> "WanCodec":
        """The codec of a diffusers VAE, with weights of its own."""
        network = FrameVae(FrameVaeConfig.of_settings(vae.config))
        network.load_state_dict(frame_vae_tensors(vae.state_dict()))
        return cls(network)


def load_codec(
    reference: str | Path, *, tiling: bool = False, allow_pickle: bool = False
) -> PcaCodec | WanCodec:
    """The codec in a folder, a pipeline's folder or on the Hub, by the class that its config.json names.

    A file is Wan's VAE. tiling and allow_pickle are those of WanCodec.from_pretrained; a PcaCodec, which sees
    every patch alone, needs neither.
    """
    if not Path(reference).is_file():
        reference = part_folder(reference, "vae")
        config, names = reference / "config.json", ("PcaCodec", "WanCodec", "AutoencoderKLWan")
        name = read_json(config).get("_class_name")
        if name not in names:
            raise ValueError(f"{config} names the class {name!r}, expected one of {', '.join(names)}")
        if name == "PcaCodec":
            return PcaCodec.from_pretrained(reference)
    return WanCodec.from_pretrained(reference, tiling=tiling, allow_pickle=allow_pickle)


def _blended_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    axis: int,
    unit_in: int,
    unit_out: int,
    tile: int,
    overlap: int,
) -> Tensor:
    """function of slices of x along an axis (-2 or -1), put together; in overlaps one fades into the next.

    tile and overlap (the least) count latent pixels, each unit_in values wide in x and unit_out afterwards.
    The outer quarter of an overlap, which the zeros beyond a tile's edge have reached, hardly counts.
    """
    spans = _tile_spans(x.shape[axis] // unit_in, tile, overlap)
    parts = [function(x.narrow(axis, start * unit_in, (stop - start) * unit_in)) for start, stop in spans]
    places = [slice(start * unit_out, stop * unit_out) for start, stop in spans]
    weights = torch.zeros(len(spans), places[-1].stop)
    for weight, place in zip(weights, places, strict=True):
        inside = (torch.arange(place.stop - place.start) + 0.5) / (overlap * unit_out)  # in overlaps
        # never 0: at the frame's own edge a tile is alone
        weight[place] = (2 * torch.minimum(inside, inside.flip(0)) - 0.5).clamp(1e-4, 1)
    weights = (weights / weights.sum(0)).to(parts[0])
    shape = list(parts[0].shape)
    shape[axis] = weights.shape[1]
    blended = parts[0].new_zeros(shape).movedim(axis, -1)
    for part, weight, place in zip(parts, weights, places, strict=True):
        blended[..., place] += part.movedim(axis, -1) * weight[place]
    return blended.movedim(-1, axis).contiguous()


def _tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of tiles of one size that cover a length, as few and then as small as can be."""
    num = max(1, math.ceil((length - overlap) / (tile - overlap)))
    size = math.ceil((length + (num - 1) * overlap) / num)
    starts = [index * (length - size) // max(1, num - 1) for index in range(num)]
    return [(start, start + size) for start in starts]


def _frame_vae_config(file: Path) -> FrameVaeConfig:
    """From the config.json of diffusers or of save_pretrained; ValueError for a VAE that is not Wan 2.1's."""
    config = read_json(file)
    others = {
        "is_residual": False,
        "patch_size": None,
        "attn_scales": [],
        "in_channels": 3,
        "out_channels": 3,
    }
    for name, expected in others.items():
        if config.get(name, expected) != expected:
            raise ValueError(
                f"{file.parent} is not the VAE of Wan 2.1: {name} is {config[name]!r}, expected {expected!r}"
            )
    return FrameVaeConfig.of_settings(config)


def _check_tensors(network: FrameVae, tensors: dict[str, Tensor], source: str | Path) -> None:
    expected_by = "Wan 2.1's VAE" if Path(source).is_file() else "its config.json"
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"the tensors of {source} do not fit {expected_by}: {'; '.join(sorted(problems)[:4])}{more}"
        )


def _checked_frames(frames: Tensor, stride: int) -> Tensor:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] % stride or frames.shape[3] % stride:
        raise ValueError(
            f"frames must be (N, 3, H, W) with H and W multiples of {stride}, found {tuple(frames.shape)}"
        )
    return frames
