"""Every code block of docs/inference.md does what the page says, in order, in one working folder."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from infer.story_project import StoryProject
from storyanchors.dit import StoryDiT
from storyanchors.lora import LoraSettings, add_lora, save_lora

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "inference.md"
MODEL = Path("examples/story_world_model")


def blocks(text):
    """(language, code) of every block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_shell(code, monkeypatch):
    """What a shell does with commands of our own, in this process: importing torch takes seconds."""
    for line in code.replace("\\\n", " ").splitlines():
        program, script, *arguments = shlex.split(line)
        assert program == "python"
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as leaving:
            assert not leaving.code, f"{line}: exit status {leaving.code}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout's examples, with a model that takes two steps and an adapter for it."""
    shutil.copytree(ROOT / "examples" / "story_world", tmp_path / "examples" / "story_world")
    (tmp_path / MODEL).mkdir(parents=True)
    for part in ("transformer", "codec", "caption_encoder"):
        (tmp_path / MODEL / part).symlink_to(ROOT / MODEL / part)
    info = json.loads((ROOT / MODEL / "story_model.json").read_text())
    (tmp_path / MODEL / "story_model.json").write_text(json.dumps({**info, "num_steps": 2}))
    dit = StoryDiT.from_pretrained(tmp_path / MODEL / "transformer")
    add_lora(dit, LoraSettings(rank=2))
    save_lora(dit, tmp_path / "runs" / "my_lora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_runs(folder, monkeypatch):
    pytest.importorskip("av")  # the film
    names = {}
    for language, code in blocks(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(code, f"{PAGE.name}: {code[:40]!r}", "exec"), names)
        else:
            run_shell(code, monkeypatch)
    project = StoryProject.open("runs/friends")
    assert len(project.history) == 6 and project.locked == {1, 2}
    made = {path.name for path in Path("runs").iterdir()}
    assert {"first_frame.png", "friends.png", "friends.html", "friends.mp4", "compared.html"} <= made
    assert [frames[0].size for frames in names["three_seeds"]] == [(64, 64)] * 3
    assert Image.open("runs/comic.png").width > 900


def test_the_page_has_its_recipes_and_its_links_lead_somewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+)\. ", text, re.MULTILINE) == [str(number) for number in range(1, 11)]
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PAGE.parent / target).exists(), target
