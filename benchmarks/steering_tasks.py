"""The tasks of steering.py: what is asked, of which stories, and which scores answer it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np

from benchmarks.steering_cases import (
    LONG_FRAMES,
    TRAINED_FRAMES,
    Case,
    delete_case,
    edit_case,
    extend_case,
    global_caption_case,
    infill_case,
    insert_case,
    keep_case,
    other_prompt_case,
    seen_late,
    short_inner_events,
)
from infer.score_story_world import HELD_OUT
from storyanchors.story_world import WorldStory, sample_story

Make = Callable[[WorldStory, np.random.Generator], Case]


@dataclass(frozen=True)
class Task:
    """A named question, and the scores that answer it (steering_scores.py)."""

    name: str
    what: str
    make: Make
    scores: tuple[str, ...]
    num_frames: int = TRAINED_FRAMES  # of the story before
    suits: Callable[[WorldStory], object] | None = None  # None: every story

    def cases(self, num_stories: int) -> Iterator[Case]:
        """The cases of the first held-out stories that suit; the same at every call."""
        stories = (sample_story(HELD_OUT + i, num_frames=self.num_frames) for i in count())
        for index, story in enumerate(islice(filter(self.suits, stories), num_stories)):
            yield self.make(story, np.random.default_rng((HELD_OUT, index)))


CONTINUED = ("pfa_f1", "subject_consistency")
SEEN = ("identity", "scene_accuracy")
CHANGED = ("pfa_f1", "subject_consistency", "whole_order_tau", "locked", "locked_png")
FROM_TEXT = partial(keep_case, numbers=[], anonymous=False)
ORDER = ("event_completeness", "scene_sequence", "scene_order_tau")


def _kept(name: str, what: str, numbers: Sequence[int], *, anonymous: bool = False) -> Task:
    make = partial(keep_case, numbers=numbers, anonymous=anonymous)
    return Task(name, what, make, SEEN if anonymous else CONTINUED)


def _infilled(name: str, what: str, later_frame: str, scores: tuple[str, ...]) -> Task:
    return Task(name, what, partial(infill_case, later_frame=later_frame), scores, suits=seen_late)


FIRST_FRAMES = [("1", [1])] + [(f"1 to {k}", range(1, k + 1)) for k in range(2, 6)]
SECTIONS = {
    "From text alone": [
        Task(
            "text",
            "numbered prompt",
            FROM_TEXT,
            ("pfa_f1", "subject_consistency", "event_order_tau", *ORDER),
        ),
        Task("global_caption", "global caption", global_caption_case, ORDER),
    ],
    "Continue, looks in the text": [
        _kept(f"continue_{len(numbers)}", f"given {which} of 8", numbers) for which, numbers in FIRST_FRAMES
    ],
    "Looks in the given frames alone": [
        *(
            _kept(f"continue_{len(numbers)}_anonymous", f"given {which} of 8", numbers, anonymous=True)
            for which, numbers in FIRST_FRAMES
        ),
        _kept("from_middle", "given 4 of 8", [4], anonymous=True),
        _kept("from_last", "given 8 of 8", [8], anonymous=True),
        _kept("between", "given 1 and 8 of 8", [1, 8], anonymous=True),
        Task("other_prompt", "given 1 to 4, the prompt of another story", other_prompt_case, SEEN),
    ],
    "Looks in a later frame alone": [
        _infilled("infill", "given 1 and 8, somebody seen in 8 alone", "true", SEEN),
        _infilled("infill_other", "the same, 8 shows somebody else", "other", ("identity", "identity_shown")),
        _infilled("infill_none", "the same without 8", "none", ("identity",)),
    ],
    "Change a story": [
        Task("edit", "an inner frame told anew", partial(edit_case, anonymous=False), CHANGED),
        Task(
            "edit_anonymous",
            "an inner frame told anew, looks in the frames",
            partial(edit_case, anonymous=True),
            SEEN,
        ),
        Task("insert", "a frame put in", partial(insert_case, anonymous=False), CHANGED, num_frames=7),
        Task(
            "insert_anonymous",
            "a frame put in, looks in the frames",
            partial(insert_case, anonymous=True),
            SEEN,
            num_frames=7,
        ),
        Task(
            "delete",
            "an event taken out, the frame behind it drawn anew",
            delete_case,
            CHANGED,
            suits=short_inner_events,
        ),
    ],
    "Three times the trained length": [
        Task(
            "extend",
            "24 frames from text, windows of 8",
            partial(extend_case, anonymous=False),
            ("pfa_f1", "event_order_tau", "consistency_within", "consistency_across"),
            num_frames=LONG_FRAMES,
        ),
        Task(
            "extend_at_once",
            "24 frames from text, in one go",
            FROM_TEXT,
            ("pfa_f1", "event_order_tau", "subject_consistency"),
            num_frames=LONG_FRAMES,
        ),
        Task(
            "extend_anonymous",
            "8 frames given, 16 by windows, looks in the frames",
            partial(extend_case, anonymous=True),
            (*SEEN, "identity_last_window"),
            num_frames=LONG_FRAMES,
        ),
    ],
}
TASKS = {task.name: task for section in SECTIONS.values() for task in section}
