"""What the first-block cache saves and costs: held-out stories of the story world, with exact scores.

OMP_NUM_THREADS=1 python benchmarks/block_cache.py --num-stories 50
OMP_NUM_THREADS=1 python benchmarks/block_cache.py --num-stories 50 --num-steps 30 --thresholds 0.05 0.1 0.2

Each batch of stories is drawn once with every threshold, in turns, and also with fewer steps and no cache,
which is the other way to save as much. Blocks: how many of the blocks ran, for each clip and step. Time: CPU
seconds of generate_many, the median over the batches of their ratio to the first row. RMSE: to the frames of
the first row, in RGB steps; the other scores are those of infer/score_story_world.py, from the text alone.
Ctrl-C prints the table of the stories that are done.
"""

import argparse
import multiprocessing
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import describe_machine
from tqdm import tqdm

from infer.score_story_world import HELD_OUT
from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT
from storyanchors.generator import StoryGenerator
from storyanchors.story_request import SamplerSettings, StoryRequest
from storyanchors.story_world import WorldStory, sample_story, score_stories, to_story

SCORES = ("pfa_f1", "subject_consistency", "shot_accuracy", "action_accuracy", "legal_rmse")
CONDITIONS = ClipConditions(fps=24, frame_interval=69)


@dataclass
class Row:
    """One way of sampling, and what came of it so far."""

    name: str
    settings: SamplerSettings
    seconds: list[float] = field(default_factory=list)  # of each batch
    tokens: int = 0  # through a block, summed over blocks
    frames: dict[int, list[Image.Image]] = field(default_factory=dict)  # by story


@dataclass
class Drawn:
    """One batch of stories in all ways."""

    numbers: list[int]
    frames: list[list[list[Image.Image]]]  # by row and story
    seconds: list[float]  # by row
    tokens: list[int]  # by row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("examples/story_world_model"))
    parser.add_argument("--num-stories", type=int, default=50)
    parser.add_argument("--num-steps", type=int, default=12)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.25])
    parser.add_argument("--fewer-steps", type=int, nargs="*", default=[8])
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    rows = [Row(f"{args.num_steps} steps", SamplerSettings(args.num_steps))]
    for threshold in args.thresholds:
        settings = SamplerSettings(args.num_steps, cache_threshold=threshold)
        rows.append(Row(f"{args.num_steps} steps, cache {threshold}", settings))
    rows += [Row(f"{steps} steps", SamplerSettings(steps)) for steps in args.fewer_steps]
    numbers = list(range(args.num_stories))
    batches = [numbers[start : start + args.batch] for start in range(0, len(numbers), args.batch)]
    draw = partial(draw_batch, args.weights, args.dtype, [row.settings for row in rows])
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        try:
            for drawn in tqdm(pool.imap_unordered(draw, batches), total=len(batches), unit="batch"):
                for row, frames, seconds, tokens in zip(
                    rows, drawn.frames, drawn.seconds, drawn.tokens, strict=True
                ):
                    row.frames |= dict(zip(drawn.numbers, frames, strict=True))
                    row.seconds.append(seconds)
                    row.tokens += tokens
        except KeyboardInterrupt:
            print("stopped")
    machine = describe_machine(torch.device("cpu"))
    print(f"{args.weights}, {len(rows[0].frames)} stories, {args.dtype}, {machine}")
    report(rows)


def draw_batch(weights: Path, dtype: str, settings: list[SamplerSettings], numbers: list[int]) -> Drawn:
    generator, drawn = load(weights, dtype), Drawn(numbers, [], [], [])
    requests = [StoryRequest(to_story(world_story(n)), conditions=CONDITIONS, seed=n) for n in numbers]
    for one in settings:
        with counted_tokens(generator.dit) as counts:
            start = time.process_time()
            drawn.frames.append(generator.generate_many(requests, settings=one, progress=False))
            drawn.seconds.append(time.process_time() - start)
        drawn.tokens.append(sum(counts))
    return drawn


@lru_cache(maxsize=1)
def load(weights: Path, dtype: str) -> StoryGenerator:
    torch.set_num_threads(1)
    return StoryGenerator.from_pretrained(weights, dtype=getattr(torch, dtype))


def world_story(number: int) -> WorldStory:
    return sample_story(HELD_OUT + number)


@contextmanager
def counted_tokens(dit: StoryDiT):
    """The tokens of every run of a block."""
    counts: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: counts.append(len(args[0]))) for block in dit.blocks
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def report(rows: list[Row]) -> None:
    titles = ("blocks", "time", "RMSE", *SCORES)
    widths = [max(8, len(title) + 2) for title in titles]
    print(" " * 22 + "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    first, numbers = rows[0], sorted(rows[0].frames)
    expected = [first.frames[number] for number in numbers]
    for row in rows:
        frames = [row.frames[number] for number in numbers]
        scores = score_stories(frames, [world_story(number) for number in numbers])
        time_ratio = np.median(np.divide(row.seconds, first.seconds))
        values = (row.tokens / first.tokens, time_ratio, rmse(frames, expected), *map(scores.get, SCORES))
        cells = (f"{value:>{width}.3f}" for value, width in zip(values, widths, strict=True))
        print(f"{row.name:<22}" + "".join(cells))


def rmse(frames: list[list[Image.Image]], others: list[list[Image.Image]]) -> float:
    """Root of the mean squared difference of all pixels of all frames, in RGB steps."""
    squares = [
        np.square(np.asarray(frame, float) - np.asarray(other, float)).mean()
        for shown, expected in zip(frames, others, strict=True)
        for frame, other in zip(shown, expected, strict=True)
    ]
    return float(np.sqrt(np.mean(squares)))


if __name__ == "__main__":
    main()
