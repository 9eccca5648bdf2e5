"""What can be taken away from a board: the contact sheet, a film, the whole project."""

import io
import tempfile
import zipfile
from pathlib import Path

from infer.film.blend import blend_gap
from infer.film.film import make_film as write_film
from infer.project.unfinished import UNFINISHED
from infer.project.whole_files import LOCK_FILE
from infer.story_project import StoryProject
from infer.storyboard.board import Board
from storyanchors.contact_sheet import draw_contact_sheet

FRAME_INTERVAL, FPS = 23, 24.0  # a story frame a second: to look through, not to hand in
HIDDEN = {UNFINISHED, LOCK_FILE}  # of a project's folder: nothing for another machine


def draw_sheet(board: Board) -> bytes:
    """A PNG of all frames with their events; locked ones are marked."""
    project = _project(board)
    frames = project.frames()
    sheet = draw_contact_sheet(list(frames.values()), project.story, locked=project.locked)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def make_film(board: Board) -> bytes:
    """An mp4 in which each frame turns into the next."""
    project = _project(board)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{board.desk.folder.name}.mp4"
        write_film(
            list(project.frame_paths().values()),
            project.story,
            out,
            draw=blend_gap,
            settings={"interpolator": "blend"},
            frame_interval=FRAME_INTERVAL,
            fps=FPS,
            progress=False,
        )
        return out.read_bytes()


def pack_project(board: Board) -> bytes:
    """A zip of the project's folder, which is a project wherever it is unpacked."""
    folder = _project(board).folder
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and inside.parts[0] not in HIDDEN:
                archive.write(path, Path(folder.name) / inside)
    return file.getvalue()


def _project(board: Board) -> StoryProject:
    if not board.desk.project:
        raise ValueError("nothing is drawn yet")
    return board.desk.project
