"""What the commands of this folder share: settings, loading a model, drawing an edit, telling of it."""

import hashlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from conf.command import Stopped
from infer.frame_folder import as_png, read_given
from infer.project.drawing import DrawSettings, run_edit
from infer.project.history import Version
from infer.project.unfinished import UNFINISHED
from infer.project.views import SHEET
from infer.project.whole_files import write_whole
from infer.story_project import RESTORE, StoryProject, is_project
from storyanchors.conditioning import ClipConditions
from storyanchors.contact_sheet import draw_comparison
from storyanchors.generator import SamplingStopped, StoryGenerator
from storyanchors.story_edit import StoryEdit
from storyanchors.story_request import NEGATIVE_STORY_PROMPT, SamplerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREVIEW_S = 1.0  # at most one preview in this time


@dataclass
class ModelConfig:
    """Which model to load, and how to sample it; null is the model's own setting."""

    weights: str = MISSING  # a model folder of train/export_weights.py
    lora: str | None = None  # an adapter to merge into it: its file or folder
    num_steps: int | None = None
    guidance_scale: float | None = None  # 1 = no guidance, half the work
    shift: float | None = None  # of the noise levels; higher = more steps at high noise
    sampler: str = "euler"  # or unipc
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # sigmas where guidance acts
    negative_prompt: str = ""  # what guidance leads away from; "story" = a text made for story frames
    cache_threshold: float = 0.0  # of the first-block cache, e.g. 0.1; 0 = off
    fps: float | None = None  # what the network is told of the clip; null = unknown
    frame_interval: int | None = None  # source frames between two story frames: 69 or 139 in the paper
    motion: float | None = None
    device: str | None = None  # null = cuda where there is one, else cpu
    dtype: str = "float32"  # or bfloat16
    memory: str = "resident"  # or offload: parts are on the device only while they work


@dataclass
class DrawConfig(ModelConfig):
    """How to draw a story."""

    seed: int = 0
    height: int | None = None  # pixels
    width: int | None = None
    window: int | None = None  # frames drawn at once; null = what the model was trained for
    overlap: int | None = None  # frames that a window shares with what is there; null = half a window
    preview: str | None = None  # a .png that shows the frames while they are drawn


def pick_device(config: ModelConfig) -> tuple[str, torch.dtype]:
    """Where to compute and with what numbers; ValueError for an unknown device or dtype."""
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}, expected one of {', '.join(DTYPES)}")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device, DTYPES[config.dtype]


def load_generator(config: ModelConfig) -> StoryGenerator:
    """The model on its device; ValueError or OSError where there is none, or it does not fit."""
    device, dtype = pick_device(config)
    return StoryGenerator.from_pretrained(
        config.weights, device=device, dtype=dtype, lora=config.lora, memory=config.memory
    )


def sampler_settings(config: ModelConfig) -> SamplerSettings:
    """How to sample, as the configuration says; ValueError for what makes no sense."""
    negative = NEGATIVE_STORY_PROMPT if config.negative_prompt == "story" else config.negative_prompt
    return SamplerSettings(
        config.num_steps,
        config.guidance_scale,
        config.shift,
        config.sampler,
        tuple(config.guidance_interval),
        negative,
        config.cache_threshold,
    )


def describe_model(config: ModelConfig, generator: StoryGenerator) -> dict:
    """Which model draws, on what: for a project's history."""
    lora = (
        {} if config.lora is None else {"lora": config.lora, "lora_sha256": hash_weights(Path(config.lora))}
    )
    return {
        "weights": config.weights,
        "weights_sha256": hash_weights(Path(config.weights)),
        **lora,
        "device": str(generator.device),
        "dtype": config.dtype,
        "versions": {package: version(package) for package in ("storyanchors", "torch", "diffusers")},
    }


def hash_weights(path: Path) -> dict[str, str]:
    """SHA-256 by file name of the network's weights in a model folder, or of an adapter, folder or file."""
    hashes, network = {}, path / "transformer"
    path = network if network.is_dir() else path
    for file_path in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file_path.open("rb") as file:
            hashes[file_path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def draw_edit(
    config: DrawConfig,
    project: StoryProject | Path,
    edit: StoryEdit,
    *,
    given: Mapping[int, Path] | None = None,
    out: Path | None = None,
) -> None:
    """What a command does with an edit: loads the model, draws with a progress bar, says what was done."""
    if config.seed < 0:
        raise ValueError(f"seed must not be below 0, found {config.seed}")
    history = [] if isinstance(project, Path) else project.history
    num_before = 0 if out else len(history)
    again = num_before > 0 and _is_done_again(project, edit, config.seed)
    if len(edit.kept) == edit.story.num_frames:  # e.g. a deletion: needs no model
        project = run_edit(None, project, edit, DrawSettings(), out=out)
        if len(project.history) == num_before:
            return print(f"{project.folder}: nothing changes, it stays as version {project.version}")
        return say_what_was_done(project, num_before, again)
    sampler, conditions = sampler_settings(config), _conditions(config, history)
    if num_before:
        project.check_locks(edit)
    read_given(given or {})
    if config.preview and Path(config.preview).suffix.lower() != ".png":
        raise ValueError(f"preview={config.preview} must be the name of a .png file")
    generator = load_generator(config)
    settings = DrawSettings(
        sampler,
        conditions,
        config.height,
        config.width,
        config.window,
        config.overlap,
        describe_model(config, generator),
    )
    preview = _preview(Path(config.preview), generator) if config.preview else None
    home = out or (project if isinstance(project, Path) else project.folder)
    stop_on_sigterm()
    try:
        project = run_edit(
            generator, project, edit, settings, seed=config.seed, given=given, out=out, callback=preview
        )
    except (KeyboardInterrupt, SamplingStopped) as stopped:
        raise Stopped(_what_is_kept(home, num_before)) from stopped
    say_what_was_done(project, num_before, again)


def _what_is_kept(home: Path, num_before: int) -> str:
    """By a command that was stopped; its version may be there already, but not shown yet."""
    if is_project(home) and len(StoryProject(home).history) > num_before:
        return f"the new version of {home} is finished and kept"
    if (home / UNFINISHED).is_dir():
        return f"finished windows are kept in {home / UNFINISHED}, the same command goes on"
    return "nothing was finished, the same command begins again"


def _is_done_again(project: StoryProject, edit: StoryEdit, seed: int) -> bool:
    """Whether the present version came from this very operation, so that e.g. a story is extended twice."""
    seed = seed if edit.drawn() else None
    is_same = (project.present.what, project.present.seed) == (edit.what, seed)
    return is_same and edit.story.num_frames != project.num_frames


def stop_on_sigterm() -> None:
    """From now on SIGTERM stops a command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def say_what_was_done(project: StoryProject, num_before: int, again: bool = False) -> None:
    """Prints what the present version is, where to look, and what one may want to do next.

    again: the version before it came from the very same operation.
    """
    present, folder = project.present, project.folder
    undo = f"{RESTORE} project={folder} --undo"
    if len(project.history) == num_before:
        print(
            f"{folder}: version {present.number} was drawn by this very command; another seed= draws another"
        )
    else:
        print(f"{folder}: version {present.number}, {present.what}")
        if again:
            print(f"version {present.parent} did the same, so it is done twice now; {undo} takes it back")
    num_drawn, num_kept = len(present.drawn), len(present.kept) + len(present.given)
    print(f"{num_drawn} frame{'s' * (num_drawn != 1)} drawn, {num_kept} kept: {folder / SHEET}")
    hints = [undo if present.parent else f"{RESTORE} project={folder}"]
    if present.drawn:
        seed = (present.seed or 0) + 1
        infill = f"infill={present.drawn[-1]} seed={seed}"
        hints.insert(0, f"python infer/continue_story.py project={folder} {infill}")
    print("next: " + "\n      ".join(hints))


def last_recorded(history: Sequence[Version], name: str, otherwise: object) -> Any:
    """What the history says, in the last version that says it, of what drew it."""
    return next((version.record[name] for version in reversed(history) if name in version.record), otherwise)


def _conditions(config: ModelConfig, history: Sequence[Version]) -> ClipConditions:
    """What the configuration says of the clip; what it leaves open is as the project was drawn last."""
    last = last_recorded(history, "conditions", {})
    names = ("fps", "frame_interval", "motion")
    return ClipConditions(
        *(last.get(name) if getattr(config, name) is None else getattr(config, name) for name in names)
    )


def _preview(path: Path, generator: StoryGenerator) -> Callable:
    """A callback of the sampler that draws a page of the present guess, rewritten as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = -PREVIEW_S

    def show(step: int, latents: list[Tensor]) -> None:
        nonlocal last
        if time.monotonic() - last >= PREVIEW_S:
            frames = generator.preview(latents[0])
            write_whole(path, as_png(draw_comparison([(f"step {step}", frames)])))
            last = time.monotonic()

    return show
