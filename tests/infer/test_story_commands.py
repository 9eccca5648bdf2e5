"""generate_story.py, continue_story.py and restore_story.py as a person runs them."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf.command import run
from infer import continue_story, generate_story, restore_story
from infer.project.unfinished import UnfinishedFrames
from infer.shown_story import read_shown
from infer.story_page import story_page
from infer.story_project import StoryProject
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.generator import StoryGenerator
from storyanchors.lora import LoraSettings, add_lora, save_lora
from storyanchors.model_folder import save_story_model
from storyanchors.story import Event, Story

ROOT = Path(generate_story.__file__).parents[1]
COMMANDS = {
    "generate_story": (generate_story.main, generate_story.GenerateStoryConfig),
    "continue_story": (continue_story.main, continue_story.ContinueStoryConfig),
    "restore_story": (restore_story.main, restore_story.RestoreStoryConfig),
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
    device = [] if script == "restore_story" else ["device=cpu"]
    sys.argv = [script, *device, *map(str, overrides)]
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


def change(project, *overrides):
    result = command("continue_story", f"project={project}", *overrides)
    assert result.returncode == 0, result.stderr
    return result


def restore(project, *overrides):
    return command("restore_story", f"project={project}", *overrides)


def frames_of(project):
    return [path.read_bytes() for path in sorted((project / "frames").iterdir())]


def shown(project):
    """All that people see of a project."""
    return [(project / name).read_bytes() for name in ("story.yaml", "contact_sheet.png")] + frames_of(
        project
    )


def everything(project):
    """All files but the lock, which says who held it last."""
    paths = [path for path in project.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(project): path.read_bytes() for path in paths}


def records(project):
    return [json.loads(line) for line in (project / "history.jsonl").read_text().splitlines()[1:]]


@pytest.fixture
def project(shared, tmp_path):
    return Path(shutil.copytree(shared / "first", tmp_path / "project"))


def test_a_run_leaves_frames_sheet_story_and_what_it_takes_to_repeat_it(shared):
    out = shared / "first"
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {"contact_sheet.png", "frames", "history.jsonl", "objects", "story.yaml"}
    assert [path.name for path in sorted((out / "frames").iterdir())] == [f"00{n}.png" for n in range(1, 5)]
    assert Story.from_file(out / "story.yaml") == STORY
    assert {Image.open(path).size for path in (out / "frames").iterdir()} == {(24, 16)}
    [line] = records(out)
    weights = next((shared / "model" / "transformer").glob("*.safetensors"))
    record = line["record"]
    assert record["weights_sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert (record["seed"], record["settings"]["num_steps"], record["device"]) == (5, 2, "cpu")
    assert (line["version"], line["parent"], line["kept"], line["given"]) == (1, None, {}, {})


def test_same_command_and_seed_same_bytes(shared, tmp_path):
    assert generate(shared, tmp_path / "again", "seed=5").returncode == 0
    assert generate(shared, tmp_path / "other", "seed=6").returncode == 0
    assert shown(tmp_path / "again") == shown(shared / "first") != shown(tmp_path / "other")


def test_what_a_command_drew_already_is_not_drawn_again(shared, project):
    before = shown(project)
    assert generate(shared, project, "seed=6").returncode == 0
    assert [line["version"] for line in records(project)] == [1, 2] and shown(project) != before
    again = generate(shared, project, "seed=6")
    assert again.returncode == 0 and "by this very command" in again.stdout and len(records(project)) == 2
    assert generate(shared, project, "seed=5").returncode == 0  # as the first version, so it is a new one
    assert len(records(project)) == 3 and shown(project) == before


@pytest.mark.parametrize("keep", ["[1]", "[1,2,4]", "[4,1]", "3"])
def test_kept_frames_are_byte_identical_and_the_others_are_drawn(shared, tmp_path, keep):
    result = continue_(shared, tmp_path / "out", f"keep={keep}", "seed=9")
    assert result.returncode == 0, result.stderr
    kept = {3} if keep == "3" else set(json.loads(keep))
    pairs = zip(frames_of(shared / "first"), frames_of(tmp_path / "out"), strict=True)
    assert {number for number, (before, after) in enumerate(pairs, start=1) if before == after} == kept
    assert set(map(int, records(tmp_path / "out")[0]["given"])) == kept


def test_all_frames_of_the_folder_are_kept_unless_told_otherwise(shared, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    picture.save(frames / "2.png", comment="kept as a file, not only as pixels")
    picture.save(frames / "003.jpg")
    picture.save(frames / "cover.png")
    result = continue_(shared, tmp_path / "out", f"frames={frames}")
    assert result.returncode == 0, result.stderr
    drawn = tmp_path / "out" / "frames"
    assert (drawn / "002.png").read_bytes() == (frames / "2.png").read_bytes()
    decoded = [np.asarray(Image.open(path)) for path in (frames / "003.jpg", drawn / "003.png")]
    np.testing.assert_array_equal(*decoded)
    assert set(records(tmp_path / "out")[0]["given"]) == {"2", "3"}


def test_the_folder_of_a_project_may_be_edited_in_place(shared, project):
    before = frames_of(project)
    result = continue_(shared, project, f"frames={project}", "keep=[1,2,4]", "seed=77")
    assert result.returncode == 0, result.stderr
    assert [new == old for new, old in zip(frames_of(project), before, strict=True)] == [1, 1, 0, 1]
    assert records(project)[1]["kept"] == {"1": 1, "2": 2, "4": 4} and records(project)[1]["parent"] == 1


OPERATIONS = {  # what is typed: which old frame stands where, None = drawn
    ("infill=[2,4]",): [1, None, 3, None],
    ("infill=3",): [1, 2, None, 4],
    ("infill=2-3",): [1, None, None, 4],
    ("edit=3", "text=in the cave, the fox's den (dark)"): [1, 2, None, 4],
    ("edit=[1,2]", 'text="Stop," she says'): [None, None, 3, 4],
    ("insert=2", "text=A king comes, alone."): [1, 2, None, 3, 4],
    ("insert=0", "text=A road.", "num_frames=2"): [None, None, 1, 2, 3, 4],
    ("extend_right=3", "text=The end."): [1, 2, 3, 4, None, None, None],
    ("extend_left=1", "text=A road."): [None, 1, 2, 3, 4],
    ("delete=[2,3]",): [1, 4],
    ("story={shared}/other.yaml", "keep=[2]"): [None, 2, None],
    ("story={shared}/other.yaml", "keep=[]"): [None, None, None],
    ("story={shared}/longer.yaml",): [1, 2, 3, 4, None],
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_an_operation_draws_its_frames_and_no_others(shared, project, operation):
    Story([Event(1, 3, "A king sleeps.")]).to_file(shared / "other.yaml")
    Story([Event(1, 4, "A king sleeps."), Event(5, 5, "He wakes.")]).to_file(shared / "longer.yaml")
    before, expected = frames_of(project), OPERATIONS[operation]
    change(project, *(argument.format(shared=shared) for argument in operation), "seed=1")
    after = frames_of(project)
    assert len(after) == len(expected) == Story.from_file(project / "story.yaml").num_frames
    assert [before.index(frame) + 1 if frame in before else None for frame in after] == expected
    if text := [argument[5:] for argument in operation if argument.startswith("text=")]:
        assert f"{text[0]}" in [event.description for event in Story.from_file(project / "story.yaml").events]
    assert restore(project, "--undo").returncode == 0
    assert frames_of(project) == before and Story.from_file(project / "story.yaml") == STORY


def test_an_operation_can_begin_a_new_project_instead(shared, project, tmp_path):
    change(project, "infill=2", "seed=2")
    before = shown(project), records(project)
    change(project, "delete=1", f"out={tmp_path}/other")
    result = change(project, "infill=1", f"out={tmp_path}/another", "seed=3")
    assert f"{tmp_path}/another: version 2, redraw frame 1\n" in result.stdout
    assert (shown(project), records(project)) == before
    assert frames_of(tmp_path / "other") == frames_of(project)[1:]
    assert frames_of(tmp_path / "another")[1:] == frames_of(project)[1:]
    assert restore(tmp_path / "other", "version=1").returncode == 0
    assert frames_of(tmp_path / "other") == frames_of(project)


def test_what_the_project_was_drawn_with_is_what_it_goes_on_with(shared, project):
    change(project, "infill=2", "seed=1", "fps=24", "frame_interval=69")
    change(project, "delete=1")
    change(project, "infill=1", "seed=2", "frame_interval=139", "num_steps=3")
    first, second, _, third = (line["record"] for line in records(project))
    assert first["weights"] == second["weights"] == third["weights"] == str(shared / "model")
    names = ("fps", "frame_interval", "motion")
    conditions = [[record["conditions"][name] for name in names] for record in (first, second, third)]
    assert conditions == [[None, None, None], [24, 69, None], [24, 139, None]]
    assert [record["settings"]["num_steps"] for record in (first, second, third)] == [2, 2, 3]


def test_the_precision_of_a_project_is_what_it_goes_on_with(shared, project, tmp_path):
    change(project, "infill=2", "seed=1", "dtype=bfloat16")
    change(project, "infill=3", "seed=2")
    change(project, "infill=3", "seed=3", "dtype=float32")
    dtypes = [line["record"]["dtype"] for line in records(project)]
    assert dtypes == ["float32", "bfloat16", "bfloat16", "float32"]
    change(project, "infill=3", "seed=4", "dtype=bfloat16")
    change(project, "infill=4", f"out={tmp_path}/other")
    assert records(tmp_path / "other")[1]["record"]["dtype"] == "bfloat16"
    page = story_page(read_shown(str(project)), project)
    assert "seed 4, num_steps 2" in page and "dtype bfloat16" in page


def test_opaque_frames_are_taken_and_stay_as_files(shared, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    first = Image.open(shared / "first" / "frames" / "001.png")
    first.convert("RGBA").save(frames / "001.png")
    result = continue_(shared, tmp_path / "out", f"frames={frames}")
    assert result.returncode == 0, result.stderr
    assert frames_of(tmp_path / "out")[0] == (frames / "001.png").read_bytes()
    change(tmp_path / "out", "infill=2", "seed=3")


def test_an_extension_that_is_done_twice_says_so(project):
    once = change(project, "extend_right=1", "text=The end.", "seed=1").stdout
    assert "1 frame drawn, 4 kept" in once and "twice" not in once
    twice = change(project, "extend_right=1", "text=The end.", "seed=1").stdout
    assert (
        "twice" in twice and f"python infer/restore_story.py project={project} --undo takes it back" in twice
    )
    change(project, "delete=6")
    other = change(project, "extend_right=1", "text=The end.", "seed=2").stdout
    assert "twice" not in other


def test_what_changes_nothing_is_said_in_one_line(shared, project):
    result = change(project, f"story={shared}/story.yaml")
    assert result.stdout == f"{project}: nothing changes, it stays as version 1\n"
    assert len(records(project)) == 1
    assert "infill=" not in change(project, "delete=4").stdout


def test_a_stray_frame_does_not_hide_the_history_nor_keep_locks_shut(project):
    stray = project / "frames" / "009.png"
    shutil.copy(project / "frames" / "001.png", stray)
    listed = restore(project)
    assert listed.returncode == 0 and "changed by hand: frames/009.png" in listed.stdout
    assert "> " + "  1" in listed.stdout and stray.exists()
    assert "locked: 2" in restore(project, "lock=2").stdout and stray.exists()
    refused = restore(project, "--undo")
    assert refused.returncode == 1 and f"python infer/restore_story.py project={project}" in refused.stderr


def test_ctrl_c_late_in_an_extension_says_that_windows_are_kept(project, monkeypatch):
    keep, arguments = UnfinishedFrames.keep, ["extend_right=6", "text=The end.", "window=4", "overlap=2"]

    def keep_and_press_ctrl_c(self, *args):
        keep(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(UnfinishedFrames, "keep", keep_and_press_ctrl_c)
        stopped = command("continue_story", f"project={project}", *arguments)
    assert stopped.returncode == 75 and "finished windows are kept in" in stopped.stderr
    assert "the same command goes on" in stopped.stderr and len(records(project)) == 1
    index = next(project.glob("unfinished/*/windows.json"))
    whole = index.read_bytes()
    index.write_bytes(whole[:9])
    damaged = command("continue_story", f"project={project}", *arguments)
    assert damaged.returncode == 1 and f"{index} is damaged: remove {index.parent}" in damaged.stderr
    index.write_bytes(whole)
    change(project, *arguments)
    assert len(frames_of(project)) == 10


def test_a_version_that_is_finished_when_ctrl_c_comes_is_kept_and_not_made_again(project, monkeypatch):
    def press_ctrl_c(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StoryProject, "_show", press_ctrl_c)
        patched.setattr(StoryProject, "_mend", lambda self, by_hand: None)
        stopped = command("continue_story", f"project={project}", "extend_right=1", "text=The end.")
    assert stopped.returncode == 75 and f"the new version of {project} is finished" in stopped.stderr
    assert restore(project).returncode == 0 and len(frames_of(project)) == 5


def test_the_adapter_that_drew_a_project_goes_on_with_it(shared, project, tmp_path):
    adapted = StoryGenerator.from_pretrained(shared / "model").dit
    add_lora(adapted, LoraSettings(rank=2))
    save_lora(adapted, tmp_path / "adapter")
    change(project, "infill=2", f"lora={tmp_path}/adapter")
    change(project, "infill=3")
    change(project, "infill=4", f"weights={shared}/model")
    loras = [line["record"].get("lora") for line in records(project)]
    assert loras == [None, f"{tmp_path}/adapter", f"{tmp_path}/adapter", None]


def test_what_was_done_can_be_seen_and_taken_back(project):
    change(project, "delete=4")
    change(project, "insert=1", "text=A king comes.")
    listed = restore(project).stdout
    assert "delete frame 4" in listed and "> " + "  3" in listed and f"{project} shows version 3" in listed
    assert "shows version 1" in restore(project, "version=1").stdout
    assert "shows version 3" in restore(project, "--undo").stdout
    assert "shows version 1" in restore(project, "--redo").stdout
    assert "locked: 1, 3" in restore(project, "lock=[1,3]").stdout
    refused = command("continue_story", f"project={project}", "infill=[1,2]")
    assert refused.returncode == 1 and "frames [1] of" in refused.stderr and "locked" in refused.stderr
    assert f"python infer/restore_story.py project={project} unlock=[1]" in refused.stderr
    assert "locked: 3" in restore(project, "unlock=1").stdout
    change(project, "infill=[1,2]", "seed=8")


def test_a_preview_shows_what_is_drawn(shared, tmp_path):
    result = generate(
        shared, tmp_path / "out", f"preview={tmp_path}/look/preview.png", "height=32", "width=32"
    )
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "look" / "preview.png").width > 4 * 32
    assert [path.name for path in (tmp_path / "look").iterdir()] == ["preview.png"]


def test_a_killed_command_goes_on_where_it_was_and_draws_the_same(shared, tmp_path):
    Story([Event(1, 12, "A fox sleeps.")]).to_file(shared / "long.yaml")
    arguments = [
        f"weights={shared}/model",
        f"story={shared}/long.yaml",
        "window=4",
        "overlap=2",
        "device=cpu",
    ]
    arguments += ["num_steps=60"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(
        [sys.executable, "infer/generate_story.py", *arguments, f"out={killed}"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not list(killed.glob("unfinished/*/windows.json")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    done = json.loads(next(killed.glob("unfinished/*/windows.json")).read_text())["windows"]
    assert process.returncode == -signal.SIGKILL and 1 <= done < 5
    result = command("generate_story", *arguments, f"out={killed}")
    assert result.returncode == 0, result.stderr
    assert command("generate_story", *arguments, f"out={whole}").returncode == 0
    assert shown(killed) == shown(whole)
    assert not (killed / "unfinished").exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_says_so_and_goes_on(shared, tmp_path, stop):
    Story([Event(1, 12, "A fox sleeps.")]).to_file(shared / "stopped.yaml")
    out = tmp_path / "out"
    arguments = [f"weights={shared}/model", f"story={shared}/stopped.yaml", "window=4", "overlap=2"]

    def stop_after_a_window():
        while not list(out.glob("unfinished/*/windows.json")):
            time.sleep(0.005)
        os.kill(os.getpid(), stop)

    thread = threading.Thread(target=stop_after_a_window, daemon=True)
    thread.start()
    arguments += [f"out={out}", "num_steps=30"]
    result = command("generate_story", *arguments)
    assert result.returncode == 75 and "the same command goes on" in result.stderr, result.stderr
    assert command("generate_story", *arguments).returncode == 0
    assert len(frames_of(out)) == 12


def test_scripts_run_as_modules(project):
    done = subprocess.run(
        [sys.executable, "-m", "infer.restore_story", f"project={project}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "draw frames 1-4, seed 5" in done.stdout, done.stderr


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
        "sizes",
        "alpha",
        "busy",
        "halfmodel",
    ):
        (folder / name).mkdir(parents=True)
    frame = Image.open(shared / "first" / "frames" / "001.png")
    frame.save(folder / "twice" / "001.png")
    frame.save(folder / "twice" / "1.jpg")
    (folder / "text" / "001.png").write_text("not a picture")
    (folder / "bomb" / "001.png").write_bytes(png_that_claims(50_000, 50_000))
    (folder / "large" / "001.png").write_bytes(png_that_claims(5_000, 4_000))
    whole = (shared / "first" / "frames" / "001.png").read_bytes()
    (folder / "truncated" / "001.png").write_bytes(whole[: len(whole) // 2])
    frame.resize((32, 16)).save(folder / "wide" / "001.png")
    frame.save(folder / "sizes" / "001.png")
    frame.resize((32, 16)).save(folder / "sizes" / "002.png")
    Image.new("RGBA", frame.size, (9, 9, 9, 99)).save(folder / "alpha" / "001.png")
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
        (["seed=-1", "keep=[1]"], "seed must not be below 0"),
        (["weights={broken}/nowhere", "keep=[1]"], "not a model folder"),
        (["weights={broken}/halfmodel", "keep=[1]"], "codec"),
        (["story={broken}/gap.yaml"], "no event covers frame 2"),
        (["story={broken}/nowhere.yaml"], "story file {broken}/nowhere.yaml is not there"),
        (["keep=two"], "keep: expected whole numbers such as 2, [2,3] or 2-4, found 'two'"),
        (["frames={broken}/nowhere"], "not a folder"),
        (["frames={broken}/empty"], "no numbered frames"),
        (["frames={broken}/twice", "keep=[1]"], "frame 1 twice"),
        (["frames={broken}/text"], "001.png"),
        (["frames={broken}/bomb"], "001.png"),
        (["frames={broken}/large"], "5000 x 4000"),
        (["frames={broken}/truncated"], "001.png"),
        (
            ["frames={broken}/wide"],
            "wide/001.png, has 32 x 16 pixels, expected 24 x 16: give the frames that",
        ),
        (["frames={broken}/alpha", "weights={broken}/nowhere"], "alpha/001.png, is an image of mode RGBA"),
        (["frames={broken}/sizes", "weights={broken}/nowhere"], "sizes/002.png, has 32 x 16 pixels"),
        (["keep=[1]", "weights={broken}/nowhere", "preview=look.jpg"], "must be the name of a .png"),
        (["keep=[1,9]"], "[9]"),
        (["keep=[1,2,3,4]"], "none to generate"),
        (["num_frames=3", "keep=[1]"], "num_frames= needs project="),
        (["infill=[2]"], "infill= needs project="),
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
    assert len(errors) == 1 and found.format(broken=broken) in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(str(path) for path in broken.rglob("*")) == before


OPERATIONS_REFUSED = {  # what the error says, what was typed
    "found none, expected one of infill=, edit=, insert=": [],
    "found infill= and delete=, expected one of": ["infill=2", "delete=3"],
    "unknown key 'shrink'": ["shrink=3"],
    "redraw: frame 9, expected one of 1 to 4": ["infill=[1,9]"],
    "redraw: no frame is named": ["infill=[]"],
    "redraw: frame -1, expected one of 1 to 4": ["infill=-1"],
    "edit= needs text=, found none": ["edit=2"],
    "text= says nothing to delete=: it belongs to edit=, insert=": ["delete=2", "text=a"],
    "keep= says nothing to infill=: it belongs to story=": ["infill=2", "keep=1"],
    "frames= says nothing to infill=: it needs no project=": ["infill=2", "frames=there"],
    "these are all, a story needs at least one frame": ["delete=[1,2,3,4]"],
    "insert after frame 9: expected 0 to 4": ["insert=9", "text=a"],
    "num_frames must be at least 1, found 0": ["insert=1", "text=a", "num_frames=0"],
    "num_frames must be at least 1, found -2": ["extend_left=-2", "text=a"],
    "no story project: it has no history.jsonl": ["project={broken}/empty", "infill=2"],
    "seed must not be below 0": ["infill=2", "seed=-1"],
    "a window of 2 cannot show both sides": ["infill=2", "window=2"],
    "overlap is 9, expected 1 to 3": ["infill=2", "window=4", "overlap=9"],
    "preview=look.jpg must be the name of a .png": ["infill=2", "preview=look.jpg"],
    "guidance_interval is [1.0], expected two": ["infill=2", "guidance_interval=[1]"],
    "cache_threshold must be a number from 0": ["infill=2", "cache_threshold=-1"],
    "unknown memory mode 'swap'": ["infill=2", "memory=swap"],
    "{broken}/nolora": ["infill=2", "lora={broken}/nolora"],
    "is a story project already": ["infill=2", "out={project}"],
    "{broken}/gap.yaml: no event covers frame 2": ["story={broken}/gap.yaml"],
    "24 x 16": ["infill=2", "height=32", "width=32"],
}


@pytest.mark.parametrize("found", OPERATIONS_REFUSED)
def test_an_operation_that_cannot_be_done_leaves_the_project(project, broken, found):
    before = everything(project)
    typed = [text.format(project=project, broken=broken) for text in OPERATIONS_REFUSED[found]]
    arguments = {"project": f"project={project}"} | {text.partition("=")[0]: text for text in typed}
    result = command("continue_story", *arguments.values())
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and found.format(broken=broken) in errors[0], result.stderr
    assert everything(project) == before


@pytest.mark.parametrize(
    "overrides, found",
    [
        (["version=9"], "version 9: "),
        (["version=0"], "expected one thing to do"),
        (["--undo"], "nothing to undo"),
        (["--undo", "--redo"], "found undo and redo"),
        (["lock=7"], "the story has frames 1 to 4"),
        (["by_hand=maybe"], "expected one of refuse, adopt, discard"),
    ],
)
def test_what_cannot_be_restored_leaves_the_project(project, overrides, found):
    before = everything(project)
    result = restore(project, *overrides)
    assert result.returncode == 1 and found in result.stderr and result.stderr.startswith("error: ")
    assert everything(project) == before


def test_hands_are_named_and_adopted(project):
    Story([Event(1, 4, "A fox swims.")]).to_file(project / "story.yaml")
    refused = command("continue_story", f"project={project}", "infill=2")
    assert refused.returncode == 1 and "story.yaml of" in refused.stderr and "by_hand=adopt" in refused.stderr
    assert restore(project, "by_hand=adopt").returncode == 0
    change(project, "infill=2")
    assert Story.from_file(project / "story.yaml") == Story([Event(1, 4, "A fox swims.")])


def command_within(limit: int, num_bytes: int, *arguments) -> Result:
    """A command in a process of its own that the system allows no more than this of something."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        signal.alarm(100)
        torch.set_num_threads(1)  # the threads of OpenMP do not come along into a fork
        resource.setrlimit(limit, (num_bytes, num_bytes))
        result = command(*arguments)
        os.write(writer, json.dumps([result.returncode, result.stdout, result.stderr]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.waitpid(process, 0)
    return Result(*json.loads(told))


def test_a_full_disk_is_one_line_and_the_project_stays(project):
    before = everything(project)
    arguments = ("continue_story", f"project={project}", "infill=2", "seed=4")
    result = command_within(resource.RLIMIT_FSIZE, 400, *arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"error: cannot write {project}" in result.stderr and "File too large" in result.stderr
    assert everything(project) == before
    assert command(*arguments).returncode == 0


def test_too_little_memory_is_one_line_that_says_what_to_lower(shared, tmp_path):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    arguments = [f"weights={shared}/model", f"story={shared}/story.yaml", f"out={tmp_path}/out"]
    result = command_within(
        resource.RLIMIT_AS, used + 300 * 2**20, "generate_story", *arguments, "height=4096", "width=4080"
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory while drawing 4 frames of 4096 x 4080 pixels" in error
    assert "dtype=bfloat16" in error and "a smaller height and width" in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(shared, tmp_path):
    result = command("generate_story", f"out={tmp_path / 'out'}")
    assert result.returncode == 1 and "weights" in result.stderr and "Traceback" not in result.stderr
