"""What the storyboard's server answers; the page itself is tested in a browser."""

import socket
from types import SimpleNamespace

import pytest
from PIL import Image

from infer.project.drawing import DrawSettings
from infer.story_project import StoryProject
from infer.storyboard.artist import Artist
from infer.storyboard.board import Board
from storyanchors.story import Event, Story

pytest.importorskip("gradio")
from fastapi.testclient import TestClient

from infer.storyboard.server import build_app, start_server

MODEL = SimpleNamespace(caption_encoder=None)  # nothing is drawn here
STORY = Story([Event(1, 1, "a"), Event(2, 2, "b")])


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boards") / "board"
    frames = {n: Image.new("RGB", (16, 16), (90 * n, 0, 0)) for n in (1, 2)}
    StoryProject.create(folder, STORY, frames, {})
    return Board(folder, STORY, Artist(MODEL, DrawSettings()))


@pytest.fixture(scope="module")
def client(board):
    return TestClient(build_app(board))


def test_before_anything_is_drawn_there_is_nothing_to_take_away(tmp_path):
    board = Board(tmp_path / "board", STORY, Artist(MODEL, DrawSettings()))
    client = TestClient(build_app(board))
    for name in ("sheet.png", "film.mp4", "project.zip"):
        answer = client.get(f"/export/{name}")
        assert (answer.status_code, answer.text) == (400, "nothing is drawn yet")
    assert board.is_error and board.message == "project.zip: nothing is drawn yet"


def test_pictures_are_served_by_content_and_nothing_else_is(board, client):
    path = board.desk.project.frame_paths()[2]
    answer = client.get(f"/{board.desk.pictures()[2]}")
    assert answer.content == path.read_bytes() and "immutable" in answer.headers["cache-control"]
    for name in ("0" * 64 + ".png", "..%2Fhistory.jsonl", "..%2F..%2Fboard%2Fstory.yaml", path.name[:-4]):
        answer = client.get(f"/picture/{name}")
        assert b"version" not in answer.content and answer.content != path.read_bytes()


def test_downloads_say_what_they_are(board, client):
    for name, kind in (
        ("sheet.png", "image/png"),
        ("film.mp4", "video/mp4"),
        ("project.zip", "application/zip"),
    ):
        answer = client.get(f"/export/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"] == kind
        assert f'filename="board-{name}"' in answer.headers["content-disposition"]


def test_a_project_of_any_name_can_be_taken_away(tmp_path):
    folder = tmp_path / 'm\u00e4rchen "\u72d0"'
    StoryProject.create(folder, STORY, {n: Image.new("RGB", (16, 16)) for n in (1, 2)}, {})
    client = TestClient(build_app(Board(folder, STORY, Artist(MODEL, DrawSettings()))))
    for name in ("sheet.png", "film.mp4", "project.zip"):
        answer = client.get(f"/export/{name}")
        expected = f"attachment; filename*=UTF-8''m%C3%A4rchen%20%22%E7%8B%90%22-{name}"
        assert (answer.status_code, answer.headers["content-disposition"]) == (200, expected)


def test_the_page_asks_no_other_machine_for_anything(client):
    page = client.get("/").text
    assert "storyanchors" in page
    loaded = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert loaded and not any(address.startswith(("http", "//")) for address in loaded)
    assert "fonts.googleapis" not in page and client.get("/config").json()["analytics_enabled"] is False


def test_a_taken_port_is_one_line(client):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve on 127.0.0.1, port {port}"):
            start_server(client.app, "127.0.0.1", port)
