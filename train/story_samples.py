"""Sample stories during training: held-out stories drawn with the averaged weights, as contact sheets."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from PIL import Image

from storyanchors.clip import CaptionRecord
from storyanchors.conditioning import ClipConditions
from storyanchors.contact_sheet import draw_contact_sheet
from storyanchors.generator import StoryGenerator
from train.callbacks import MetricsLog
from train.clip_index import ClipIndex
from train.loader import ClipBatch, ClipReader
from train.story_module import StoryModule


@dataclass
class SamplesConfig:
    every_n_steps: int = 500  # 0 = no samples
    num_stories: int = 4
    num_steps: int = 20  # of the sampler
    guidance_scale: float = 2.0
    score_story_world: bool = False  # exact metrics, where the stories are the story world's


@dataclass(frozen=True)
class SampleStory:
    """A labelled clip to draw again, and its first frame to continue from."""

    caption: CaptionRecord
    conditions: ClipConditions
    first_frame: Image.Image


def read_sample_stories(index: ClipIndex, num_stories: int) -> list[SampleStory]:
    """The first clips of the index that have a story, all of the first one's frame size."""
    reader, stories = ClipReader(), []
    for number in range(len(index)):
        row = index.row(number)
        size = (row.conditions.height, row.conditions.width)
        first_size = (stories[0].conditions.height, stories[0].conditions.width) if stories else size
        if size == first_size and (caption := reader.caption(row)).story is not None:
            stories.append(SampleStory(caption, row.conditions, reader.frames(row)[0]))
        if len(stories) == num_stories:
            break
    return stories


class StorySamples(Callback):
    """samples/step_*.png and, on request, the story world's metrics as numbers in metrics.jsonl.

    From the prompt alone and, in a stage that trains given frames, continued from the first frame.
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

    def on_train_batch_end(
        self, trainer: L.Trainer, module: StoryModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        if trainer.is_global_zero and (step % self.config.every_n_steps == 0 or step == trainer.max_steps):
            with module.ema.swapped_in(), trainer.precision_plugin.forward_context():
                numbers = dict(self.draw(trainer, module))
            if numbers:
                self.metrics.write(trainer, numbers)

    def draw(self, trainer: L.Trainer, module: StoryModule) -> Iterator[tuple[str, float]]:
        """Writes this step's sheets; yields the metrics asked for."""
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
        for name, given in self._tasks(module):
            frames = generator.generate_many(
                [story.caption.story for story in self.stories],
                given=given,
                conditions=[story.conditions for story in self.stories],
                captions=[self._caption(story, module.stage.caption) for story in self.stories],
                progress=False,
            )
            sheets = [
                draw_contact_sheet(pictures, story.caption.story, given=set(numbers))
                for pictures, story, numbers in zip(frames, self.stories, given, strict=True)
            ]
            self.folder.mkdir(parents=True, exist_ok=True)
            page = _stack(sheets)
            page.save(self.folder / f"step_{trainer.global_step:08d}_{name}.png")
            self.metrics.show(trainer, f"sample/{name}", page)
            if self.config.score_story_world:
                for metric, value in self._score(frames, given).items():
                    yield f"sample/{name}/{metric}", value

    def _tasks(self, module: StoryModule) -> Iterator[tuple[str, list[dict[int, Image.Image]]]]:
        yield "prompt", [{} for _ in self.stories]
        if module.stage.gives_frames:
            yield "continue", [{1: story.first_frame} for story in self.stories]

    def _caption(self, story: SampleStory, kind: str) -> str:
        return story.caption.global_caption if kind == "global" else story.caption.story.prompt()

    def _score(
        self, frames: list[list[Image.Image]], given: list[dict[int, Image.Image]]
    ) -> dict[str, float]:
        from storyanchors.story_world import from_story, score_stories  # only for runs on the story world

        stories = [from_story(story.caption.story) for story in self.stories]
        return score_stories(frames, stories, given=[set(numbers) for numbers in given])


def _stack(sheets: list[Image.Image]) -> Image.Image:
    page = Image.new(
        "RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white"
    )
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page
