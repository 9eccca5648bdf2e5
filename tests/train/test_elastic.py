"""A run goes on with another number of processes and another strategy: the same clips, the same losses."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from conf.command import Stopped
from train.saving.checkpoints import newest_checkpoint

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "stage=continuation", "stage.steps=6", "data.clips_per_batch=4", "data.packs_per_batch=2",
    "data.log_keys=true", "checkpoint.keep_last=9",
]  # fmt: skip


def keys(run_dir: Path) -> dict[int, Counter]:
    """The clips of each step, of all ranks together."""
    steps: dict[int, Counter] = {}
    for path in (run_dir / "keys").glob("rank_*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], Counter()).update(map(tuple, line["clips"]))
    return steps


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_one_two_one_processes_see_the_same_clips_and_losses(train, arguments, tmp_path, strategy):
    whole, elastic = train(tmp_path / "whole", *SETTINGS), tmp_path / "elastic"
    elastic.mkdir()
    (elastic / "save_quit").touch()  # after one step
    with pytest.raises(Stopped):
        train(elastic, *SETTINGS)
    command = [sys.executable, "train/run_stage.py", *arguments(elastic, *SETTINGS)]
    command += [f"strategy={strategy}", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    (elastic / "save_quit").touch()
    two = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert two.returncode == 75, two.stderr
    assert len(newest_checkpoint(elastic).files("model")) == (1 if strategy == "ddp" else 2)
    train(elastic, *SETTINGS)
    assert keys(elastic) == keys(whole) and len(keys(whole)) == 6
    for found, expected in zip(losses(elastic), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for kind in ("model", "ema"):
        found, expected = (newest_checkpoint(run_dir).weights(kind) for run_dir in (elastic, whole))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
