"""Sample stories during training: held-out stories drawn with the averaged weights, as contact sheets."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import distributed

from storyanchors.clip import CaptionRecord, frames_to_levels, levels_to_pixels, tensor_to_frames
from storyanchors.conditioning import ClipConditions
from storyanchors.contact_sheet import PAPER, draw_contact_sheet
from storyanchors.generator import StoryGenerator
from storyanchors.sequence_parallel import whole_sequences
from train.clips.clip_index import CAPTION_COLUMNS, ClipIndex
from train.clips.clip_reader import BrokenSample, ClipReader
from train.clips.loader import ClipBatch
from train.settings import at_least
from train.story_module import StoryModule
from train.watching.callbacks import MetricsLog

log = logging.getLogger(__name__)

Given = dict[int, Image.Image]  # frames to continue from, by their number from 1


@dataclass
class SamplesConfig:
    every_n_steps: int = 500  # 0 = no samples
    num_stories: int = 4
    num_steps: int = 20  # of the sampler
    guidance_scale: float = 2.0
    score_story_world: bool = False  # exact metrics, where the stories are the story world's

    def __post_init__(self):
        at_least(0, self, "samples.", "every_n_steps", "guidance_scale")
        at_least(1, self, "samples.", "num_stories", "num_steps")


@dataclass(frozen=True)
class SampleStory:
    """A labelled clip to draw again."""

    caption: CaptionRecord
    conditions: ClipConditions
    frames: list[Image.Image]  # as they are; the first one is there to continue from


def read_sample_stories(index: ClipIndex, num_stories: int) -> list[SampleStory]:
    """The first clips of the index that have a story, all of the first one's frame size."""
    reader, stories = ClipReader(), []
    for number in np.flatnonzero(index.numbers(CAPTION_COLUMNS["multi_event"])):
        row = index.row(number)
        size = (row.conditions.height, row.conditions.width)
        first_size = (stories[0].conditions.height, stories[0].conditions.width) if stories else size
        if size != first_size:
            continue
        try:
            if (caption := reader.caption(row)).story is not None:
                stories.append(SampleStory(caption, row.conditions, reader.frames(row)))
        except BrokenSample as error:
            log.warning("no sample of a broken clip: %s", error)
        if len(stories) == num_stories:
            return stories
    if stories:
        log.warning(
            "samples.num_stories=%d, found %d among the %d clips for samples that have a multi-event caption "
            "and frames of the first one's size",
            num_stories,
            len(stories),
            len(index),
        )
    return stories


class StorySamples(Callback):
    """samples/truth.png, samples/step_*.png and, on request, the story world's metrics in metrics.jsonl.

    From the prompt alone and, in a stage that trains given frames, continued from the first frame. Each story
    has its own seed and is drawn alone, by one of the ranks: the same pictures on any number of them.
    """

    def __init__(
        self,
        run_dir: Path,
        config: SamplesConfig,
        stories: list[SampleStory],
        metrics: MetricsLog,
    ):
        self.folder = run_dir / "samples"
        self.config = config
        self.stories = stories
        self.metrics = metrics
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, module: StoryModule) -> None:
        self.last_step = trainer.global_step
        if trainer.is_global_zero:
            self._save("truth", [story.frames for story in self.stories], [{} for _ in self.stories])

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        if step % self.config.every_n_steps == 0 or step == trainer.max_steps:
            with self.metrics.aside("samples", step):
                for name, given in self._tasks(module):
                    with module.ema.swapped_in(), whole_sequences(module.dit):
                        own = self._draw(trainer, module, given)
                    drawn = self._collect(own, trainer)
                    if trainer.is_global_zero:
                        self._publish(name, step, drawn, given)

    def _draw(
        self, trainer: L.Trainer, module: StoryModule, given: list[Given]
    ) -> dict[int, list[Image.Image]]:
        """This rank's stories by number. Under ZeRO-3 a forward is a collective, so all ranks draw equally
        many; what a rank draws beyond its share does not count."""
        conditions = self.stories[0].conditions
        generator = StoryGenerator(
            module.dit,
            module.codec,
            module.caption_encoder,
            frame_size=(conditions.height, conditions.width),
            num_steps=self.config.num_steps,
            guidance_scale=self.config.guidance_scale,
            shift=module.sigma_shift,
        )
        own = list(range(trainer.global_rank, len(self.stories), trainer.world_size))
        num_rounds = -(-len(self.stories) // trainer.world_size)
        drawn = {}
        for number in own + [0] * (num_rounds - len(own)):
            story = self.stories[number]
            with trainer.precision_plugin.forward_context():
                drawn[number] = generator.generate(
                    story.caption.story,
                    given=given[number],
                    conditions=story.conditions,
                    caption=self._caption(story, module.stage.caption),
                    seed=number,
                    progress=False,
                )
        return {number: drawn[number] for number in own}

    def _collect(self, own: dict[int, list[Image.Image]], trainer: L.Trainer) -> list[list[Image.Image]]:
        """All stories' frames on the first rank, which has them sent one after the other."""
        drawn = []
        for number, story in enumerate(self.stories):
            source = number % trainer.world_size
            if trainer.world_size == 1:
                drawn.append(own[number])
                continue
            shape = (story.conditions.num_frames, 3, story.conditions.height, story.conditions.width)
            levels = torch.empty(shape, dtype=torch.uint8, device=trainer.strategy.root_device)
            if number in own:
                levels.copy_(frames_to_levels(own[number]))
            distributed.broadcast(levels, source)
            drawn.append(tensor_to_frames(levels_to_pixels(levels)))
        return drawn

    def _save(self, name: str, frames: list[list[Image.Image]], given: list[Given]) -> list[Image.Image]:
        """Writes a page for people and returns its stories: events below the frames, given ones marked."""
        sheets = [
            draw_contact_sheet(pictures, story.caption.story, given=set(numbers))
            for pictures, story, numbers in zip(frames, self.stories, given, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        _stack(sheets).save(self.folder / f"{name}.png")
        return sheets

    def _publish(self, name: str, step: int, drawn: list[list[Image.Image]], given: list[Given]) -> None:
        sheets = self._save(f"step_{step:08d}_{name}", drawn, given)
        texts = [story.caption.story.prompt() for story in self.stories]
        self.metrics.show(f"sample/{name}", sheets, texts)
        if self.config.score_story_world:
            scores = self._score(drawn, given)
            self.metrics.add({f"sample/{name}/{metric}": value for metric, value in scores.items()})

    def _tasks(self, module: StoryModule) -> Iterator[tuple[str, list[Given]]]:
        yield "prompt", [{} for _ in self.stories]
        if module.stage.gives_frames:
            yield "continue", [{1: story.frames[0]} for story in self.stories]

    def _caption(self, story: SampleStory, kind: str) -> str:
        return story.caption.global_caption if kind == "global" else story.caption.story.prompt()

    def _score(self, frames: list[list[Image.Image]], given: list[Given]) -> dict[str, float]:
        from storyanchors.story_world import from_story, score_stories  # only for runs on the story world

        stories = [from_story(story.caption.story) for story in self.stories]
        return score_stories(frames, stories, given=[set(numbers) for numbers in given])


def _stack(sheets: list[Image.Image]) -> Image.Image:
    page = Image.new(
        "RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER
    )
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page
