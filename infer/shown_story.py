"""A story as it is shown: its frames, and where each of them came from."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from infer.frame_folder import find_frames, read_frame
from infer.project.history import Version
from infer.project.views import STORY_FILE
from infer.story_project import StoryProject, is_project
from storyanchors.story import Story


@dataclass(frozen=True)
class ShownStory:
    """One version of a project, or a folder of frames with a story, which has no history."""

    name: str
    story: Story
    paths: list[Path]  # of the frames, in order
    origins: dict[int, Version] = field(default_factory=dict)  # the version that each frame was new in
    given: set[int] = field(default_factory=set)  # frames that no model of this history drew
    locked: set[int] = field(default_factory=set)
    history: list[Version] = field(default_factory=list)
    version: int | None = None

    def frames(self) -> list[Image.Image]:
        """RGB, in order; ValueError naming the file that is broken."""
        return [read_frame(path).convert("RGB") for path in self.paths]


def read_shown(project: str, version: int | None = None) -> ShownStory:
    """A version of a project (None: the present one); ValueError where it has no such version."""
    opened = StoryProject.open(project)
    version = opened.version if version is None else version
    if not 1 <= version <= len(opened.history):
        raise ValueError(f"{project} has no version {version}, its last one is {len(opened.history)}")
    shown = opened.history[version - 1]
    origins = {n: find_origin(opened.history, version, n) for n in range(1, len(shown.frames) + 1)}
    return ShownStory(
        Path(project).resolve().name,
        shown.story,
        [path for _, path in sorted(opened.frame_paths(version).items())],
        {number: origin for number, (origin, _) in origins.items()},
        {number for number, (origin, there) in origins.items() if there in origin.given},
        opened.locked if version == opened.version else set(),
        opened.history,
        version,
    )


def find_origin(history: list[Version], version: int, number: int) -> tuple[Version, int]:
    """The version in which a frame of this version was new, and the frame's number there."""
    shown = history[version - 1]
    while number in shown.kept and shown.parent is not None:
        number, shown = shown.kept[number], history[shown.parent - 1]
    return shown, number


def read_frames_and_story(frames: str, story: str | None) -> ShownStory:
    """Numbered frames and a story file (None: the folder's own); ValueError where they do not fit."""
    found = find_frames(Path(frames))
    if story is None and not (Path(frames) / STORY_FILE).is_file():
        raise ValueError(f"{frames} has no {STORY_FILE}, expected story=FILE")
    read = Story.from_file(Path(story) if story else Path(frames) / STORY_FILE)
    if len(found) != read.num_frames or max(found) != read.num_frames or min(found) < 1:
        raise ValueError(f"{frames} has the frames {sorted(found)}, the story has 1 to {read.num_frames}")
    return ShownStory(Path(frames).resolve().name, read, [path for _, path in sorted(found.items())])


def read_any(place: str, version: int | None = None) -> ShownStory:
    """A project, PROJECT@VERSION, or a folder of frames with its story.yaml."""
    folder, at, number = place.rpartition("@")
    if version is None and at and number.isdecimal() and not Path(place).exists():
        return read_any(folder, int(number))
    if is_project(Path(place)):
        return read_shown(place, version)
    if version is not None:
        raise ValueError(f"{place} is no story project, so it has no version {version}")
    return read_frames_and_story(place, None)
