"""What a story is: numbered events, subjects and style (paper 2.2), and the one text that prompts a model.

`Story.prompt()` is the multi-event caption of training and inference alike; `Story.from_prompt()` is its
inverse.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

SCHEMA_VERSION = 1
_EVENTS_TITLE = "Consistency Event Description:"
_SUBJECTS_TITLE = "Subjects:"
_STYLE_TITLE = "Video Style:"
_EVENT_LINE = re.compile(r"\[(\d+)(?:-(\d+))?\] (.+)")
_SUBJECT_LINE = re.compile(r"(\d+)\. (.+)")


@dataclass(frozen=True)
class Event:
    """Something that happens in frames first_frame..last_frame (1-based, inclusive); events may overlap."""

    first_frame: int
    last_frame: int
    description: str

    def __post_init__(self):
        for name in ("first_frame", "last_frame"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, found {value!r}")
        object.__setattr__(self, "description", _single_line(self.description, "an event's description"))
        if self.first_frame < 1:
            raise ValueError(f"frames are numbered from 1, found an event that starts at {self.first_frame}")
        if self.last_frame < self.first_frame:
            raise ValueError(f"an event's frames run backwards: found {self.first_frame}..{self.last_frame}")
        if not self.description:
            raise ValueError(f"the event of frames {self.first_frame}..{self.last_frame} has no description")


@dataclass(frozen=True)
class Story:
    """Events that together cover frames 1..num_frames, subjects (most important first) and the video's style.

    Raises ValueError for no events, a frame that no event covers, and an event that is given twice.
    """

    events: list[Event]
    subjects: list[str] = field(default_factory=list)
    style: str = ""
    global_caption: str = ""

    def __post_init__(self):
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (the class is frozen)
        if isinstance(self.subjects, str):  # its letters would become the subjects
            raise ValueError(f"a story's subjects must be a list, found {self.subjects!r}")
        set_field("events", list(self.events))
        set_field("subjects", [_single_line(subject, "a subject") for subject in self.subjects])
        set_field("style", _single_line(self.style, "the style"))
        set_field("global_caption", _single_line(self.global_caption, "the global caption"))
        if not self.events:
            raise ValueError("a story needs at least one event, found none")
        if "" in self.subjects:
            raise ValueError(f"subject {self.subjects.index('') + 1} of {len(self.subjects)} is empty")
        seen = set()
        for event in self.events:
            if event in seen:
                raise ValueError(
                    f"event given twice: frames {event.first_frame}..{event.last_frame}, "
                    f"{event.description!r}"
                )
            seen.add(event)
        covered = 0
        for event in sorted(self.events, key=lambda event: event.first_frame):
            if event.first_frame > covered + 1:
                raise ValueError(
                    f"no event covers frame {covered + 1}: the next event starts at frame "
                    f"{event.first_frame} ({event.description!r})"
                )
            covered = max(covered, event.last_frame)

    @property
    def num_frames(self) -> int:
        """The last story frame that any event covers."""
        return max(event.last_frame for event in self.events)

    def prompt(self) -> str:
        """The multi-event caption: every event behind its frame range, then subjects by rank, then style."""
        lines = [_EVENTS_TITLE]
        for event in self.events:
            single = event.first_frame == event.last_frame
            frames = str(event.first_frame) if single else f"{event.first_frame}-{event.last_frame}"
            lines.append(f"[{frames}] {event.description}")
        if self.subjects:
            lines.append(_SUBJECTS_TITLE)
            lines += [f"{rank}. {subject}" for rank, subject in enumerate(self.subjects, start=1)]
        if self.style:
            lines.append(f"{_STYLE_TITLE} {self.style}")
        return "\n".join(lines)

    @classmethod
    def from_prompt(cls, text: str) -> "Story":
        """Inverse of prompt(): the same events, subjects and style; a prompt has no global caption."""
        lines = text.split("\n")
        if lines[0] != _EVENTS_TITLE:
            raise ValueError(f"a prompt begins with {_EVENTS_TITLE!r}, found {lines[0]!r}")
        events, subjects, style, in_subjects = [], [], "", False
        for number, line in enumerate(lines[1:], start=2):
            event, subject = _EVENT_LINE.fullmatch(line), _SUBJECT_LINE.fullmatch(line)
            if event and not in_subjects:
                first, last, description = event.groups()
                events.append(Event(int(first), int(last or first), description))
            elif line == _SUBJECTS_TITLE and not in_subjects:
                in_subjects = True
            elif subject and in_subjects and int(subject[1]) == len(subjects) + 1:
                subjects.append(subject[2])
            elif line.startswith(_STYLE_TITLE + " ") and number == len(lines):
                style = line.removeprefix(_STYLE_TITLE + " ")
            else:
                expected = f"'{len(subjects) + 1}. subject'" if in_subjects else "'[first-last] description'"
                raise ValueError(
                    f"line {number} of the prompt: found {line!r}, expected {expected} or the style"
                )
        return cls(events, subjects, style)

    def to_dict(self) -> dict:
        """The shape of a story file: version, style, subjects, events, global_caption."""
        return {
            "version": SCHEMA_VERSION,
            "style": self.style,
            "subjects": list(self.subjects),
            "events": [
                {"frames": [event.first_frame, event.last_frame], "description": event.description}
                for event in self.events
            ],
            "global_caption": self.global_caption,
        }

    @classmethod
    def from_dict(cls, content: dict) -> "Story":
        """Inverse of to_dict(); ValueError for an unknown key, a missing one, or a wrong shape."""
        _check_keys(
            content, {"version", "style", "subjects", "events", "global_caption"}, {"events"}, "a story"
        )
        version = content.get("version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise ValueError(f"story version {version!r} is not known, expected {SCHEMA_VERSION}")
        if not isinstance(content["events"], list):
            raise ValueError(f"a story's events must be a list, found {type(content['events']).__name__}")
        given = {key: value for key, value in content.items() if value is not None}  # "style:" is no style
        subjects = given.get("subjects", [])
        if not isinstance(subjects, list):
            raise ValueError(f"a story's subjects must be a list, found {type(subjects).__name__}")
        events = [_event_from_dict(event, number) for number, event in enumerate(content["events"], start=1)]
        return cls(events, subjects, given.get("style", ""), given.get("global_caption", ""))

    @classmethod
    def from_file(cls, path: str | Path) -> "Story":
        """Reads a story from YAML or JSON; errors name the file."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _StoryLoader)
            return cls.from_dict(content)
        except (
            ValueError,
            yaml.YAMLError,
            RecursionError,
        ) as error:  # bad UTF-8 and bad JSON are ValueErrors
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error

    def to_file(self, path: str | Path) -> None:
        """Writes YAML, or JSON where the name ends in .json."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        else:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)
        path.write_text(text, encoding="utf-8")


class _StoryLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"{key.value!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _single_line(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a text, found {text!r}")
    return " ".join(text.split())


def _event_from_dict(content: dict, number: int) -> Event:
    try:
        if isinstance(content, dict):
            content = _rejoin_commas(content)
        _check_keys(content, {"frames", "description"}, {"frames", "description"}, "an event")
        frames = content["frames"]
        if not isinstance(frames, list) or len(frames) != 2:
            raise ValueError(f"frames must be [first, last], found {frames!r}")
        return Event(frames[0], frames[1], content["description"])
    except ValueError as error:
        raise ValueError(f"event {number}: {error}") from error


def _rejoin_commas(content: dict) -> dict:
    """In YAML's {frames: [3, 3], description: She waits, alone} "alone" is a key without a value."""
    keys = list(content)
    if "description" not in keys or not isinstance(content["description"], str):
        return content
    rest = keys[keys.index("description") + 1 :]
    while rest and content[rest[0]] is None and isinstance(rest[0], str):
        content = {**content, "description": f"{content['description']}, {rest[0]}"}
        del content[rest.pop(0)]
    return content


def _check_keys(content: dict, known: set[str], required: set[str], what: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be a mapping, found {type(content).__name__}")
    for key in content:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {what}, expected one of {sorted(known)}")
    for key in sorted(required):
        if key not in content:
            raise ValueError(f"{what} has no {key!r}, found {sorted(content)}")
