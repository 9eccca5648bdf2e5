"""Fills a gap with the model that drew its anchors: coarse to fine, as clips of a small frame_interval.

A gap of 70 steps is one clip of 11 frames 7 steps apart (frame_interval 6), its two anchors given; then ten
clips of 8 frames 1 step apart (frame_interval 0), each between two frames that are known by now. What a clip
is told is its piece of the story (Gap.clip_story) and its own frame_interval.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infer.film.gap import Gap
from storyanchors.conditioning import ClipConditions
from storyanchors.generator import StoryGenerator
from storyanchors.story_request import SamplerSettings, StoryRequest

MAX_STRIDES = 10  # of one clip: 11 frames, the most that the shipped model was trained with in dense clips
MIN_STRIDE = 7  # of a clip that is not the finest: clips of three frames would be drawn for one of them

Clip = tuple[int, ...]  # steps after the gap's first anchor; the first and last are known, the others drawn


def plan_levels(num_steps: int) -> list[list[Clip]]:
    """Clips that draw the steps 1..num_steps-1, each once, in levels: one needs what those before it drew."""
    levels, spans = [], [(0, num_steps)]
    while wide := [span for span in spans if span[1] - span[0] > 1]:
        levels.append([_strides(*span) for span in wide])
        spans = [span for clip in levels[-1] for span in pairwise(clip)]
    return levels


def _strides(first: int, last: int) -> Clip:
    """first, ..., last in up to MAX_STRIDES equal strides; nearly equal ones where no number divides them."""
    num_steps = last - first
    whole = [count for count in range(2, MAX_STRIDES + 1) if num_steps % count == 0]
    if num_steps <= MAX_STRIDES:
        count = num_steps
    elif whole:
        count = max((count for count in whole if num_steps >= MIN_STRIDE * count), default=min(whole))
    else:
        count = min(MAX_STRIDES, -(-num_steps // MAX_STRIDES))
    return tuple(first + round(index * num_steps / count) for index in range(count + 1))


def draw_gaps(
    generator: StoryGenerator,
    gaps: Sequence[Gap],
    frame_interval: int,
    *,
    conditions: ClipConditions = ClipConditions(),  # noqa: B008  frozen
    settings: SamplerSettings = SamplerSettings(),  # noqa: B008  frozen
    seed: int = 0,
    progress: bool = False,
) -> list[list[Image.Image]]:
    """frame_interval frames for each gap. The clips of one level of all gaps are drawn in one packed forward.

    Settings that are None are no guidance and half the model's own steps.
    conditions are those of the film (fps, motion); each clip's own frame_interval is filled in. The clip that
    begins at step s has the noise of seed + s: a gap's frames depend on nothing outside it.
    SamplingStopped after Ctrl-C.
    """
    num_steps, settings = frame_interval + 1, _film_settings(generator, settings)
    known = [{0: gap.first, num_steps: gap.last} for gap in gaps]
    levels = plan_levels(num_steps)
    total = len(levels) * settings.num_steps
    with tqdm(total=total, desc="sampling", unit="step", leave=False, disable=not progress) as bar:

        def count(step: int, latents: list[Tensor]) -> None:
            bar.update()

        for clips in levels:
            places = [(index, clip) for index in range(len(gaps)) for clip in clips]
            requests = [_request(gaps[i], clip, known[i], num_steps, conditions, seed) for i, clip in places]
            drawn = generator.generate_many(requests, settings=settings, progress=False, callback=count)
            for (index, clip), frames in zip(places, drawn, strict=True):
                known[index].update(zip(clip, frames, strict=True))
    return [[frames[step] for step in range(1, num_steps)] for frames in known]


def _film_settings(generator: StoryGenerator, settings: SamplerSettings) -> SamplerSettings:
    """Between two known frames little is left to decide: no guidance and half the model's steps are nearer to
    the truth than its own settings are (docs/film.md), for a quarter of the work."""
    guidance_scale = 1.0 if settings.guidance_scale is None else settings.guidance_scale
    num_steps = settings.num_steps or max(1, generator.num_steps // 2)
    return generator.full_settings(replace(settings, guidance_scale=guidance_scale, num_steps=num_steps))


def _request(
    gap: Gap,
    clip: Clip,
    known: dict[int, Image.Image],
    num_steps: int,
    conditions: ClipConditions,
    seed: int,
) -> StoryRequest:
    stride = round((clip[-1] - clip[0]) / (len(clip) - 1))
    return StoryRequest(
        gap.clip_story(len(clip), ends_at_anchor=clip[-1] == num_steps),
        given={1: known[clip[0]], len(clip): known[clip[-1]]},
        height=gap.first.height,
        width=gap.first.width,
        conditions=replace(conditions, frame_interval=stride - 1),
        seed=seed + clip[0],
    )
