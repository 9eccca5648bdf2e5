import json

import pytest
import torch

from conf.command import read_config
from infer.score_story_world import HELD_OUT, MODES, ScoreStoryWorldConfig, given_numbers, main
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.model_folder import save_story_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    config = StoryDiTConfig(2, 12, 1, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)
    codec = PcaCodec.fit(torch.rand(4, 3, 64, 64) * 2 - 1, latent_channels=4)
    info = {"frame_size": [64, 64], "num_steps": 1, "guidance_scale": 2.0, "shift": 1.0}
    save_story_model(folder, StoryDiT(config), codec, WordEncoder(), info=info)
    return folder


def score(model, out, *overrides):
    arguments = [f"weights={model}", "num_stories=3", "num_frames=3", "batch=2", f"out={out}", "device=cpu"]
    main(read_config(ScoreStoryWorldConfig, "score_story_world", [*arguments, *overrides]))
    return json.loads(out.read_text())["scores"]


@pytest.mark.parametrize("mode", MODES)
def test_truth_is_flawless_and_a_random_model_is_not(model, tmp_path, capsys, mode):
    scores = score(model, tmp_path / "scores.json", f"mode={mode}")
    assert scores["truth"]["pfa_f1"] == 1.0 and scores["truth"]["legal_rmse"] == 0.0
    assert scores["model"]["pfa_f1"] < 0.5
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["pfa_f1", f"{scores['model']['pfa_f1']:.3f}", "1.000"] for line in lines)


def test_scores_do_not_depend_on_the_batch(model, tmp_path):
    first, second = (
        score(model, tmp_path / f"{n}.json", f"batch={n}", "mode=continue", "caption=global") for n in (1, 3)
    )
    assert first["model"] == pytest.approx(second["model"], abs=0.02)


@pytest.mark.parametrize("num_frames", [2, 6, 8])
def test_every_mode_leaves_frames_to_generate_and_edits_walk_through_the_story(num_frames):
    for mode in MODES:
        for index in range(10):
            given = given_numbers(mode, num_frames, index)
            assert given <= set(range(1, num_frames + 1))
            assert len(given) < num_frames or (mode, num_frames) == ("infill", 2)
    edited = {
        number
        for index in range(num_frames)
        for number in set(range(1, num_frames + 1)) - given_numbers("edit", num_frames, index)
    }
    assert edited == set(range(1, num_frames + 1))


def test_held_out_stories_are_no_training_stories():
    from data_pipeline.write_story_world import STORIES_PER_SEED

    assert HELD_OUT >= 100 * STORIES_PER_SEED


@pytest.mark.parametrize("wrong", ["mode=draw", "caption=short", "num_stories=0", "batch=0"])
def test_wrong_settings_are_named(model, tmp_path, wrong):
    with pytest.raises(ValueError, match=wrong.split("=")[0]):
        score(model, tmp_path / "scores.json", wrong)
    assert list(tmp_path.iterdir()) == []
