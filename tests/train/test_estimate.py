"""train.estimate: the numbers that it prints agree with the plan, the formulas and what a run writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conf.command import read_config
from train.costs.estimated_run import Estimate, EstimateConfig
from train.costs.memory_model import Network
from train.costs.training_cost import checkpoint_bytes
from train.estimate import main

WAN = ["stage=multi_event", "model=wan-1.3b", "cluster=zero2", "data.clips_per_batch=256"]
PACKED = [*WAN, "data.packs_per_batch=64", "data.max_tokens=165000"]


def estimate(*words: str) -> Estimate:
    return Estimate.of(read_config(EstimateConfig, "run_stage", list(words)))


@pytest.fixture(scope="module")
def packed() -> Estimate:
    return estimate(*PACKED)


def test_more_nodes_take_less_time_but_more_gpu_hours(packed):
    nodes = estimate(*PACKED, "nodes=8")
    assert nodes.work.micro_steps == packed.work.micro_steps / 8
    assert packed.hours / 8 < nodes.hours < packed.hours / 7
    assert nodes.work.clips == packed.work.clips  # the batches do not depend on the world


def test_hours_follow_the_assumed_mfu(packed):
    half = estimate(*PACKED, "mfu=0.2")
    assert half.step.network == pytest.approx(2 * packed.step.network)
    # 8 ranks at the peak would take this long
    ideal = 3 * packed.work.flops / (8 * 989.4e12)
    assert packed.step.network * packed.step.balance * packed.config.mfu == pytest.approx(ideal, rel=1e-6)


def test_the_report_names_each_part_and_a_pack_that_fits(packed, capsys):
    main(packed.config)
    printed = capsys.readouterr().out
    parts = re.findall(r"^  (.+?) +([\d.]+) GiB$", printed, re.MULTILINE)
    total = sum(float(size) for _, size in parts)
    assert {"weights", "gradients", "masters", "moments", "activations"} < {name for name, _ in parts}
    assert float(re.search(r"total +([\d.]+) of 79", printed)[1]) == pytest.approx(total, abs=0.05)
    most = int(re.search(r"largest pack that fits: (\d+)", printed)[1])
    assert 0 < most < 1_000_000 and "an estimate, not a measurement" in printed


def test_what_does_not_fit_ends_in_an_error_after_words_that_do(capsys):
    words = ["stage=multi_event", "model=wan-14b", "cluster=zero3", "data.clips_per_batch=64"]
    with pytest.raises(ValueError, match=r"^the run does not fit: [\d.]+ GiB of a GPU's 79 GiB$"):
        main(read_config(EstimateConfig, "run_stage", words))
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    [line] = re.findall(
        r"^  (model.sequence_parallel=8 data.*)    # 64.0 clips a step", printed, re.MULTILINE
    )
    main(read_config(EstimateConfig, "run_stage", [*words, *line.split()]))
    assert ": fits" in capsys.readouterr().out


def test_where_nothing_helps_it_says_so_and_how_many_gpus_would(capsys):
    words = ["stage=multi_event", "model=wan-14b", "cluster=one_gpu", "gpus_per_node=1"]
    with pytest.raises(ValueError, match="does not fit"):
        main(read_config(EstimateConfig, "run_stage", words))
    assert re.search(r"nothing makes it fit on 1 x 1 H100\nthe fewest GPUs", capsys.readouterr().out)


def test_a_stop_has_time_for_a_step_and_a_save(packed):
    save = checkpoint_bytes(Network.of(packed.config.model)) / 1e9
    assert packed.stop_seconds == pytest.approx(packed.step.total + save + 60, abs=1)


@pytest.mark.parametrize("preset", ["step-4b", "step-30b"])
def test_a_preset_without_codec_or_captions_is_estimated_all_the_same(preset):
    assert estimate("stage=multi_event", f"model={preset}", "gpu=H200").longest_clip > 0


def test_the_tiny_preset_is_estimated_with_clips_of_its_size():
    assert estimate("stage=multi_event", "model=tiny").longest_clip == 8 * 8 * 8


def test_a_dataset_takes_the_place_of_the_mix(dataset, capsys):
    words = ["stage=multi_event", "model=tiny", f"data.dataset={dataset}", "data.clips_per_batch=8"]
    main(read_config(EstimateConfig, "run_stage", [*words, "gpus_per_node=2", "data.holdout=0.2"]))
    printed = capsys.readouterr().out
    assert "of the dataset" in printed and "4000 steps, 32000 clips" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=tpu"], "gpu is 'tpu'"),
        (["mfu=1.5"], "mfu is 1.5"),
        (["nodes=0"], "nodes=0"),
        (["model.sequence_parallel=3"], "does not divide"),
        (["data.packs_per_batch=12"], "cannot be shared by 8"),
        (["data.max_tokens=5000"], "data.max_tokens=5000"),
        (["mix.sizes=[480x831]"], "480x831"),
        (["mix.sizes=[]"], r"^mix.sizes is \[\], expected HEIGHTxWIDTH, as 480x832$"),
        (["mix.frames=[]"], r"^mix.frames is \[\], expected numbers of at least 1$"),
        (["mix.clips=0"], "mix.clips is 0"),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        estimate(*WAN, *words)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_the_shares_of_zero_are_those_that_deepspeed_makes(arguments, tmp_path, strategy):
    """Of a real run on two processes: what each rank writes is its share of weights, average and moments."""
    words = arguments(tmp_path / "run", "stage=global_caption", "stage.steps=1", f"strategy={strategy}")
    command = [sys.executable, "-m", "train.run_stage", *words, "trainer.devices=2"]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, env={**os.environ, **settings}, timeout=300, check=True)
    [folder] = (tmp_path / "run/checkpoints").glob("step_*")
    sizes = []
    for number in ("00000", "00001"):
        files = [load_file(file) for file in folder.glob(f"[!r]*-{number}-of-00002.safetensors")]  # not rng-
        sizes.append(sum(part.nbytes for file in files for part in file.values()))
    config = read_config(EstimateConfig, "run_stage", words)
    expected = checkpoint_bytes(Network.of(config.model)) / 2
    assert sum(sizes) == 2 * expected
    assert sizes == pytest.approx([expected, expected], rel=0.01)
