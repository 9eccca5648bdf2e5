"""StoryGenerator: a story and any given frames -> story frames; and the model folder it is loaded from.

One call continues, edits, infills, extends and generates: only the numbers of the given frames differ.

Legend: F story frames, C latent channels, h w latent size. Frames are numbered from 1.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from storyanchors.caption_cache import embedding_to
from storyanchors.caption_encoder import fit_caption, load_caption_encoder
from storyanchors.clip import MAX_FRAME_PIXELS, MAX_FRAMES, frames_to_tensor, tensor_to_frames
from storyanchors.codec import load_codec
from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT
from storyanchors.flow import sampling_sigmas
from storyanchors.output_folder import output_folder
from storyanchors.sampling import SAMPLERS, guided
from storyanchors.story import Story
from storyanchors.weights import load_story_dit, read_json

log = logging.getLogger(__name__)

MODEL_FILE = "story_model.json"
SCHEMA_VERSION = 1
RGB_WITHOUT_LOSS = ("RGB", "L", "P", "1")  # PIL modes


class StoryGenerator:
    """A network, its codec and its caption encoder, with the settings the model is best sampled with."""

    def __init__(
        self,
        dit: StoryDiT,
        codec,
        caption_encoder,
        *,
        frame_size: tuple[int, int],
        num_steps: int = 50,
        guidance_scale: float = 5.0,
        shift: float = 5.0,
    ):
        self.dit, self.codec, self.caption_encoder = dit, codec, caption_encoder
        self.frame_size = tuple(frame_size)  # (height, width) in pixels
        self.num_steps, self.guidance_scale, self.shift = num_steps, guidance_scale, shift

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "StoryGenerator":
        """Loads a model folder of save_story_model; dtype is the network's, the codec stays float32.

        ValueError or OSError when the folder, one of its parts or a setting is missing or does not fit.
        """
        folder = Path(folder)
        info = read_story_model(folder)
        dit = load_story_dit(_part(folder, info, "transformer"), dtype=dtype).to(device).eval()
        codec = load_codec(_part(folder, info, "codec"), tiling=True).to(device, torch.float32)
        caption_encoder = load_caption_encoder(_part(folder, info, "caption_encoder")).to(device, dtype)
        _check_parts(dit, codec, caption_encoder, folder)
        settings = {name: info[name] for name in ("num_steps", "guidance_scale", "shift")}
        return cls(dit, codec, caption_encoder, frame_size=info["frame_size"], **settings)

    def generate(
        self,
        story: Story,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        given: Mapping[int, Image.Image] | None = None,
        conditions: ClipConditions | None = None,
        caption: str | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        sampler: str = "euler",
        seed: int = 0,
        progress: bool = True,
        callback: Callable[[int, list[Tensor]], None] | None = None,
    ) -> list[Image.Image]:
        """The story's frames as RGB images; given frames, keyed by number, come back pixel-identical.

        num_frames defaults to the story's; height and width (pixels) and the sampler's settings to the
        model's; caption, the text that the network reads, to story.prompt(). A caption that is too long for
        the text encoder is cut as fit_caption does it, with a warning. Of the conditions, the number of
        frames, height and width are filled in where unknown. callback(step, latents) sees after every step
        the present guess of the clean latents, a list of one (F, C, h, w).
        ValueError for settings and given frames that do not fit.
        """
        return self.generate_many(
            [story],
            num_frames=num_frames,
            height=height,
            width=width,
            given=[given or {}],
            conditions=[conditions or ClipConditions()],
            captions=None if caption is None else [caption],
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            shift=shift,
            sampler=sampler,
            seed=seed,
            progress=progress,
            callback=callback,
        )[0]

    @torch.inference_mode()
    def generate_many(
        self,
        stories: Sequence[Story],
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        given: Sequence[Mapping[int, Image.Image]] | None = None,
        conditions: Sequence[ClipConditions] | None = None,
        captions: Sequence[str] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        sampler: str = "euler",
        seed: int = 0,
        progress: bool = True,
        callback: Callable[[int, list[Tensor]], None] | None = None,
    ) -> list[list[Image.Image]]:
        """Several stories of any lengths in one packed forward per step; see generate.

        Story i is drawn with seed + i, whatever the others are: generate(stories[i], seed=seed + i) gives the
        same frames up to rounding.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        _check_sampling(guidance_scale, sampler, seed)
        sigmas = sampling_sigmas(num_steps, self.shift if shift is None else shift)
        size = (
            self.frame_size[0] if height is None else height,
            self.frame_size[1] if width is None else width,
        )
        self._check_size(size)
        clips = [
            self._clip(
                story,
                story.num_frames if num_frames is None else num_frames,
                size,
                given[index] if given else {},
                conditions[index] if conditions else ClipConditions(),
                self._fitted(captions[index] if captions else story.prompt(), index + 1),
                seed + index,
            )
            for index, story in enumerate(stories)
        ]
        with tqdm(total=num_steps, desc="sampling", unit="step", disable=not progress) as bar:
            latents = self._sample(clips, sigmas, guidance_scale, sampler, bar, callback)
        return [self._frames(clip, clip_latents) for clip, clip_latents in zip(clips, latents, strict=True)]

    def _fitted(self, caption: str, number: int) -> str:
        """As much of the caption of story `number` as the text encoder takes."""
        fitted = fit_caption(caption, self.caption_encoder)
        if fitted.dropped:
            log.warning("story %d: %s", number, fitted.loss)
        return fitted.text

    def _clip(
        self,
        story: Story,
        num_frames: int,
        size: tuple[int, int],
        given: Mapping[int, Image.Image],
        conditions: ClipConditions,
        caption: str,
        seed: int,
    ) -> "_Clip":
        """Validates one story's request and draws its noise."""
        if num_frames > MAX_FRAMES:
            raise ValueError(f"num_frames={num_frames} is too many, expected at most {MAX_FRAMES}")
        if num_frames < 1 or num_frames < story.num_frames:
            raise ValueError(f"num_frames={num_frames} is too few: the story has {story.num_frames} frames")
        for number, frame in given.items():
            _check_given(number, frame, num_frames, size)
        if len(given) == num_frames:
            raise ValueError(f"all {num_frames} frames are given: there is none to generate")
        stride = self.codec.spatial_stride
        shape = (num_frames, self.codec.latent_channels, size[0] // stride, size[1] // stride)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        cond_latents, cond_mask = torch.zeros_like(noise), torch.zeros(num_frames, device=self.device)
        if given:
            numbers = sorted(given)
            rows = torch.tensor(numbers, device=self.device) - 1
            pixels = frames_to_tensor([given[number] for number in numbers]).to(self.device)
            cond_latents[rows] = self.codec.encode(pixels).to(noise.dtype)
            cond_mask[rows] = 1
        known = {"num_frames": conditions.num_frames or num_frames}
        if conditions.height is None:
            known |= {"height": size[0], "width": size[1]}
        given = {number: frame.convert("RGB") for number, frame in given.items()}
        conditions = dataclasses.replace(conditions, **known)
        return _Clip(noise, cond_latents, cond_mask, given, conditions, caption)

    def _sample(
        self,
        clips: list["_Clip"],
        sigmas: Tensor,
        guidance_scale: float,
        sampler: str,
        bar: tqdm,
        callback: Callable[[int, list[Tensor]], None] | None,
    ) -> list[Tensor]:
        """Latents (F, C, h, w) of every clip. All clips are one flat tensor to the sampler."""
        both = guidance_scale != 1
        texts = [clip.caption for clip in clips] + ([""] if both else [])
        captions = [embedding_to(caption, self.device) for caption in self.caption_encoder.encode(texts)]
        captions += captions[-1:] * (len(clips) - 1) if both else []
        conditions = [clip.conditions for clip in clips] * (2 if both else 1)
        shapes = [clip.noise.shape for clip in clips]

        def unpack(latents: Tensor) -> list[Tensor]:
            parts = latents.split([shape.numel() for shape in shapes])
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

        def forward(latents: Tensor, sigma: Tensor) -> Tensor:
            inputs = [
                stack_condition_channels(noisy, clip.cond_latents, clip.cond_mask)
                for noisy, clip in zip(unpack(latents), clips, strict=True)
            ]
            inputs = inputs * 2 if both else inputs
            timesteps = (1000 * sigma).to(self.device, torch.float32).expand(len(inputs))
            velocity = self.dit(inputs, timesteps, conditions, captions)
            return torch.cat([clip_velocity.float().flatten() for clip_velocity in velocity])

        def after_step(step: int, guess: Tensor) -> None:
            bar.update()
            if callback:
                callback(step, unpack(guess))

        denoise = guided(lambda *args: forward(*args).chunk(2), guidance_scale) if both else forward
        noise = torch.cat([clip.noise.flatten() for clip in clips])
        return unpack(SAMPLERS[sampler](denoise, noise, sigmas, after_step))

    def _frames(self, clip: "_Clip", latents: Tensor) -> list[Image.Image]:
        generated = iter(tensor_to_frames(self.codec.decode(latents[clip.cond_mask == 0])))
        return [clip.given.get(number) or next(generated) for number in range(1, len(latents) + 1)]

    def _check_size(self, size: tuple[int, int]) -> None:
        multiple = self.codec.spatial_stride * self.dit.config.patch_size[-1]
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels < multiple or pixels % multiple:
                raise ValueError(
                    f"{name}={pixels} is not a multiple of {multiple} pixels, which the model needs"
                )
        if size[0] * size[1] > MAX_FRAME_PIXELS:
            raise ValueError(f"height={size[0]} x width={size[1]} is more than {MAX_FRAME_PIXELS} pixels")

    @property
    def device(self) -> torch.device:
        return self.dit.device


@dataclass(frozen=True)
class _Clip:
    """One validated request, ready for the sampler."""

    noise: Tensor  # (F, C, h, w)
    cond_latents: Tensor  # (F, C, h, w)
    cond_mask: Tensor  # (F,), 1 = given
    given: dict[int, Image.Image]
    conditions: ClipConditions
    caption: str


def save_story_model(folder: str | Path, dit: StoryDiT, codec, caption_encoder, *, info: dict) -> None:
    """Writes a model folder, whole or not at all: story_model.json and a folder for each of the three parts.

    info holds frame_size [height, width], num_steps, guidance_scale and shift, and what one wants to know
    later: preset, stage, provenance. A part that info names as {"reference": hub id or path} is not copied,
    and may be None.
    """
    parts = {"transformer": dit, "codec": codec, "caption_encoder": caption_encoder}
    info = {"schema_version": SCHEMA_VERSION, **{name: name for name in parts}, **info}
    _check_info(info, "info")
    with output_folder(folder, made_with=MODEL_FILE) as temporary:
        for name, part in parts.items():
            if isinstance(info[name], str):
                part.save_pretrained(temporary / info[name])
        (temporary / MODEL_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    log.info("wrote %s", folder)


def read_story_model(folder: str | Path) -> dict:
    """The content of a model folder's story_model.json; ValueError or OSError where it is not one."""
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {MODEL_FILE}")
    info = read_json(path)
    _check_info(info, str(path))
    return info


def _check_info(info: dict, where: str) -> None:
    if info.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{where}: schema_version {info.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    needed = ["transformer", "codec", "caption_encoder", "frame_size", "num_steps", "guidance_scale", "shift"]
    if missing := [name for name in needed if name not in info]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; found {', '.join(info)}")
    size = info["frame_size"]
    if not (
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)
    ):
        raise ValueError(f"{where}: frame_size is {size!r}, expected [height, width] in pixels")
    for name in needed[:3]:
        part = info[name]
        if not isinstance(part.get("reference") if isinstance(part, dict) else part, str):
            raise ValueError(f"{where}: {name} is {part!r}, expected a folder or {{'reference': ...}}")
    for name, kind in (("num_steps", int), ("guidance_scale", int | float), ("shift", int | float)):
        if not isinstance(info[name], kind):
            raise ValueError(f"{where}: {name} is {info[name]!r}, expected a number")


def _part(folder: Path, info: dict, name: str) -> str:
    part = info[name]
    if isinstance(part, dict):
        return part["reference"]
    if not (folder / part).is_dir():
        raise FileNotFoundError(
            f"{folder / MODEL_FILE} names {name} {part!r}, but {folder / part} does not exist"
        )
    return str(folder / part)


def _check_parts(dit: StoryDiT, codec, caption_encoder, folder: Path) -> None:
    for name, part, expected in (
        ("latent_channels", codec.latent_channels, dit.config.latent_channels),
        ("text_dim", caption_encoder.text_dim, dit.config.text_dim),
        ("clip_text_dim", caption_encoder.clip_text_dim, dit.config.clip_text_dim),
    ):
        if part != expected:
            raise ValueError(
                f"{folder}: parts of different models, {name} {part} for a network of {expected}"
            )


def _check_sampling(guidance_scale: float, sampler: str, seed: int) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale must be a number from 0 (1 = no guidance), found {guidance_scale}")
    if seed < 0:
        raise ValueError(f"seed must not be below 0, found {seed}")


def _check_given(number: int, frame: Image.Image, num_frames: int, size: tuple[int, int]) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= num_frames:
        raise ValueError(f"given frame {number!r} is outside the story's frames 1..{num_frames}")
    if (frame.height, frame.width) != size:
        raise ValueError(
            f"given frame {number} has {frame.width} x {frame.height} pixels, expected {size[1]} x {size[0]}"
        )
    if frame.mode not in RGB_WITHOUT_LOSS:
        raise ValueError(f"given frame {number} is an image of mode {frame.mode}, expected RGB")
