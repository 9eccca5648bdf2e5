"""Ranks that share the tokens of every clip learn what one process learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.command import read_config
from train.run_stage import RunStageConfig
from train.saving.checkpoints import newest_checkpoint

ROOT = Path(__file__).parents[3]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(f"zero{stage}", marks=pytest.mark.slow) for stage in (2, 3))]
)
def test_two_processes_that_share_every_clip_learn_what_one_learns(train, arguments, tmp_path, strategy):
    more = ["stage=continuation", "data.clips_per_batch=3", "model.activation_checkpointing=selective"]
    command = [sys.executable, "train/run_stage.py", *arguments(tmp_path / "two", *more)]
    command += ["model.sequence_parallel=2", f"strategy={strategy}", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240, text=True)
    assert done.returncode == 0, done.stderr
    assert "the tokens of every clip are split over 2 ranks" in done.stderr
    train(tmp_path / "one", *more)
    two, one = (newest_checkpoint(tmp_path / name) for name in ("two", "one"))
    assert two.state == one.state
    for which in ("model", "ema"):
        for name, tensor in one.weights(which).items():
            torch.testing.assert_close(two.weights(which)[name], tensor, atol=1e-5, rtol=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_degree_that_does_not_divide_the_heads_is_refused_before_anything_is_opened(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"model.sequence_parallel=3 .* 2 attention heads; possible: 1, 2"):
        read_config(RunStageConfig, "run_stage", arguments(tmp_path, "model.sequence_parallel=3"))


def test_a_group_stays_inside_a_node(train, tmp_path):
    with pytest.raises(ValueError, match=r"sequence_parallel=2 does not divide the 1 ranks of a node"):
        train(tmp_path / "run", "model.sequence_parallel=2")
