"""Writes a checkpoint of a run, by default its newest: a model folder for infer/, or for others.

python train/export_weights.py run_dir=runs/s3 out=models/story-world dtype=bfloat16
python train/export_weights.py run_dir=runs/lora out=models/adapter format=lora
python train/export_weights.py run_dir=runs/wan out=models/for-diffusers format=diffusers-wan verify=true
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from conf.command import run
from storyanchors.codec import PcaCodec
from storyanchors.diffusers_export import STORY_PARTS, save_diffusers_wan, verify_diffusers_wan
from storyanchors.dit import StoryDiT
from storyanchors.lora import LORA_FILE, has_lora, merge_lora, save_lora
from storyanchors.model_folder import MODEL_FILE, save_story_model
from storyanchors.output_folder import check_output_folder, output_folder
from train.parts import CODEC, WORDS, ModelConfig, open_caption_encoder, open_codec
from train.run_folder import read_network, read_provenance, read_settings, stage_history
from train.saving.checkpoints import Checkpoint, checkpoint_to_take

MADE_WITH = {"story-model": MODEL_FILE, "lora": LORA_FILE, "diffusers-wan": STORY_PARTS}  # by format
PROVENANCE = "provenance.json"  # of the formats that have no file of their own for it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ExportWeightsConfig:
    run_dir: str = MISSING
    out: str = MISSING  # the folder to write
    # story-model: all parts, a LoRA merged | lora: the LoRA alone | diffusers-wan: WanTransformer3DModel's
    format: str = "story-model"
    verify: bool = False  # diffusers-wan: compare one forward of stock diffusers with ours
    which: str = "ema"  # ema | model
    step: int | None = None  # of the checkpoint; None = the newest, which must be sound
    dtype: str = "float32"  # float32 | bfloat16
    num_steps: int | None = None  # what the model folder recommends; None = the run's samples.num_steps
    guidance_scale: float | None = None
    shift: float | None = None  # None = the shift it was trained with
    max_frames: int | None = None  # drawn at once; longer stories go by windows. None = any number

    def __post_init__(self):
        known = {"which": ("ema", "model"), "dtype": tuple(DTYPES), "format": tuple(MADE_WITH)}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(words)}")
        if self.verify and self.format != "diffusers-wan":
            raise ValueError(
                f"verify compares format=diffusers-wan with diffusers, found format={self.format}"
            )


def main(config: ExportWeightsConfig) -> None:
    run_dir = Path(config.run_dir)
    check_output_folder(config.out, made_with=MADE_WITH[config.format])
    settings = read_settings(run_dir)
    name = None if config.step is None else f"step_{config.step:08d}"
    checkpoint = checkpoint_to_take(run_dir, config.which, name=name, option="step={step}")
    try:
        model = ModelConfig(**settings["model"])
    except TypeError as error:
        raise ValueError(f"{run_dir} was trained by another version of storyanchors: {error}") from error
    dit = read_network(run_dir, checkpoint, config.which)
    if config.format == "lora" and not has_lora(dit):
        raise ValueError(f"{run_dir} trained the whole network, format=lora needs a run with model.lora.rank")
    if config.format != "lora" and has_lora(dit):
        merge_lora(dit)
    dit.cast(DTYPES[config.dtype])
    about = describe(run_dir, checkpoint, config.which)
    if config.format == "story-model":
        write_story_model(config, dit, model, settings["samples"], about)
    else:
        with output_folder(config.out, made_with=MADE_WITH[config.format]) as folder:
            (save_lora if config.format == "lora" else save_diffusers_wan)(dit, folder)
            (folder / PROVENANCE).write_text(json.dumps(about, indent=2) + "\n")
    print(f"{config.out}: {config.which} weights of {checkpoint.folder} in {config.dtype}")
    if config.verify:
        difference, largest = verify_diffusers_wan(dit, config.out)
        print(
            f"stock diffusers differs by {difference:.2e} at most, where the velocity reaches {largest:.2e}"
        )


def describe(run_dir: Path, checkpoint: Checkpoint, which: str) -> dict:
    """What one wants to know of exported weights later."""
    provenance, state = read_provenance(run_dir), checkpoint.state
    base = provenance.get("base")
    return {
        "stage": state.stage,
        "preset": state.preset,
        "frame_size": provenance["frame_size"],
        "provenance": {
            "tool_version": provenance["tool_version"],
            "which": which,
            "sha256": checkpoint.sha256(which),
            "history": stage_history(run_dir, state.step),
            **({"base": base} if base else {}),
        },
    }


def write_story_model(
    config: ExportWeightsConfig, dit: StoryDiT, model: ModelConfig, samples: dict, about: dict
) -> None:
    """The model folder: the network with its codec and caption encoder, or references to them."""
    info = {
        **about,
        "num_steps": config.num_steps or samples["num_steps"],
        "guidance_scale": samples["guidance_scale"]
        if config.guidance_scale is None
        else config.guidance_scale,
        "shift": config.shift or model.sigma_shift,
        **({"max_frames": config.max_frames} if config.max_frames else {}),
    }
    codec = open_codec(model, Path(config.run_dir) / CODEC)
    if not isinstance(codec, PcaCodec):
        info["codec"] = {"reference": model.codec}
    caption_encoder = None  # referenced, not copied: a published one need not even be here
    if model.caption_encoder == WORDS:
        caption_encoder = open_caption_encoder(model)
    else:
        info["caption_encoder"] = {"reference": model.caption_encoder}
    save_story_model(config.out, dit, codec, caption_encoder, info=info)


if __name__ == "__main__":
    run(main, ExportWeightsConfig, "export_weights")
