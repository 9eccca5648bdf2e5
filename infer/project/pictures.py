"""The pictures of a story project: objects/<sha256>.png. One that is there never changes."""

from collections.abc import Collection, Mapping
from pathlib import Path

from PIL import Image

from infer.frame_folder import as_png, check_frame, read_frame
from infer.project.history import SHA256
from infer.project.whole_files import sha256, write_whole

OBJECTS = "objects"


def picture_path(folder: Path, content: str) -> Path:
    """Of the picture with this SHA-256 in the project in a folder."""
    return folder / OBJECTS / f"{content}.png"


def read_picture(folder: Path, content: str) -> bytes:
    """The PNG file with this SHA-256; ValueError where the disk has another content."""
    path = picture_path(folder, content)
    found = path.read_bytes()
    if sha256(found) != content:
        raise ValueError(f"{path} is damaged: its content is not what its name says")
    return found


def store_pictures(folder: Path, contents: Collection[bytes]) -> None:
    """Writes PNG files into the project, all or none; no line of the history names them yet."""
    (folder / OBJECTS).mkdir(exist_ok=True)
    paths = {picture_path(folder, sha256(content)): content for content in contents}
    new = {path: content for path, content in paths.items() if not path.exists()}
    try:
        for path, content in new.items():
            write_whole(path, content)
    except OSError:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def remove_unknown_pictures(folder: Path, known: Collection[str]) -> None:
    """Takes away what a process stored that was stopped before a line of the history named it."""
    for path in (folder / OBJECTS).iterdir():
        if path.suffix == ".png" and SHA256.fullmatch(path.stem) and path.stem not in known:
            path.unlink()


def read_new_pictures(
    frames: Mapping[int, Image.Image | Path], size: tuple[int, int] | None
) -> tuple[dict[int, bytes], dict[int, str]]:
    """The PNG files of frames by number, and where those come from that were files.

    ValueError for one that cannot be read or is not of this size (width, height; None: that of the first).
    """
    contents, given = {}, {}
    for number, frame in sorted(frames.items()):
        image = read_frame(frame) if isinstance(frame, Path) else frame
        size = size or image.size
        check_frame(image, f"frame {number}" + (f", {frame}," if isinstance(frame, Path) else ""), size)
        contents[number] = as_png(frame)
        if isinstance(frame, Path):
            given[number] = str(frame)
    return contents, given
