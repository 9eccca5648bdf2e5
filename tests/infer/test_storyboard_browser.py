"""The storyboard as a person meets it: in a real browser, on the shipped model."""

import io
import re
import shutil
import socket
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from conf.command import read_config
from infer.story_project import StoryProject
from infer.storyboard_app import StoryboardAppConfig, open_board

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
from infer.storyboard.server import build_app, start_server  # noqa: E402  needs gradio

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
ROOT = Path(__file__).parents[2]
PATIENCE_MS = 120_000  # the machine may be busy
STORY = """1-2: in the canyon, the blue triangle stands, medium shot from the left
3: in the snow, the blue triangle runs, wide shot from the center
in the city, the blue triangle sleeps, close shot from the right"""
SNOW = "in the snow, the blue triangle jumps, medium shot from the left"


@contextmanager
def served(folder, *overrides):
    """The URL of a storyboard of the folder."""
    config = read_config(
        StoryboardAppConfig,
        "storyboard_app",
        [
            f"weights={ROOT}/examples/story_world_model",
            f"story={ROOT}/examples/story_world/two_friends.story.yaml",
            f"project={folder}",
            "dtype=bfloat16",
            "device=cpu",
            *overrides,
        ],
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(build_app(open_board(config)), "127.0.0.1", port)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Person:
    """What one sees and does."""

    def __init__(self, browser, url):
        self.hosts, self.errors = set(), []
        self.page = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on(
            "request", lambda request: self.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", request.url))
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector(".card")

    def click(self, what):
        self.page.click(what)

    def write(self, field, text):
        self.page.fill(f"#{field} textarea", text)

    def choose(self, number):
        self.click(f'.card[data-number="{number}"] > .picture')
        self.page.wait_for_selector(f'.card.is-selected[data-number="{number}"]')
        self.page.wait_for_selector("#frame-panel")

    def wait_for_version(self, number):
        self.page.wait_for_selector(f'#version[data-version="{number}"]')
        self.page.wait_for_selector(".status:not(.is-busy)")

    def line(self, containing):
        self.page.wait_for_selector(f'.status p:has-text("{containing}")')
        return self.page.inner_text(".status p")

    def pictures(self):
        return [image.get_attribute("src") for image in self.page.query_selector_all(".card img")]

    def take(self, name):
        with self.page.expect_download() as download:
            self.click(f'.board-header a[href$="{name}"]')
        return Path(download.value.path()).read_bytes()


def test_a_person_writes_draws_steers_and_takes_a_story_away(browser, tmp_path):
    folder = tmp_path / "board"
    with served(folder, "num_steps=6") as url:
        person = Person(browser, url)
        page = person.page
        assert len(page.query_selector_all(".card")) == 8 and person.pictures() == []  # the example
        person.write("events", STORY)
        person.click("#draw")
        person.wait_for_version(1)
        first = person.pictures()
        assert len(first) == 4

        person.choose(2)
        person.click('.card[data-number="2"] .lock')
        page.wait_for_selector('.card.is-locked[data-number="2"]')
        page.wait_for_selector("#reroll[disabled]")
        assert page.is_disabled("#delete") and page.is_visible(".panel-heading [data-act=lock]")

        person.choose(3)
        person.click("#reroll")
        person.wait_for_version(2)
        assert [old == new for old, new in zip(first, person.pictures())] == [True, True, False, True]

        person.click("#compare")
        page.wait_for_selector(".tray button:not([disabled]) >> nth=4")
        chosen = page.get_attribute(".tray button >> nth=3 >> img", "src")
        assert chosen.startswith("data:image/png")
        person.click(".tray button >> nth=3")
        person.wait_for_version(3)
        page.wait_for_selector(".tray", state="detached")

        person.write("frame-text", SNOW)
        person.click("#edit")
        person.wait_for_version(4)
        assert SNOW in page.inner_text('.card[data-number="3"] .caption')

        person.click("#insert")
        page.wait_for_selector("#place-panel")
        person.write("new-text", SNOW)
        person.click("#add")
        person.wait_for_version(5)
        assert len(person.pictures()) == 5

        person.click(".card.is-more .picture")
        page.wait_for_selector("#place-panel")
        person.write("new-text", SNOW)
        page.fill("#count input", "99")
        person.click("#add")
        assert person.line("at once") == "1 to 16 new frames at once, found 99"
        assert page.query_selector(".toast-wrap *") is None
        page.fill("#count input", "2")
        person.click("#add")
        person.wait_for_version(6)
        assert len(person.pictures()) == 7

        other = Person(browser, url)
        other.choose(2)  # another page looks at another frame
        person.choose(7)
        other.choose(3)
        person.click("#delete")
        person.wait_for_version(7)
        assert len(person.pictures()) == 6
        person.click("[data-act=undo]")
        person.wait_for_version(6)
        person.click("[data-act=redo]")
        person.wait_for_version(7)

        person.click("[data-act=play]")
        page.wait_for_selector("#screen img")
        page.keyboard.press("Escape")
        page.wait_for_selector("#screen", state="detached")

        assert Image.open(io.BytesIO(person.take("sheet.png"))).format == "PNG"
        assert b"ftyp" in person.take("film.mp4")[:12]
        with zipfile.ZipFile(io.BytesIO(person.take("project.zip"))) as archive:
            assert "board/history.jsonl" in archive.namelist()

        shown = person.pictures()
        person.page.reload()
        page.wait_for_selector(".card img")
        assert person.pictures() == shown and page.query_selector('.card.is-locked[data-number="2"]')
        typed = page.input_value("#events textarea")
        person.click("#surprise")
        page.wait_for_function(
            "typed => document.querySelector('#events textarea').value !== typed", arg=typed
        )
        person.write("events", "1: a story that nobody has drawn")
        page.press("#events textarea", "Tab")
        page.wait_for_selector("[data-act=forget]")
        assert person.hosts - {"data:"} == {url.rstrip("/")} or all(
            "127.0.0.1" in h for h in person.hosts if "//" in h
        )
        assert not person.errors

    with served(folder, "num_steps=500") as url:  # another server, the same board
        person = Person(browser, url)
        page = person.page
        page.wait_for_selector(".card img")
        assert person.pictures() == shown and page.query_selector('.card.is-locked[data-number="2"]')
        assert page.input_value("#events textarea") == "1: a story that nobody has drawn"
        person.choose(1)
        person.click("#reroll")
        page.wait_for_selector('.card.is-drawing[data-number="1"] img[src^="data:image/png"]')  # a preview
        assert "Re-rolling frame 1" in page.inner_text(".status.is-busy p")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        person.click("[data-act=cancel]")
        person.line("cancelled")
        assert person.pictures() == shown
    assert StoryProject.open(folder).num_frames == 6
