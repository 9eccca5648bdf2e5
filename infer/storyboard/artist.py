"""Draws what the board asks for, and shows it while it appears."""

import base64
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from infer.project.drawing import DrawSettings, run_edit
from infer.story_project import StoryProject
from infer.storyboard.worker import Job
from storyanchors.generator import StoryGenerator
from storyanchors.story_edit import StoryEdit, window
from storyanchors.story_request import StoryRequest

PREVIEW_S = 0.3  # at most one preview in this time: a page asks for news about as often


@dataclass(frozen=True)
class Artist:
    """A generator with the settings it draws with."""

    generator: StoryGenerator
    settings: DrawSettings

    def draw(self, project: StoryProject | Path, edit: StoryEdit, seed: int, job: Job) -> StoryProject:
        """The project with the edit as its present version, or the one that begins in the folder."""
        plan = self.generator.windows(edit, self.settings.window, self.settings.overlap)

        def show(step: int, latents: list[Tensor]) -> None:
            place = plan[(step - 1) // self._num_steps()]
            previews = self.generator.preview(latents[0])
            for number in place.drawn:
                job.previews[number] = as_url(previews[number - place.first])

        callback = _watcher(job, len(plan) * self._num_steps(), show)
        return run_edit(
            self.generator, project, edit, self.settings, seed=seed, progress=False, callback=callback
        )

    def draw_variants(
        self, project: StoryProject, edit: StoryEdit, seeds: Sequence[int], job: Job
    ) -> list[Image.Image]:
        """The one frame that the edit draws, with each of the seeds, in one packed forward per step."""
        [number] = edit.drawn()
        [place] = self.generator.windows(edit, self.settings.window, self.settings.overlap)
        frames, index = project.frames(), number - place.first
        height, width = frames[number].height, frames[number].width
        story = window(edit.story, place.first, place.last)
        given = {other - place.first + 1: frames[other] for other in place.given}
        requests = [
            StoryRequest(
                story, given, height=height, width=width, conditions=self.settings.conditions, seed=seed
            )
            for seed in seeds
        ]

        def show(step: int, latents: list[Tensor]) -> None:
            for variant, clip in enumerate(latents):
                [preview] = self.generator.preview(clip[index : index + 1])
                job.previews[variant] = as_url(preview)

        callback = _watcher(job, self._num_steps(), show)
        drawn = self.generator.generate_many(
            requests, settings=self.settings.sampler, progress=False, callback=callback
        )
        return [clip[index] for clip in drawn]

    def take_variant(
        self, project: StoryProject, edit: StoryEdit, drawn: Mapping[int, Image.Image], seed: int
    ) -> None:
        """What draw_variants drew as the project's new version."""
        project.commit(edit, drawn, self.settings.record(self.generator, seed))

    def _num_steps(self) -> int:
        return self.generator.full_settings(self.settings.sampler).num_steps


def as_url(picture: Image.Image) -> str:
    """The picture itself as a URL, for what is not on disk."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _watcher(
    job: Job, num_steps: int, show: Callable[[int, list[Tensor]], None]
) -> Callable[[int, list[Tensor]], bool]:
    """A callback of the sampler that shows previews now and then, and ends it when the job is cancelled."""
    shown_at = 0.0

    def callback(step: int, latents: list[Tensor]) -> bool:
        nonlocal shown_at
        job.share = step / num_steps
        if time.monotonic() - shown_at >= PREVIEW_S:
            show(step, latents)
            shown_at = time.monotonic()
        return not job.cancelled

    return callback
