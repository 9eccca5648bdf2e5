"""What a story is: numbered events, subjects and style (paper 2.2), and the one text that prompts a model.

`Story.prompt()` is the multi-event caption of training and inference alike; `Story.from_prompt()` is its
inverse. A caption that is too long for a text encoder is cut along its structure, see `shorter_captions`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

SCHEMA_VERSION = 1
_EVENTS_TITLE = "Consistency Event Description:"
_SUBJECTS_TITLE = "Subjects:"
_STYLE_TITLE = "Video Style:"
_EVENT_LINE = re.compile(r"\[(\d+)(?:-(\d+))?\] (.+)")
_SUBJECT_LINE = re.compile(r"(\d+)\. (.+)")
# Where a sentence may end: Latin marks before a space, and the full-width ones anywhere
_SENTENCE_END = re.compile(
    r"[.!?\u2026\u061f\u0964]+[\"')\]\u201d\u2019]*(\s+|$)|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f]*\s*"
)
_BRACKETS = ("()", "[]", "\u201c\u201d", "\u300c\u300d", "\u300e\u300f")
_ABBREVIATIONS = frozenset("mr mrs ms dr prof st jr sr vs etc no ca approx lt sgt capt".split())


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
class CutPart:
    """What a caption loses where it is too long."""

    kind: str  # style, subject, event or sentence
    text: str


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

    def descriptions(self) -> list[tuple[str, ...]]:
        """What is told of each frame, frame 1 first: the texts of its events in their order, each once."""
        told: list[dict[str, None]] = [{} for _ in range(self.num_frames)]
        for event in self.events:
            for number in range(event.first_frame, event.last_frame + 1):
                told[number - 1][event.description] = None
        return [tuple(texts) for texts in told]

    @classmethod
    def from_descriptions(
        cls, descriptions: Sequence[Sequence[str]], subjects: Sequence[str] = (), style: str = ""
    ) -> "Story":
        """Inverse of descriptions(): a text that goes on from frame to frame is one event.

        Events stand in reading order, by their first frame. ValueError for a frame of which nothing is told.
        """
        frames = [[_single_line(text, "a description") for text in texts] for texts in descriptions]
        if [] in frames:
            raise ValueError(f"nothing is told of frame {frames.index([]) + 1} of {len(frames)}")
        events = [
            Event(number, _goes_on_until(frames, number, text), text)
            for number, texts in enumerate(frames, start=1)
            for text in dict.fromkeys(texts)
            if number == 1 or text not in frames[number - 2]
        ]
        return cls(events, list(subjects), style)

    def prompt(self) -> str:
        """The multi-event caption: every event behind its frame range, then subjects by rank, then style."""
        lines = [_EVENTS_TITLE]
        lines += map(_event_line, self.events)
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

    def shortened(self) -> Iterator[tuple["Story", CutPart]]:
        """Ever less of this story, and what went last; at the end one event is left.

        First the style goes, then the subjects from the least important on, then whole events, the one that
        begins last first: what is left is a story of frames 1..n.
        """
        story = self
        if story.style:
            story = replace(story, style="")
            yield story, CutPart("style", self.style)
        for number in range(len(self.subjects), 0, -1):
            story = replace(story, subjects=self.subjects[: number - 1])
            yield story, CutPart("subject", self.subjects[number - 1])
        while len(story.events) > 1:
            last = max(range(len(story.events)), key=lambda i: (story.events[i].first_frame, i))
            cut = story.events[last]
            story = replace(story, events=story.events[:last] + story.events[last + 1 :])
            yield story, CutPart("event", _event_line(cut))

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
        except FileNotFoundError as error:
            raise FileNotFoundError(f"story file {path} is not there") from error
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
            text = self.to_yaml()
        path.write_text(text, encoding="utf-8")

    def to_yaml(self) -> str:
        """The text of a YAML story file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


def shorter_captions(text: str) -> Iterator[tuple[str, CutPart]]:
    """Ever shorter versions of a caption, and what each has lost; the last one is an event or a sentence.

    A prompt loses what Story.shortened takes, any other text whole sentences from its end. ValueError for a
    text that begins like a prompt and is none.
    """
    if text.startswith(_EVENTS_TITLE):
        yield from ((story.prompt(), part) for story, part in Story.from_prompt(text).shortened())
        return
    ends = _sentence_ends(text)
    for before, end in zip(ends[-2::-1], ends[:0:-1]):
        yield text[:before].rstrip(), CutPart("sentence", text[before:end].strip())


def _sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end; rather too few than one inside a sentence."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if _ends_sentence(text, match)]
    return ends if ends and not text[ends[-1] :].strip() else [*ends, len(text)]


def _ends_sentence(text: str, match: re.Match) -> bool:
    before, after = text[: match.start()], text[match.end() :]
    quoted = text[: match.end()]
    if quoted.count('"') % 2 or any(quoted.count(a) != quoted.count(b) for a, b in _BRACKETS):
        return False
    if after[:1].islower():
        return False
    word = before.split()[-1].lower().lstrip("\"'([") if before.split() else ""
    is_abbreviation = len(word) == 1 or "." in word or word in _ABBREVIATIONS
    return not (match[0].strip() == "." and is_abbreviation and after)


class _StoryLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"{key.value!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _goes_on_until(frames: list[list[str]], number: int, text: str) -> int:
    return next((last for last in range(number, len(frames)) if text not in frames[last]), len(frames))


def _event_line(event: Event) -> str:
    first, last = event.first_frame, event.last_frame
    return f"[{first if first == last else f'{first}-{last}'}] {event.description}"


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
