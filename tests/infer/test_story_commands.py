"""generate_story.py and continue_story.py as a person runs them."""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf.command import run
from infer import continue_story, generate_story
from infer.story_run import StoryRunConfig
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.model_folder import save_story_model
from storyanchors.story import Event, Story

ROOT = Path(generate_story.__file__).parents[1]
COMMANDS = {
    "generate_story": (generate_story.main, StoryRunConfig),
    "continue_story": (continue_story.main, continue_story.ContinueStoryConfig),
}
STORY = Story([Event(1, 2, "A fox sleeps."), Event(2, 4, "The fox runs.")], ["a fox"], "ink")


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def command(script, *overrides):
    """What `python infer/<script>.py ...` does, in this process: importing torch takes seconds every time."""
    stdout, stderr, argv = io.StringIO(), io.StringIO(), sys.argv
    main, schema = COMMANDS[script]
    sys.argv = [script, "device=cpu", *map(str, overrides)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            run(main, schema, script)
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.argv = argv
    return Result(status, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tiny random model, a story of four frames and its generated frames."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    config = StoryDiTConfig(2, 12, 2, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)
    codec = PcaCodec.fit(torch.rand(8, 3, 16, 16) * 2 - 1, latent_channels=4)
    info = {"frame_size": [16, 24], "num_steps": 2, "guidance_scale": 2.0, "shift": 1.0}
    save_story_model(folder / "model", StoryDiT(config), codec, WordEncoder(), info=info)
    STORY.to_file(folder / "story.yaml")
    result = generate(folder, folder / "first", "seed=5")
    assert result.returncode == 0, result.stderr
    return folder


def generate(shared, out, *overrides):
    arguments = (f"weights={shared}/model", f"story={shared}/story.yaml", f"out={out}", *overrides)
    return command("generate_story", *arguments)


def continue_(shared, out, *overrides):
    settings = {
        "weights": shared / "model",
        "story": shared / "story.yaml",
        "frames": shared / "first",
        "out": out,
    }
    settings |= dict(override.split("=", 1) for override in overrides)
    return command("continue_story", *(f"{key}={value}" for key, value in settings.items()))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_leaves_frames_sheet_story_and_what_it_takes_to_repeat_it(shared):
    out = shared / "first"
    names = ["001.png", "002.png", "003.png", "004.png", "contact_sheet.png", "run.json", "story.yaml"]
    assert sorted(contents(out)) == names
    assert Story.from_file(out / "story.yaml") == STORY
    assert {Image.open(out / name).size for name in names[:4]} == {(24, 16)}
    record = json.loads((out / "run.json").read_text())
    weights = next((shared / "model" / "transformer").glob("*.safetensors"))
    assert record["weights_sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert (record["seed"], record["num_steps"], record["num_frames"], record["given"]) == (5, 2, 4, {})


def test_same_seed_same_bytes_and_an_earlier_result_is_replaced(shared, tmp_path):
    out = tmp_path / "again"
    assert generate(shared, out, "seed=6").returncode == 0
    other = contents(out)
    result = generate(shared, out, "seed=5")
    assert result.returncode == 0 and str(out) in result.stdout
    assert contents(out) == contents(shared / "first") != other
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize("keep", ["[1]", "[1,2,4]", "[4,1]", "[3]"])
def test_kept_frames_are_byte_identical_and_the_others_are_drawn(shared, tmp_path, keep):
    result = continue_(shared, tmp_path / "out", f"keep={keep}", "seed=9")
    assert result.returncode == 0, result.stderr
    before, after = contents(shared / "first"), contents(tmp_path / "out")
    for number in range(1, 5):
        name = f"{number:03d}.png"
        assert (after[name] == before[name]) == (number in json.loads(keep))
    assert sorted(json.loads(after["run.json"])["given"], key=int) == sorted(map(str, json.loads(keep)))


def test_all_frames_of_the_folder_are_kept_unless_told_otherwise(shared, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    picture.save(frames / "2.png", comment="kept as a file, not only as pixels")
    picture.save(frames / "003.jpg")
    picture.save(frames / "cover.png")
    result = continue_(shared, tmp_path / "out", f"frames={frames}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "002.png").read_bytes() == (frames / "2.png").read_bytes()
    decoded = [np.asarray(Image.open(path)) for path in (frames / "003.jpg", tmp_path / "out" / "003.png")]
    np.testing.assert_array_equal(*decoded)
    assert set(json.loads((tmp_path / "out" / "run.json").read_text())["given"]) == {"2", "3"}


def test_the_folder_of_a_run_may_be_edited_in_place(shared, tmp_path):
    folder = tmp_path / "story"
    shutil.copytree(shared / "first", folder)
    before = contents(folder)
    result = continue_(shared, folder, f"frames={folder}", "keep=[1,2,4]", "seed=77")
    assert result.returncode == 0, result.stderr
    changed = {name for name, content in contents(folder).items() if content != before[name]}
    assert changed == {"003.png", "contact_sheet.png", "run.json"}


@pytest.mark.parametrize("target", [["infer/continue_story.py"], ["-m", "infer.continue_story"]])
def test_scripts_run_by_path_and_as_modules(shared, tmp_path, target):
    arguments = [
        f"weights={shared}/model",
        f"story={shared}/story.yaml",
        f"frames={shared}/first",
        "keep=[2]",
    ]
    process = [sys.executable, *target, *arguments, f"out={tmp_path}/out", "device=cpu"]
    done = subprocess.run(process, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "002.png").read_bytes() == (shared / "first" / "002.png").read_bytes()


def png_that_claims(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, body: (  # noqa: E731
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def broken(shared):
    """Folders and files that are wrong in one way each."""
    folder = shared / "broken"
    for name in (
        "empty",
        "twice",
        "text",
        "bomb",
        "large",
        "truncated",
        "wide",
        "alpha",
        "busy",
        "halfmodel",
    ):
        (folder / name).mkdir(parents=True)
    frame = Image.open(shared / "first" / "001.png")
    frame.save(folder / "twice" / "001.png")
    frame.save(folder / "twice" / "1.jpg")
    (folder / "text" / "001.png").write_text("not a picture")
    (folder / "bomb" / "001.png").write_bytes(png_that_claims(50_000, 50_000))
    (folder / "large" / "001.png").write_bytes(png_that_claims(5_000, 4_000))
    whole = (shared / "first" / "001.png").read_bytes()
    (folder / "truncated" / "001.png").write_bytes(whole[: len(whole) // 2])
    frame.resize((32, 16)).save(folder / "wide" / "001.png")
    frame.convert("RGBA").save(folder / "alpha" / "001.png")
    (folder / "busy" / "diary.txt").write_text("mine")
    shutil.copytree(shared / "model", folder / "halfmodel", dirs_exist_ok=True)
    shutil.rmtree(folder / "halfmodel" / "codec")
    (folder / "gap.yaml").write_text(
        "events: [{frames: [1, 1], description: a}, {frames: [3, 3], description: b}]"
    )
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize(
    "overrides, found",
    [
        (["sede=5"], "did you mean 'seed'"),
        (["seed=five"], "seed"),
        (["seed=-1"], "seed must not be below 0"),
        (["weights={broken}/nowhere"], "not a model folder"),
        (["weights={broken}/halfmodel"], "codec"),
        (["story={broken}/gap.yaml"], "no event covers frame 2"),
        (["story={broken}/nowhere.yaml"], "nowhere.yaml"),
        (["frames={broken}/nowhere"], "not a folder"),
        (["frames={broken}/empty"], "no numbered frames"),
        (["frames={broken}/twice", "keep=[1]"], "frame 1 twice"),
        (["frames={broken}/text"], "001.png"),
        (["frames={broken}/bomb"], "001.png"),
        (["frames={broken}/large"], "5000 x 4000"),
        (["frames={broken}/truncated"], "001.png"),
        (["frames={broken}/wide"], "32 x 16 pixels, expected 24 x 16"),
        (["frames={broken}/alpha"], "RGBA"),
        (["keep=[1,9]"], "[9]"),
        (["keep=[1,2,3,4]"], "none to generate"),
        (["num_frames=3", "keep=[1]"], "num_frames=3"),
        (["keep=[1]", "height=20"], "height=20"),
        (["keep=[1]", "sampler=ddim"], "ddim"),
        (["keep=[1]", "num_steps=0"], "num_steps=0"),
        (["keep=[1]", "guidance_scale=.nan"], "guidance_scale"),
        (["keep=[1]", "fps=0"], "fps"),
        (["keep=[1]", "dtype=int8"], "int8"),
        (["keep=[1]", "device=tpu"], "device=tpu"),
        (["keep=[1]", "out={broken}/busy"], "not empty"),
        (["keep=[1]", "out={broken}/file/out"], "is a file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(shared, broken, tmp_path, overrides, found):
    before = sorted(str(path) for path in broken.rglob("*"))
    result = continue_(shared, tmp_path / "out", *(text.format(broken=broken) for text in overrides))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and found in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(str(path) for path in broken.rglob("*")) == before


def test_what_is_missing_is_named(shared, tmp_path):
    result = command("generate_story", f"out={tmp_path / 'out'}")
    assert result.returncode == 1 and "weights" in result.stderr and "Traceback" not in result.stderr
