from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conf.command import read_config
from data_pipeline.build_index import build_index
from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from train import export_weights
from train.run_stage import RunStageConfig, main

SMALL = [
    "model.num_layers=1", "model.num_attention_heads=2", "model.attention_head_dim=16", "model.ffn_dim=64",
    "model.pca_frames=64", "data.clips_per_batch=2", "data.num_workers=0", "data.holdout=0.2",
    "samples.every_n_steps=0", "held_out.every_n_steps=0", "log_every_n_steps=1", "stage.steps=3",
    "optimizer.warmup_steps=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Ten labelled story-world clips of 3 to 5 frames."""
    folder = tmp_path_factory.mktemp("data") / "world"
    write_dataset(folder, WriteStoryWorldConfig(str(folder), num_stories=10, num_frames=[3, 5], workers=1))
    build_index(folder, "truth")
    return folder


@pytest.fixture(scope="session")
def arguments(dataset) -> Callable[..., list[str]]:
    """Command-line arguments of a small run."""
    return lambda run_dir, *more: [f"data.dataset={dataset}", f"run_dir={run_dir}", *SMALL, *more]


@pytest.fixture(scope="session")
def train(arguments) -> Callable[..., Path]:
    """train(run_dir, *overrides) runs train/run_stage.py in this process."""

    def run(run_dir: Path, *more: str) -> Path:
        main(read_config(RunStageConfig, "run_stage", arguments(run_dir, *more)))
        return run_dir

    return run


@pytest.fixture(scope="session")
def three_steps(train, tmp_path_factory) -> Path:
    """A finished run of three steps of stage 3, with every step's checkpoint; read only."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return train(run_dir, "stage=continuation", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3")


@pytest.fixture(scope="session")
def export() -> Callable[..., Path]:
    """export(run_dir, out, *overrides) runs train/export_weights.py in this process."""

    def run(run_dir: Path, out: Path, *more: str) -> Path:
        overrides = [f"run_dir={run_dir}", f"out={out}", *more]
        export_weights.main(read_config(export_weights.ExportWeightsConfig, "export_weights", overrides))
        return out

    return run


@pytest.fixture(scope="session")
def base_model(export, three_steps, tmp_path_factory) -> Path:
    """A model folder to adapt; read only."""
    return export(three_steps, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def lora(base_model) -> list[str]:
    """Arguments of a run that trains a LoRA of the base model, with every step's checkpoint."""
    base = [f"model.base_weights={base_model}", f"model.codec={base_model}/codec"]
    steps = ["stage=continuation", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3"]
    return [*steps, *base, "model.lora.rank=2", "model.lora.alpha=6"]


@pytest.fixture(scope="session")
def lora_run(train, lora, tmp_path_factory) -> Path:
    """A finished LoRA run of three steps; read only."""
    return train(tmp_path_factory.mktemp("runs") / "lora", *lora, "optimizer.lr=1e-2")
