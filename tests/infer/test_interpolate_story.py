"""interpolate_story.py as a person runs it; what a film is made of: tests/infer/film."""

import io
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from conf.command import run
from infer.interpolate_story import InterpolateStoryConfig, main
from infer.story_project import StoryProject
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.model_folder import save_story_model
from storyanchors.story import Event, Story
from storyanchors.story_edit import edit_frames

STORY = Story([Event(1, 2, "A fox sleeps."), Event(3, 4, "The fox runs.")], ["a fox"], "ink")


def interpolate(*overrides):
    """Exit status, stdout and the one line of stderr of `python infer/interpolate_story.py ...`."""
    stdout, stderr, argv, handler = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["interpolate_story", "device=cpu", *map(str, overrides)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            run(main, InterpolateStoryConfig, "interpolate_story")
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return status, stdout.getvalue(), stderr.getvalue().splitlines()[-1:]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tiny random model, a story and four frames."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    config = StoryDiTConfig(1, 12, 1, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)
    codec = PcaCodec.fit(torch.rand(8, 3, 16, 24) * 2 - 1, latent_channels=4)
    info = {"frame_size": [16, 24], "num_steps": 2, "guidance_scale": 1.0, "shift": 1.0}
    save_story_model(folder / "model", StoryDiT(config), codec, WordEncoder(), info=info)
    STORY.to_file(folder / "story.yaml")
    (folder / "frames").mkdir()
    for number in range(1, 5):
        picture(number).save(folder / "frames" / f"{number:03d}.png")
    return folder


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def source(shared):
    return f"frames={shared}/frames", f"story={shared}/story.yaml"


def frame_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "frames").glob("*.png")}


@pytest.mark.parametrize("interpolator", ["blend", "story"])
def test_a_film_has_the_frames_of_the_story_in_place_and_can_be_made_again(shared, tmp_path, interpolator):
    arguments = (
        *source(shared),
        f"interpolator={interpolator}",
        f"weights={shared}/model",
        "frame_interval=2",
    )
    status, stdout, _ = interpolate(*arguments, f"out={tmp_path}/one.mp4")
    assert status == 0 and f"{tmp_path}/one.parts" in stdout
    frames = frame_files(tmp_path / "one.parts")
    assert sorted(frames) == [f"{number:06d}.png" for number in range(10)]
    for number in range(4):
        anchor = (shared / "frames" / f"{number + 1:03d}.png").read_bytes()
        assert frames[f"{3 * number:06d}.png"] == anchor
    assert interpolate(*arguments, f"out={tmp_path}/two.mp4")[0] == 0
    assert frame_files(tmp_path / "two.parts") == frames
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.mp4",
        "one.parts",
        "two.mp4",
        "two.parts",
    ]


def test_seed_and_settings_change_what_is_drawn(shared, tmp_path):
    arguments = (*source(shared), "interpolator=story", f"weights={shared}/model", f"out={tmp_path}/film.mp4")
    seen = []
    for changed in ("seed=0", "seed=1", "num_steps=3", "fps=12", "seed=0"):
        assert interpolate(*arguments, "frame_interval=2", changed)[0] == 0
        seen.append(frame_files(tmp_path / "film.parts")["000001.png"])
    assert seen[0] == seen[-1] and len(set(seen)) >= 3


def test_a_project_is_filmed_as_it_is_now(shared, tmp_path):
    frames = {number: picture(number) for number in range(1, 5)}
    project = StoryProject.create(tmp_path / "project", STORY, frames, {})
    arguments = (f"project={tmp_path}/project", f"out={tmp_path}/film.mp4", "frame_interval=1")
    assert interpolate(*arguments)[0] == 0
    before = frame_files(tmp_path / "film.parts")
    project.commit(edit_frames(STORY, {4: "It snows."}), {4: picture(9)}, {})
    assert interpolate(*arguments)[0] == 0
    after = frame_files(tmp_path / "film.parts")
    assert [name for name in sorted(after) if after[name] != before[name]] == ["000005.png", "000006.png"]
    assert Image.open(tmp_path / "film.parts" / "frames" / "000006.png").tobytes() == picture(9).tobytes()


def test_a_stopped_film_is_resumable_and_becomes_the_same(shared, tmp_path):
    arguments = (*source(shared), "interpolator=story", f"weights={shared}/model", "frame_interval=3")
    arguments = (*arguments, "num_steps=40")
    gaps = tmp_path / "stopped.parts" / "gaps"

    def stop_after_one_gap():
        deadline = time.monotonic() + 60
        while not (gaps.is_dir() and list(gaps.glob("[!.]*"))) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_after_one_gap)
    thread.start()
    status, _, stderr = interpolate(*arguments, f"out={tmp_path}/stopped.mp4")
    thread.join()
    assert status == 75 and "the same command goes on" in stderr[0]
    assert not (tmp_path / "stopped.mp4").exists() and 1 <= len(list(gaps.glob("[!.]*"))) < 3
    assert interpolate(*arguments, f"out={tmp_path}/stopped.mp4")[0] == 0
    assert interpolate(*arguments, f"out={tmp_path}/film.mp4")[0] == 0
    assert frame_files(tmp_path / "stopped.parts") == frame_files(tmp_path / "film.parts")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ["interpolator=rife"],
            "unknown interpolator 'rife', expected one of blend, story, wan_flf, wan_i2v",
        ),
        (["interpolator=story"], "interpolator=story needs weights=..."),
        (["interpolator=story", "weights=nowhere"], "nowhere is not a model folder"),
        (["interpolator=wan_flf", "weights=nowhere"], "weights=nowhere is no folder and no hub id"),
        (
            ["interpolator=wan_flf", "weights=a/b", "sampler=unipc"],
            "sampler is a setting of interpolator=story",
        ),
        (["interpolator=story", "weights=x", "seed=-1"], "seed must not be below 0, found -1"),
        (["frame_interval=-1"], "frame_interval=-1, expected 0 to 1000"),
        (["frame_interval=1.5"], "frame_interval"),
        (
            ["project=here"],
            "expected project=... or frames=... and story=..., found project and frames and story",
        ),
        (["story=null"], "found frames"),
        (["out=film.gif"], "out=film.gif must be the name of an .mp4 file"),
    ],
)
def test_errors_say_in_one_line_what_was_found_and_expected(shared, tmp_path, overrides, expected):
    status, _, stderr = interpolate(*source(shared), f"out={tmp_path}/film.mp4", *overrides)
    assert status == 1 and stderr[0].startswith("error: ") and expected in stderr[0]
    assert not list(tmp_path.glob("*.mp4"))


def test_frames_that_do_not_fit_the_story_are_named(shared, tmp_path):
    (tmp_path / "frames").mkdir()
    arguments = f"frames={tmp_path}/frames", f"story={shared}/story.yaml", f"out={tmp_path}/film.mp4"
    for number, expected in ((1, "two story frames or more, found 1"), (3, "but not [2]")):
        picture(number).save(tmp_path / "frames" / f"{number}.png")
        status, _, stderr = interpolate(*arguments)
        assert status == 1 and expected in stderr[0]


def test_without_pyav_the_extra_is_named(shared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    status, _, stderr = interpolate(*source(shared), f"out={tmp_path}/film.mp4")
    assert status == 1 and "pip install -e '.[video]'" in stderr[0]
