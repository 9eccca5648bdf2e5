"""What is asked of a model to see whether it can be steered: held-out stories -> edits and their truth.

Every function here makes a Case of a story-world story: the frames before, a StoryEdit, and the facts that
the frames must show after it. Frames before are true ones, so that a case measures one operation and nothing
that came before it. In anonymous cases the text says hero1 and hero2: what they look like is seen in the kept
frames alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from PIL import Image

from storyanchors.story import Story
from storyanchors.story_edit import (
    StoryEdit,
    delete_frames,
    edit_frames,
    extend_right,
    insert_event,
    keep_frames,
    redraw_frames,
    replace_story,
)
from storyanchors.story_world import (
    FrameFacts,
    Subject,
    WorldEvent,
    WorldStory,
    members_seen,
    render_frame,
    to_story,
)
from storyanchors.story_world.captions import describe
from storyanchors.story_world.world import ACTIONS, COLOURS, PANS, SCENES, SHAPES, ZOOMS
from storyanchors.windows import Window, plan_windows

TRAINED_FRAMES = 8  # the longest stories that the models were trained on
LONG_FRAMES = 3 * TRAINED_FRAMES
OVERLAP = 4


@dataclass(frozen=True)
class Case:
    """One thing asked of a model."""

    before: Story
    frames: tuple[Image.Image, ...]  # before the edit, all of them
    edit: StoryEdit
    truth: WorldStory  # what the frames after the edit should show
    members: frozenset[int]  # cast members whose looks the kept frames or the text tell
    caption: str | None = None  # what the network reads instead of the story's prompt
    shown: WorldStory | None = None  # another cast, which the kept frames show; None: the true one
    windows: tuple[Window, ...] = ()  # for stories longer than trained; () = all frames at once

    @property
    def given(self) -> dict[int, Image.Image]:
        """The kept frames, by their number after the edit."""
        return {after: self.frames[before - 1] for after, before in self.edit.kept.items()}


def true_frames(story: WorldStory) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(render_frame(story, number + 1)) for number in range(story.num_frames))


def told(cast: tuple[Subject, ...], facts: Sequence[FrameFacts]) -> WorldStory:
    """The story whose frames show these facts; equal neighbours are one event."""
    events, first = [], 1
    for same, run in groupby(facts):
        last = first + len(list(run)) - 1
        events.append(WorldEvent(first, last, same))
        first = last + 1
    return WorldStory(cast, tuple(events))


def other_facts(story: WorldStory, members: Sequence[int], rng: np.random.Generator) -> FrameFacts:
    """An event that the story does not have, in a scene it does not have, of some of these cast members."""
    scene = _choose(rng, [scene for scene in SCENES if scene not in {facts.scene for facts in story.frames}])
    zoom = _choose(rng, ZOOMS)
    if zoom == "close" or rng.random() < 0.2:
        members = [_choose(rng, members)]
    return FrameFacts(
        scene, zoom, _choose(rng, PANS), tuple((member, _choose(rng, ACTIONS)) for member in sorted(members))
    )


def _choose(rng: np.random.Generator, options: Sequence) -> object:
    return options[int(rng.integers(len(options)))]


def _case(story: WorldStory, edit: StoryEdit, truth: WorldStory, *, anonymous: bool, **more: object) -> Case:
    members = members_seen(story, edit.kept.values()) if anonymous else range(len(story.cast))
    return Case(
        to_story(story, anonymous=anonymous), true_frames(story), edit, truth, frozenset(members), **more
    )


def keep_case(
    story: WorldStory, rng: np.random.Generator, *, numbers: Sequence[int], anonymous: bool
) -> Case:
    return _case(
        story, keep_frames(to_story(story, anonymous=anonymous), numbers), story, anonymous=anonymous
    )


def global_caption_case(story: WorldStory, rng: np.random.Generator) -> Case:
    text = to_story(story)
    return _case(story, keep_frames(text, []), story, anonymous=False, caption=text.global_caption)


def edit_case(story: WorldStory, rng: np.random.Generator, *, anonymous: bool) -> Case:
    """A frame between the first and the last one is told anew."""
    number = int(rng.integers(2, story.num_frames))
    others = [n for n in range(1, story.num_frames + 1) if n != number]
    facts = other_facts(story, sorted(members_seen(story, others)), rng)
    frames = [facts if n == number else story.frames[n - 1] for n in range(1, story.num_frames + 1)]
    text = to_story(story, anonymous=anonymous)
    edit = edit_frames(text, {number: describe(facts, text.subjects)})
    return _case(story, edit, told(story.cast, frames), anonymous=anonymous)


def insert_case(story: WorldStory, rng: np.random.Generator, *, anonymous: bool) -> Case:
    after = int(rng.integers(1, story.num_frames))
    facts = other_facts(story, range(len(story.cast)), rng)
    text = to_story(story, anonymous=anonymous)
    edit = insert_event(text, after, describe(facts, text.subjects))
    frames = [*story.frames[:after], facts, *story.frames[after:]]
    return _case(story, edit, told(story.cast, frames), anonymous=anonymous)


def short_inner_events(story: WorldStory) -> list[WorldEvent]:
    return [event for event in story.events[1:-1] if event.last_frame - event.first_frame < 2]


def delete_case(story: WorldStory, rng: np.random.Generator) -> Case:
    """An event of one or two frames goes, the frame behind it is drawn anew: does it fit its new place?"""
    gone = _choose(rng, short_inner_events(story))
    numbers = range(gone.first_frame, gone.last_frame + 1)
    edit = delete_frames(to_story(story), numbers)
    edit = edit.then(redraw_frames(edit.story, [gone.first_frame]))
    frames = [facts for number, facts in enumerate(story.frames, start=1) if number not in numbers]
    return _case(story, edit, told(story.cast, frames), anonymous=False)


def other_prompt_case(story: WorldStory, rng: np.random.Generator) -> Case:
    """Four frames stay; two events of another story follow them."""
    num_kept, kept = 4, range(1, 5)
    members = sorted(members_seen(story, kept))
    first = other_facts(story, members, rng)
    second = other_facts(told(story.cast, [*story.frames, first]), members, rng)
    cut = int(rng.integers(1, story.num_frames - num_kept))
    rest = [first] * cut + [second] * (story.num_frames - num_kept - cut)
    truth = told(story.cast, [*story.frames[:num_kept], *rest])
    edit = replace_story(to_story(story, anonymous=True), to_story(truth, anonymous=True), kept)
    return _case(story, edit, truth, anonymous=True)


def seen_late(story: WorldStory) -> set[int]:
    """Cast members that the last frame shows, the first one does not, and a frame between asks for."""
    between = members_seen(story, range(2, story.num_frames))
    return (members_seen(story, [story.num_frames]) & between) - members_seen(story, [1])


def infill_case(story: WorldStory, rng: np.random.Generator, *, later_frame: str) -> Case:
    """Between the first and the last frame: the looks of somebody whom the last frame alone shows.

    later_frame: "true", "other" (it shows another looks of that cast member, drawn evenly) or "none".
    """
    numbers = [1] if later_frame == "none" else [1, story.num_frames]
    case = keep_case(story, rng, numbers=numbers, anonymous=True)
    case = replace(case, members=frozenset(seen_late(story)))
    if later_frame != "other":
        return case
    cast = list(story.cast)
    for member in seen_late(story):
        taken = {other.colour for other in story.cast if other != story.cast[member]}
        colour = _choose(rng, [colour for colour in COLOURS if colour not in taken])
        cast[member] = Subject(colour, _choose(rng, SHAPES))
    shown = WorldStory(tuple(cast), story.events)
    return replace(case, frames=true_frames(shown), shown=shown)


def extend_case(story: WorldStory, rng: np.random.Generator, *, anonymous: bool) -> Case:
    """To three times the trained length: from text alone, or anonymous behind the first eight frames."""
    text = to_story(story, anonymous=anonymous)
    if not anonymous:
        case = _case(story, keep_frames(text, []), story, anonymous=False)
    else:
        begin = told(story.cast, story.frames[:TRAINED_FRAMES])
        rest = told(story.cast, story.frames[TRAINED_FRAMES:])
        events = [(describe(e.facts, text.subjects), e.last_frame - e.first_frame + 1) for e in rest.events]
        edit = extend_right(to_story(begin, anonymous=True), events)
        case = _case(begin, edit, story, anonymous=True)
    windows = plan_windows(LONG_FRAMES, case.edit.kept, window=TRAINED_FRAMES, overlap=OVERLAP)
    return replace(case, windows=tuple(windows))
