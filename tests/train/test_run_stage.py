"""A run of a small model on story-world clips: the same bits when repeated, resumed or killed."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.command import Stopped, read_config
from data_pipeline.build_index import build_index
from storyanchors.lora import LORA_FILE
from train import run_stage
from train.processes.trained_state import MOMENTS
from train.run_stage import RunStageConfig
from train.saving.checkpoints import newest_checkpoint
from train.story_module import NonFiniteGradients

ROOT = Path(__file__).parents[2]
STAGE_3 = ["stage=continuation", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3"]


def checkpoint_bits(run_dir: Path, step: int) -> dict:
    """Sizes and SHA-256 of weights, average, optimizer and data position."""
    return json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").read_text())["files"]


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step twice"
    return {line["step"]: (line["train/loss"], line["train/grad_norm"], line["train/lr"]) for line in lines}


def test_a_repeated_run_is_bit_identical(train, three_steps, tmp_path):
    again = train(tmp_path / "again", *STAGE_3)
    assert losses(again) == losses(three_steps)
    assert checkpoint_bits(again, 3) == checkpoint_bits(three_steps, 3)


def test_workers_do_not_change_a_bit(train, three_steps, tmp_path):
    with_workers = train(tmp_path / "workers", *STAGE_3, "data.num_workers=2")
    assert losses(with_workers) == losses(three_steps)
    assert checkpoint_bits(with_workers, 3) == checkpoint_bits(three_steps, 3)


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_is_bit_identical_to_an_undisturbed_one(train, three_steps, tmp_path, step):
    resumed = tmp_path / "resumed"
    shutil.copytree(three_steps, resumed)
    for later in range(step + 1, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later:08d}")
    train(resumed, *STAGE_3)
    assert losses(resumed) == losses(three_steps)
    assert checkpoint_bits(resumed, 3) == checkpoint_bits(three_steps, 3)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_does_not_change_a_loss(train, three_steps, tmp_path, mode):
    run_dir = train(tmp_path / "saving", *STAGE_3, f"model.activation_checkpointing={mode}")
    assert losses(run_dir) == losses(three_steps)


def test_compiled_blocks_compute_the_same(train, lora, lora_run, tmp_path):
    """eager: traced as for inductor, but not translated, which takes minutes on a CPU."""
    run_dir = train(tmp_path / "compiled", *lora, "stage.steps=1", "model.compile=eager")
    assert losses(run_dir)[1][:2] == pytest.approx(losses(lora_run)[1][:2], rel=1e-5)  # loss, gradient norm


def test_a_signal_ends_the_step_saves_and_says_so(train, tmp_path):
    run_dir = tmp_path / "stopped"
    metrics = run_dir / "metrics.jsonl"

    def stop_after_the_first_step():
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_after_the_first_step, daemon=True)
    thread.start()
    with pytest.raises(Stopped, match="SIGTERM after step"):
        train(run_dir, "stage=continuation", "stage.steps=400")
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    step = newest_checkpoint(run_dir).state.step
    assert 1 <= step < 400
    assert max(losses(run_dir)) == step


def test_a_signal_during_start_up_is_heard_before_weights_are_read(train, tmp_path, monkeypatch):
    def open_clips(config, original=run_stage.open_clips):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(config)

    monkeypatch.setattr(run_stage, "open_clips", open_clips)
    monkeypatch.setattr(run_stage, "build_module", None)
    with pytest.raises(Stopped, match="SIGUSR1 before the weights were read"):
        train(tmp_path / "run", "stage=continuation")


def test_killed_in_the_middle_and_started_again_gives_the_same_weights(train, arguments, tmp_path):
    more = ["stage=continuation", "stage.steps=60", "checkpoint.every_n_steps=5"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "train/run_stage.py", *arguments(killed, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "step_00000010").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert newest_checkpoint(killed).state.step < 60
    train(killed, *more)
    train(whole, *more)
    assert losses(killed) == losses(whole)
    assert checkpoint_bits(killed, 60) == checkpoint_bits(whole, 60)


def test_two_processes_learn_what_one_learns(train, arguments, tmp_path):
    more = ["stage=continuation", "data.clips_per_batch=3", "data.packs_per_batch=2"]
    command = [sys.executable, "train/run_stage.py", *arguments(tmp_path / "two", *more)]
    command += ["strategy=ddp", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    train(tmp_path / "one", *more)
    two, one = (newest_checkpoint(tmp_path / name) for name in ("two", "one"))
    assert two.state == one.state
    assert two.weights("ema").keys() == one.weights("ema").keys()
    for name, tensor in one.weights("ema").items():
        torch.testing.assert_close(two.weights("ema")[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_finished_run_has_nothing_to_do(train, three_steps, capsys):
    before = checkpoint_bits(three_steps, 3)
    train(three_steps, *STAGE_3)
    assert "has done its 3 steps" in capsys.readouterr().out
    assert checkpoint_bits(three_steps, 3) == before


def test_an_existing_run_is_not_overwritten(train, three_steps):
    with pytest.raises(ValueError, match="holds a run already"):
        train(three_steps, *STAGE_3, "resume=never")


def test_a_run_goes_on_with_its_own_settings_only(train, three_steps):
    with pytest.raises(ValueError, match=r"seed=0, found seed=1"):
        train(three_steps, *STAGE_3, "seed=1")


def assert_handed_over(before: Path, after: Path) -> None:
    """A run with a learning rate of 0 keeps the average that it began with."""
    average, weights = saved_weights(before, "ema"), saved_weights(after)
    assert average.keys() == weights.keys()
    assert all(torch.equal(average[name], weights[name]) for name in weights)


def test_hand_over_begins_with_the_average_and_remembers_where_from(train, three_steps, tmp_path):
    first = train(tmp_path / "next", "stage=continuation", f"init_from={three_steps}", "optimizer.lr=0.0")
    assert_handed_over(three_steps, first)
    provenance = json.loads((first / "provenance.json").read_text())
    assert provenance["init_from"]["step"] == 3
    assert provenance["init_from"]["sha256"] == newest_checkpoint(three_steps).sha256("ema")
    assert provenance["history"] == [{"stage": "continuation", "steps": 3, "run": three_steps.name}]
    assert (first / "codec" / "codec.safetensors").read_bytes() == (
        three_steps / "codec" / "codec.safetensors"
    ).read_bytes()


def test_a_network_of_another_size_is_refused(train, three_steps, tmp_path):
    with pytest.raises(ValueError, match=r"num_layers=1, .* expects 2") as error:
        train(tmp_path / "next", "model.num_layers=2", f"init_from={three_steps}")
    assert str(three_steps) in str(error.value)
    assert not (tmp_path / "next").exists()


def test_init_from_something_else_is_refused(train, dataset, tmp_path):
    with pytest.raises(ValueError, match="neither a run folder"):
        train(tmp_path / "next", f"init_from={dataset}")


def test_a_run_of_an_older_version_hands_over_what_it_has(train, three_steps, tmp_path):
    """Its checkpoint does not know the settings of the network that have come since."""
    older = tmp_path / "older"
    shutil.copytree(three_steps, older)
    folder = older / "checkpoints" / "step_00000003"
    config = json.loads((folder / "config.json").read_text())
    newer = {"qk_norm", "norm_eps", "reversed_flow", "rope_axes_dim"}
    content = json.dumps({name: value for name, value in config.items() if name not in newer})
    (folder / "config.json").write_text(content)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["config.json"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }  # fmt: skip
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    train(tmp_path / "next", "stage.steps=1", f"init_from={older}")


def saved_weights(run_dir: Path, which: str = "model") -> dict[str, torch.Tensor]:
    return newest_checkpoint(run_dir).weights(which)


def test_a_lora_run_learns_and_saves_the_lora_alone(lora_run, three_steps):
    for which in ("model", "ema"):
        weights = saved_weights(lora_run, which)
        assert {name.split(".")[0] for name in weights} == {"blocks", "patch_embedding", "story_embedder"}
        low_rank = {name for name in weights if name.startswith("blocks.")}
        assert all(".lora_A." in name or ".lora_B." in name for name in low_rank) and len(low_rank) == 20
        assert all(weights[name].abs().max() > 0 for name in low_rank)  # B begins at zero
    moments = saved_weights(lora_run, "optimizer")
    assert moments.keys() == {f"{moment}/{name}" for name in weights for moment in MOMENTS}
    assert len(weights) < len(saved_weights(three_steps))


def test_a_lora_over_bfloat16_weights_draws_samples_and_is_saved_in_float32(train, lora, tmp_path):
    samples = ["samples.every_n_steps=1", "samples.num_stories=1", "samples.num_steps=1"]
    run_dir = train(tmp_path / "bf16", *lora, *samples, "trainer.precision=bf16-mixed", "stage.steps=1")
    assert {tensor.dtype for tensor in saved_weights(run_dir).values()} == {torch.float32}
    names = {path.name for path in (run_dir / "samples").glob("step_*")}
    assert names == {"step_00000001_prompt.png", "step_00000001_continue.png"}


def test_what_is_trained_is_said_at_the_start(train, lora, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(tmp_path / "said", *lora, "stage.steps=1")
    assert re.search(r"0\.0\d M of 0\.\d\d M parameters are trained; attention: \w+", caplog.text)


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_lora_run_is_bit_identical(train, lora, lora_run, tmp_path, step):
    resumed = tmp_path / "resumed"
    shutil.copytree(lora_run, resumed)
    for later in range(step + 1, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step_{later:08d}")
    train(resumed, *lora, "optimizer.lr=1e-2")
    assert losses(resumed) == losses(lora_run)
    assert checkpoint_bits(resumed, 3) == checkpoint_bits(lora_run, 3)


def test_the_base_of_a_lora_may_move_and_must_not_change(train, lora, lora_run, base_model, tmp_path):
    moved, unfinished = tmp_path / "moved", tmp_path / "unfinished"
    shutil.copytree(base_model, moved)
    shutil.copytree(lora_run, unfinished)
    shutil.rmtree(unfinished / "checkpoints" / "step_00000003")
    arguments = [*lora, "optimizer.lr=1e-2", f"model.base_weights={moved}"]
    changed = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(changed.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first number behind the header: a block's
    changed.write_bytes(content)
    with pytest.raises(ValueError, match=f"but {moved} has other weights now"):
        train(unfinished, *arguments)
    changed.write_bytes((base_model / "transformer" / changed.name).read_bytes())
    train(unfinished, *arguments)
    assert checkpoint_bits(unfinished, 3) == checkpoint_bits(lora_run, 3)


def test_a_lora_is_handed_over_to_the_next_stage_as_it_is(train, lora, lora_run, tmp_path):
    following = train(tmp_path / "next", *lora, f"init_from={lora_run}", "optimizer.lr=0.0")
    assert_handed_over(lora_run, following)
    provenance = json.loads((following / "provenance.json").read_text())
    assert provenance["base"] == json.loads((lora_run / "provenance.json").read_text())["base"]
    assert provenance["history"] == [{"stage": "continuation", "steps": 3, "run": lora_run.name}]


def test_a_lora_of_a_published_base_is_exported_and_handed_over(train, export, lora, base_model, tmp_path):
    """Such a base lacks what the paper adds: what is drawn for it must not count as the base's."""
    tensors = load_file(base_model / "transformer" / "diffusion_pytorch_model.safetensors")
    patch = tensors["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = patch[:, : patch.shape[1] // 2].contiguous()
    published = tmp_path / "published"
    published.mkdir()
    save_file({n: t for n, t in tensors.items() if "story_embedder" not in n}, published / "wan.safetensors")
    (published / "config.json").write_text("{}")
    arguments = [*lora, f"model.base_weights={published}", "stage.steps=1"]
    first = train(tmp_path / "first", *arguments)
    assert (export(first, tmp_path / "merged") / "story_model.json").is_file()
    assert (export(first, tmp_path / "adapter", "format=lora") / LORA_FILE).is_file()
    train(tmp_path / "next", *arguments, f"init_from={first}", "seed=1")


def test_a_run_of_all_weights_begins_with_the_lora_merged(train, export, lora_run, base_model, tmp_path):
    more = ["stage=continuation", "optimizer.lr=0.0", "stage.steps=1"]
    whole = train(tmp_path / "whole", f"init_from={lora_run}", *more)
    export(lora_run, tmp_path / "model")
    merged = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    codecs = {(f / "codec" / "codec.safetensors").read_bytes() for f in (base_model, lora_run, whole)}
    assert len(codecs) == 1 and (tmp_path / "model" / "codec").is_dir()
    weights = saved_weights(whole)
    assert weights.keys() == merged.keys()
    assert all(torch.equal(weights[name], merged[name]) for name in weights)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lora.rank=4", "model.lora.rank=2, found rank=4"),
        ("model.lora.alpha=2", "model.lora.alpha=6.0, found alpha=2.0"),
    ],
)
def test_a_lora_of_other_settings_is_not_handed_over(train, lora, lora_run, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "next", *lora, f"init_from={lora_run}", override)
    assert not (tmp_path / "next").exists()


def test_a_whole_network_is_no_lora_to_begin_with(train, lora, three_steps, base_model, tmp_path):
    for whole in (three_steps, base_model):
        with pytest.raises(
            ValueError, match=r"holds a whole network, no LoRA: give it as model\.base_weights"
        ):
            train(tmp_path / "next", *lora, f"init_from={whole}")


def test_base_weights_keep_their_codec(train, lora, tmp_path):
    with pytest.raises(ValueError, match=r"model\.codec=pca would fit another"):
        train(tmp_path / "next", *lora, "model.codec=pca")


def test_a_lora_needs_a_base(train, tmp_path):
    with pytest.raises(ValueError, match=r"model\.lora\.rank=8 needs model\.base_weights"):
        train(tmp_path / "next", "model.lora.rank=8")


@pytest.mark.parametrize(("preset", "names"), [("paper", ["first"]), ("none", ["none"])])
def test_a_preset_of_mask_policies_can_be_chosen(arguments, preset, names):
    overrides = ["stage=continuation", f"mask_policies@stage={preset}"]
    config = read_config(RunStageConfig, "run_stage", arguments("unused", *overrides))
    assert [policy.name for policy in config.stage.mask_policies] == names


def test_samples_are_drawn_and_scored_with_held_out_stories(train, tmp_path):
    run_dir = train(
        tmp_path / "samples", "stage=continuation", "samples.every_n_steps=3", "samples.num_stories=2",
        "samples.num_steps=1", "samples.score_story_world=true",
    )  # fmt: skip
    names = {path.name for path in (run_dir / "samples").glob("step_*")}
    assert names == {"step_00000003_prompt.png", "step_00000003_continue.png"}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["sample/prompt/pfa_f1"] <= 1 and last["step"] == 3


def test_a_dataset_without_stories_is_trained_on_without_samples(dataset, train, tmp_path, caplog):
    told = tmp_path / "told"
    shutil.copytree(dataset, told)
    for path in (told / "captions" / "truth").glob("*.jsonl"):
        records = [json.loads(line) | {"story": None} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_index(told, "truth")
    settings = ["stage=global_caption", "stage.steps=1", "samples.every_n_steps=1"]
    run_dir = train(tmp_path / "run", f"data.dataset={told}", *settings)
    assert "no samples: none of the clips" in caplog.text and not (run_dir / "samples").exists()


def test_a_run_that_diverges_stops_and_names_the_clips(train, tmp_path):
    with pytest.raises(NonFiniteGradients, match=r"2 steps in a row .* story-world-"):
        train(tmp_path / "wild", "optimizer.lr=1e30", "stage.steps=20", "optimizer.max_skipped=1")


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_numbers_and_pictures_reach_the_other_loggers(train, tmp_path, logger, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    samples = ["samples.every_n_steps=2", "samples.num_stories=1", "samples.num_steps=1"]
    run_dir = train(tmp_path / "logged", f"logger={logger}", "stage.steps=2", *samples)
    assert any(path.stat().st_size > 10_000 for path in (run_dir / logger).rglob("*") if path.is_file())


def test_bfloat16_products_keep_float32_weights(train, tmp_path):
    run_dir = train(tmp_path / "bf16", "trainer.precision=bf16-mixed", "stage.steps=1")
    checkpoint = newest_checkpoint(run_dir)
    assert {tensor.dtype.itemsize for tensor in checkpoint.weights("model").values()} == {4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=5", "max_steps"),
        ("stage.caption=both", "multi_event"),
        ("logger=mlflow", "tensorboard"),
        ("data.clips_per_batch=0", "at least 1"),
        ("ema.decay=1.0", "below 1"),
        ("optimizer.schedule=step", "cosine"),
        ("model.preset=huge", "tiny"),
        ("model.activation_checkpointing=some", "selective"),
        ("model.lora.rank=0", "at least 1"),
        ("model.compile=fast", "inductor"),
        ("stage.steps=none", "steps"),
        ("optimizer.learning_rate=1", "optimizer"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(train, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "wrong", override)
    assert not (tmp_path / "wrong").exists()
