"""ZeRO on two CPU processes, through the real command, against one process without it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from conf.command import read_config
from storyanchors.caption_cache import PrecomputedCaptions
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import ClipReader
from train.processes.strategies import ZeroPrecision, build_strategy, zero_settings
from train.run_stage import RunStageConfig
from train.saving.checkpoints import Checkpoint, newest_checkpoint

ROOT = Path(__file__).parents[3]
CLIPS = 4  # in a batch
STEPS = 12  # ten at least, and those that are skipped
NO_PERSISTENT = (
    "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0"  # gather small weights too
)


@pytest.fixture(scope="session")
def spoiled(dataset, tmp_path_factory) -> list[str]:
    """Arguments of a run in which one caption, that of nothing, is NaN; chance shows it now and then."""
    captions = PrecomputedCaptions.create(tmp_path_factory.mktemp("captions"), encoder="test", text_dim=192)
    index, generator = ClipIndex.open(dataset), torch.Generator().manual_seed(0)
    for number in range(len(index)):
        text = ClipReader().caption(index.row(number)).story.prompt()
        captions.write(text, torch.randn(5, 192, generator=generator).bfloat16())
    captions.write("", torch.full((1, 192), float("nan")).bfloat16())
    return [
        "stage=multi_event", "stage.other_caption_share=0", "stage.caption_dropout=0.03",
        f"stage.steps={STEPS}",
        f"data.clips_per_batch={CLIPS}", "data.packs_per_batch=2", f"model.caption_encoder={captions.folder}",
        "checkpoint.every_n_steps=1", f"checkpoint.keep_last={STEPS}", "seed=1", "samples.num_stories=2",
        f"samples.every_n_steps={STEPS}", "samples.num_steps=2", "samples.guidance_scale=1.0",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def one_process(train, spoiled, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "one", *spoiled)


def train_on_two(arguments: list[str], *more: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "train/run_stage.py", *arguments, "trainer.devices=2", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, **settings
    )


def at_step(run_dir: Path, step: int) -> Checkpoint:
    return Checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")


def assert_close(run_dir: Path, reference: Path, step: int, tolerance: float) -> None:
    two, one = at_step(run_dir, step), at_step(reference, step)
    assert two.state == one.state
    for which in ("model", "ema", "optimizer"):
        expected, found = one.weights(which), two.weights(which)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_two_ranks_learn_what_one_learns_and_skip_what_one_skips(
    arguments, spoiled, one_process, tmp_path, strategy
):
    run_dir = tmp_path / strategy
    more = [f"strategy={strategy}", *([NO_PERSISTENT] if strategy == "zero3" else [])]
    log = train_on_two(arguments(run_dir, *spoiled), *more)
    assert log.returncode == 0, log.stderr
    assert_close(run_dir, one_process, STEPS, 1e-5)
    state = newest_checkpoint(run_dir).state
    assert state.num_updates == state.num_ema_updates == STEPS - state.num_skipped >= 10

    pattern = r"step skipped: gradient norm \w+ at step (\d+), this rank's clips ([\w, -]+)"
    found = re.findall(pattern, log.stderr)  # both ranks say so, each with its own clips
    assert len(found) == 2 * state.num_skipped > 0
    assert sum(len(keys.split(", ")) for _, keys in found) == CLIPS * state.num_skipped
    skipped = int(found[0][0])
    before, after = at_step(run_dir, skipped), at_step(run_dir, skipped + 1)
    for which in ("model", "ema", "optimizer"):
        weights = after.weights(which)
        assert all(torch.equal(weights[name], tensor) for name, tensor in before.weights(which).items())
    for picture in (one_process / "samples").glob("*.png"):
        assert (run_dir / "samples" / picture.name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize(
    "more",
    [
        ["offload=true"],
        ["model.activation_checkpointing=selective"],
        ["model.activation_checkpointing=auto"],
        ["data.packs_per_batch=4"],
    ],
    ids=["offload", "selective", "auto", "micro-steps"],
)
def test_settings_that_save_memory_do_not_change_what_is_learnt(train, arguments, tmp_path, strategy, more):
    common = ["stage=continuation", "data.clips_per_batch=4", "data.packs_per_batch=2", *more]
    log = train_on_two(arguments(tmp_path / "two", *common), f"strategy={strategy}", NO_PERSISTENT)
    assert log.returncode == 0, log.stderr
    train(tmp_path / "one", *[argument for argument in common if "offload" not in argument])
    assert_close(tmp_path / "two", tmp_path / "one", 3, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_lora_is_learnt_in_bfloat16_products_on_float32_masters(train, arguments, lora, tmp_path, strategy):
    common = [*lora, "data.clips_per_batch=4", "data.packs_per_batch=2", "trainer.precision=bf16-mixed"]
    log = train_on_two(arguments(tmp_path / "two", *common), f"strategy={strategy}")
    assert log.returncode == 0, log.stderr
    train(tmp_path / "one", *common)
    assert_close(tmp_path / "two", tmp_path / "one", 3, 1e-3)
    assert {t.dtype for t in newest_checkpoint(tmp_path / "two").weights("model").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_the_others_of_a_stopped_rank_end_within_the_timeout_and_name_what_they_waited_in(
    arguments, tmp_path, strategy
):
    run_dir = tmp_path / "stopped"
    command = [
        sys.executable, "train/run_stage.py", *arguments(run_dir, "stage.steps=100000"), "trainer.devices=2",
        f"strategy={strategy}", "collective_timeout_s=6",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"  # no pipe: the stopped rank would hold it open
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    try:
        while not (run_dir / "metrics.jsonl").is_file():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        [other] = [int(pid) for pid in _children(process.pid) if "run_stage" in _command_of(pid)]
        os.kill(other, signal.SIGSTOP)
        stopped = time.monotonic()
        status = process.wait(timeout=90)
        assert time.monotonic() - stopped < 6 + 45  # and what it takes to say who was quiet
        message = log.read_text()
        assert status == 69 and "Timed out waiting 6000ms" in message
        assert re.search(r"lost another rank in (all_reduce|reduce_scatter|all_gather|the backward)", message)
    finally:
        os.kill(other, signal.SIGKILL)
        process.kill()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _command_of(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


SETTINGS = dict(offload=False, timeout_s=60, deepspeed={}, clip_norm=1.0)
CPU = {"accelerator": "cpu", "devices": 2, "num_nodes": 1}


def test_auto_is_ddp_for_more_than_one_process_and_has_the_timeout():
    strategy = build_strategy("auto", trainer=CPU, **SETTINGS)
    assert isinstance(strategy, DDPStrategy) and strategy.collective_timeout.total_seconds() == 60
    assert build_strategy("auto", trainer=CPU | {"devices": 1}, **SETTINGS) == "auto"


def test_compiled_blocks_and_sharded_weights_are_refused_together(arguments):
    overrides = arguments("unused", "strategy=zero3", "model.compile=inductor")
    with pytest.raises(ValueError, match=r"model\.compile=inductor does not go with strategy=zero3"):
        read_config(RunStageConfig, "run_stage", overrides)


@pytest.mark.parametrize(
    ("preset", "strategy", "offload"),
    [("one_gpu", "auto", False), ("ddp", "ddp", False), ("zero2", "zero2", False), ("zero3", "zero3", False),
     ("zero2_offload", "zero2", True), ("zero3_offload", "zero3", True), ("cpu", "auto", False)],
)  # fmt: skip
def test_a_preset_of_the_cluster_sets_the_strategy(preset, strategy, offload):
    overrides = ["run_dir=unused", "data.dataset=unused", f"cluster={preset}"]
    config = read_config(RunStageConfig, "run_stage", overrides)
    assert (config.strategy, config.offload) == (strategy, offload)
    assert config.trainer["precision"] == ("32-true" if preset == "cpu" else "bf16-mixed")


def test_deepspeeds_own_settings_go_over_ours_one_by_one():
    settings = zero_settings(
        2,
        offload=True,
        clip_norm=0.5,
        more={"zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 9},
    )
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7 and settings["steps_per_print"] == 9
    assert settings["zero_optimization"]["stage"] == 2 and settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_products_are_bfloat16_and_weights_and_gradients_are_not():
    linear, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    with ZeroPrecision("bf16-mixed").forward_context():
        product = linear(torch.ones(2, 4))
        normed = norm(product.float())
    normed.sum().backward()
    assert product.dtype == torch.bfloat16 and normed.dtype == torch.float32
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
