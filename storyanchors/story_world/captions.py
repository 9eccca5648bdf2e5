"""Story world <-> text: every fact of a frame is in its event's sentence and can be read back from it.

The grammar, in fewer than 50 different words:
    event    in the SCENE, CLAUSE [and CLAUSE], ZOOM shot from the PAN
    clause   the COLOUR SHAPE stands | jumps | sleeps | runs | holds a ball
    subject  COLOUR SHAPE
"""

from collections.abc import Iterable

from storyanchors.story import Event, Story
from storyanchors.story_world.world import (
    ACTIONS,
    COLOURS,
    MAX_FRAMES,
    MIN_FRAMES,
    PANS,
    SCENES,
    SHAPES,
    STYLE,
    ZOOMS,
    FrameFacts,
    Subject,
    WorldEvent,
    WorldStory,
)

MAX_CAST = 2


def to_story(world_story: WorldStory, *, anonymous: bool = False) -> Story:
    """One Event per event, the cast as subjects; the global caption names cast and scenes in order.

    anonymous calls the cast hero1 and hero2: what they look like is then to be seen in given frames alone.
    """
    subjects = [
        f"hero{number}" if anonymous else f"{subject.colour} {subject.shape}"
        for number, subject in enumerate(world_story.cast, start=1)
    ]
    events = [
        Event(event.first_frame, event.last_frame, describe(event.facts, subjects))
        for event in world_story.events
    ]
    cast = " and ".join(f"a {name}" for name in subjects)
    scenes = ", then ".join(f"in the {event.facts.scene}" for event in world_story.events)
    return Story(events, subjects, world_story.style, f"{cast}, first {scenes}")


def from_story(story: Story) -> WorldStory:
    """Inverse of to_story; the global caption is not read.

    Raises ValueError with the line, the word found and what was expected, for a text outside the grammar
    (an anonymous one too) and for a story that the world cannot show.
    """
    if not 1 <= len(story.subjects) <= MAX_CAST:
        raise ValueError(f"found {len(story.subjects)} subjects, expected 1 to {MAX_CAST}")
    if story.style != STYLE:
        raise ValueError(f"found the style {story.style!r}, expected {STYLE!r}")
    if not MIN_FRAMES <= story.num_frames <= MAX_FRAMES:
        raise ValueError(f"found {story.num_frames} frames, expected {MIN_FRAMES} to {MAX_FRAMES}")
    cast = tuple(_read_subject(text, f"subject {rank}") for rank, text in enumerate(story.subjects, start=1))
    if len({subject.colour for subject in cast}) < len(cast):
        raise ValueError(f"subjects 1 and 2 are both {cast[0].colour}, expected different colours")
    events: list[WorldEvent] = []
    for number, event in enumerate(story.events, start=1):
        line = f"event {number}"
        expected_first = events[-1].last_frame + 1 if events else 1
        if event.first_frame != expected_first:
            raise ValueError(f"{line} starts at frame {event.first_frame}, expected frame {expected_first}")
        facts = _read_description(event.description, cast, line)
        events.append(WorldEvent(event.first_frame, event.last_frame, facts))
    return WorldStory(cast, tuple(events), story.style)


def describe(facts: FrameFacts, names: list[str]) -> str:
    """The sentence of an event; names are the cast's, in its order."""
    phrases = {action: action for action in ACTIONS} | {"holds": "holds a ball"}
    clauses = " and ".join(f"the {names[index]} {phrases[action]}" for index, action in facts.actions)
    return f"in the {facts.scene}, {clauses}, {facts.zoom} shot from the {facts.pan}"


class _Words:
    """The words of one line, taken one by one; one that does not fit raises a ValueError saying where."""

    def __init__(self, text: str, line: str):
        self.words = text.replace(",", " , ").split()
        self.position = 0
        self.line = line

    def take(self, expected: Iterable[str]) -> str:
        if self.position == len(self.words) or self.words[self.position] not in expected:
            raise self.error(" or ".join(map(repr, expected)))
        self.position += 1
        return self.words[self.position - 1]

    def take_all(self, expected: str) -> None:
        for word in expected.split():
            self.take((word,))

    def end(self) -> None:
        if self.position < len(self.words):
            raise self.error("the end of the line")

    def error(self, expected: str) -> ValueError:
        at_end = self.position == len(self.words)
        found = "the end of the line" if at_end else repr(self.words[self.position])
        before = " ".join(self.words[: self.position]).replace(" ,", ",")
        where = f" after {before!r}" if before else ""
        return ValueError(f"{self.line}: found {found}{where}, expected {expected}")


def _read_subject(text: str, line: str) -> Subject:
    words = _Words(text, line)
    subject = Subject(words.take(COLOURS), words.take(SHAPES))
    words.end()
    return subject


def _read_description(text: str, cast: tuple[Subject, ...], line: str) -> FrameFacts:
    words = _Words(text, line)
    words.take_all("in the")
    scene = words.take(SCENES)
    words.take_all(",")
    actions = [_read_clause(words, cast)]
    if words.take((",", "and")) == "and":
        actions.append(_read_clause(words, cast))
        words.take_all(",")
    if len(actions) == 2 and actions[0][0] >= actions[1][0]:
        raise ValueError(
            f"{line}: subjects are named once each, from left to right, in the order of the subjects"
        )
    zoom = words.take(ZOOMS if len(actions) == 1 else ZOOMS[:-1])
    words.take_all("shot from the")
    pan = words.take(PANS)
    words.end()
    return FrameFacts(scene, zoom, pan, tuple(actions))


def _read_clause(words: _Words, cast: tuple[Subject, ...]) -> tuple[int, str]:
    words.take_all("the")
    colours = [subject.colour for subject in cast]
    index = colours.index(words.take(colours))
    words.take((cast[index].shape,))
    action = words.take(ACTIONS)
    if action == "holds":
        words.take_all("a ball")
    return index, action
