"""StoryGenerator: a story and any given frames -> story frames.

One call continues, edits, infills, extends and generates: only the numbers of the given frames differ.

Legend: F story frames, C latent channels, h w latent size. Frames are numbered from 1.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from storyanchors.caption_cache import embedding_to
from storyanchors.caption_encoder import fit_caption
from storyanchors.clip import tensor_to_frames
from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT
from storyanchors.embedders import CaptionEmbedding
from storyanchors.memory import MEMORY_MODES, at_work, memory_advice, out_of_memory_explained
from storyanchors.model_folder import load_parts, read_story_model
from storyanchors.packed_sampling import NoisyClip, needs_guidance, noisy_clip, sample_clips
from storyanchors.story import Story
from storyanchors.story_edit import StoryEdit
from storyanchors.story_edit import window as window_of
from storyanchors.story_request import SamplerSettings, StoryRequest
from storyanchors.windows import Window, plan_windows

log = logging.getLogger(__name__)

Callback = Callable[[int, list[Tensor]], bool | None]  # (steps done, guesses of the clean latents)
PREVIEW_SIDE = 256  # pixels, the longer side of a preview


class SamplingStopped(Exception):
    """Ctrl-C or a callback ended the sampling; frames has those known by then, kept or drawn, by number."""

    def __init__(self, frames: dict[int, Image.Image]):
        super().__init__(f"sampling was stopped, {len(frames)} frames of the story are there")
        self.frames = frames


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
        max_frames: int | None = None,
        device: torch.device | None = None,
        memory: str = "resident",
    ):
        """frame_size: (height, width) in pixels. max_frames: what the model draws well at once, None = any
        number. device: where to compute, by default where the network is; memory: see memory.py. With
        memory="resident" the parts are on the device already.
        """
        if memory not in MEMORY_MODES:
            raise ValueError(f"unknown memory mode {memory!r}, expected one of {', '.join(MEMORY_MODES)}")
        self.dit, self.codec, self.caption_encoder = dit, codec, caption_encoder
        self.frame_size, self.max_frames = tuple(frame_size), max_frames
        self.num_steps, self.guidance_scale, self.shift = num_steps, guidance_scale, shift
        self.device, self.memory = device or dit.device, memory

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        lora: str | Path | None = None,
        memory: str = "resident",
    ) -> "StoryGenerator":
        """Loads a model folder of save_story_model; dtype is the network's, the codec stays float32.

        lora is an adapter of save_lora, its file or the folder it is in, and is merged into the network.
        ValueError or OSError when the folder, one of its parts, a setting or the adapter is missing or does
        not fit; OutOfMemory, a ValueError, when the parts do not fit on the device.
        """
        device = torch.device(device)
        info = read_story_model(folder)
        settings = {name: info[name] for name in ("frame_size", "num_steps", "guidance_scale", "shift")}
        advice = memory_advice(device, dtype, memory, loading=True)
        with out_of_memory_explained(f"loading {folder}", advice):
            parts = load_parts(folder, info, dtype=dtype, lora=lora)
            if memory == "resident":
                parts = [part.to(device) for part in parts]
            return cls(*parts, **settings, max_frames=info.get("max_frames"), device=device, memory=memory)

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
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str = "",
        cache_threshold: float = 0.0,
        seed: int = 0,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> list[Image.Image]:
        """The story's frames as RGB images; given frames, keyed by number, come back pixel-identical.

        num_frames defaults to the story's; height and width (pixels) and the sampler's settings to the
        model's; caption, the text that the network reads, to story.prompt(). A caption that is too long for
        the text encoder is cut as fit_caption does it, with a warning. Of the conditions, the number of
        frames, height and width are filled in where unknown. callback(step, latents) sees after every step
        the present guess of the clean latents, a list of one (F, C, h, w), for which there is preview.
        ValueError for settings and given frames that do not fit; OutOfMemory, a ValueError too;
        SamplingStopped after Ctrl-C and where the callback returns False.
        """
        request = StoryRequest(
            story, given or {}, num_frames, height, width, conditions or ClipConditions(), caption, seed
        )
        settings = SamplerSettings(
            num_steps,
            guidance_scale,
            shift,
            sampler,
            guidance_interval,
            negative_prompt,
            cache_threshold,
        )
        return self.generate_many([request], settings=settings, progress=progress, callback=callback)[0]

    def generate_many(
        self,
        requests: Sequence[StoryRequest],
        *,
        settings: SamplerSettings = SamplerSettings(),  # noqa: B008  frozen
        progress: bool = True,
        callback: Callback | None = None,
    ) -> list[list[Image.Image]]:
        """Several stories of any lengths and sizes in one packed forward per step; see generate.

        The frames of a request are those that it gives alone, up to rounding, whatever the others are.
        """
        if not requests:
            return []
        settings = self.full_settings(settings)
        bar = tqdm(total=settings.num_steps, desc="sampling", unit="step", disable=not progress)
        with bar, _stoppable({}):
            return self._draw(requests, settings, bar, callback)

    def redraw(
        self,
        edit: StoryEdit,
        frames: Sequence[Image.Image] | Mapping[int, Image.Image],
        *,
        height: int | None = None,
        width: int | None = None,
        conditions: ClipConditions = ClipConditions(),  # noqa: B008  frozen
        seed: int = 0,
        settings: SamplerSettings = SamplerSettings(),  # noqa: B008  frozen
        window: int | None = None,
        overlap: int | None = None,
        progress: bool = True,
        callback: Callback | None = None,
        finished: Callable[[dict[int, Image.Image]], None] | None = None,
    ) -> list[Image.Image]:
        """The frames of edit.story: kept ones are those of `frames`, untouched, the others are drawn.

        frames are those before the edit, by number or in order from 1; those that the edit does not keep need
        not be there. height and width default to the kept frames', then to the model's. What is longer than a
        window is drawn window by window (see `windows`), window i, from 0, with seed + i. The callback's step
        goes on from window to window, its latents are those of the window's frames. After each window,
        finished gets all frames that are known by then, by number after the edit.
        ValueError, OutOfMemory and SamplingStopped, with the frames of the windows before, as in generate.
        """
        before = frames if isinstance(frames, Mapping) else dict(enumerate(frames, start=1))
        if missing := sorted(set(edit.kept.values()) - set(before)):
            raise ValueError(f"the edit keeps frames {missing}, found frames {sorted(before)}")
        known = {number: before[earlier] for number, earlier in edit.kept.items()}
        for number, earlier in edit.kept.items():
            if not isinstance(known[number], Image.Image):
                raise ValueError(f"frame {earlier}: found {known[number]!r}, expected a PIL image")
        if known and height is None and width is None:
            height, width = known[min(known)].height, known[min(known)].width
        settings, plan = self.full_settings(settings), self.windows(edit, window, overlap)
        bar = tqdm(
            total=len(plan) * settings.num_steps,
            desc="sampling",
            unit="step",
            disable=not (progress and plan),
        )
        with bar, _stoppable(known):
            for index, place in enumerate(plan):
                shift = place.first - 1
                request = StoryRequest(
                    window_of(edit.story, place.first, place.last),
                    {number - shift: known[number] for number in place.given},
                    height=height,
                    width=width,
                    conditions=conditions,
                    seed=seed + index,
                )
                [drawn] = self._draw([request], settings, bar, _later(callback, index * settings.num_steps))
                known |= {number: drawn[number - 1 - shift] for number in place.drawn}
                if finished:
                    finished(dict(known))
        return [known[number] for number in sorted(known)]

    def windows(self, edit: StoryEdit, window: int | None = None, overlap: int | None = None) -> list[Window]:
        """What redraw draws one after the other; window i is of the steps from i num_steps + 1 on.

        window, the number of frames at once, defaults to the model's max_frames, and overlap, the frames that
        a window shares with what is there, to half of it. ValueError where they do not fit together.
        """
        if window is None:
            window = self.max_frames or max(3, edit.story.num_frames)
        overlap = max(1, window // 2) if overlap is None else overlap
        return plan_windows(edit.story.num_frames, edit.kept, window=window, overlap=overlap)

    def full_settings(self, settings: SamplerSettings) -> SamplerSettings:
        """The settings with the model's own in place of None."""
        own = {name: getattr(self, name) for name in ("num_steps", "guidance_scale", "shift")}
        return replace(
            settings, **{name: value for name, value in own.items() if getattr(settings, name) is None}
        )

    @torch.inference_mode()
    def preview(self, latents: Tensor) -> list[Image.Image]:
        """A callback's latents (F, C, h, w) as small RGB images: decoded from a reduced latent picture.

        The longer side has at most PREVIEW_SIDE pixels, so that a preview costs little beside a step.
        """
        longer = max(latents.shape[-2:]) * self.codec.spatial_stride
        if longer > PREVIEW_SIDE:
            size = [max(1, side * PREVIEW_SIDE // longer) for side in latents.shape[-2:]]
            latents = F.interpolate(latents, size=size, mode="area")
        with self._at_work(self.codec):
            return tensor_to_frames(self.codec.decode(latents))

    @torch.inference_mode()
    def _draw(
        self,
        requests: Sequence[StoryRequest],
        settings: SamplerSettings,
        bar: tqdm,
        callback: Callback | None,
    ) -> list[list[Image.Image]]:
        multiple = self.codec.spatial_stride * self.dit.config.patch_size[-1]
        requests = [request.filled(self.frame_size, multiple) for request in requests]
        sizes = {f"{one.num_frames} frames of {one.height} x {one.width} pixels" for one in requests}
        advice = memory_advice(self.device, self.dit.dtype, self.memory, num_requests=len(requests))

        def on_step(step: int, guesses: list[Tensor]) -> None:
            bar.update()
            if callback and callback(step, guesses) is False:
                raise SamplingStopped({})

        with out_of_memory_explained(f"drawing {' and '.join(sorted(sizes))}", advice):
            captions, negative = self._captions(requests, settings)
            with self._at_work(self.codec):
                clips = [noisy_clip(request, self.codec, self.device) for request in requests]
            with self._at_work(self.dit):
                latents = sample_clips(self.dit, clips, captions, negative, settings, on_step)
            with self._at_work(self.codec):
                return [self._frames(*drawn) for drawn in zip(requests, clips, latents, strict=True)]

    def _captions(
        self, requests: Sequence[StoryRequest], settings: SamplerSettings
    ) -> tuple[list[CaptionEmbedding], CaptionEmbedding | None]:
        """Embeddings of the requests' captions, and of the negative prompt where guidance acts."""
        texts = {f"story {number}": request.caption for number, request in enumerate(requests, start=1)}
        if needs_guidance(settings):
            texts["negative prompt"] = settings.negative_prompt
        fitted = {whose: fit_caption(text, self.caption_encoder) for whose, text in texts.items()}
        for whose, caption in fitted.items():
            if caption.dropped:
                log.warning("%s: %s", whose, caption.loss)
        with self._at_work(self.caption_encoder):
            encoded = self.caption_encoder.encode([caption.text for caption in fitted.values()])
        captions = [embedding_to(caption, self.device) for caption in encoded]
        return captions[: len(requests)], captions[-1] if len(captions) > len(requests) else None

    def _frames(self, request: StoryRequest, clip: NoisyClip, latents: Tensor) -> list[Image.Image]:
        generated = iter(tensor_to_frames(self.codec.decode(latents[clip.cond_mask == 0])))
        numbers = range(1, request.num_frames + 1)
        return [request.given[number] if number in request.given else next(generated) for number in numbers]

    def _at_work(self, part) -> AbstractContextManager[None]:
        return at_work(part, self.device, self.memory)


def _later(callback: Callback | None, steps: int) -> Callback | None:
    """The callback, with the steps of earlier windows counted."""
    return callback and (lambda step, latents: callback(steps + step, latents))


@contextmanager
def _stoppable(known: dict[int, Image.Image]) -> Iterator[None]:
    """Ctrl-C and a callback's False become SamplingStopped with the frames known so far."""
    try:
        yield
    except (KeyboardInterrupt, SamplingStopped):
        raise SamplingStopped(known) from None
