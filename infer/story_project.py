"""A story project: a folder with a story, its frames, and everything that was ever done to them.

history.jsonl is the truth. A line of it is appended and on disk last, after the frames it names, which lie in
objects/ by their content. story.yaml, frames/001.png, ... and contact_sheet.png are views of the present
version, for people and other programs; left behind by a killed process, they are written by the next one.
What a person changed in story.yaml or frames/ is never overwritten unasked: it is named, and can be adopted.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from infer.frame_folder import decode_frame
from infer.project.history import HEADER, Version, given_pictures, read_history
from infer.project.pictures import (
    OBJECTS,
    picture_path,
    read_new_pictures,
    read_picture,
    remove_unknown_pictures,
    store_pictures,
)
from infer.project.unfinished import UNFINISHED, forget_unfinished
from infer.project.views import (
    FRAMES,
    SHEET,
    SHOWN_FILE,
    STORY_FILE,
    changed_by_hand,
    frame_name,
    write_views,
)
from infer.project.whole_files import (
    LOCK_FILE,
    Busy,
    append_line,
    end_last_line,
    locked,
    read_lines,
    sha256,
    temporary_of,
    write_whole,
)
from storyanchors.output_folder import check_output_folder
from storyanchors.story import Story
from storyanchors.story_edit import StoryEdit, replace_story

HISTORY_FILE = "history.jsonl"
RESTORE = "python infer/restore_story.py"
BEGUN = {OBJECTS, UNFINISHED, LOCK_FILE}  # what a project holds that has no version yet


class StoryProject:
    """An open project. It knows the history as it was when it was opened or last changed through this object.

    Where another process has changed the folder meanwhile, changing it through this object is a ValueError.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._load()

    # Begin and open

    @classmethod
    def create(
        cls,
        folder: str | Path,
        story: Story,
        frames: Mapping[int, Image.Image | Path],
        record: dict,
        *,
        what: str = "",
    ) -> "StoryProject":
        """A new project of a story and all its frames, by number; those that are files count as given.

        record is what drew them, as JSON: seed, settings, weights_sha256, ... ValueError for a folder that
        holds something else, frames that are missing, too many, or not of one size.
        """
        _check_numbers(frames, range(1, story.num_frames + 1))
        contents, given = read_new_pictures(frames, None)
        hashes = tuple(sha256(contents[number]) for number in range(1, story.num_frames + 1))
        what = what or f"a story of {story.num_frames} frames"
        version = Version(1, None, what, {}, given, story, hashes, record, _now())
        return cls._begin(Path(folder), [version], contents.values())

    @classmethod
    def open(cls, folder: str | Path, *, by_hand: str = "refuse") -> "StoryProject":
        """The project in a folder, mended where a killed process left something half done.

        ValueError where story.yaml or frames were changed by hand, naming them; by_hand="adopt" makes a new
        version of them, by_hand="discard" throws the changes away, by_hand="leave" leaves the
        folder as it is. While another process changes the project, it is opened as it was before.
        """
        folder = Path(folder)
        if not is_project(folder):
            raise ValueError(f"{folder} is no story project: it has no {HISTORY_FILE}")
        project = cls(folder)
        if os.access(folder, os.W_OK):
            try:
                with locked(folder, "opening it"):
                    project._load()
                    project._mend(by_hand)
            except Busy:
                if by_hand != "refuse":
                    raise
        return project

    @classmethod
    def _begin(
        cls,
        folder: Path,
        versions: list[Version],
        contents: Collection[bytes],
        lock: Collection[str] = (),
    ) -> "StoryProject":
        check_new_project(folder)
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder, "beginning it"):
                check_new_project(folder)
                store_pictures(folder, contents)
                lines = [version.to_line() for version in versions]
                if lock:
                    lines.append(_lock_line("lock", lock))
                lines = [HEADER, *(json.dumps(line).encode() for line in lines)]
                write_whole(folder / HISTORY_FILE, b"\n".join(lines) + b"\n")
                forget_unfinished(folder)
        finally:
            forget_beginning(folder, is_new)
        return cls.open(folder)

    # What it is

    @property
    def history(self) -> list[Version]:
        """All versions, the first one first; those that were undone too."""
        return list(self._history.versions)

    @property
    def present(self) -> Version:
        """The version that is shown."""
        return self._history.versions[self._history.present - 1]

    @property
    def version(self) -> int:
        """Its number, from 1."""
        return self.present.number

    @property
    def story(self) -> Story:
        """The story as it is now."""
        return self.present.story

    @property
    def num_frames(self) -> int:
        """How many frames it has now."""
        return len(self.present.frames)

    def frame_paths(self, version: int | None = None) -> dict[int, Path]:
        """PNG files of a version's frames by number (None: the present one's). They never change."""
        hashes = (self.present if version is None else self._version(version)).frames
        return {n: picture_path(self.folder, content) for n, content in enumerate(hashes, start=1)}

    def frames(self, version: int | None = None) -> dict[int, Image.Image]:
        """The frames of a version by number; ValueError, naming the file, where one is damaged."""
        return {n: _image(self.folder, path.stem) for n, path in self.frame_paths(version).items()}

    # Change it

    def commit(self, edit: StoryEdit, drawn: Mapping[int, Image.Image | Path], record: dict) -> int:
        """Adds the version that an edit of the present one makes, and shows it; returns its number.

        drawn has the frames of edit.drawn(), those that are files count as given; kept frames stay the same
        files. Whole or not at all: after a kill or on a full disk the project is what it was, or what it
        should become. An edit that draws nothing and changes nothing makes no version.
        """
        with self.exclusive("a new version"):
            self.check_untouched()
            self.check_locks(edit)
            return self._add(edit, drawn, record)

    def undo(self) -> int:
        """Back to what was shown before; returns the version's number. ValueError at the beginning."""
        return self._move("undo", self._history.before[-1:])

    @property
    def can_undo(self) -> bool:
        """Whether there is something to undo."""
        return bool(self._history.before)

    @property
    def can_redo(self) -> bool:
        """Whether there is an undo to take back."""
        return bool(self._history.undone)

    def redo(self) -> int:
        """Takes an undo back; returns the version's number. ValueError where there is none."""
        return self._move("redo", self._history.undone[-1:])

    def restore(self, version: int) -> int:
        """Shows any version again; undo goes back to the present one. ValueError for an unknown number."""
        return self._move("restore", [self._version(version).number])

    @property
    def locked(self) -> set[int]:
        """Numbers of the frames that a person has locked: no edit draws or deletes them.

        A lock holds a picture: it goes along when frames are inserted, and through undo, redo and restore.
        """
        return {
            n for n, content in enumerate(self.present.frames, start=1) if content in self._history.locked
        }

    @property
    def given(self) -> set[int]:
        """Numbers of the frames that came from files outside, in whichever version."""
        pictures = given_pictures(self._history.versions)
        return {n for n, content in enumerate(self.present.frames, start=1) if content in pictures}

    def lock(self, numbers: Collection[int]) -> None:
        """Locks frames; ValueError for a number outside."""
        self._append_lock("lock", numbers)

    def unlock(self, numbers: Collection[int]) -> None:
        """Unlocks frames; ValueError for a number outside."""
        self._append_lock("unlock", numbers)

    def check_locks(self, edit: StoryEdit) -> None:
        """ValueError naming the locked frames that an edit of the present version would not keep."""
        if lost := sorted(self.locked - set(edit.kept.values())):
            raise ValueError(
                f"{edit.what}: frames {lost} of {self.folder} are locked, to unlock them: "
                f"{RESTORE} project={self.folder} unlock={_typed(lost)}"
            )

    def copy(
        self, folder: str | Path, edit: StoryEdit, drawn: Mapping[int, Image.Image | Path], record: dict
    ) -> "StoryProject":
        """A new project whose first version is the present one, and whose second is the edit's.

        Locks come along; the edit may draw locked frames, for they stay in this project.
        """
        what = f"version {self.version} of {self.folder}"
        given = {number: str(path) for number, path in self.frame_paths().items()}
        record = {**self.present.record, "given_before": sorted(self.given)}
        first = replace(self.present, number=1, parent=None, kept={}, given=given, what=what, record=record)
        second, contents = self._edited(edit, drawn, record)
        contents += [read_picture(self.folder, content) for content in self.present.frames]
        lock = sorted(self._history.locked & set(self.present.frames))
        return self._begin(Path(folder), [first, replace(second, number=2, parent=1)], contents, lock)

    @contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """Nobody else changes the project inside this; it may be nested in one thread.

        Busy (a ValueError) where another process or thread does just now, ValueError where one has since this
        object read the history.
        """
        with locked(self.folder, what):
            if read_lines(self.folder / HISTORY_FILE)[1] != self._end:
                raise ValueError(f"{self.folder} was changed by another process meanwhile: open it again")
            yield

    def _load(self) -> None:
        path = self.folder / HISTORY_FILE
        lines, self._end = read_lines(path)
        self._history = read_history(path, lines)

    def _append(self, line: dict) -> None:
        append_line(self.folder / HISTORY_FILE, json.dumps(line).encode(), self._end)
        self._load()

    def _append_lock(self, verb: str, numbers: Collection[int]) -> None:
        _check_inside(numbers, self.num_frames, verb)
        pictures = sorted({self.present.frames[number - 1] for number in numbers})
        with self.exclusive(verb):
            self._append(_lock_line(verb, pictures))
            if not self.changed_by_hand():
                self._show()

    def _move(self, move: str, to: list[int]) -> int:
        if not to:
            raise ValueError(f"nothing to {move}: {self.folder} is at version {self.version}")
        with self.exclusive(move):
            self.check_untouched()
            self._append({"move": move, "to": to[0], "time": _now()})
            self._show()
        return self.version

    def _add(self, edit: StoryEdit, drawn: Mapping[int, Image.Image | Path], record: dict) -> int:
        version, contents = self._edited(edit, drawn, record)
        if not drawn and (version.story, version.frames) == (self.story, self.present.frames):
            self._show()
            return self.version
        store_pictures(self.folder, contents)
        self._append(version.to_line())
        forget_unfinished(self.folder)
        self._show()
        return self.version

    def _edited(
        self, edit: StoryEdit, drawn: Mapping[int, Image.Image | Path], record: dict
    ) -> tuple[Version, list[bytes]]:
        """The version that an edit makes, and the new PNG files of it."""
        _check_numbers(drawn, edit.drawn())
        _check_inside(edit.kept.values(), self.num_frames, "keep")
        size = _image(self.folder, self.present.frames[0]).size if edit.kept else None
        contents, given = read_new_pictures(drawn, size)
        hashes = {number: sha256(content) for number, content in contents.items()}
        hashes |= {number: self.present.frames[before - 1] for number, before in edit.kept.items()}
        frames = tuple(hashes[number] for number in range(1, edit.story.num_frames + 1))
        number = len(self._history.versions) + 1
        version = Version(
            number, self.version, edit.what, edit.kept, given, edit.story, frames, record, _now()
        )
        return version, list(contents.values())

    def _mend(self, by_hand: str) -> None:
        """Takes away what a killed process left, and shows the present version."""
        if by_hand == "refuse":
            self.check_untouched()
        if by_hand == "leave" and self.changed_by_hand():
            return
        history = self.folder / HISTORY_FILE
        end_last_line(history, self._end)
        self._load()
        known = {content for version in self._history.versions for content in version.frames}
        for name in (HISTORY_FILE, STORY_FILE, SHEET, SHOWN_FILE):
            temporary_of(self.folder / name).unlink(missing_ok=True)
        for folder in (OBJECTS, FRAMES, f"{UNFINISHED}/*"):  # others are written by their own processes
            for path in self.folder.glob(f"{folder}/{temporary_of(Path('*'))}"):
                path.unlink()
        remove_unknown_pictures(self.folder, known)
        if by_hand == "adopt":
            self._adopt()
        self._show()

    def changed_by_hand(self) -> list[str]:
        """Paths inside the project of what was changed by hand in story.yaml and frames/."""
        return changed_by_hand(self.folder, self.present, self._history.versions)

    def check_untouched(self) -> None:
        """ValueError naming the files of story.yaml and frames/ that were changed by hand."""
        if changed := self.changed_by_hand():
            raise ValueError(
                f"{', '.join(changed)} of {self.folder} changed by hand: "
                f"{RESTORE} project={self.folder} by_hand=adopt makes a version of it, "
                "by_hand=discard throws it away"
            )

    def _adopt(self) -> None:
        """A new version of what stands in story.yaml and frames/; missing frames are the present ones.

        ValueError naming the locked frames that were changed or that the story has no more.
        """
        if not (changed := self.changed_by_hand()):
            return
        path = self.folder / STORY_FILE
        story = Story.from_file(path) if path.is_file() else self.story
        places = replace_story(self.story, story, []).drawn()  # refuses a story that is too long
        if left := sorted(set(changed) - {STORY_FILE, *map(frame_name, places)}):
            raise ValueError(f"{', '.join(left)} of {self.folder}: the story has frames 1 to {len(places)}")
        kept, given = [], {}
        for number in places:
            path = self.folder / frame_name(number)
            same = number <= self.num_frames and (
                not path.is_file() or sha256(path.read_bytes()) == self.present.frames[number - 1]
            )
            if same:
                kept.append(number)
            else:
                given[number] = path
        edit = replace(replace_story(self.story, story, kept), what=f"by hand: {', '.join(changed)}")
        self.check_locks(edit)
        self._add(edit, given, {})

    def _show(self) -> None:
        try:
            write_views(self.folder, self.present, self._read_number, self.given, self.locked)
        except OSError as error:
            raise OSError(
                f"version {self.version} is kept, but not shown yet ({error}); "
                f"the next command on {self.folder} shows it"
            ) from error

    def _read_number(self, number: int) -> bytes:
        return read_picture(self.folder, self.present.frames[number - 1])

    def _version(self, number: int) -> Version:
        if not 1 <= number <= len(self._history.versions):
            raise ValueError(f"version {number}: {self.folder} has 1 to {len(self._history.versions)}")
        return self._history.versions[number - 1]


def is_project(folder: Path) -> bool:
    """Whether a folder is a story project."""
    return (folder / HISTORY_FILE).is_file()


def check_new_project(folder: Path) -> None:
    """Raises what StoryProject.create would raise, so that one can ask before the frames are drawn."""
    begun = folder.is_dir() and {path.name for path in folder.iterdir()} <= BEGUN
    if not begun:
        check_output_folder(folder, made_with=HISTORY_FILE)
    if is_project(folder):
        raise ValueError(f"{folder} is a story project already")


def _image(folder: Path, content: str) -> Image.Image:
    return decode_frame(read_picture(folder, content), picture_path(folder, content))


def _check_numbers(frames: Mapping[int, object], expected: Collection[int]) -> None:
    if sorted(frames) != list(expected):
        raise ValueError(f"found frames {sorted(frames)}, expected {list(expected)}")


def _check_inside(numbers: Collection[int], num_frames: int, verb: str) -> None:
    if outside := sorted(number for number in numbers if not 1 <= number <= num_frames):
        raise ValueError(f"{verb} {outside}: the story has frames 1 to {num_frames}")


def forget_beginning(folder: Path, is_new: bool) -> None:
    """Takes away what is left of a project that could not begin; unfinished windows stay.

    An empty folder is taken away where is_new: it was not there before.
    """
    with suppress(OSError, Busy), locked(folder, "leaving it"):
        if not is_project(folder):
            remove_unknown_pictures(folder, set())
            (folder / OBJECTS).rmdir()
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()


def _lock_line(verb: str, pictures: Collection[str]) -> dict:
    return {"lock": [], "unlock": [], verb: list(pictures), "time": _now()}


def _typed(numbers: Collection[int]) -> str:
    """As an argument says them."""
    return f"[{','.join(map(str, sorted(numbers)))}]"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
