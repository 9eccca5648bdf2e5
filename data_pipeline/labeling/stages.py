"""The three stages of labeling: a global caption, the events of each subset, and the story that unifies them.

A stage turns one clip into one line of labels/<run>/<stage>/<shard>.jsonl and asks through `ask`, which knows
the ledger, the limits and the model. A line's status is ok, warned (it has warnings), quarantined (no answer
passed its checks) or blocked (refused by the model's filter).
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from data_pipeline.labeling.findings import (
    ERROR,
    WARNING,
    Finding,
    PoolEvent,
    check_events,
    check_global_caption,
    check_story,
    to_story,
    worst,
)
from data_pipeline.labeling.partition import read_run
from data_pipeline.labeling.prompts import EVENTS, GLOBAL_CAPTION, STORY
from data_pipeline.labeling.runner import Ask, LabelClip, LabelingConfig, Settled
from data_pipeline.labeling.schemas import EventsAnswer, GlobalCaptionAnswer, StoryAnswer
from data_pipeline.labeling.subsets import (
    MAX_SUBSET,
    balanced_subsets,
    evenly_chosen,
    look_at,
    representative_frame,
)
from storyanchors.clip import decode_jpeg, encode_jpeg, read_jpeg_size
from storyanchors.vlm import VlmRequest, VlmUsage

if TYPE_CHECKING:
    from storyanchors.caption_encoder import TokenCounter

MAX_PIXELS = 409_600  # what sample_frames makes by default: such frames are sent as they are stored
WORDS_PER_TOKEN = 0.6  # English in the tokenizers of text encoders has 0.65 to 0.8


class GlobalCaptions:
    """Stage 1 captions (paper 2.1): one chronological caption of the whole clip, without events.

    Of a clip of more than max_images frames evenly chosen ones are sent.
    """

    name = "global"

    def __init__(
        self,
        *,
        max_images: int | None = None,
        max_pixels: int = MAX_PIXELS,
        caption_encoder: str | None = None,
    ):
        self.prompts = {GLOBAL_CAPTION.id: GLOBAL_CAPTION.text}
        self.settings = {
            "max_images": max_images,
            "max_pixels": max_pixels,
            "caption_encoder": caption_encoder,
        }
        self.max_images, self.max_pixels = max_images, max_pixels
        self.counter = _load_counter(caption_encoder)

    async def label(self, clip: LabelClip, ask: Ask) -> dict:
        """The line: its "global_caption" is "" where there is none."""
        num_frames = clip.info.num_frames
        chosen = evenly_chosen(num_frames, self.max_images)
        about = f"The clip has {num_frames} frames." + _budget_line(self.counter)
        request = VlmRequest(
            f"{clip.key}/{self.name}/1-{num_frames}",
            (GLOBAL_CAPTION.text, about, *await _numbered(clip, chosen, self.max_pixels)),
            GlobalCaptionAnswer,
        )
        settled = await ask(request, lambda answer: check_global_caption(answer, self.counter))
        caption = settled.answer.caption if settled.status == "ok" else ""
        return _line([settled], _skipped(num_frames, chosen)) | {"global_caption": caption}


class Events:
    """The first of the two story stages: every subset of at most 12 frames is annotated alone.

    A clip of which a subset cannot be settled has no story; what was found in the others is kept.
    """

    name = "events"

    def __init__(self, *, max_images: int | None = None, max_pixels: int = MAX_PIXELS):
        self.prompts = {EVENTS.id: EVENTS.text}
        self.settings = {"max_images": max_images, "max_pixels": max_pixels}
        self.max_subset, self.max_pixels = min(MAX_SUBSET, max_images or MAX_SUBSET), max_pixels

    async def label(self, clip: LabelClip, ask: Ask) -> dict:
        """The line: "subsets", and "events" of all settled ones, each with the frame that represents it."""
        num_frames = clip.info.num_frames
        subsets = balanced_subsets(num_frames, self.max_subset)
        settled = await asyncio.gather(*(self._ask(clip, subset, ask) for subset in subsets))
        found = [event for one in settled if one.status == "ok" for event in one.answer.events]
        looks = cache(lambda frame: look_at(clip.jpegs[frame - 1]))
        pool = make_pool([(event.first_frame, event.last_frame, event.description) for event in found], looks)
        return _line(settled) | {
            "subsets": [{"first": first, "last": last} for first, last in subsets],
            "events": [asdict(event) for event in pool],
        }

    async def _ask(self, clip: LabelClip, subset: tuple[int, int], ask: Ask) -> Settled:
        first, last = subset
        frames = f"frame {first}" if first == last else f"frames {first} to {last}"
        about = f"The clip has {clip.info.num_frames} frames. Annotate {frames}."
        images = await _numbered(clip, range(first, last + 1), self.max_pixels)
        name = f"{clip.key}/{self.name}/{first}-{last}"
        request = VlmRequest(name, (EVENTS.text, about, *images), EventsAnswer)
        return await ask(request, lambda answer: check_events(answer, first, last))


class UnifiedStory:
    """The second story stage: all events of a clip in one pool, with one frame each, become one story.

    caption_encoder: folder, Hub id or "words" of the encoder whose token budget the story has to keep.
    Of more events than max_images, evenly chosen ones are shown with their frame.
    """

    name = "story"

    def __init__(
        self,
        caption_encoder: str | None = None,
        *,
        max_images: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.prompts = {STORY.id: STORY.text}
        self.settings = {
            "max_images": max_images,
            "max_pixels": max_pixels,
            "caption_encoder": caption_encoder,
        }
        self.max_images, self.max_pixels = max_images, max_pixels
        self.caption_encoder = caption_encoder
        self.counter = _load_counter(caption_encoder)

    async def label(self, clip: LabelClip, ask: Ask) -> dict:
        """The line: "story" is Story.to_dict() or None, "event_ids" are the annotations behind each event."""
        nothing = {"story": None, "event_ids": [], "token_counts": {}}
        if clip.earlier is None or clip.earlier["status"] not in ("ok", "warned"):
            status = clip.earlier["status"] if clip.earlier else "missing"
            detail = f"the clip has no events to unify: its line of the stage before is {status}"
            line = _line([], [Finding("events_missing", ERROR, detail)])
            return line | {"status": "blocked" if status == "blocked" else "quarantined"} | nothing
        num_frames = clip.info.num_frames
        pool = [PoolEvent(**event) for event in clip.earlier["events"]]
        chosen = evenly_chosen(len(pool), self.max_images)
        request = VlmRequest(
            f"{clip.key}/{self.name}/1-{num_frames}",
            (
                STORY.text,
                f"The clip has {num_frames} frames and {len(pool)} annotations." + _budget_line(self.counter),
                *await self._annotations(clip, pool, set(chosen)),
            ),
            StoryAnswer,
            max_tokens=8192,
        )
        settled = await ask(request, lambda answer: check_story(answer, pool, num_frames, self.counter))
        line = _line([settled], _skipped(len(pool), chosen))
        if settled.status != "ok":
            return line | nothing
        story = to_story(settled.answer)
        counts = {self.caption_encoder: self.counter.count_tokens(story.prompt())} if self.counter else {}
        return line | {
            "story": story.to_dict(),
            "event_ids": [event.event_ids for event in settled.answer.events],
            "token_counts": counts,
        }

    async def _annotations(
        self, clip: LabelClip, pool: list[PoolEvent], chosen: set[int]
    ) -> list[str | bytes]:
        parts: list[str | bytes] = []
        for number, event in enumerate(pool, start=1):
            shown = f" (Frame {event.representative})" if number in chosen else ""
            parts.append(annotation_text(event) + shown)
            if shown:
                parts.append(await _sendable(clip.jpegs[event.representative - 1], self.max_pixels))
            parts.append(event.description)
        return parts


def open_stage(name: str, settings: dict[str, object]) -> GlobalCaptions | Events | UnifiedStory:
    """The stage of that name with its own settings, as run.json keeps them under "asked_with"."""
    [kind] = [kind for kind in (GlobalCaptions, Events, UnifiedStory) if kind.name == name]
    return kind(**settings)


def reopen_stage(dataset: Path, run: str, name: str) -> GlobalCaptions | Events | UnifiedStory:
    """The stage of a run as it was asked, so that its questions are those in the ledger.

    ValueError for a run without that stage, and one that was asked with another text than a prompt has now.
    """
    begun = read_run(dataset, run)["stages"]
    if name not in begun:
        raise ValueError(f"run {run!r} has no {name} labels, found {', '.join(sorted(begun)) or 'none'}")
    stage = open_stage(name, begun[name]["asked_with"])
    for id, text in stage.prompts.items():
        if begun[name]["prompts"].get(id) != text:
            raise ValueError(
                f"run {run!r} asked for {name} with another text than prompt {id} has now: "
                "its answers are to another question"
            )
    return stage


def images_allowed(config: LabelingConfig) -> int:
    """In one request, by all models that may be asked."""
    return min(vlm.max_images for vlm in (config.vlm, *config.fallback))


def make_pool(events: list[tuple[int, int, str]], look: Callable) -> list[PoolEvent]:
    """Events (first, last, description) in order, with their ids and one representative frame each."""
    pool, used = [], set()
    for number, (first, last, description) in enumerate(sorted(events, key=lambda event: event[:2]), start=1):
        representative = representative_frame(first, last, used, look)
        used.add(representative)
        pool.append(PoolEvent(f"e{number:02d}", first, last, description, representative))
    return pool


def annotation_text(event: PoolEvent) -> str:
    """How the second stage names an event of the pool; exact_labeler reads it back."""
    return f"Annotation {event.id} [{event.first_frame}-{event.last_frame}]"


async def _numbered(clip: LabelClip, numbers: list[int] | range, max_pixels: int) -> list[str | bytes]:
    """ "Frame k" and its image, for every k."""
    parts: list[str | bytes] = []
    for number in numbers:
        parts += [f"Frame {number}", await _sendable(clip.jpegs[number - 1], max_pixels)]
    return parts


async def _sendable(jpeg: bytes, max_pixels: int) -> bytes:
    """The JPEG itself, or where it has more than max_pixels a smaller one, made beside the event loop."""
    width, height = read_jpeg_size(jpeg)
    if width * height <= max_pixels:
        return jpeg
    return await asyncio.to_thread(_smaller, jpeg, (width, height), max_pixels)


def _smaller(jpeg: bytes, size: tuple[int, int], max_pixels: int) -> bytes:
    scale = sqrt(max_pixels / (size[0] * size[1]))
    smaller = tuple(max(1, int(side * scale)) for side in size)
    return encode_jpeg(decode_jpeg(jpeg, size).resize(smaller, Image.Resampling.LANCZOS))


def _load_counter(caption_encoder: str | None) -> "TokenCounter | None":
    if not caption_encoder:
        return None
    from storyanchors.caption_encoder import load_token_counter  # imports transformers, which takes seconds

    return load_token_counter(caption_encoder)


def _budget_line(counter: "TokenCounter | None") -> str:
    if counter is None or counter.max_tokens is None:
        return ""
    words = int(counter.max_tokens * WORDS_PER_TOKEN)
    return f" Everything that you write together has at most {words} words."


def _skipped(total: int, chosen: list[int]) -> list[Finding]:
    if len(chosen) == total:
        return []
    return [Finding("images_left_out", WARNING, f"{len(chosen)} of {total} images were sent")]


def _line(settled: list[Settled], findings: Sequence[Finding] = ()) -> dict:
    """What the lines of all stages have: status, findings, usage, usd, num_requests."""
    findings = [*findings, *(finding for one in settled for finding in one.findings)]
    failed = [one.status for one in settled if one.status != "ok"]
    usage = sum((one.usage for one in settled), VlmUsage())
    return {
        "status": failed[0] if failed else "warned" if worst(findings) == WARNING else "ok",
        "findings": [asdict(finding) for finding in findings],
        "usage": asdict(usage),
        "usd": sum((one.usd for one in settled), 0.0),
        "num_requests": sum(one.num_requests for one in settled),
    }
