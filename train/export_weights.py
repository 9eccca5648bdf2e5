"""Writes the newest checkpoint of a run as a model folder, which infer/ and init_from= read.

python train/export_weights.py run_dir=runs/s3 out=models/story-world dtype=bfloat16
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from conf.command import run
from storyanchors.dit import StoryDiT
from storyanchors.generator import MODEL_FILE, save_story_model
from storyanchors.output_folder import check_output_folder
from train.checkpoints import newest_checkpoint
from train.parts import CODEC, FITTED_CODEC, WORDS, ModelConfig, open_caption_encoder, open_codec
from train.run_folder import read_provenance, read_settings, stage_history

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ExportWeightsConfig:
    run_dir: str = MISSING
    out: str = MISSING  # the model folder to write
    which: str = "ema"  # ema | model
    dtype: str = "float32"  # float32 | bfloat16
    num_steps: int | None = None  # what the model folder recommends; None = the run's samples.num_steps
    guidance_scale: float | None = None

    def __post_init__(self):
        for name, known in (("which", ("ema", "model")), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in (*known, MISSING):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(known)}")


def main(config: ExportWeightsConfig) -> None:
    run_dir = Path(config.run_dir)
    check_output_folder(config.out, made_with=MODEL_FILE)
    settings, provenance = read_settings(run_dir), read_provenance(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(f"{run_dir} has no complete checkpoint under checkpoints/")

    dit = StoryDiT.from_config(checkpoint.dit_config)
    dit.load_state_dict(checkpoint.weights(config.which))
    cast(dit, DTYPES[config.dtype])
    try:
        model, samples = ModelConfig(**settings["model"]), settings["samples"]
    except TypeError as error:
        raise ValueError(f"{run_dir} was trained by another version of storyanchors: {error}") from error
    state = checkpoint.state
    info = {
        "stage": state.stage,
        "preset": state.preset,
        "frame_size": provenance["frame_size"],
        "num_steps": config.num_steps or samples["num_steps"],
        "guidance_scale": samples["guidance_scale"]
        if config.guidance_scale is None
        else config.guidance_scale,
        "shift": model.sigma_shift,
        "provenance": {
            "tool_version": provenance["tool_version"],
            "which": config.which,
            "sha256": checkpoint.sha256(config.which),
            "history": stage_history(run_dir, state.step),
        },
    }
    if model.codec != FITTED_CODEC:
        info["codec"] = {"reference": model.codec}
    if model.caption_encoder != WORDS:
        info["caption_encoder"] = {"reference": model.caption_encoder}
    codec = open_codec(model, run_dir / CODEC)
    save_story_model(config.out, dit, codec, open_caption_encoder(model), info=info)
    print(f"{config.out}: {config.which} weights of {checkpoint.folder} in {config.dtype}")


def cast(dit: StoryDiT, dtype: torch.dtype) -> None:
    """In place; the parts whose numbers need float32 (timesteps, conditions, tables) keep it."""
    for name, parameter in dit.named_parameters():
        if not any(kept in name for kept in dit._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)


if __name__ == "__main__":
    run(main, ExportWeightsConfig, "export_weights")
