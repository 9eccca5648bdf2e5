"""What the commands of this folder share: their settings, loading a model, a folder of a story's frames."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import MISSING
from PIL import Image

from storyanchors.clip import MAX_FRAME_PIXELS
from storyanchors.conditioning import ClipConditions
from storyanchors.contact_sheet import draw_contact_sheet
from storyanchors.generator import StoryGenerator
from storyanchors.output_folder import check_output_folder, output_folder
from storyanchors.story import Story

RUN_FILE = "run.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelConfig:
    """Which model to load, and how to sample it; None is the model's own setting."""

    weights: str = MISSING
    num_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    sampler: str = "euler"
    fps: float | None = None  # what the network is told about the clip; None = unknown
    frame_interval: int | None = None
    motion: float | None = None
    device: str | None = None  # None = cuda where there is one, else cpu
    dtype: str = "float32"


@dataclass
class StoryRunConfig(ModelConfig):
    """A story to draw and where to; sizes that are None are the story's and the model's."""

    story: str = MISSING
    out: str = MISSING
    seed: int = 0
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None


def load_generator(config: ModelConfig) -> StoryGenerator:
    """The model on its device; ValueError for an unknown device or dtype."""
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {config.dtype!r}, expected one of {', '.join(DTYPES)}")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    return StoryGenerator.from_pretrained(config.weights, device=device, dtype=DTYPES[config.dtype])


def draw_story(config: StoryRunConfig, command: str, given: Mapping[int, Path]) -> None:
    """Generates the frames that are not given; writes them all, a contact sheet, the story and run.json."""
    out = Path(config.out)
    check_output_folder(out, made_with=RUN_FILE)
    story = Story.from_file(config.story)
    given_frames = {number: read_frame(path) for number, path in given.items()}
    generator = load_generator(config)
    conditions = ClipConditions(config.fps, config.frame_interval, config.motion)
    settings = {
        "num_frames": story.num_frames if config.num_frames is None else config.num_frames,
        "height": generator.frame_size[0] if config.height is None else config.height,
        "width": generator.frame_size[1] if config.width is None else config.width,
        "num_steps": generator.num_steps if config.num_steps is None else config.num_steps,
        "guidance_scale": generator.guidance_scale
        if config.guidance_scale is None
        else config.guidance_scale,
        "shift": generator.shift if config.shift is None else config.shift,
        "sampler": config.sampler,
        "seed": config.seed,
    }
    frames = generator.generate(story, given=given_frames, conditions=conditions, **settings)
    record = {
        "command": command,
        **settings,
        "conditions": asdict(conditions),
        "given": {str(number): str(path) for number, path in sorted(given.items())},
        "weights": config.weights,
        "weights_sha256": hash_weights(Path(config.weights)),
        "device": str(generator.device),
        "dtype": config.dtype,
        "versions": {package: version(package) for package in ("storyanchors", "torch", "diffusers")},
    }
    with output_folder(out, made_with=RUN_FILE) as folder:
        for number, frame in enumerate(frames, start=1):
            write_frame(folder / f"{number:03d}.png", frame, given.get(number))
        draw_contact_sheet(frames, story, given=set(given)).save(folder / "contact_sheet.png")
        story.to_file(folder / "story.yaml")
        (folder / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{len(frames) - len(given)} generated and {len(given)} given frames: {out / 'contact_sheet.png'}")


def find_frames(folder: Path) -> dict[int, Path]:
    """Numbered images of a folder: 001.png, 2.jpg, ... ValueError for none, and for two of one number."""
    if not folder.is_dir():
        raise NotADirectoryError(f"frames={folder} is not a folder")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.stem.isdecimal() and path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            if (number := int(path.stem)) in found:
                raise ValueError(f"{folder} has frame {number} twice: {found[number].name} and {path.name}")
            found[number] = path
    if not found:
        raise ValueError(f"{folder} has no numbered frames, expected 001.png, 002.png, ... or .jpg")
    return found


def read_frame(path: Path) -> Image.Image:
    """The decoded image; ValueError, naming the file, for one that is broken or too large."""
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            if image.width * image.height > MAX_FRAME_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, at most {MAX_FRAME_PIXELS} are read"
                )
            image.load()
            return image
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError: broken PNG
        raise ValueError(f"cannot read the frame {path}: {error}") from error


def write_frame(path: Path, frame: Image.Image, source: Path | None) -> None:
    """A frame as PNG; one that was given as PNG stays the same file, byte for byte."""
    if source and source.suffix.lower() == ".png":
        shutil.copyfile(source, path)
    else:
        frame.save(path)


def hash_weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the network's weights."""
    hashes = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
