"""Films against the truth: gaps of held-out story-world stories, filled from their two anchors alone.

    python benchmarks/film.py --weights examples/story_world_model --out benchmarks/results/film.json

The world's dense mode says what happens between two story frames: subjects move and come back; where the
next frame shows another event, the film cuts at its last step. For each gap and way to fill it: how far the
subjects are from where they should be (RMSE of their centroids in pixels, of 64), the share of frames that
show them at all, and the RMSE of the frames in RGB steps. A subject that is not seen counts where it was
seen last. hold repeats the first anchor; blend is what has to be beaten. Gaps that are in --out, drawn by the
same weights in the same dtype, are not drawn again. --picture shows the first gap of each kind.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from infer.film import strides
from infer.film.blend import blend_gap
from infer.film.gap import Gap, gaps_between
from infer.project.whole_files import write_whole
from infer.score_story_world import HELD_OUT
from infer.story_run import hash_weights
from storyanchors.conditioning import ClipConditions
from storyanchors.contact_sheet import draw_comparison
from storyanchors.generator import StoryGenerator
from storyanchors.story_world import WorldStory, render_frame, sample_story, to_story
from storyanchors.story_world.dense import FPS, FRAME_INTERVAL, dense_frame
from storyanchors.story_world.renderer import background, subject_columns
from storyanchors.story_world.world import COLOURS

KINDS = ("within an event", "across a cut")
FROM_SHARE, TO_SHARE = (
    0.25,
    0.75,
)  # of the subject's colour in a pixel: below it is noise, above it is the subject
MAX_RESIDUAL = 48  # RGB steps that a pixel may be off the line from the scene's colour to the subject's
MIN_SEEN = 0.5  # a subject is seen where this share of its true pixels is found
COLUMNS = 8

Pixels = np.ndarray  # (H, W, 3)
Fill = Callable[[Gap, int], list[Image.Image]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True)
    parser.add_argument("--num-gaps", type=int, default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    generator = StoryGenerator.from_pretrained(
        arguments.weights, device=arguments.device, dtype=getattr(torch, arguments.dtype)
    )
    fills: dict[str, Fill] = {
        "hold": lambda gap, frame_interval: [gap.first] * frame_interval,
        "blend in linear light": blend_in_linear_light,
        "blend": blend_gap,
        "story": partial(_draw_one, generator),
    }
    made_from = {"weights_sha256": hash_weights(Path(arguments.weights)), "dtype": arguments.dtype}
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results = record["gaps"] if record.get("made_from") == made_from else {}
    for index in tqdm(range(arguments.num_gaps), unit="gap"):
        if str(index) not in results:
            results[str(index)] = measure_gap(*held_out_gap(index), fills)
            record = json.dumps({"made_from": made_from, "gaps": results}, indent=1)
            write_whole(arguments.out, f"{record}\n".encode())
    print(f"{arguments.num_gaps} gaps of {FRAME_INTERVAL} frames, {arguments.weights}, {arguments.dtype}")
    print(format_results(list(results.values())[: arguments.num_gaps], list(fills)))
    if arguments.picture:
        draw_picture(results, fills).save(arguments.picture)


def held_out_gap(index: int) -> tuple[WorldStory, int]:
    """A story that no model was trained on, and the number of the story frame before one of its gaps."""
    story = sample_story(HELD_OUT + index)
    return story, int(np.random.default_rng(index).integers(1, story.num_frames))


def measure_gap(story: WorldStory, number: int, fills: dict[str, Fill]) -> dict:
    """Squared errors, summed, for each way to fill the gap behind story frame `number`."""
    gap, truth = gap_of(story, number), true_frames(story, number)
    is_cut = story.frames[number - 1] != story.frames[number]
    return {"kind": KINDS[is_cut]} | {
        name: measure(
            [np.asarray(frame, np.float64) for frame in fill(gap, FRAME_INTERVAL)], truth, story, number
        )
        for name, fill in fills.items()
    }


def measure(frames: list[Pixels], truth: list[Pixels], story: WorldStory, number: int) -> dict[str, float]:
    """Mean squared errors of positions (pixels) and of frames (RGB steps), and the share of subjects seen."""
    positions, seen = [], []
    for member, _ in story.frames[number - 1].actions:
        find = partial(find_subject, story=story, number=number, member=member)
        last, _ = find(render_frame(story, number).astype(np.float64))
        for frame, true in zip(frames, truth, strict=True):
            (expected, expected_area), (found, area) = find(true), find(frame)
            seen.append(area >= MIN_SEEN * expected_area)
            last = found if seen[-1] else last
            positions.append(float(np.square(last - expected).sum()))
    error = np.square(np.stack(frames) - np.stack(truth)).mean()
    return {"position": float(np.mean(positions)), "seen": float(np.mean(seen)), "frame": float(error)}


def find_subject(pixels: Pixels, *, story: WorldStory, number: int, member: int) -> tuple[np.ndarray, float]:
    """(x, y) of the centre of a subject's body and its area, in pixels; shares of its colour are the weights.

    The scene is known, so an edge pixel that is half body and half scene counts half, and noise not at all.
    Of two subjects each is looked for on its own side, for a blurred yellow one has orange edges.
    """
    facts = story.frames[number - 1]
    scene = background(facts.scene, facts.zoom).astype(np.float64)
    direction = np.array(COLOURS[story.cast[member].colour]) - scene
    shares = np.clip(((pixels - scene) * direction).sum(-1) / np.square(direction).sum(-1), 0, 1)
    residuals = np.sqrt(np.square(pixels - scene - shares[..., None] * direction).sum(-1))
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    columns = subject_columns(facts.zoom, facts.pan, len(facts.actions))
    place = [index for index, _ in facts.actions].index(member)
    is_own = np.abs(x - columns[place]) <= np.min([np.abs(x - column) for column in columns], axis=0)
    weights = np.clip((shares - FROM_SHARE) / (TO_SHARE - FROM_SHARE), 0, 1)
    weights = weights * is_own * (residuals <= MAX_RESIDUAL)
    area = float(weights.sum())
    return np.array([(weights * axis).sum() for axis in (x, y)]) / max(area, 1e-9), area


def true_frames(story: WorldStory, number: int) -> list[Pixels]:
    return [
        dense_frame(story, number, position).astype(np.float64) for position in range(1, FRAME_INTERVAL + 1)
    ]


def gap_of(story: WorldStory, number: int) -> Gap:
    anchors = [Image.fromarray(render_frame(story, n)) for n in range(1, story.num_frames + 1)]
    return gaps_between(anchors, to_story(story))[number - 1]


def blend_in_linear_light(gap: Gap, frame_interval: int) -> list[Image.Image]:
    """What blend_gap does not do: shares of light instead of shares of sRGB values."""
    first, last = (_to_light(np.asarray(anchor) / 255) for anchor in (gap.first, gap.last))
    shares = np.arange(1, frame_interval + 1) / (frame_interval + 1)
    frames = (_to_srgb(first + share * (last - first)) for share in shares)
    return [Image.fromarray(np.rint(255 * frame).astype(np.uint8)) for frame in frames]


def _to_light(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _to_srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _draw_one(generator: StoryGenerator, gap: Gap, frame_interval: int) -> list[Image.Image]:
    return strides.draw_gaps(generator, [gap], frame_interval, conditions=ClipConditions(FPS))[0]


def format_results(results: list[dict], names: list[str]) -> str:
    """A table of root mean squares, for gaps of each kind."""
    lines = []
    for kind in KINDS:
        gaps = [result for result in results if result["kind"] == kind]
        lines += ["", f"{kind} ({len(gaps)} gaps)"]
        lines.append(f"{'':24}{'position px':>13}{'seen':>8}{'frame RMSE':>13}")
        for name in names if gaps else ():
            means = {key: np.mean([gap[name][key] for gap in gaps]) for key in ("position", "seen", "frame")}
            position, frame = np.sqrt(means["position"]), np.sqrt(means["frame"])
            lines.append(f"{name:24}{position:13.3f}{means['seen']:8.3f}{frame:13.2f}")
    return "\n".join(lines)


def draw_picture(results: dict[str, dict], fills: dict[str, Fill]) -> Image.Image:
    """The first gap of each kind: the truth, the blend and the model's frames."""
    rows = []
    for kind in KINDS:
        index = next(int(index) for index, result in results.items() if result["kind"] == kind)
        gap, truth = gap_of(*held_out_gap(index)), true_frames(*held_out_gap(index))
        shown = {"truth": [Image.fromarray(frame.astype(np.uint8)) for frame in truth]}
        shown |= {name: fills[name](gap, FRAME_INTERVAL) for name in ("blend", "story")}
        for name, frames in shown.items():
            between = [frames[round(step * FRAME_INTERVAL / (COLUMNS - 1))] for step in range(1, COLUMNS - 1)]
            rows.append((f"{kind}: {name}", [gap.first, *between, gap.last]))
    return draw_comparison(rows)


if __name__ == "__main__":
    main()
