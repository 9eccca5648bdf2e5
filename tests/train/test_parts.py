"""The settings of every model in conf/model are whole, and say what the user has to bring."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import conf
from conf.command import read_config
from storyanchors.dit_config import PRESETS, StoryDiTConfig
from train.parts import build_dit
from train.run_stage import RunStageConfig

TO_BRING = {"step-4b": ["caption_encoder"], "step-30b": ["codec", "caption_encoder"]}


def read(model: str, *more: str) -> RunStageConfig:
    return read_config(RunStageConfig, "run_stage", [f"model={model}", "data.dataset=d", "run_dir=r", *more])


def test_every_preset_has_its_settings():
    assert {path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("model", PRESETS)
def test_a_model_can_be_built_from_its_settings(model):
    brought = [f"model.{part}=somewhere" for part in TO_BRING.get(model, [])]
    config = read(model, *brought)
    assert config.model.dit_config == StoryDiTConfig.preset(model) and config.optimizer.lr > 0
    with torch.device("meta"):
        dit = build_dit(replace(config.model, num_layers=1), seed=0)
    assert dit.activation_checkpointing == config.model.activation_checkpointing


@pytest.mark.parametrize(("model", "parts"), TO_BRING.items())
def test_what_cannot_be_downloaded_has_to_be_named(model, parts):
    for missing in parts:
        others = [f"model.{part}=somewhere" for part in parts if part != missing]
        with pytest.raises(ValueError, match=f"model.{missing}=... is missing"):
            read(model, *others)
