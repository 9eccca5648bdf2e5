"""The history of a story project: the lines of history.jsonl, and what they add up to.

The first line says the format. After it one line stands for each thing done: a version, a move (undo, redo,
restore), pictures locked or unlocked. Nothing is ever taken out, so every version can be had back.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from storyanchors.story import Story

SCHEMA_VERSION = 1
SHA256 = re.compile("[0-9a-f]{64}")
HEADER = json.dumps({"story_project": SCHEMA_VERSION}).encode()


@dataclass(frozen=True)
class Version:
    """A story and its frames, and how they came from the version before."""

    number: int  # from 1, in the order they were made
    parent: int | None  # the version that was changed; None for the first
    what: str  # one line for people
    kept: dict[int, int]  # frame number here -> frame number in the parent, whose very bytes these are
    given: dict[int, str]  # frame number -> file that it was taken from
    story: Story
    frames: tuple[str, ...]  # SHA-256 of each frame's PNG file, in order
    record: dict  # what drew it: seed, settings, weights, ... as JSON
    time: str  # ISO 8601, UTC

    @property
    def drawn(self) -> list[int]:
        """Numbers of the frames that a model drew for this version."""
        return [n for n in range(1, len(self.frames) + 1) if n not in self.kept and n not in self.given]

    @property
    def seed(self) -> int | None:
        """Of the noise; None where nothing was drawn."""
        return self.record.get("seed")

    @property
    def settings(self) -> dict:
        """The sampler's; {} where nothing was drawn."""
        return self.record.get("settings", {})

    @property
    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 by file name of the weights that drew it; {} where nothing was drawn."""
        return self.record.get("weights_sha256", {})

    def to_line(self) -> dict:
        """As a line of history.jsonl."""
        return {
            "version": self.number,
            "parent": self.parent,
            "what": self.what,
            "kept": {str(number): before for number, before in self.kept.items()},
            "given": {str(number): path for number, path in self.given.items()},
            "story": self.story.to_dict(),
            "frames": list(self.frames),
            "record": self.record,
            "time": self.time,
        }

    @classmethod
    def from_line(cls, line: dict) -> "Version":
        """Inverse of to_line."""
        return cls(
            number=line["version"],
            parent=line["parent"],
            what=line["what"],
            kept={int(number): before for number, before in line["kept"].items()},
            given={int(number): path for number, path in line["given"].items()},
            story=Story.from_dict(line["story"]),
            frames=tuple(line["frames"]),
            record=line["record"],
            time=line["time"],
        )


def given_pictures(versions: Collection[Version]) -> set[str]:
    """SHA-256 of the pictures that came from files outside.

    The frames that a copy took from its original did so where they were given there.
    """
    return {
        version.frames[number - 1]
        for version in versions
        for number in version.record.get("given_before", version.given)
    }


@dataclass
class History:
    """What the lines add up to: the versions, the present one, and the way back and forth."""

    versions: list[Version] = field(default_factory=list)
    present: int = 0  # number of the version that is shown
    before: list[int] = field(default_factory=list)  # what undo goes back to, the next one last
    undone: list[int] = field(default_factory=list)  # what redo goes on to, the next one last
    locked: set[str] = field(default_factory=set)  # SHA-256 of pictures

    def add(self, line: dict) -> None:
        """One more line; ValueError, KeyError, IndexError or TypeError where it does not follow."""
        if "version" in line:
            version = Version.from_line(line)
            _check_follows(version, len(self.versions))
            self.versions.append(version)
            self._go_to(version.number)
        elif "move" in line:
            self._move(line["move"], line["to"])
        else:
            self.locked -= set(line["unlock"])
            self.locked |= set(line["lock"])

    def _go_to(self, number: int) -> None:
        if self.present:
            self.before.append(self.present)
        self.present = self.versions[number - 1].number
        self.undone.clear()

    def _move(self, move: str, to: int) -> None:
        if move == "restore":
            return self._go_to(to)
        here, there = {"undo": (self.undone, self.before), "redo": (self.before, self.undone)}[move]
        here.append(self.present)
        self.present = there.pop()
        if self.present != to:
            raise ValueError(f"{move} to version {to}, expected {self.present}")


def _check_follows(version: Version, number_before: int) -> None:
    """Other programs may have written the line: its hashes become paths, its parents are followed."""
    if version.number != number_before + 1:
        raise ValueError(f"version {version.number} after {number_before}")
    if version.parent is not None and not 1 <= version.parent <= number_before:
        raise ValueError(f"version {version.number} has the parent {version.parent}")
    if len(version.frames) != version.story.num_frames:
        raise ValueError(f"{len(version.frames)} frames of a story of {version.story.num_frames}")
    if wrong := [content for content in version.frames if not SHA256.fullmatch(content)]:
        raise ValueError(f"{wrong[0]!r} is no SHA-256")


def read_history(path: Path, lines: list[bytes]) -> History:
    """The history in the lines of a file; ValueError naming the file and the line that is damaged."""
    history = History()
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            if number > 1:
                history.add(content)
            elif content["story_project"] != SCHEMA_VERSION:
                raise ValueError(f"story_project {content['story_project']!r}, expected {SCHEMA_VERSION}")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error!r})") from error
    if not history.versions:
        raise ValueError(f"{path} has no version, expected at least one")
    return history
