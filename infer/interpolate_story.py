"""Makes a film of a story: fills what lies between its frames, and writes an mp4 with the events as chapters.

python infer/interpolate_story.py frames=FOLDER story=STORY.yaml out=film.mp4 interpolator=blend
python infer/interpolate_story.py project=PROJECT out=film.mp4 interpolator=story weights=MODEL

n story frames, frame_interval film frames between two: (n - 1) (frame_interval + 1) + 1 film frames.
interpolator is blend (a dissolve), story (the network that draws stories fills them in as well), wan_flf or
wan_i2v (a Wan video model between two frames, or from one; weights is then a diffusers folder or a hub id).
film.parts/ has every film frame as PNG, the story's own untouched, and a filmstrip. Stopped, or started again
after an edit, the command draws only the gaps that are missing.
"""

from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from omegaconf import MISSING
from PIL import Image

from conf.command import Stopped, run
from infer.film import strides
from infer.film.blend import blend_gap
from infer.film.gap import DrawGap, Gap
from infer.frame_folder import find_frames
from infer.story_project import StoryProject
from infer.story_run import (
    ModelConfig,
    hash_weights,
    load_generator,
    pick_device,
    sampler_settings,
    stop_on_sigterm,
)
from storyanchors.conditioning import ClipConditions
from storyanchors.generator import SamplingStopped
from storyanchors.model_folder import read_story_model
from storyanchors.story import Story

INTERPOLATORS = ("blend", "story", "wan_flf", "wan_i2v")
STORY_MODEL_ONLY = ("lora", "sampler", "guidance_interval", "cache_threshold", "motion")


@dataclass
class InterpolateStoryConfig(ModelConfig):
    project: str | None = None  # a story project; or, instead of it, frames and story
    frames: str | None = None  # a folder with 001.png, 002.png, ...
    story: str | None = None  # their story file
    out: str = MISSING  # a NAME.mp4; NAME.parts/ beside it keeps every film frame
    interpolator: str = MISSING  # blend, story, wan_flf or wan_i2v
    weights: str | None = None  # of story: a model folder; of wan_*: a diffusers folder or a hub id
    frame_interval: int = MISSING  # film frames between two story frames
    fps: float = MISSING  # of the film, and what the network is told
    seed: int = 0


def main(config: InterpolateStoryConfig) -> None:
    if find_spec("av") is None:
        raise ValueError("an mp4 is written with PyAV, which is not installed: pip install -e '.[video]'")
    from infer.film.film import make_film  # here: it imports PyAV

    draw, settings = choose_model(config)
    story, anchors = find_story(config)
    stop_on_sigterm()
    try:
        parts_folder = make_film(
            anchors,
            story,
            Path(config.out),
            draw=draw,
            settings={"interpolator": config.interpolator, **settings},
            frame_interval=config.frame_interval,
            fps=config.fps,
        )
    except (KeyboardInterrupt, SamplingStopped) as stopped:
        raise Stopped("the gaps that are drawn are kept, the same command goes on") from stopped
    print(f"{config.out}; its frames and a filmstrip are in {parts_folder}")


def find_story(config: InterpolateStoryConfig) -> tuple[Story, list[Path]]:
    """The story and the files of its frames in order."""
    given = tuple(name for name in ("project", "frames", "story") if getattr(config, name) is not None)
    if given == ("project",):
        project = StoryProject.open(config.project)
        return project.story, [path for _, path in sorted(project.frame_paths().items())]
    if given != ("frames", "story"):
        raise ValueError(
            f"expected project=... or frames=... and story=..., found {' and '.join(given) or 'neither'}"
        )
    found = find_frames(Path(config.frames))
    if missing := sorted(set(range(1, max(found) + 1)) - set(found)):
        raise ValueError(f"{config.frames} has the frames {sorted(found)}, but not {missing}")
    return Story.from_file(config.story), [found[number] for number in sorted(found)]


def choose_model(config: InterpolateStoryConfig) -> tuple[DrawGap, dict]:
    """What draws a gap, and the settings that decide its pixels. Weights are read when the first is drawn."""
    if config.interpolator not in INTERPOLATORS:
        raise ValueError(
            f"unknown interpolator {config.interpolator!r}, expected one of {', '.join(INTERPOLATORS)}"
        )
    if config.interpolator == "blend":
        return blend_gap, {}
    if config.weights is None:
        raise ValueError(f"interpolator={config.interpolator} needs weights=...")
    if config.seed < 0:
        raise ValueError(f"seed must not be below 0, found {config.seed}")
    return _story_model(config) if config.interpolator == "story" else _wan_model(config)


def _story_model(config: InterpolateStoryConfig) -> tuple[DrawGap, dict]:
    sampler, folder = sampler_settings(config), Path(config.weights)
    files = [folder, *([Path(config.lora)] if config.lora else [])]
    facts = {"weights": [read_story_model(folder), *map(hash_weights, files)], "dtype": config.dtype}
    conditions = ClipConditions(config.fps, motion=config.motion)
    generator = cache(lambda: load_generator(config))

    def draw(gap: Gap, frame_interval: int) -> list[Image.Image]:
        arguments = dict(conditions=conditions, settings=sampler, seed=config.seed, progress=True)
        return strides.draw_gaps(generator(), [gap], frame_interval, **arguments)[0]

    return draw, {**facts, "seed": config.seed, **asdict(conditions), **asdict(sampler)}


def _wan_model(config: InterpolateStoryConfig) -> tuple[DrawGap, dict]:
    for name in STORY_MODEL_ONLY:
        if getattr(config, name) != getattr(ModelConfig(), name):
            raise ValueError(f"{name} is a setting of interpolator=story, not of {config.interpolator}")
    from infer.film import wan  # here: diffusers' pipelines take seconds to import

    sampler, with_last = sampler_settings(config), config.interpolator == "wan_flf"
    settings = {name: getattr(sampler, name) for name in ("num_steps", "guidance_scale", "negative_prompt")}
    settings |= {"with_last": with_last, "seed": config.seed}
    device, dtype = pick_device(config)
    wan.check_wan(config.weights, with_last=with_last)
    pipeline = cache(
        lambda: wan.load_wan(
            config.weights, device=device, dtype=dtype, shift=config.shift, offload=config.memory == "offload"
        )
    )

    def draw(gap: Gap, frame_interval: int) -> list[Image.Image]:
        return wan.draw_gap(pipeline(), gap, frame_interval, **settings)

    facts = {"weights": [config.weights, wan.weight_files(config.weights)], "dtype": config.dtype}
    return draw, {**facts, **settings, "shift": config.shift}


if __name__ == "__main__":
    run(main, InterpolateStoryConfig, "interpolate_story")
