"""What a story project shows of its present version: story.yaml, frames/001.png, ... and contact_sheet.png.

.shown says which version the files show, and is there only while they show it completely. So what a killed
process left half-written (of some version, without .shown) is told from what a person changed.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from infer.frame_folder import as_png, decode_frame
from infer.project.history import Version
from infer.project.whole_files import sha256, write_whole
from storyanchors.contact_sheet import draw_contact_sheet
from storyanchors.story import Story

STORY_FILE, FRAMES, SHEET, SHOWN_FILE = "story.yaml", "frames", "contact_sheet.png", ".shown"
FRAME_NAME = re.compile(r"\d{3}\.png")


def frame_name(number: int) -> str:
    """Path of a frame inside the project."""
    return f"{FRAMES}/{number:03d}.png"


def shown_by(version: Version) -> dict[str, str]:
    """SHA-256 of every file, by path inside the project, that shows a version."""
    names = map(frame_name, range(1, len(version.frames) + 1))
    return {STORY_FILE: sha256(story_file(version.story)), **dict(zip(names, version.frames, strict=True))}


def story_file(story: Story) -> bytes:
    """The content of story.yaml."""
    return story.to_yaml().encode()


def changed_by_hand(folder: Path, version: Version, versions: Collection[Version]) -> list[str]:
    """Paths inside the project of files that show neither the present version nor, half-written, another."""
    expected, found = shown_by(version), _found(folder)
    changed = [name for name, content in found.items() if expected.get(name) != content]
    if changed and not _is_shown(folder, version):
        known = {content for any_version in versions for content in shown_by(any_version).values()}
        changed = [name for name in changed if found[name] not in known]
    return sorted(changed)


def write_views(folder: Path, version: Version, read: Callable[[int], bytes]) -> None:
    """Makes the files show the version; read gives a frame's PNG by its number. Whole ones are left alone."""
    expected, found = shown_by(version), _found(folder)
    if found == expected and _is_shown(folder, version) and (folder / SHEET).is_file():
        return
    (folder / SHOWN_FILE).unlink(missing_ok=True)
    (folder / FRAMES).mkdir(exist_ok=True)
    contents = {number: read(number) for number in range(1, len(version.frames) + 1)}
    for number, content in contents.items():
        name = frame_name(number)
        if found.get(name) != expected[name]:
            write_whole(folder / name, content)
    if found.get(STORY_FILE) != expected[STORY_FILE]:
        write_whole(folder / STORY_FILE, story_file(version.story))
    for name in found.keys() - expected.keys():
        (folder / name).unlink()
    frames = [decode_frame(content, frame_name(number)) for number, content in contents.items()]
    held = {*version.kept, *version.given}
    write_whole(folder / SHEET, as_png(draw_contact_sheet(frames, version.story, given=held)))
    write_whole(folder / SHOWN_FILE, f"{version.number}\n".encode())


def _is_shown(folder: Path, version: Version) -> bool:
    shown = folder / SHOWN_FILE
    return shown.is_file() and shown.read_text(errors="replace").strip() == str(version.number)


def _found(folder: Path) -> dict[str, str]:
    paths = [folder / STORY_FILE]
    if (folder / FRAMES).is_dir():
        paths += [path for path in (folder / FRAMES).iterdir() if FRAME_NAME.fullmatch(path.name)]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in paths if path.is_file()}
