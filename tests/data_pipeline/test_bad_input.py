"""Ways to call the data commands wrongly: each is one clear line, and leaves nothing under a final name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def setting(tmp_path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "readme.md").write_text("no film here")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "twice.txt").write_text("a.mp4\nb.mp4\na.mp4\n")
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")


SAMPLE_FRAMES = {
    "unknown key 'frame_intervall' for sample_frames; did you mean 'frame_interval'?": ["frame_intervall=69"],
    "frame_interval": ["frame_interval=often"],
    "frame_interval is -1, expected 0 to": ["frame_interval=-1"],
    "max_frames is 1000, expected 1 to 999": ["max_frames=1000"],
    "min_frames is 25, expected 1 to 24": ["min_frames=25"],
    "max_pixels is 100, expected 256 to": ["max_pixels=100"],
    "workers is 0, expected 1 to": ["workers=0"],
    "timeout_s is 0": ["timeout_s=0"],
    "videos=... is missing": ["videos=???"],
    "no such folder, .txt list or video": ["videos={}/nowhere"],
    "found no video in": ["videos={}/none"],
    "lists no video": ["videos={}/empty.txt"],
    "lists a.mp4 more than once": ["videos={}/twice.txt"],
    "cannot be made a folder for the dataset: Not a directory": ["out={}/file/ds"],
    "cannot be made a folder for the dataset: File exists": ["out={}/file"],
    "is not empty and no dataset, found thesis.tex": ["out={}/full"],
}


@pytest.mark.parametrize("message", SAMPLE_FRAMES)
def test_sample_frames_says_what_is_wrong(refused, short_videos, tmp_path, tree, message):
    setting(tmp_path)
    before = tree(tmp_path)
    given = [argument.format(tmp_path) for argument in SAMPLE_FRAMES[message]]
    names = {argument.split("=")[0] for argument in given}
    usual = [f"videos={short_videos}", f"out={tmp_path}/ds"]
    arguments = [argument for argument in usual if argument.split("=")[0] not in names] + given
    assert message in refused("sample_frames", *arguments)
    assert tree(tmp_path) == before


WRITE_STORY_WORLD = {
    "num_stories is 0": ["num_stories=0"],
    "num_frames is [fewest, most], 2 to 32, found [8, 6]": ["num_frames=[8,6]"],
    "2 to 32, found [1, 4]": ["num_frames=[1,4]"],
    "seed is -1": ["seed=-1"],
    "clips_per_shard is 0": ["clips_per_shard=0"],
    "did you mean 'videos'?": ["vidoes=true"],
    "cannot be made a folder": ["out={}/file"],
}


@pytest.mark.parametrize("message", WRITE_STORY_WORLD)
def test_write_story_world_says_what_is_wrong(refused, tmp_path, tree, message):
    setting(tmp_path)
    before = tree(tmp_path)
    given = [argument.format(tmp_path) for argument in WRITE_STORY_WORLD[message]]
    usual = [] if given[0].startswith("out=") else [f"out={tmp_path}/ds"]
    assert message in refused("write_story_world", *usual, *given)
    assert tree(tmp_path) == before


def test_a_dataset_of_another_command_is_not_continued(refused, command, short_videos, tmp_path):
    assert command("write_story_world", f"out={tmp_path}/ds", "num_stories=2", "workers=1")[0] == 0
    message = refused("sample_frames", f"videos={short_videos}", f"out={tmp_path}/ds")
    assert "was made by write_story_world, not by sample_frames" in message


def run_script(*arguments: str, limit: str = "") -> subprocess.CompletedProcess:
    """As a user types it, from the root of the repository."""
    words = " ".join(f"'{word}'" for word in [sys.executable, *arguments])
    return subprocess.run(["bash", "-c", limit + words], cwd=ROOT, capture_output=True, text=True)


def test_a_full_disk_is_one_error_and_the_job_continues_when_there_is_room(short_videos, tmp_path):
    """A limit on the size of files stands for the disk."""
    script = (
        "data_pipeline/sample_frames.py",
        f"videos={short_videos}",
        f"out={tmp_path}/ds",
        "frame_interval=0",
    )
    full = run_script(*script, limit="ulimit -f 400; ")
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "error: [Errno 27] File too large: " in full.stderr
    assert not list((tmp_path / "ds" / "frames").iterdir())
    done = run_script(*script)
    assert done.returncode == 0 and "rejected       2" in done.stdout


@pytest.mark.parametrize("name", ["sample_frames", "build_index", "write_story_world"])
def test_a_command_explains_itself(command, name):
    status, printed, _ = command(name, "--help")
    assert status == 0 and f"python data_pipeline/{name}.py" in printed


def test_commands_also_run_as_modules(tmp_path):
    refused = run_script("-m", "data_pipeline.build_index", f"dataset={tmp_path}")
    assert refused.returncode == 1
    assert refused.stderr == f"error: {tmp_path} is not a dataset: found no dataset.json in it\n"
