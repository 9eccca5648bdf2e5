import pytest
import torch
from safetensors.torch import load_file

from conf.command import read_config
from storyanchors.generator import StoryGenerator
from storyanchors.story import Event, Story
from train.export_weights import ExportWeightsConfig, main


def export(run_dir, out, *more: str) -> None:
    main(read_config(ExportWeightsConfig, "export_weights", [f"run_dir={run_dir}", f"out={out}", *more]))


@pytest.mark.parametrize("which", ["ema", "model"])
def test_an_export_holds_the_weights_of_the_newest_checkpoint(three_steps, tmp_path, which):
    export(three_steps, tmp_path / "model", f"which={which}")
    generator = StoryGenerator.from_pretrained(tmp_path / "model")
    checkpoint = load_file(three_steps / "checkpoints" / "step_00000003" / f"{which}.safetensors")
    weights = generator.dit.state_dict()
    assert weights.keys() == checkpoint.keys()
    assert all(torch.equal(weights[name], checkpoint[name]) for name in weights)
    assert generator.frame_size == (64, 64)
    frames = generator.generate(Story([Event(1, 2, "A fox runs.")]), num_steps=1, progress=False)
    assert len(frames) == 2


def test_an_export_can_begin_another_stage(train, three_steps, tmp_path):
    export(three_steps, tmp_path / "model", "dtype=bfloat16")
    run_dir = train(
        tmp_path / "next", "stage=multi_event", f"init_from={tmp_path / 'model'}", "stage.steps=1"
    )
    assert (run_dir / "codec" / "codec.safetensors").is_file()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        export(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
