"""Scores a model on held-out stories of the story world, exactly and without a network as judge.

python infer/score_story_world.py weights=MODEL num_stories=200 mode=text_to_story out=SCORES.json

mode says which frames are given: text_to_story none, continue the first, edit all but one, infill the first
and the last. Scores count generated frames only and are printed beside those of the true frames.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm

from conf.command import run
from infer.project.whole_files import write_whole
from infer.story_run import ModelConfig, hash_weights, load_generator, sampler_settings
from storyanchors.conditioning import ClipConditions
from storyanchors.generator import StoryGenerator, StoryRequest
from storyanchors.story_world import WorldStory, render_frame, sample_story, score_stories, to_story

HELD_OUT = 1_000_000_000  # write_story_world's stories have smaller seeds, up to its seed=99
MODES = ("text_to_story", "continue", "edit", "infill")
CAPTIONS = ("multi_event", "global")
UNDEFINED = {  # scores without a meaning: no given frame to copy, no two generated frames to compare
    "text_to_story": {"copy_paste"},
    "edit": {"event_order_tau", "scene_order_tau", "scene_diversity_gap", "shot_diversity_gap"},
}


@dataclass
class ScoreStoryWorldConfig(ModelConfig):
    num_stories: int = MISSING
    mode: str = MISSING
    caption: str = MISSING
    num_frames: int | None = None  # None draws 6 to 8
    seed: int = 0  # of the noise; the stories are always the same
    batch: int = MISSING  # stories per forward
    out: str | None = None


def main(config: ScoreStoryWorldConfig) -> None:
    if config.mode not in MODES:
        raise ValueError(f"unknown mode {config.mode!r}, expected one of {', '.join(MODES)}")
    if config.caption not in CAPTIONS:
        raise ValueError(f"unknown caption {config.caption!r}, expected one of {', '.join(CAPTIONS)}")
    if min(config.num_stories, config.batch) < 1:
        raise ValueError(f"num_stories={config.num_stories} and batch={config.batch} must be at least 1")
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)  # now, not when all the work is done
    generator = load_generator(config)
    stories = [sample_story(HELD_OUT + i, num_frames=config.num_frames) for i in range(config.num_stories)]
    truth = [_true_frames(story) for story in stories]
    given = [given_numbers(config.mode, story.num_frames, index) for index, story in enumerate(stories)]
    frames = list(_generate(config, generator, stories, truth, given))
    print(f"scoring {sum(map(len, frames))} frames, and as many true ones", flush=True)
    scores = {
        name: {
            metric: value
            for metric, value in score_stories(shown, stories, given=given).items()
            if metric not in UNDEFINED.get(config.mode, ())
        }
        for name, shown in (("model", frames), ("truth", truth))
    }
    print(format_table(scores))
    if config.out:
        record = {**asdict(config), "weights_sha256": hash_weights(Path(config.weights)), "scores": scores}
        write_whole(Path(config.out), f"{json.dumps(record, indent=2)}\n".encode())


def given_numbers(mode: str, num_frames: int, index: int) -> set[int]:
    """The frames that are given to story number index; edit leaves out each position in turn."""
    match mode:
        case "continue":
            return {1}
        case "edit":
            return set(range(1, num_frames + 1)) - {index % num_frames + 1}
        case "infill":
            return {1, num_frames}
    return set()


def _true_frames(story: WorldStory) -> list[Image.Image]:
    return [Image.fromarray(render_frame(story, number)) for number in range(1, story.num_frames + 1)]


def _generate(
    config: ScoreStoryWorldConfig,
    generator: StoryGenerator,
    world_stories: list[WorldStory],
    truth: list[list[Image.Image]],
    given: list[set[int]],
) -> Iterator[list[Image.Image]]:
    stories = [to_story(story) for story in world_stories]
    conditions = ClipConditions(config.fps, config.frame_interval, config.motion)
    settings = sampler_settings(config)
    requests = [
        StoryRequest(
            story,
            {number: truth[index][number - 1] for number in given[index]},
            conditions=conditions,
            caption=story.global_caption if config.caption == "global" else None,
            seed=config.seed + index,
        )
        for index, story in enumerate(stories)
    ]
    with tqdm(total=len(stories), desc=config.mode, unit="story") as bar:
        for start in range(0, len(stories), config.batch):
            part = requests[start : start + config.batch]
            yield from generator.generate_many(part, settings=settings, progress=False)
            bar.update(len(part))


def format_table(columns: dict[str, dict[str, float]]) -> str:
    """Aligned rows of numbers, one per score and one column per name."""
    names = list(next(iter(columns.values())))
    first = max(map(len, names))
    widths = {title: max(10, len(title) + 2) for title in columns}
    lines = [" " * first + "".join(f"{title:>{width}}" for title, width in widths.items())]
    for name in names:
        numbers = "".join(f"{columns[title][name]:>{width}.3f}" for title, width in widths.items())
        lines.append(f"{name:<{first}}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, ScoreStoryWorldConfig, "score_story_world")
