"""The model folder: story_model.json, which says what the parts are, and a folder for each of them.

A part may be a reference to a folder elsewhere or to the Hub instead of a copy.
"""

import json
import logging
from pathlib import Path

import torch

from storyanchors.caption_encoder import load_caption_encoder
from storyanchors.codec import load_codec
from storyanchors.dit import StoryDiT
from storyanchors.lora import load_lora, merge_lora
from storyanchors.output_folder import output_folder
from storyanchors.weights import load_story_dit, read_json

log = logging.getLogger(__name__)

MODEL_FILE = "story_model.json"
SCHEMA_VERSION = 1
PARTS = ("transformer", "codec", "caption_encoder")


def save_story_model(folder: str | Path, dit: StoryDiT, codec, caption_encoder, *, info: dict) -> None:
    """Writes a model folder, whole or not at all: story_model.json and a folder for each of the three parts.

    info holds frame_size [height, width], num_steps, guidance_scale and shift, and what one wants to know
    later: preset, stage, provenance; max_frames, where it is there, is the most frames that the model draws
    well at once. A part that info names as {"reference": hub id or path} is not copied, and may be None.
    """
    parts = dict(zip(PARTS, (dit, codec, caption_encoder), strict=True))
    info = {"schema_version": SCHEMA_VERSION, **{name: name for name in parts}, **info}
    _check_info(info, "info")
    with output_folder(folder, made_with=MODEL_FILE) as temporary:
        for name, part in parts.items():
            if isinstance(info[name], str):
                part.save_pretrained(temporary / info[name])
        (temporary / MODEL_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    log.info("wrote %s", folder)


def read_story_model(folder: str | Path) -> dict:
    """The content of a model folder's story_model.json; ValueError or OSError where it is not one."""
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {MODEL_FILE}")
    info = read_json(path)
    _check_info(info, str(path))
    return info


def load_parts(
    folder: str | Path, info: dict, *, dtype: torch.dtype, lora: str | Path | None = None
) -> tuple:
    """(network, codec, caption encoder) of a model folder on the CPU, the adapter of save_lora merged.

    dtype is the network's and the caption encoder's, the codec stays float32. ValueError or OSError where a
    part or the adapter is missing or does not fit.
    """
    folder = Path(folder)
    dit = load_story_dit(_part(folder, info, "transformer"), dtype=dtype).eval()
    if lora is not None:
        load_lora(dit, lora)
        merge_lora(dit)
    codec = load_codec(_part(folder, info, "codec"), tiling=True).to("cpu", torch.float32)
    caption_encoder = load_caption_encoder(_part(folder, info, "caption_encoder")).to("cpu", dtype)
    _check_parts(dit, codec, caption_encoder, folder)
    return dit, codec, caption_encoder


def _check_info(info: dict, where: str) -> None:
    if info.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{where}: schema_version {info.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    needed = [*PARTS, "frame_size", "num_steps", "guidance_scale", "shift"]
    if missing := [name for name in needed if name not in info]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; found {', '.join(info)}")
    size = info["frame_size"]
    if not (
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)
    ):
        raise ValueError(f"{where}: frame_size is {size!r}, expected [height, width] in pixels")
    for name in PARTS:
        part = info[name]
        if not isinstance(part.get("reference") if isinstance(part, dict) else part, str):
            raise ValueError(f"{where}: {name} is {part!r}, expected a folder or {{'reference': ...}}")
    for name, kind in (("num_steps", int), ("guidance_scale", int | float), ("shift", int | float)):
        if not isinstance(info[name], kind):
            raise ValueError(f"{where}: {name} is {info[name]!r}, expected a number")
    most = info.get("max_frames")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 3):
        raise ValueError(f"{where}: max_frames is {most!r}, expected at least 3 frames")


def _part(folder: Path, info: dict, name: str) -> str:
    part = info[name]
    if isinstance(part, dict):
        return part["reference"]
    if not (folder / part).is_dir():
        raise FileNotFoundError(
            f"{folder / MODEL_FILE} names {name} {part!r}, but {folder / part} does not exist"
        )
    return str(folder / part)


def _check_parts(dit: StoryDiT, codec, caption_encoder, folder: Path) -> None:
    for name, part, expected in (
        ("latent_channels", codec.latent_channels, dit.config.latent_channels),
        ("text_dim", caption_encoder.text_dim, dit.config.text_dim),
        ("clip_text_dim", caption_encoder.clip_text_dim, dit.config.clip_text_dim),
    ):
        if part != expected:
            raise ValueError(
                f"{folder}: parts of different models, {name} {part} for a network of {expected}"
            )
