"""The board: one story project, what a person does to it, and what is shown of it. No HTML, no Gradio.

Whatever changes the project is a job of the worker, so that one thing happens at a time, and a page that is
closed, reloaded or opened twice changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from infer.storyboard.artist import Artist
from infer.storyboard.desk import Desk
from infer.storyboard.draft import Draft, Texts
from infer.storyboard.event_lines import event_lines, read_story
from infer.storyboard.focus import Focus
from infer.storyboard.known_words import knows_story_world_only, surprising_story, unknown_to_story_world
from infer.storyboard.worker import Job
from storyanchors.generator import SamplingStopped
from storyanchors.story import Story
from storyanchors.story_edit import (
    StoryEdit,
    delete_frames,
    edit_frames,
    insert_event,
    keep_frames,
    redraw_frames,
    replace_story,
)

NUM_VARIANTS = 4
MAX_NEW_FRAMES = 16
HARDLY_DIFFERENT = 3.0  # mean difference of two drawings in RGB steps, seen from far away
FAR_AWAY = (16, 16)  # pixels: noise is gone, a subject that stands elsewhere is not


@dataclass
class Choice:
    """Several drawings of one frame of one version of the project."""

    number: int
    version: int
    seeds: range
    job: Job  # that draws them
    drawn: list[Image.Image] | None = None  # None until it has


class Board:
    """Raises ValueError, one line, for what cannot be done; jobs say theirs when they come to it."""

    def __init__(self, folder: Path, example: Story, artist: Artist, first_seed: int = 0):
        self.example, self.artist = example, artist
        self.message, self.is_error = "", False
        self.desk = Desk(folder, self.say, first_seed)
        self.moves = 0  # how often frames were numbered anew
        self.choice: Choice | None = None
        self._draft = Draft(folder)
        if not self.desk.project:
            self.say("Write what happens, or take the example, and draw it.")

    def say(self, text: str, is_error: bool = False) -> None:
        """The one line at the bottom of the page, without the path that its reader does not know."""
        text = text.replace(str(self.desk.folder), self.desk.folder.name)
        self.message, self.is_error = " ".join(text.split()), is_error

    # What a click does

    def act(self, act: str, value: int, focus: Focus) -> None:
        """A click on what carries this data-act and data-value, on the page of this focus."""
        if not isinstance(value, int):
            raise ValueError(f"a click on {act!r} carries a number, found {value!r}")
        acts: dict[str, Callable[[], None]] = {
            "select": lambda: focus.look_at(self.moves, selected=value),
            "place": lambda: focus.look_at(self.moves, place=value),
            "story": lambda: focus.look_at(self.moves),
            "lock": lambda: self._lock(value, focus),
            "choose": lambda: self._choose(value),
            "undo": lambda: self._move("undo"),
            "redo": lambda: self._move("redo"),
            "cancel": self.desk.worker.cancel,
            "forget": self._draft.forget,
        }
        if act not in acts:
            raise ValueError(f"unknown click {act!r}")
        acts[act]()

    def place_after_selected(self, focus: Focus) -> None:
        """Frames are to be inserted after the selected one."""
        focus.look_at(self.moves, place=self._selected(focus))

    def keep_up(self, focus: Focus) -> None:
        """A page whose numbers have become those of other frames looks at the story again."""
        if focus.moves != self.moves:
            focus.look_at(self.moves)

    def _check_numbers(self, focus: Focus) -> None:
        if focus.moves != self.moves:
            raise ValueError("the frames got other numbers meanwhile: now this page shows them, click again")

    # The story

    def texts(self) -> Texts:
        """Events, subjects and style as they are typed: the draft, else the project's, else the example's."""
        return self._draft.read() or self._told()

    def has_draft(self) -> bool:
        """Whether something is typed that is not drawn."""
        return self._draft.read() is not None

    def _told(self) -> Texts:
        story = self.desk.project.story if self.desk.project else self.example
        return event_lines(story), "; ".join(story.subjects), story.style

    def keep_draft(self, events: str, subjects: str, style: str) -> None:
        """Remembers what is typed but not drawn, also when the server is started again."""
        texts = (events, subjects, style)
        if texts == self._told():
            self._draft.forget()
        else:
            self._draft.keep(texts)

    def surprise(self, seed: int) -> None:
        """Types a story that a story-world model knows all words of."""
        story = surprising_story(seed)
        self.keep_draft(event_lines(story), "; ".join(story.subjects), story.style)

    @property
    def knows_story_world_only(self) -> bool:
        """Whether the model that draws here knows nothing else."""
        return knows_story_world_only(self.artist.generator)

    def draw_story(self, focus: Focus, events: str, subjects: str, style: str) -> None:
        """Draws the story as typed: all of a new one, else the frames whose text has changed."""
        story = read_story(events, subjects, style)

        def edit() -> StoryEdit:
            if not self.desk.project:
                return keep_frames(story, [])
            keep = _unchanged(self.desk.project.story, story) | self._locked_within(story)
            if len(keep) == story.num_frames == self.desk.project.num_frames:
                raise ValueError("no frame's text has changed: re-roll single frames, or draw all anew")
            return replace_story(self.desk.project.story, story, keep)

        self._draw("Drawing the story", edit, focus, renumbers=True, typed=(events, subjects, style))

    def draw_all_anew(self, focus: Focus, events: str, subjects: str, style: str) -> None:
        """Draws all frames that are not locked, from the story as typed."""
        story = read_story(events, subjects, style)

        def edit() -> StoryEdit:
            keep = self._locked_within(story) if self.desk.project else set()
            return replace_story(self.desk.project.story if self.desk.project else story, story, keep)

        self._draw("Drawing all frames", edit, focus, renumbers=True, typed=(events, subjects, style))

    def _locked_within(self, story: Story) -> set[int]:
        """The locked frames; ValueError for a story that ends before one."""
        locked, end = self.desk.project.locked, story.num_frames
        if beyond := [number for number in sorted(locked) if number > end]:
            raise ValueError(
                f"frame {beyond[-1]} is locked, and your story ends at frame {end}: "
                f"unlock it or write {beyond[-1]} frames"
            )
        return locked

    # One frame

    def reroll(self, focus: Focus) -> None:
        """Another drawing of the selected frame from the same text."""
        number = self._unlocked(focus)
        edit = lambda: redraw_frames(self.desk.project.story, [number])  # noqa: E731
        self._draw(f"Re-rolling frame {number}", edit, focus)

    def edit(self, focus: Focus, text: str) -> None:
        """The selected frame from another text."""
        number = self._unlocked(focus)
        if not text.strip():
            raise ValueError(f"write first what happens in frame {number}")
        edit = lambda: edit_frames(self.desk.project.story, {number: text})  # noqa: E731
        self._draw(f"Drawing frame {number} with its new text", edit, focus)

    def delete(self, focus: Focus) -> None:
        """Takes the selected frame out."""
        number = self._unlocked(focus)
        if self.desk.project.num_frames == 1:
            raise ValueError("this is the only frame, and a story has at least one")
        edit = lambda: delete_frames(self.desk.project.story, [number])  # noqa: E731
        self._draw(f"Deleting frame {number}", edit, focus, renumbers=True)

    def add_frames(self, focus: Focus, text: str, count: int | None) -> None:
        """New frames at the chosen place; at the end they leave every frame its number."""
        self._check_numbers(focus)
        if focus.place is None or not self.desk.project:
            raise ValueError("choose a place for the new frames first")
        if count is None or not 1 <= count <= MAX_NEW_FRAMES:
            found = "none" if count is None else count
            raise ValueError(f"1 to {MAX_NEW_FRAMES} new frames at once, found {found}")
        if not text.strip():
            raise ValueError("write first what happens in the new frames")
        place, count = focus.place, int(count)
        at_end = place >= self.desk.project.num_frames

        def edit() -> StoryEdit:
            story = self.desk.project.story
            return insert_event(story, story.num_frames if at_end else place, text, count)

        what = f"Drawing {count} new frame{'s' * (count != 1)} after frame {place}"
        self._draw(what, edit, focus, renumbers=not at_end)

    def _selected(self, focus: Focus) -> int:
        self._check_numbers(focus)
        if focus.selected is None or not self.desk.project:
            raise ValueError("choose a frame first")
        return focus.selected

    def _unlocked(self, focus: Focus) -> int:
        number = self._selected(focus)
        if number in self.desk.project.locked:
            raise ValueError(f"frame {number} is locked: unlock it first")
        return number

    def _lock(self, number: int, focus: Focus) -> None:
        self._check_numbers(focus)

        def work(job: Job) -> str:
            locked = number in self.desk.project.locked
            (self.desk.project.unlock if locked else self.desk.project.lock)([number])
            return f"Frame {number} is {'unlocked' if locked else 'locked: it stays as it is'}."

        self._submit(Job(f"Locking frame {number}", work))

    def _move(self, move: str) -> None:
        def work(job: Job) -> str:
            (self.desk.project.undo if move == "undo" else self.desk.project.redo)()
            self.moves += 1
            return self._what()

        self._submit(Job(move.capitalize(), work, renumbers=True))

    # Comparing

    def compare(self, focus: Focus) -> None:
        """Several drawings of the selected frame, to choose from."""
        number = self._unlocked(focus)

        def work(job: Job) -> str:
            edit = redraw_frames(self.desk.project.story, [number])
            choice = Choice(number, self.desk.project.version, self.desk.new_seeds(NUM_VARIANTS), job)
            self.choice = choice
            try:
                choice.drawn = self.artist.draw_variants(self.desk.project, edit, choice.seeds, job)
            finally:
                self.choice = choice if choice.drawn else None
            if _hardly_differ(choice.drawn):
                return (
                    f"{NUM_VARIANTS} drawings of frame {number} that hardly differ: "
                    "the text and the other frames leave little open here."
                )
            return f"{NUM_VARIANTS} drawings of frame {number}: choose one, or keep what is."

        self._submit(Job(f"Drawing {NUM_VARIANTS} versions of frame {number}", work))

    def _choose(self, index: int) -> None:
        """Drawing 0 is what the story has now."""
        choice = self.present_choice()
        if not choice or (index and not choice.drawn):
            raise ValueError("there is nothing to choose from: compare the drawings of a frame first")
        if index == 0:
            if not choice.drawn:
                choice.job.cancelled = True
            self.choice = None
            return

        def work(job: Job) -> str:
            if choice.version != self.desk.project.version:
                raise ValueError("the story has changed since these were drawn: compare again")
            edit = redraw_frames(self.desk.project.story, [choice.number])
            seed = choice.seeds[index - 1]
            self.artist.take_variant(self.desk.project, edit, {choice.number: choice.drawn[index - 1]}, seed)
            return f"Version {self.desk.project.version}: frame {choice.number} with seed {seed}"

        self._submit(Job(f"Taking drawing {index} of frame {choice.number}", work))

    def present_choice(self) -> Choice | None:
        """What there is to choose from, as long as the project is what it was then."""
        fits = self.choice and self.desk.project and self.choice.version == self.desk.project.version
        return self.choice if fits else None

    # Jobs

    def _draw(
        self,
        what: str,
        make_edit: Callable[[], StoryEdit],
        focus: Focus,
        *,
        renumbers: bool = False,
        typed: Texts | None = None,  # the whole story, where that is what is drawn
    ) -> None:
        def work(job: Job) -> str:
            num_before = self.desk.project.num_frames if self.desk.project else 0
            edit = make_edit()
            self._check_locks(edit)
            job.sketch = self.desk.sketch(edit)
            looked_at = {"selected": focus.selected, "place": focus.place}
            moves = renumbers or edit.story.num_frames != num_before
            if moves:
                self.moves += renumbers
                focus.look_at(self.moves, selected=None if typed else next(iter(edit.drawn()), None))
            [seed] = self.desk.new_seeds(1)
            try:
                self.desk.project = self.artist.draw(self.desk.project or self.desk.folder, edit, seed, job)
            except BaseException as error:
                if moves:  # back again
                    self.moves += renumbers
                    focus.look_at(self.moves, **looked_at)
                if isinstance(error, SamplingStopped):  # asked for again, it goes on after finished windows
                    self.desk.first_seed = seed
                raise
            if typed and typed == self._draft.read():  # nothing was typed since
                self._draft.forget()
            return self._told_of(edit, num_before if typed else 0)

        self._submit(Job(what, work, renumbers))

    def _check_locks(self, edit: StoryEdit) -> None:
        """Locks may have come while the click waited in the line."""
        locked = self.desk.project.locked if self.desk.project else set()
        if lost := sorted(locked - set(edit.kept.values())):
            raise ValueError(f"frame {lost[0]} is locked: unlock it first")

    def _told_of(self, edit: StoryEdit, num_before: int) -> str:
        """The line after an edit."""
        line, num_frames = self._what(), edit.story.num_frames
        if num_frames < num_before:
            became = f"{num_before} frames became {num_frames}"
            line = f"Version {self.desk.project.version}: {became}. Undo brings them back"
        unknown = unknown_to_story_world(edit.story) if edit.drawn() and self.knows_story_world_only else ""
        return (
            f"{line}. This model knows only the story world's sentences: {unknown}."
            if unknown
            else f"{line}."
        )

    def _submit(self, job: Job) -> None:
        self.say("")
        self.desk.submit(job)

    def _what(self) -> str:
        return f"Version {self.desk.project.version}: {self.desk.project.present.what}"


def _unchanged(before: Story, after: Story) -> set[int]:
    """Numbers of the frames of which both stories tell the same."""
    if (before.subjects, before.style) != (after.subjects, after.style):
        return set()
    told = zip(before.descriptions(), after.descriptions())
    return {number for number, (old, new) in enumerate(told, start=1) if old == new}


def _hardly_differ(drawings: list[Image.Image]) -> bool:
    """Whether no two are far apart."""
    far_away = [drawing.resize(FAR_AWAY, Image.Resampling.BOX) for drawing in drawings]
    arrays = [np.asarray(drawing, dtype=np.float32) for drawing in far_away]
    return all(np.abs(a - b).mean() < HARDLY_DIFFERENT for a, b in combinations(arrays, 2))
