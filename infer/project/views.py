"""What a story project shows of its present version: story.yaml, frames/001.png, ... and contact_sheet.png.

.shown says which version the files show, and behind its number which frames are marked as locked; it is
there only while they show it completely. So what a killed process left half-written (of some version, without
.shown) is told from what a person changed.
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
    if changed and _shown(folder).split()[:1] != [str(version.number)]:
        known = {content for any_version in versions for content in shown_by(any_version).values()}
        changed = [name for name in changed if found[name] not in known]
    return sorted(changed)


def write_views(
    folder: Path,
    version: Version,
    read: Callable[[int], bytes],
    given: Collection[int],
    locked: Collection[int],
) -> None:
    """Makes the files show the version; read gives a frame's PNG by its number. Whole ones are left alone.

    The contact sheet marks the frames that are given and those that are locked.
    """
    expected, found = shown_by(version), _found(folder)
    shown = " ".join(map(str, [version.number, *sorted(locked)]))
    if found == expected and _shown(folder) == shown and (folder / SHEET).is_file():
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
    sheet = draw_contact_sheet(frames, version.story, given=given, locked=locked)
    write_whole(folder / SHEET, as_png(sheet))
    write_whole(folder / SHOWN_FILE, f"{shown}\n".encode())


def _shown(folder: Path) -> str:
    """Which version, and of it which locked frames, the files show completely."""
    path = folder / SHOWN_FILE
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def _found(folder: Path) -> dict[str, str]:
    paths = [folder / STORY_FILE]
    if (folder / FRAMES).is_dir():
        paths += [path for path in (folder / FRAMES).iterdir() if FRAME_NAME.fullmatch(path.name)]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in paths if path.is_file()}
