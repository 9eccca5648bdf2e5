"""A story as a person types it: one event per line, "1-2: what happens", subjects between semicolons."""

import re

from storyanchors.story import Event, Story

_NUMBERED = re.compile(r"\[?\s*(\d+)\s*(?:(?:-|to|\u2013)\s*(\d+)\s*)?(?:\]\s*:?|:)\s*(.*)")


def event_lines(story: Story) -> str:
    """The text that read_story takes back."""
    return "\n".join(f"{frame_range(event)}: {event.description}" for event in story.events)


def frame_range(event: Event) -> str:
    """ "3" or "3-5"."""
    first, last = event.first_frame, event.last_frame
    return f"{first}" if first == last else f"{first}-{last}"


def read_story(lines: str, subjects: str = "", style: str = "") -> Story:
    """The story that a person typed; a line without numbers is the next frame.

    Raises ValueError, naming the line, for one without a text or with numbers that fit no event, and what
    Story raises.
    """
    events: list[Event] = []
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip():
            continue
        following = max((event.last_frame for event in events), default=0) + 1
        numbered = _NUMBERED.fullmatch(line.strip())
        first, last, text = numbered.groups() if numbered else (following, None, line)
        try:
            events.append(Event(int(first), int(last or first), text))
        except ValueError as error:
            raise ValueError(f"line {number} of the story: {error}") from error
    if not events:
        raise ValueError("the story is empty, expected a line per event: 1-2: what happens")
    return Story(events, [part.strip() for part in subjects.split(";") if part.strip()], style)
