"""Draws what an edit leaves to draw, into a story project."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from infer.frame_folder import as_png, read_given
from infer.project.unfinished import UnfinishedFrames
from infer.project.whole_files import locked, sha256
from infer.story_project import StoryProject, check_new_project, forget_beginning
from storyanchors.conditioning import ClipConditions
from storyanchors.generator import StoryGenerator
from storyanchors.story import Story
from storyanchors.story_edit import StoryEdit
from storyanchors.story_request import SamplerSettings


@dataclass(frozen=True)
class DrawSettings:
    """All that decides the pixels besides the story, the frames that are known and the seed."""

    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    conditions: ClipConditions = field(default_factory=ClipConditions)
    height: int | None = None  # pixels; None = as the frames that are kept, or the model's
    width: int | None = None
    window: int | None = None
    overlap: int | None = None
    model: dict = field(default_factory=dict)  # which weights, device and versions: see describe_model

    def record(self, generator: StoryGenerator, seed: int) -> dict:
        """What a project's history says of a drawing."""
        settings = asdict(generator.full_settings(self.sampler))
        settings |= {name: getattr(self, name) for name in ("height", "width", "window", "overlap")}
        return {"seed": seed, "settings": settings, "conditions": asdict(self.conditions), **self.model}


def run_edit(
    generator: StoryGenerator,
    project: StoryProject | Path,
    edit: StoryEdit,
    settings: DrawSettings,
    *,
    seed: int = 0,
    given: Mapping[int, Path] | None = None,
    out: Path | None = None,
    progress: bool = True,
    callback: Callable[[int, list[Tensor]], bool | None] | None = None,
) -> StoryProject:
    """Draws what an edit leaves to draw, and returns the project of which the result is the present version.

    project is one that the edit was made for, or a folder to begin one in. given has files for frames, by
    number after the edit, that the edit does not keep. With out, a project in that folder begins with the
    present version and goes on with the edit, and `project` stays as it is.
    What this very call has drawn before, in this project, is not drawn again. Windows of a story that is too
    long to be drawn at once are stored as they are finished; the same call goes on with them, after
    SamplingStopped as after a kill, and makes the same frames; the callback's steps count those windows too.
    ValueError and OSError, in one line, leave the project as it is.
    """
    home = out or (project if isinstance(project, Path) else project.folder)
    given = dict(given or {})
    with _held(project, home, edit):
        known, hashes = _known_frames(project, edit, given)
        if len(known) == edit.story.num_frames:
            return _put(project, home, edit, given, {})
        if not edit.kept and not settings.height and not settings.width:
            _check_size(given, known, generator.frame_size)
        record = settings.record(generator, seed)
        key = record["request"] = _request_key(edit.story, hashes, record)
        drawn = _drawn_before(project, key)
        if drawn is None:
            draw = _Drawing(generator, edit, settings, seed, UnfinishedFrames(home, key))
            drawn = draw(known, progress, callback)
        elif home == project.folder and project.present.record.get("request") == key:
            return project
        new = {number: frame for number, frame in drawn.items() if number not in known}
        return _put(project, home, edit, new | given, record)


@contextmanager
def _held(project: StoryProject | Path, home: Path, edit: StoryEdit) -> Iterator[None]:
    """Nobody else changes the folder that the result goes to; what it refuses is refused before drawing."""
    if isinstance(project, StoryProject) and home == project.folder:
        with project.exclusive(edit.what):
            project.check_untouched()
            project.check_locks(edit)
            yield
        return
    check_new_project(home)
    is_new = not home.exists()
    home.mkdir(parents=True, exist_ok=True)
    try:
        with locked(home, edit.what):
            yield
    finally:
        forget_beginning(home, is_new)


def _known_frames(
    project: StoryProject | Path, edit: StoryEdit, given: Mapping[int, Path]
) -> tuple[dict[int, Image.Image], dict[int, str]]:
    """Frames by number after the edit, and the SHA-256 of their PNG files."""
    frames: dict[int, Image.Image] = dict(read_given(given))
    hashes = {number: sha256(as_png(path)) for number, path in given.items()}
    if edit.kept:
        before = project.frames()
        frames |= {number: before[earlier] for number, earlier in edit.kept.items()}
        hashes |= {number: project.present.frames[earlier - 1] for number, earlier in edit.kept.items()}
    return frames, hashes


def _check_size(
    given: Mapping[int, Path], known: Mapping[int, Image.Image], frame_size: tuple[int, int]
) -> None:
    """frame_size: height, width."""
    height, width = frame_size
    for number, path in given.items():
        if (found := known[number].size) != (width, height):
            raise ValueError(
                f"frame {number}, {path}, has {found[0]} x {found[1]} pixels, expected {width} x {height}: "
                f"give the frames that size, or height={found[1]} width={found[0]} for a new project"
            )


def _request_key(story: Story, hashes: dict[int, str], record: dict) -> str:
    """Equal for two drawings that must have the same pixels; where the weights lie does not matter."""
    record = {name: value for name, value in record.items() if name not in ("weights", "lora")}
    return sha256(json.dumps([story.to_dict(), sorted(hashes.items()), record], sort_keys=True).encode())


def _drawn_before(project: StoryProject | Path, key: str) -> dict[int, Image.Image] | None:
    for drawn in [] if isinstance(project, Path) else project.history:
        if drawn.record.get("request") == key:
            return project.frames(drawn.number)
    return None


@dataclass(frozen=True)
class _Drawing:
    """One call of StoryGenerator.redraw that can be gone on with."""

    generator: StoryGenerator
    edit: StoryEdit
    settings: DrawSettings
    seed: int
    unfinished: UnfinishedFrames

    def __call__(
        self, known: Mapping[int, Image.Image], progress: bool, callback: Callable | None
    ) -> dict[int, Image.Image]:
        num_before, done = self.unfinished.read()
        num_windows = num_before

        def finished(frames: dict[int, Image.Image]) -> None:
            nonlocal num_windows
            num_windows += 1
            if len(frames) < self.edit.story.num_frames:  # the last window is about to be a version
                new = {number: frame for number, frame in frames.items() if number not in known}
                self.unfinished.keep(num_windows, new)

        there, settings = {**known, **done}, self.settings
        steps_before = num_before * self.generator.full_settings(settings.sampler).num_steps

        own_height, own_width = (None, None) if self.edit.kept else self.generator.frame_size

        def show(step: int, latents: list[Tensor]) -> bool | None:
            return callback(steps_before + step, latents) if callback else None

        frames = self.generator.redraw(
            StoryEdit(self.edit.story, {number: number for number in there}, self.edit.what),
            there,
            height=settings.height or own_height,
            width=settings.width or own_width,
            conditions=settings.conditions,
            seed=self.seed + num_before,  # window i is drawn with seed + i
            settings=settings.sampler,
            window=settings.window,
            overlap=settings.overlap,
            progress=progress,
            callback=show,
            finished=finished,
        )
        return dict(enumerate(frames, start=1))


def _put(
    project: StoryProject | Path,
    home: Path,
    edit: StoryEdit,
    frames: Mapping[int, Image.Image | Path],
    record: dict,
) -> StoryProject:
    if isinstance(project, Path):
        return StoryProject.create(home, edit.story, frames, record, what=edit.what)
    if home != project.folder:
        return project.copy(home, edit, frames, record)
    project.commit(edit, frames, record)
    return project
