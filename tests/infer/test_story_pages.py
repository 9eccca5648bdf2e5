"""draw_story.py and compare_stories.py as a person runs them, and what their pages hold."""

import base64
import hashlib
import io
import random
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conf.command import run
from infer import compare_stories, draw_story
from infer.page_parts import SCRIPT
from infer.shown_story import read_any
from infer.story_difference import pair_frames
from infer.story_project import StoryProject
from storyanchors.story import Event, Story
from storyanchors.story_edit import edit_frames, insert_event, redraw_frames

NASTY = "</span><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too'"
COMMANDS = {
    "draw_story": (draw_story.main, draw_story.DrawStoryConfig),
    "compare_stories": (compare_stories.main, compare_stories.CompareStoriesConfig),
}


def frame(value, size=(32, 24)):
    return Image.new("RGB", size, (value, 100, 255 - value))


def command(capsys, name, *overrides):
    main, schema = COMMANDS[name]
    argv, sys.argv = sys.argv, [name, *map(str, overrides)]
    try:
        run(main, schema, name)
        status = 0
    except SystemExit as leaving:
        status = leaving.code
    finally:
        sys.argv = argv
    return status, "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Four frames, the first one given; 2 edited; two inserted behind it, undone; 4 drawn anew; 1 locked."""
    folder = tmp_path_factory.mktemp("pages")
    frame(1).save(folder / "given.png")
    story = Story([Event(1, 2, "A fox."), Event(3, 4, NASTY)], [f"fox {NASTY}"], f"ink {NASTY}")
    frames = {1: folder / "given.png", 2: frame(2), 3: frame(3), 4: frame(4)}
    project = StoryProject.create(folder / "tale", story, frames, {"seed": 11})
    project.commit(edit_frames(project.story, {2: NASTY}), {2: frame(20)}, {"seed": 22})
    project.commit(insert_event(project.story, 2, "x", 2), {3: frame(30), 4: frame(31)}, {"seed": 33})
    project.undo()
    project.commit(
        redraw_frames(project.story, [4]), {4: frame(40)}, {"seed": 44, "settings": {"num_steps": 7}}
    )
    project.lock([1])
    return project.folder


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, its pictures."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self):
        sources = [image["src"].split(",", 1) for image in self.all("img")]
        assert all(head.startswith("data:image/") for head, _ in sources)
        return [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for _, content in sources]


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def check_safe(page, text):
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    assert scripts == [SCRIPT] and "onerror" not in {name for _, a in page.elements for name in a}
    policy = page.all("meta")[-1]["content"]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    links = [a[name] for _, a in page.elements for name in ("href", "src") if name in a]
    assert links and all(
        link.startswith(("#", "data:image/")) for link in links
    )  # nothing comes from a network
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(link[1:] in ids for link in links if link.startswith("#"))


def test_a_page_holds_frames_events_seeds_and_history_and_nothing_foreign_runs(project, tmp_path, capsys):
    status, said = command(capsys, "draw_story", f"project={project}", f"out={tmp_path}/page.html")
    assert status == 0 and "page.html" in said
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    check_safe(page, text)
    shown = [picture.getpixel((0, 0)) for picture in page.pictures()[:4]]
    assert shown == [frame(value).getpixel((0, 0)) for value in (1, 20, 3, 40)]
    words = " ".join(page.texts)
    for expected in (
        NASTY,
        "[2-4]",
        "seed 44",
        "num_steps 7",
        "version 2, seed 22",
        "given",
        "locked",
        "4 (shown)",
    ):
        assert expected in words, expected
    assert len([a for a in page.all("tr") if a.get("class") == "aside"]) == 1  # the version that was undone


def test_frames_say_which_version_drew_them(project):
    shown = read_any(str(project))
    assert {n: version.number for n, version in shown.origins.items()} == {1: 1, 2: 2, 3: 1, 4: 4}
    assert shown.given == shown.locked == {1}
    earlier = read_any(f"{project}@3")
    assert [f.getpixel((0, 0))[0] for f in earlier.frames()] == [1, 20, 30, 31, 3, 4]


@pytest.mark.parametrize("layout", ["sheet", "comic", "strip"])
def test_every_layout_shows_every_frame(project, tmp_path, capsys, layout):
    out = tmp_path / "page.png"
    status, _ = command(
        capsys, "draw_story", f"project={project}", f"out={out}", f"layout={layout}", "version=1"
    )
    colours = np.asarray(Image.open(out))
    assert status == 0
    for value in (1, 2, 3, 4):
        assert (colours == frame(value).getpixel((0, 0))).all(-1).sum() > 5000


def test_a_folder_of_frames_is_drawn_with_its_story_or_another(project, tmp_path, capsys):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in (1, 2):
        frame(number).save(folder / f"{number:03d}.png")
    Story([Event(1, 2, "two")]).to_file(folder / "story.yaml")
    Story([Event(1, 3, "three")]).to_file(tmp_path / "other.yaml")
    assert command(capsys, "draw_story", f"frames={folder}", f"out={tmp_path}/a.html")[0] == 0
    assert len(page_of(tmp_path / "a.html").pictures()) == 2
    status, said = command(
        capsys, "draw_story", f"frames={folder}", f"story={tmp_path}/other.yaml", f"out={tmp_path}/a.png"
    )
    assert status == 1 and "has the frames [1, 2], the story has 1 to 3" in said
    (tmp_path / "long.yaml").write_text("events: [{frames: [1, 2000000000], description: long}]")
    long = f"story={tmp_path}/long.yaml"
    status, said = command(capsys, "draw_story", f"frames={project}/frames", long, "out=x.png")
    assert status == 1 and "the story has 1 to 2000000000" in said


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["out=x.png"], "expected project=PROJECT or frames=DIR, found neither"),
        (["project={project}", "frames=y", "out=x.png"], "found both"),
        (["project={project}", "out=x.jpg"], "must be the name of a .png or .html"),
        (["project={project}", "out=x.png", "layout=poster"], "unknown layout 'poster'"),
        (["project={project}", "out=x.png", "version=5"], "has no version 5, its last one is 4"),
        (["project={project}", "out=x.png", "font={project}/story.yaml"], "cannot read the font"),
        (["project={project}/frames", "out=x.png"], "is no story project"),
        (["frames={project}/frames", "out=x.png"], "has no story.yaml, expected story=FILE"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(project, capsys, overrides, message):
    status, said = command(capsys, "draw_story", *(one.format(project=project) for one in overrides))
    assert status == 1 and message in said and said.count("\n") == 1


def test_two_versions_side_by_side_as_picture_and_as_page(project, tmp_path, capsys):
    for out in ("x.png", "x.html"):
        status, said = command(
            capsys, "compare_stories", f"a={project}@1", f"b={project}", f"out={tmp_path / out}"
        )
        assert status == 0 and "2 same, 2 changed" in said
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(text)
    check_safe(page, text)
    assert [picture.getpixel((0, 0))[0] for picture in page.pictures()] == [1, 1, 2, 20, 3, 3, 4, 40]
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    changed, same = ((picture == frame(value).getpixel((0, 0))).all(-1).sum() for value in (20, 3))
    assert changed > 5000 and same == 0  # what is the same stands back


def test_a_version_that_is_not_there_is_named(project, tmp_path, capsys):
    status, said = command(
        capsys, "compare_stories", f"a={project}@9", f"b={project}", f"out={tmp_path}/x.png"
    )
    assert status == 1 and "no version 9" in said


def numbered(values):
    return [frame(value, (2, 2)) for value in values]


def test_inserted_and_deleted_frames_move_no_other_out_of_its_place():
    pairs = pair_frames(numbered([1, 2, 3]), numbered([1, 9, 2, 3]), "abc", "axbc")
    assert [(pair.a, pair.b, pair.word) for pair in pairs] == [
        (1, 1, "same"),
        (None, 2, "only in B"),
        (2, 3, "same"),
        (3, 4, "same"),
    ]
    pairs = pair_frames(numbered([1, 2, 3]), numbered([1, 8, 9, 3]), "abc", "axbc")
    assert [pair.word for pair in pairs] == ["same", "only in B", "changed", "same"]  # told alike: a pair


def test_a_comparison_has_every_frame_once_in_order_and_the_other_way_round_is_its_mirror():
    random.seed(0)
    for _ in range(100):
        a, b = ([random.randrange(4) for _ in range(random.randrange(1, 8))] for _ in range(2))
        pairs = pair_frames(numbered(a), numbered(b), a, b)
        assert [pair.a for pair in pairs if pair.a] == [*range(1, len(a) + 1)]
        assert [pair.b for pair in pairs if pair.b] == [*range(1, len(b) + 1)]
        assert all(pair.same == (a[pair.a - 1] == b[pair.b - 1]) for pair in pairs if pair.a and pair.b)
        mirrored = pair_frames(numbered(b), numbered(a), b, a)
        assert sorted(pair.word == "same" for pair in mirrored) == sorted(pair.same for pair in pairs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_in_a_browser_frames_enlarge_keys_work_and_nothing_foreign_runs(project, tmp_path, capsys):
    sync_api = pytest.importorskip("playwright.sync_api")
    assert command(capsys, "draw_story", f"project={project}", f"out={tmp_path}/page.html")[0] == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700}, color_scheme="light", offline=True)
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))  # an alert of the story's own script
        page.on(
            "request", lambda request: said.append(request.url) if "page.html" not in request.url else None
        )
        page.goto(f"file://{tmp_path}/page.html")
        small = page.locator("#frame-2 img").bounding_box()["width"]
        page.click("#frame-2 .pictures")
        assert page.locator("#frame-2 img").bounding_box()["width"] > 2 * small
        page.keyboard.press("ArrowRight")
        assert page.url.endswith("#frame-3")
        page.keyboard.press("Escape")
        assert page.url.endswith("#cell-3")
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        page.click(".theme")
        assert page.evaluate(background) != light
        browser.close()
    assert [one for one in said if not one.startswith("data:")] == []
