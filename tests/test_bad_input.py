"""Ways to be wrong that no other test shows: one line that says what was found and expected, exit status 1.

Nothing is left under a final name. See also tests/data_pipeline/test_bad_input.py (videos and shards),
tests/infer/test_story_commands.py (stories and frames), tests/conf/test_command.py (arguments).
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conf.command import run
from data_pipeline.build_index import build_index
from data_pipeline.index_file import write_index
from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.model_folder import save_story_model
from storyanchors.story import Event, Story

SCHEMAS = {
    "generate_story": "infer.generate_story.GenerateStoryConfig",
    "continue_story": "infer.continue_story.ContinueStoryConfig",
    "score_story_world": "infer.score_story_world.ScoreStoryWorldConfig",
    "compare_scores": "infer.compare_scores.CompareScoresConfig",
    "sample_frames": "data_pipeline.sample_frames.SampleFramesConfig",
    "run_stage": "train.run_config.RunStageConfig",
    "export_weights": "train.export_weights.ExportWeightsConfig",
}
SMALL_RUN = [
    "model.num_layers=1", "model.num_attention_heads=1", "model.attention_head_dim=16", "model.ffn_dim=32",
    "model.pca_frames=8", "data.clips_per_batch=2", "data.num_workers=0", "data.holdout=0", "stage.steps=1",
    "samples.every_n_steps=0", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "world"
    write_dataset(folder, WriteStoryWorldConfig(str(folder), num_stories=3, num_frames=[2, 3], workers=1))
    build_index(folder, "truth")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model of two layers, and a story for it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    dit = StoryDiT(StoryDiTConfig(1, 16, 2, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32))
    codec = PcaCodec.fit(torch.rand(4, 3, 16, 16) * 2 - 1, latent_channels=4)
    info = {"frame_size": [16, 16], "num_steps": 1, "guidance_scale": 1.0, "shift": 1.0}
    save_story_model(folder / "model", dit, codec, WordEncoder(), info=info)
    Story([Event(1, 2, "A fox sleeps.")]).to_file(folder / "story.yaml")
    return folder / "model"


@pytest.fixture
def refused(monkeypatch, capsys) -> Callable[..., str]:
    """refused("run_stage", "run_dir=...") -> the one line of a user's error."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # as the script itself sets it

    def call(name: str, *arguments: object) -> str:
        module, schema = SCHEMAS[name].rsplit(".", 1)
        app = module.split(".")[0]
        script, settings = import_module(f"{app}.{name}"), getattr(import_module(module), schema)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run(script.main, settings, name)
        printed = capsys.readouterr().err
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert (exit.value.code, len(errors)) == (1, 1) and "Traceback" not in printed, printed
        return errors[0]

    return call


# A run


RUNS = {
    "stage.steps is 0, expected at least 1": ["stage.steps=0"],
    "log_every_n_steps is 0, expected at least 1": ["log_every_n_steps=0"],
    "since run_stage settles it: use data.packs_per_batch": ["+trainer.accumulate_grad_batches=2"],
    "resume is 'always', expected auto or never": ["resume=always"],
    "k of mask policy all_but must be at least 1, found 0": ["stage.mask_policies=[{{name: all_but, k: 0}}]"],
    "model.num_attention_heads is 0, expected at least 1": ["model.num_attention_heads=0"],
    "unknown key 'data.clips' for run_stage; known keys: data.clips_per_batch": ["+data.clips=3"],
    "Could not find 'stage/continue', expected one of": ["stage=continue"],
    "trainer.epochs is not passed on, since run_stage settles it: expected one of": ["+trainer.epochs=3"],
    "trainer.devices is 0, expected at least 1": ["trainer.devices=0"],
    "trainer.precision is 'int4', expected 32-true or bf16-mixed": ["trainer.precision=int4"],
    "model.codec: found no folder nowhere": ["model.codec=nowhere"],
    "model.base_weights: found no folder /nowhere": ["model.base_weights=/nowhere", "model.codec=its-own"],
    "model.codec=pca would fit another": ["model.base_weights=/nowhere"],
    "is a file, expected a folder": ["run_dir={data}/dataset.json/run"],
    "no index at": ["data.dataset={data}/frames"],
    "expected data.dataset=FOLDER or data.mix": ["data.dataset=null"],
    "clips_per_batch=2 is too few for 3 packs": ["data.packs_per_batch=3"],
}


@pytest.mark.parametrize("message", RUNS)
def test_a_run_that_cannot_begin_leaves_no_folder(refused, dataset, tmp_path, message):
    changes = [argument.format(data=dataset) for argument in RUNS[message]]
    usual = [f"data.dataset={dataset}", f"run_dir={tmp_path}/run", *SMALL_RUN]
    assert message.lower() in refused("run_stage", *usual, *changes).lower()
    assert list(tmp_path.iterdir()) == []


def open_index(path: Path) -> pa.Table:
    return pq.read_table(path / "index.parquet")


def without_a_column(path: Path) -> None:
    write_index(path, open_index(path).drop_columns(["story_words"]))


INDEXES = {
    "index.arrow is damaged (File is too small: 0": lambda path: (path / "index.arrow").write_bytes(b""),
    "index.arrow is damaged (Not an Arrow file": lambda path: (path / "index.arrow").write_text("key\n" * 99),
    "index.arrow was written with one of": lambda path: (path / "index.parquet").write_bytes(b"another"),
    "no index at": lambda path: (path / "index.arrow").unlink(),
    "index.arrow lacks the column story_words": without_a_column,
    "none of the 0 clips of": lambda path: write_index(path, open_index(path).slice(0, 0)),
}


@pytest.mark.parametrize("message", INDEXES)
def test_a_spoiled_index_is_named(refused, dataset, tmp_path, message):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    INDEXES[message](copy)
    assert message in refused("run_stage", f"data.dataset={copy}", f"run_dir={tmp_path}/run", *SMALL_RUN)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_damaged_settings_is_named(refused, dataset, tmp_path):
    (tmp_path / "config.yaml").write_text("stage: [")
    assert "config.yaml is damaged" in refused("export_weights", f"run_dir={tmp_path}", f"out={tmp_path}/out")


EXPORTS = {
    "which is 'best', expected ema or model": ["which=best"],
    "dtype is 'int8', expected float32 or bfloat16": ["dtype=int8"],
    "is not empty and has no story_model.json": ["out={data}"],
    "has no complete checkpoint under checkpoints/": [],
}


@pytest.mark.parametrize("message", EXPORTS)
def test_an_export_that_cannot_be_made_leaves_nothing(refused, dataset, tmp_path, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}\nsamples: {}\n")
    (tmp_path / "run" / "provenance.json").write_text("{}")
    changes = [argument.format(data=dataset) for argument in EXPORTS[message]]
    assert message in refused("export_weights", f"run_dir={tmp_path}/run", f"out={tmp_path}/out", *changes)
    assert not (tmp_path / "out").exists()


# A model folder


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def in_config(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "transformer" / "config.json", **values)


def in_model(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "story_model.json", **values)


CODEC = "codec/codec.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


MODELS = {  # what the error says, how the folder was spoiled
    "Unable to load weights from checkpoint file": lambda folder: cut(folder / WEIGHTS),
    "no file named diffusion_pytorch_model.safetensors": pickled,
    "lacks blocks.2.": in_config(num_layers=3),  # the checkpoint of another preset
    "has no place for blocks.1.": in_config(num_layers=1),
    "expected shape": in_config(num_attention_heads=2),
    "num_layers must be a whole number from 1, found 'two'": in_config(num_layers="two"),
    "unknown keys ['image_dim'] in a StoryDiT config": in_config(image_dim=1280),
    "qk_norm is 'rms', expected rms_norm_across_heads or rms_norm": in_config(qk_norm="rms"),
    "codec.safetensors is not a complete safetensors file": lambda folder: cut(folder / CODEC),
    "is no PcaCodec: it lacks 'patch'": lambda folder: (folder / "codec/config.json").write_text(
        '{"_class_name": "PcaCodec", "scale": 1.0}'
    ),
    "holds list, expected a JSON object": lambda folder: (folder / "story_model.json").write_text("[]"),
    "frame_size is [64], expected [height, width] in pixels": in_model(frame_size=[64]),
    "guidance_scale is None, expected a number": in_model(guidance_scale=None),
    "num_steps is 'many', expected a number": in_model(num_steps="many"),
    "codec is {'ref': 'x'}, expected a folder or": in_model(codec={"ref": "x"}),
}  # fmt: skip


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("message", MODELS)
def test_a_spoiled_model_folder_is_refused_whole(refused, model, tmp_path, message):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    MODELS[message](copy)
    arguments = (f"weights={copy}", f"story={model.parent}/story.yaml", f"out={tmp_path}/out", "device=cpu")
    assert message in refused("generate_story", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


REQUESTS = {
    "is more than 16777216 pixels": ["height=2000000"],
    "shift must be a number above 0, found 0.0": ["shift=0"],
    "fps must be a number above 0 or unknown (None), found inf": ["fps=inf"],
    "Is a directory": ["story={folder}"],
    "story.txt: a story must be a mapping, found str": ["story={folder}/story.txt"],
    "the caption has": ["story={folder}/long.yaml"],
}


@pytest.mark.parametrize("message", REQUESTS)
def test_a_request_that_cannot_be_met_is_refused_at_once(refused, model, tmp_path, message):
    (tmp_path / "story.txt").write_text("Once upon a time")
    Story([Event(1, 1, "and " * 5000)]).to_file(tmp_path / "long.yaml")
    changes = [argument.format(folder=tmp_path) for argument in REQUESTS[message]]
    usual = [f"weights={model}", f"story={model.parent}/story.yaml", f"out={tmp_path}/out", "device=cpu"]
    assert message in refused("generate_story", *usual, *changes)
    assert not (tmp_path / "out").exists()


def test_scores_know_where_to_go_before_the_work_begins(refused, model, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = (f"weights={tmp_path}/nowhere", "num_stories=1", f"out={tmp_path}/file/scores.json")
    assert "file" in refused("score_story_world", *arguments)  # not: found no model


def test_what_is_no_score_file_is_named(refused, tmp_path):
    (tmp_path / "scores.json").write_text('{"model": 1}')
    assert "scores.json is no score file" in refused("compare_scores", f"scores=[{tmp_path}/scores.json]")
    assert "scores is empty" in refused("compare_scores", "scores=[]")


def test_a_list_of_videos_that_is_no_text_is_named(refused, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfea.mp4")
    arguments = (f"videos={tmp_path}/list.txt", f"out={tmp_path}/out")
    assert "list.txt is not a list of videos in UTF-8" in refused("sample_frames", *arguments)
    assert not (tmp_path / "out").exists()
