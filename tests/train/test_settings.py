"""A wrong setting is refused before anything is read, by a line with its key, what was found and expected."""

from dataclasses import replace
from typing import Any

import pytest

from conf.command import read_config
from train.processes.strategies import check_zero_optimization, zero_settings
from train.processes.trainer_settings import check_gpu
from train.run_stage import RunStageConfig, main


@pytest.fixture(scope="module")
def config() -> RunStageConfig:
    return read_config(RunStageConfig, "run_stage", ["data.dataset=/nowhere", "run_dir=unused"])


NUMBERS = [
    ("", "collective_timeout_s", (-1.0, 0.0, float("nan"), float("inf")), "above 0 and at most 86400"),
    ("", "peak_tflops", (0.0, -1.0, float("nan")), "above 0"),
    ("", "seed", (-1, 2**63), "at least 0 and below 2^63"),
    ("", "log_every_n_steps", (0,), "at least 1"),
    ("samples", "every_n_steps", (-1,), "at least 0"),
    ("samples", "num_stories", (0,), "at least 1"),
    ("samples", "num_steps", (0,), "at least 1"),
    ("samples", "guidance_scale", (-1.0, float("nan")), "at least 0"),
    ("held_out", "every_n_steps", (-1,), "at least 0"),
    ("checkpoint", "every_minutes", (0.0, float("nan")), "above 0"),
    ("checkpoint", "keep_last", (0,), "at least 1"),
    ("model", "pca_frames", (0,), "at least 1"),
    ("model", "num_layers", (0, -1), "at least 1"),
    ("model", "sequence_parallel", (0, -1), "at least 1"),
    ("model", "sigma_shift", (0.0, float("nan")), "above 0"),
    ("model", "compile", ("True",), "null, inductor"),
    ("model", "activation_checkpointing", ("some",), "none, selective, full, auto"),
    ("model", "lora", ({"rank": 0},), "at least 1"),
    ("model", "lora", ({"alpha": 2.0},), "rank with it"),
    ("stage", "mask_policies", ([],), "weight above 0"),
    ("stage", "steps", (0,), "at least 1"),
    ("data", "clips_per_batch", (0,), "at least 1"),
    ("data", "num_workers", (-1,), "at least 0"),
]


@pytest.mark.parametrize(
    ("section", "key", "found", "expected"),
    [(section, key, found, expected) for section, key, values, expected in NUMBERS for found in values],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_key(config, section, key, found, expected):
    with pytest.raises(ValueError) as error:
        replace(getattr(config, section) if section else config, **{key: found})
    line = str(error.value)
    name = f"{section}.{key}".removeprefix(".") if key != "lora" else f"lora.{next(iter(found))}"
    assert line.startswith(f"{name} is ") and expected in line and "\n" not in line


@pytest.mark.parametrize("run_dir", ["", " "])
def test_a_run_has_a_folder_of_its_own(config, run_dir):
    with pytest.raises(ValueError, match="run_dir is empty"):
        replace(config, run_dir=run_dir)


TRAINER = [
    ({"fast_dev_run": True}, "trainer.fast_dev_run is not passed on, .* use stage.steps"),
    ({"limit_train_batches": 2}, "trainer.limit_train_batches .* use stage.steps"),
    ({"overfit_batches": 1}, "trainer.overfit_batches .* use stage.steps"),
    ({"min_epochs": 3}, "trainer.min_epochs is not passed on, .* expected one of accelerator, "),
    ({"barebones": True}, "trainer.barebones is not passed on"),
    ({"plugins": []}, "trainer.plugins is not passed on"),
    ({"precision": 16}, "trainer.precision is 16, expected 32-true or bf16-mixed"),
    ({"precision": "16-mixed"}, "trainer.precision is '16-mixed', expected"),
    ({"accelerator": "tpuu"}, "trainer.accelerator is 'tpuu', expected auto or cpu"),
    ({"devices": 0}, "trainer.devices is 0, expected at least 1, auto or a list"),
    ({"devices": []}, r"trainer.devices is \[\], expected"),
    ({"devices": ["a"]}, r"trainer.devices is \['a'\], expected"),
    ({"devices": True}, "trainer.devices is True, expected"),
    ({"num_nodes": 0}, "trainer.num_nodes is 0, expected at least 1"),
    ({"max_time": 5}, "trainer.max_time is 5, expected DD:HH:MM:SS"),
    ({"max_time": "00:00:00:00"}, "trainer.max_time is '00:00:00:00', expected DD:HH:MM:SS"),
]


@pytest.mark.parametrize(("settings", "message"), TRAINER)
def test_settings_of_the_trainer_that_fight_ours_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        replace(config, trainer=config.trainer | settings)


@pytest.mark.parametrize(
    "settings",
    [{"max_time": "00:03:55:00"}, {"devices": [0, 2]}, {"devices": "auto"}, {"profiler": "simple"}],
)
def test_other_settings_of_the_trainer_are_taken(config, settings):
    assert replace(config, trainer=config.trainer | settings).trainer.items() >= settings.items()


DEEPSPEED: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": 8}, "deepspeed.train_batch_size is set by run_stage: use data.clips_per_batch"),
    ({"gradient_clipping": 2.0}, "deepspeed.gradient_clipping .* use optimizer.clip_norm"),
    ({"bf16": {"enabled": True}}, "deepspeed.bf16 .* use trainer.precision"),
    ({"zero_force_ds_cpu_optimizer": True}, "is set by run_stage$"),
    ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage .* use strategy"),
    ({"zero_optimization": 3}, "deepspeed.zero_optimization is 3, expected keys"),
]


@pytest.mark.parametrize(("settings", "message"), DEEPSPEED)
def test_settings_of_deepspeed_that_fight_ours_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        replace(config, strategy="zero2", deepspeed=settings)


@pytest.mark.parametrize(("given", "message"), [("offload", "offload=true"), ("deepspeed", "deepspeed.tag")])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_settings_of_zero_are_refused_without_it(config, given, message, strategy):
    settings = {"offload": True} if given == "offload" else {"deepspeed": {"tag": 1}}
    with pytest.raises(ValueError, match=f"{message} is for strategy=zero1, .* found strategy={strategy}"):
        replace(config, strategy=strategy, **settings)


@pytest.mark.parametrize("wrong", [{"overlapp_comm": True}, {"reduce_bucket_size": "many"}])
def test_deepspeeds_own_settings_are_read_before_a_run_begins(monkeypatch, wrong):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = zero_settings(2, offload=False, clip_norm=1.0, more={"zero_optimization": wrong})
    with pytest.raises(ValueError, match=rf"^deepspeed\.zero_optimization\.{next(iter(wrong))}: "):
        check_zero_optimization(settings["zero_optimization"])


def test_where_there_is_no_gpu_the_line_says_how_to_try_without(config, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    asked = replace(config, strategy="zero2", trainer={"accelerator": "gpu"}, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no GPU here: cluster=cpu strategy=zero2 tries it on the CPU"):
        main(asked)
    assert not (tmp_path / "run").exists()
    check_gpu({"accelerator": "cpu"}, "zero2")


def test_more_clips_in_a_batch_than_there_are_is_said(arguments, tmp_path, caplog):
    for clips, is_said in ((10, False), (1000, True)):
        more = ["--dry-run", f"data.clips_per_batch={clips}"]
        main(read_config(RunStageConfig, "run_stage", arguments(tmp_path / "run", *more)))
        assert ("data.clips_per_batch=1000, and there are 10 clips" in caplog.text) == is_said
