"""The board: one story project, what a person does to it, and what is shown of it. No HTML, no Gradio.

Whatever changes the project is a job of the worker, so that one thing happens at a time, and a page that is
closed, reloaded or opened twice changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from infer.storyboard.artist import Artist
from infer.storyboard.desk import Desk
from infer.storyboard.draft import Draft, Texts
from infer.storyboard.event_lines import event_lines, read_story
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
        self.selected: int | None = None
        self.place: int | None = None  # new frames go after this one
        self.choice: Choice | None = None
        self._draft = Draft(folder)
        if not self.desk.project:
            self.say("Write what happens, or take the example, and draw it.")

    def say(self, text: str, is_error: bool = False) -> None:
        """The one line at the bottom of the page."""
        self.message, self.is_error = " ".join(text.split()), is_error

    # What a click does

    def act(self, act: str, value: int) -> None:
        """A click on what carries this data-act and data-value."""
        if not isinstance(value, int):
            raise ValueError(f"a click on {act!r} carries a number, found {value!r}")
        acts: dict[str, Callable[[], None]] = {
            "select": lambda: self._look_at(selected=value),
            "place": lambda: self._look_at(place=value),
            "story": lambda: self._look_at(),
            "lock": lambda: self._lock(value),
            "choose": lambda: self._choose(value),
            "undo": lambda: self._move("undo"),
            "redo": lambda: self._move("redo"),
            "cancel": self.desk.worker.cancel,
            "forget": self._draft.forget,
        }
        if act not in acts:
            raise ValueError(f"unknown click {act!r}")
        acts[act]()

    def place_after_selected(self) -> None:
        """Frames are to be inserted after the selected one."""
        self._look_at(place=self._selected())

    def check_focus(self, selected: int | None, place: int | None) -> None:
        """ValueError unless this is what is chosen: a click on a page that does not show it means another."""
        if (selected, place) != (self.selected, self.place):
            raise ValueError(
                "another page chose something else meanwhile: now this one shows it, click again"
            )

    def _look_at(self, selected: int | None = None, place: int | None = None) -> None:
        self.selected, self.place = selected, place

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

    def draw_story(self, events: str, subjects: str, style: str) -> None:
        """Draws the story as typed: all of a new one, else the frames whose text has changed."""
        story = read_story(events, subjects, style)

        def edit() -> StoryEdit:
            if not self.desk.project:
                return keep_frames(story, [])
            keep = _unchanged(self.desk.project.story, story) | self._locked_within(story)
            if len(keep) == story.num_frames == self.desk.project.num_frames:
                raise ValueError("no frame's text has changed: re-roll single frames, or draw all anew")
            return replace_story(self.desk.project.story, story, keep)

        self._draw("Drawing the story", edit, renumbers=True, typed=(events, subjects, style))

    def draw_all_anew(self, events: str, subjects: str, style: str) -> None:
        """Draws all frames that are not locked, from the story as typed."""
        story = read_story(events, subjects, style)

        def edit() -> StoryEdit:
            keep = self._locked_within(story) if self.desk.project else set()
            return replace_story(self.desk.project.story if self.desk.project else story, story, keep)

        self._draw("Drawing all frames", edit, renumbers=True, typed=(events, subjects, style))

    def _locked_within(self, story: Story) -> set[int]:
        return {number for number in self.desk.project.locked if number <= story.num_frames}

    # One frame

    def reroll(self) -> None:
        """Another drawing of the selected frame from the same text."""
        number = self._unlocked()
        self._draw(f"Re-rolling frame {number}", lambda: redraw_frames(self.desk.project.story, [number]))

    def edit(self, text: str) -> None:
        """The selected frame from another text."""
        number = self._unlocked()
        edit = lambda: edit_frames(self.desk.project.story, {number: text})  # noqa: E731
        self._draw(f"Drawing frame {number} with its new text", edit)

    def delete(self) -> None:
        """Takes the selected frame out."""
        number = self._unlocked()
        edit = lambda: delete_frames(self.desk.project.story, [number])  # noqa: E731
        self._draw(f"Deleting frame {number}", edit, renumbers=True)

    def add_frames(self, text: str, count: int | None) -> None:
        """New frames at the chosen place."""
        if self.place is None:
            raise ValueError("choose a place for the new frames first")
        place, count = self.place, int(count or 0)
        what = f"Drawing {count} new frame{'s' * (count != 1)} after frame {place}"
        edit = lambda: insert_event(self.desk.project.story, place, text, count)  # noqa: E731
        self._draw(what, edit, renumbers=True)

    def _selected(self) -> int:
        if self.selected is None or not self.desk.project:
            raise ValueError("choose a frame first")
        return self.selected

    def _unlocked(self) -> int:
        number = self._selected()
        if number in self.desk.project.locked:
            raise ValueError(f"frame {number} is locked: unlock it first")
        return number

    def _lock(self, number: int) -> None:
        def work(job: Job) -> str:
            locked = number in self.desk.project.locked
            (self.desk.project.unlock if locked else self.desk.project.lock)([number])
            return f"Frame {number} is {'unlocked' if locked else 'locked: it stays as it is'}."

        self._submit(Job(f"Locking frame {number}", work))

    def _move(self, move: str) -> None:
        def work(job: Job) -> str:
            (self.desk.project.undo if move == "undo" else self.desk.project.redo)()
            self._look_at()
            return self._what()

        self._submit(Job(move.capitalize(), work, renumbers=True))

    # Comparing

    def compare(self) -> None:
        """Several drawings of the selected frame, to choose from."""
        number = self._unlocked()

        def work(job: Job) -> str:
            edit = redraw_frames(self.desk.project.story, [number])
            choice = Choice(number, self.desk.project.version, self.desk.new_seeds(NUM_VARIANTS), job)
            self.choice = choice
            try:
                choice.drawn = self.artist.draw_variants(self.desk.project, edit, choice.seeds, job)
            finally:
                self.choice = choice if choice.drawn else None
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
        *,
        renumbers: bool = False,
        typed: Texts | None = None,  # the whole story, where that is what is drawn
    ) -> None:
        def work(job: Job) -> str:
            edit = make_edit()
            job.sketch = self.desk.sketch(edit)
            if renumbers:
                self._look_at(selected=None if typed else next(iter(edit.drawn()), None))
            [seed] = self.desk.new_seeds(1)
            try:
                self.desk.project = self.artist.draw(self.desk.project or self.desk.folder, edit, seed, job)
            except SamplingStopped:
                self.desk.first_seed = (
                    seed  # asked for again, the drawing goes on after the windows that are finished
                )
                raise
            if typed and typed == self._draft.read():  # nothing was typed since
                self._draft.forget()
            return self._what()

        self._submit(Job(what, work, renumbers))

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
