"""Held-out losses and sample stories: fixed, fair, without a trace in training, on any number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storyanchors.conditioning import MaskPolicy
from train.saving.checkpoints import newest_checkpoint
from train.watching.held_out_loss import Case, HeldOutConfig, pack_in_order, summarize

ROOT = Path(__file__).parents[3]
MORE = [
    "stage=continuation", "data.holdout=0.6", "data.clips_per_batch=4", "data.packs_per_batch=2",
]  # fmt: skip
WATCHED = [
    *MORE, "held_out.every_n_steps=2", "held_out.num_clips=3", "held_out.quantiles=[0.2,0.8]",
    "samples.every_n_steps=2", "samples.num_stories=3", "samples.num_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def watched(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "watched", *WATCHED)


def held_out(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        line.pop("step"): {name: value for name, value in line.items() if name.startswith("held_out")}
        for line in lines
    }


def test_neighbours_are_packed_in_order_up_to_the_limit():
    tokens = [3, 4, 5, 20, 1, 1, 9, 10, 1]
    packs = pack_in_order(tokens, 10)
    assert [number for pack in packs for number in pack] == list(range(len(tokens)))
    assert [sum(tokens[number] for number in pack) for pack in packs] == [7, 5, 20, 2, 9, 10, 1]


def test_masks_weigh_what_they_weigh_in_training():
    none, first = MaskPolicy("none", weight=3.0), MaskPolicy("prefix", weight=1.0, k=1)
    cases = [Case(0, 0.5, none), Case(0, 0.5, first), Case(1, 0.9, none), Case(1, 0.9, first)]
    assert summarize(cases, [1.0, 2.0, 3.0, 8.0]) == {
        "held_out/loss": (3 * 1 + 2 + 3 * 3 + 8) / 8,
        "held_out/quantile_0.5": (3 * 1 + 2) / 4,
        "held_out/quantile_0.9": (3 * 3 + 8) / 4,
        "held_out/mask_none": 2.0,
        "held_out/mask_prefix_1": 5.0,
    }


def test_a_line_has_the_loss_by_noise_level_and_by_given_frames(watched):
    found = held_out(watched)
    masks = {f"held_out/mask_{name}" for name in ("none", "first", "prefix", "random_subset", "first_last")}
    assert not found[1] and found[2].keys() == found[3].keys()
    assert found[3].keys() == masks | {"held_out/loss", "held_out/quantile_0.2", "held_out/quantile_0.8"}


def test_watching_leaves_no_trace_in_what_is_learned(train, watched, tmp_path):
    plain = train(tmp_path / "plain", *MORE)
    found, expected = (newest_checkpoint(run_dir) for run_dir in (watched, plain))
    assert found.state == expected.state
    for which in ("model", "ema"):
        theirs = expected.weights(which)
        assert all((tensor == theirs[name]).all() for name, tensor in found.weights(which).items())


def test_samples_are_there_with_the_true_stories_beside_them(watched):
    names = {path.name for path in (watched / "samples").iterdir()}
    drawn = {f"step_0000000{step}_{task}.png" for step in (2, 3) for task in ("prompt", "continue")}
    assert names == drawn | {"truth.png"}


@pytest.mark.parametrize("settings", [{"num_clips": 0}, {"quantiles": []}, {"quantiles": [0.0, 0.5]}])
def test_a_setting_that_measures_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=r"held_out\.\w+ (is|are)"):
        HeldOutConfig(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_measure_and_draw_what_one_does(arguments, watched, tmp_path, strategy):
    run_dir = tmp_path / strategy
    command = [sys.executable, "train/run_stage.py", *arguments(run_dir, *WATCHED)]
    command += [f"strategy={strategy}", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    found, expected = held_out(run_dir), held_out(watched)
    for step in (2, 3):
        assert found[step] == (
            expected[step] if strategy == "ddp" else pytest.approx(expected[step], rel=1e-5)
        )
    for path in (watched / "samples").iterdir():
        assert (run_dir / "samples" / path.name).is_file()
        if strategy == "ddp":  # ZeRO adds gradients in another order, which a pixel may show
            assert (run_dir / "samples" / path.name).read_bytes() == path.read_bytes()
