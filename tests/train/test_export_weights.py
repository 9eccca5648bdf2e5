"""What a run has learned leaves it as a model folder, as an adapter, or for stock diffusers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from storyanchors.diffusers_export import load_diffusers_wan
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.generator import StoryGenerator
from storyanchors.lora import LoraSettings, load_lora
from storyanchors.story import Event, Story
from storyanchors.weights import load_story_dit
from train.run_folder import plain_config, read_init_from, read_network, write_provenance, write_settings
from train.saving.checkpoint_writer import CheckpointWriter, describe_state
from train.saving.checkpoints import CheckpointConfig, TrainingState, newest_checkpoint, trained_weights
from train.saving.tensor_ranges import TensorRange


def velocity(dit: StoryDiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        return dit(draw(1, 3, 33, 4, 6), torch.tensor([500.0]), None, [draw(7, 192)])


@pytest.fixture
def wan_run(tmp_path) -> Path:
    """The folder of a run whose network is built as Wan's, with one checkpoint."""
    run_dir = tmp_path / "wan"
    sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64)
    dit = StoryDiT(replace(StoryDiTConfig.preset("wan-1.3b"), **sizes))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = {"preset": "wan-1.3b", "codec": "pca", "caption_encoder": "words", **sizes}
    write_settings(run_dir, {"model": model, "samples": {"num_steps": 1, "guidance_scale": 1.0}})
    about = dict(stage="global_caption", preset="wan-1.3b", frame_size=(64, 64))
    write_provenance(run_dir, **about, handed_over=None, base=None)
    save(run_dir, dit)
    return run_dir


def save(run_dir: Path, dit: StoryDiT) -> None:
    """A checkpoint of step 1 whose average is the weights."""
    state = TrainingState(1, 1, 1, 1, 0, 0, "global_caption", "wan-1.3b")
    weights = trained_weights(dit).items()
    ranges = [TensorRange(name, tuple(weight.shape), 0, weight.flatten()) for name, weight in weights]
    writer = CheckpointWriter(run_dir, "attempt")
    files = {f"{kind}-00000-of-00001.safetensors": ranges for kind in ("model", "ema")}
    writer.begin(1, files, describe_state(state, plain_config(dit)))
    writer.commit(writer.wait().files, CheckpointConfig())
    writer.close()


@pytest.mark.parametrize("which", ["ema", "model"])
def test_an_export_holds_the_weights_of_the_newest_checkpoint(export, three_steps, tmp_path, which):
    export(three_steps, tmp_path / "model", f"which={which}")
    generator = StoryGenerator.from_pretrained(tmp_path / "model")
    checkpoint = newest_checkpoint(three_steps).weights(which)
    weights = generator.dit.state_dict()
    assert weights.keys() == checkpoint.keys()
    assert all(torch.equal(weights[name], checkpoint[name]) for name in weights)
    assert generator.frame_size == (64, 64)
    frames = generator.generate(Story([Event(1, 2, "A fox runs.")]), num_steps=1, progress=False)
    assert len(frames) == 2


def test_an_export_recommends_what_it_is_told_to(export, three_steps, tmp_path):
    export(three_steps, tmp_path / "model", "num_steps=7", "guidance_scale=1", "shift=3", "max_frames=5")
    generator = StoryGenerator.from_pretrained(tmp_path / "model")
    found = (generator.num_steps, generator.guidance_scale, generator.shift, generator.max_frames)
    assert found == (7, 1, 3, 5)


def test_an_export_can_begin_another_stage(train, export, three_steps, tmp_path):
    export(three_steps, tmp_path / "model", "dtype=bfloat16")
    run_dir = train(
        tmp_path / "next", "stage=multi_event", f"init_from={tmp_path / 'model'}", "stage.steps=1"
    )
    assert (run_dir / "codec" / "codec.safetensors").is_file()


def test_an_older_checkpoint_is_exported_or_handed_over_only_where_it_is_named(export, three_steps, tmp_path):
    run_dir = shutil.copytree(three_steps, tmp_path / "run")
    newest, older = (run_dir / "checkpoints" / f"step_0000000{step}" for step in (3, 2))
    [average] = newest.glob("ema-*")
    average.write_bytes(average.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"step_00000003, the newest.* is damaged.* with step=2$"):
        export(run_dir, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    export(run_dir, tmp_path / "model", "step=2")
    history = json.loads((tmp_path / "model" / "story_model.json").read_text())["provenance"]["history"]
    assert history[-1]["steps"] == 2
    with pytest.raises(ValueError, match=f"is damaged.* with init_from={older}$"):
        read_init_from(run_dir, {}, "tiny", None)
    handed_over = read_init_from(older, {}, "tiny", None)
    assert handed_over.source["step"] == 2 and handed_over.codec == run_dir / "codec"


@pytest.mark.parametrize("kind", ["story-model", "lora", "diffusers-wan"])
def test_a_folder_that_is_no_run_is_refused(export, tmp_path, kind):
    with pytest.raises(ValueError, match="not a run folder"):
        export(tmp_path, tmp_path / "model", f"format={kind}")
    assert not (tmp_path / "model").exists()


def test_a_lora_run_becomes_a_whole_model(export, lora_run, base_model, tmp_path):
    export(lora_run, tmp_path / "model")
    generator = StoryGenerator.from_pretrained(tmp_path / "model")
    base = load_story_dit(base_model / "transformer")
    assert generator.dit.state_dict().keys() == base.state_dict().keys()
    learned = read_network(lora_run, newest_checkpoint(lora_run), "ema")
    merged, unmerged = velocity(generator.dit), velocity(learned)
    assert (merged - unmerged).abs().max() <= 1e-5 < (unmerged - velocity(base)).abs().max()
    provenance = json.loads((tmp_path / "model" / "story_model.json").read_text())["provenance"]
    assert provenance["base"]["weights"] == str(base_model)
    frames = generator.generate(Story([Event(1, 2, "A fox runs.")]), num_steps=1, progress=False)
    assert len(frames) == 2


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_lora_run_becomes_an_adapter_of_its_base(export, lora_run, base_model, tmp_path, which):
    export(lora_run, tmp_path / "adapter", "format=lora", f"which={which}")
    dit = load_story_dit(base_model / "transformer")
    assert load_lora(dit, tmp_path / "adapter") == LoraSettings(rank=2, alpha=6)
    learned = read_network(lora_run, newest_checkpoint(lora_run), which)
    weights = learned.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dit.state_dict().items())
    about = json.loads((tmp_path / "adapter" / "provenance.json").read_text())
    assert about["provenance"]["base"]["weights"] == str(base_model)


def test_a_whole_network_is_no_adapter(export, three_steps, tmp_path):
    with pytest.raises(ValueError, match=r"trained the whole network.* model\.lora\.rank"):
        export(three_steps, tmp_path / "adapter", "format=lora")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_stock_diffusers_loads_what_it_is_given(export, wan_run, tmp_path, capsys, dtype, tolerance):
    out = export(wan_run, tmp_path / "out", "format=diffusers-wan", "verify=true", f"dtype={dtype}")
    wan = WanTransformer3DModel.from_pretrained(out, torch_dtype=getattr(torch, dtype))
    assert wan.config.in_channels == 16 and wan.blocks[0].attn1.to_q.weight.dtype == getattr(torch, dtype)
    words = capsys.readouterr().out.splitlines()[-1].split()
    difference, largest = (float(word.rstrip(",")) for word in words if "e" in word and word[0].isdigit())
    assert difference <= tolerance * largest
    weights = newest_checkpoint(wan_run).weights("ema")
    again = load_diffusers_wan(out).state_dict()
    expected = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in weights.items()}
    assert all(torch.equal(again[n], weights[n]) or torch.equal(again[n], expected[n]) for n in weights)


def test_a_network_that_diffusers_does_not_know_is_refused(export, three_steps, tmp_path):
    with pytest.raises(ValueError, match="frame_number_embedding=True"):
        export(three_steps, tmp_path / "out", "format=diffusers-wan")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("format=onnx", "story-model or lora or diffusers-wan"), ("verify=true", "format=story-model")],
)
def test_a_wrong_setting_is_one_clear_error(export, three_steps, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        export(three_steps, tmp_path / "out", override)
