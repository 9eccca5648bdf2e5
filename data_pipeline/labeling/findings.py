"""What is wrong with an answer: coded findings, and the repairs that need no second question.

A check takes an answer whose form is right (schemas.py) and returns it repaired, with all that was found. An
error is worth one more question, which lists the details; a warning is kept beside the label; an info only
counts. Checks are pure: the same answer always gives the same findings, also years later from the ledger.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from data_pipeline.labeling.schemas import (
    EventAnswer,
    EventsAnswer,
    GlobalCaptionAnswer,
    StoryAnswer,
    StoryEventAnswer,
    SubjectAnswer,
)
from storyanchors.story import Event, Story

if TYPE_CHECKING:
    from storyanchors.caption_encoder import TokenCounter

INFO, WARNING, ERROR = "info", "warning", "error"
MAX_FILLED_GAP = 2  # frames; a longer gap is asked about
FEWEST_WORDS = 3  # of a description
MOST_REPEATS = 2  # of one description; a model that repeats itself goes on and on
FOREIGN_SHARE = 0.2  # of the letters of an English text

_LABEL = re.compile(
    r"\s*(?:\[\d+(?:\s*-\s*\d+)?\]|(?:events?|frames?)\s+\d+(?:\s*(?:-|to)\s*\d+)?\s*:)\s*", re.I
)
_REFUSAL = re.compile(
    r"\bas an ai\b|^\W*(i'?m|i am) (sorry|unable|not able)\b|^\W*sorry\b"
    r"|\bi (can ?not|can't|am unable to|won't) "
    r"(assist|help|describe|identify|provide|view|see|comply|analy[sz]e)",
    re.I,
)
_MEDIUM = r"(?:images?|pictures?|photos?|frames?|screenshots?|clips?|videos?)"
_META = re.compile(
    rf"\b(?:the|this|these|each|first|last) {_MEDIUM} "
    r"(?:shows?|depicts?|features?|displays?|captures?|contains?)\b"
    rf"|\bin (?:the|this|these) {_MEDIUM}\b|\bframes? \d+",
    re.I,
)
_PEOPLE = re.compile(
    r"\b(?:m[ae]n|wom[ae]n|boys?|girls?|persons?|people|child(?:ren)?|he|she|his|her|they)\b", re.I
)
# a name inside a sentence that does something: "while Ada Lane runs"
_ACTING_NAME = re.compile(r"(?<=[a-z,] )([A-Z][a-z]+(?: [A-Z][a-z]+)*) [a-z]+s\b")
_AFTER_PLACE_WORD = re.compile(r"\b(?:in|at|to|from|near|of|on|the|through|over|towards?|reads?|says?),? $")
_ARTICLES = frozenset("a an the his her their of in on with and".split())


@dataclass(frozen=True)
class Finding:
    """`detail` tells a person, and in a repair turn the model, what to change."""

    code: str
    severity: str  # info | warning | error
    detail: str


@dataclass(frozen=True)
class PoolEvent:
    """An event of the first stage, as the second stage refers to it."""

    id: str  # e01, e02, ... in the order of first and last frame
    first_frame: int
    last_frame: int
    description: str
    representative: int  # the frame that is shown for it


def worst(findings: list[Finding]) -> str:
    """The gravest severity, "info" where nothing was found."""
    return max((finding.severity for finding in findings), key=(INFO, WARNING, ERROR).index, default=INFO)


def check_global_caption(
    answer: GlobalCaptionAnswer, counter: "TokenCounter | None" = None
) -> tuple[GlobalCaptionAnswer, list[Finding]]:
    """A caption of the whole clip; counter: the caption encoder whose budget it must keep."""
    caption = _plain(answer.caption)
    findings = _text_findings(caption, "the caption")
    if counter and caption:
        findings += _budget_findings(caption, counter, grave={"sentence"})
    return GlobalCaptionAnswer.model_construct(caption=caption), findings


def check_events(answer: EventsAnswer, first: int, last: int) -> tuple[EventsAnswer, list[Finding]]:
    """The events of frames first..last: in order, inside the subset, together covering it."""
    events, findings = _cleaned_events(answer.events)
    events, more = _rebased(events, first, last)
    findings += more
    events, more = _in_range(events, first, last)
    findings += more
    events, more = _in_order(events)
    findings += more
    events, more = _without_repeats(events)
    findings += more
    events, more = _without_gaps(events, first, last)
    findings += more
    if len(events) == 1 and last > first:
        findings.append(Finding("one_event_covers_all", INFO, f"one event covers frames {first}-{last}"))
    return EventsAnswer.model_construct(events=sorted(events, key=_order)), findings


def check_story(
    answer: StoryAnswer, pool: list[PoolEvent], num_frames: int, counter: "TokenCounter | None" = None
) -> tuple[StoryAnswer, list[Finding]]:
    """The unified story of frames 1..num_frames against the pool that it was made from.

    counter: the caption encoder whose budget the story's prompt must keep; None: no budget.
    """
    events, findings = _cleaned_events(answer.events)
    events, more = _with_pool_boundaries(events, pool)
    findings += more
    for repair in (
        lambda events: _in_range(events, 1, num_frames),
        _in_order,
        _without_repeats,
        lambda events: _without_gaps(events, 1, num_frames),
    ):
        events, more = repair(events)
        findings += more
    findings += _pool_findings(events, pool)
    subjects, more = _cleaned_subjects(answer.subjects, events)
    findings += more
    style = _plain(answer.style)
    findings += _text_findings(style, "the style", fewest_words=1)
    repaired = StoryAnswer.model_construct(subjects=subjects, style=style, events=sorted(events, key=_order))
    if worst(findings) == ERROR:
        return repaired, findings  # a budget of what is asked again says nothing
    try:
        prompt = to_story(repaired).prompt()
    except ValueError as error:
        return repaired, [*findings, Finding("not_a_story", ERROR, str(error))]
    if counter:
        findings += _budget_findings(prompt, counter, grave={"event"})
    return repaired, findings


def to_story(answer: StoryAnswer) -> Story:
    """The story of a checked answer; ValueError for what Story refuses."""
    events = [Event(event.first_frame, event.last_frame, event.description) for event in answer.events]
    subjects = [", ".join(filter(None, (subject.name, subject.appearance))) for subject in answer.subjects]
    return Story(events, subjects, answer.style)


def _plain(text: str) -> str:
    """One line of text without control characters."""
    visible = "".join(char for char in text if char.isspace() or unicodedata.category(char) != "Cc")
    return " ".join(visible.split())


def _cleaned_events(events: list) -> tuple[list, list[Finding]]:
    """Plain descriptions without the range or number that some models write before them."""
    cleaned, findings = [], []
    for event in events:
        text = _plain(event.description)
        description = text[match.end() :] if (match := _LABEL.match(text)) else text
        where = f"the description of frames {event.first_frame}-{event.last_frame}"
        findings += _text_findings(description, where)
        cleaned.append(_changed(event, description=description))
    return cleaned, findings


def _text_findings(text: str, where: str, *, fewest_words: int = FEWEST_WORDS) -> list[Finding]:
    if not text:
        return [Finding("empty_text", ERROR, f"{where} is empty")]
    findings = []
    if _REFUSAL.search(text):
        findings.append(Finding("refusal_text", ERROR, f"{where} is a refusal: {_short(text)}"))
    if match := _META.search(text):
        detail = f"{where} speaks of pictures, not of what happens: {match[0]!r}"
        findings.append(Finding("meta_text", WARNING, detail))
    if len(text.split()) < fewest_words:
        findings.append(Finding("too_short_text", WARNING, f"{where} has too few words: {text!r}"))
    letters = [] if text.isascii() else [char for char in text if char.isalpha()]
    if sum(not unicodedata.name(char, "").startswith("LATIN") for char in letters) > FOREIGN_SHARE * len(
        letters
    ):
        findings.append(Finding("wrong_language", WARNING, f"{where} is not in English: {_short(text)}"))
    return findings


def _rebased(events: list, first: int, last: int) -> tuple[list, list[Finding]]:
    """Frames that were counted from 1 in a later subset, beyond doubt: none of its own numbers occurs."""
    size = last - first + 1
    numbers = {number for event in events for number in (event.first_frame, event.last_frame)}
    if first <= size or max(numbers) > size:
        return events, []
    detail = f"frames were numbered from 1 and not from {first}"
    shift = first - 1
    moved = [
        _changed(event, first_frame=event.first_frame + shift, last_frame=event.last_frame + shift)
        for event in events
    ]
    return moved, [Finding("numbered_from_one", WARNING, detail)]


def _in_range(events: list, first: int, last: int) -> tuple[list, list[Finding]]:
    """A range that is wrong by one frame is cut; anything else that is wrong is an error."""
    kept, findings = [], []
    for event in events:
        found = f"the event of frames {event.first_frame}-{event.last_frame}"
        inside = max(event.first_frame, first), min(event.last_frame, last)
        if event.first_frame > event.last_frame:
            findings.append(Finding("range_inverted", ERROR, f"{found} ends before it begins"))
        elif (event.first_frame, event.last_frame) != inside:
            near = event.first_frame >= first - 1 and event.last_frame <= last + 1 and inside[0] <= inside[1]
            severity = WARNING if near else ERROR
            detail = f"{found} is not inside frames {first}-{last}"
            findings.append(Finding("range_out_of_subset", severity, detail))
            if near:
                event = _changed(event, first_frame=inside[0], last_frame=inside[1])
        kept.append(event)
    return kept, findings


def _in_order(events: list) -> tuple[list, list[Finding]]:
    ordered = sorted(events, key=_order)
    if list(map(_order, ordered)) == list(map(_order, events)):
        return events, []
    return ordered, [Finding("unsorted", WARNING, "events were not in the order of their frames")]


def _without_repeats(events: list) -> tuple[list, list[Finding]]:
    """Events with one description that touch are one event; one that stands in many places is an error."""
    merged, findings = [], []
    for event in events:
        same = next((one for one in merged if _same_text(one, event) and _touches(one, event)), None)
        if same is None:
            merged.append(event)
            continue
        detail = f"the events of frames {_range(same)} and {_range(event)} have one description: joined"
        findings.append(Finding("duplicate_text", WARNING, detail))
        merged[merged.index(same)] = _joined(same, event)
    repeats = Counter(event.description.casefold() for event in merged)
    for text, count in repeats.items():
        if count > 1:
            severity = ERROR if count > MOST_REPEATS else WARNING
            detail = f"{count} events have the same description: {_short(text)}"
            findings.append(Finding("duplicate_text", severity, detail))
    return merged, findings


def _without_gaps(events: list, first: int, last: int) -> tuple[list, list[Finding]]:
    """A short gap goes to the event before it, at the beginning to the one after it."""
    covered = {
        frame
        for event in events
        for frame in range(max(event.first_frame, first), min(event.last_frame, last) + 1)
    }
    missing = [frame for frame in range(first, last + 1) if frame not in covered]
    events, findings = list(events), []
    for begin, end in _runs(missing):
        filled = covered and end - begin < MAX_FILLED_GAP
        detail = f"no event covers frames {begin}-{end}" + (
            ": the event beside them was extended" * bool(filled)
        )
        findings.append(Finding("gap", WARNING if filled else ERROR, detail))
        if not filled:
            continue
        before = [index for index, event in enumerate(events) if event.last_frame == begin - 1]
        if before:
            events[before[-1]] = _changed(events[before[-1]], last_frame=end)
        else:
            after = next(index for index, event in enumerate(events) if event.first_frame == end + 1)
            events[after] = _changed(events[after], first_frame=begin)
    return events, findings


def _with_pool_boundaries(
    events: list[StoryEventAnswer], pool: list[PoolEvent]
) -> tuple[list[StoryEventAnswer], list[Finding]]:
    """Every event names events of the pool, and begins and ends where one of the pool does.

    The second stage may join events and describe them anew; where they begin and end was seen in the first.
    """
    known = {event.id: event for event in pool}
    starts, ends = {event.first_frame for event in pool}, {event.last_frame for event in pool}
    repaired, findings = [], []
    for event in events:
        where = f"the event of frames {_range(event)}"
        ids = [id for id in dict.fromkeys(event.event_ids) if id in known]
        if unknown := sorted(set(event.event_ids) - set(known)):
            detail = f"{where} names annotations that were not given: {_short(', '.join(unknown))}"
            findings.append(Finding("unknown_event_id", WARNING, detail))
        if not ids:
            ids = _ids_of_frames(event.first_frame, event.last_frame, pool)
            detail = f"{where} names no annotation; that of its frames was taken"
            findings.append(Finding("event_ids_missing", WARNING, detail))
        first, last = event.first_frame, event.last_frame
        if first not in starts or last not in ends:
            if ids:
                first = first if first in starts else min(known[id].first_frame for id in ids)
                last = last if last in ends else max(known[id].last_frame for id in ids)
            detail = f"{where} does not begin and end where annotations do" + (
                f": its frames are {first}-{last}" if ids else ""
            )
            findings.append(Finding("boundary_not_in_pool", WARNING if ids else ERROR, detail))
        repaired.append(_changed(event, first_frame=first, last_frame=last, event_ids=ids))
    return repaired, findings


def _ids_of_frames(first: int, last: int, pool: list[PoolEvent]) -> list[str]:
    """The pool's events inside these frames, else the one that shares most frames with them, else none."""
    shared = {one.id: min(last, one.last_frame) - max(first, one.first_frame) + 1 for one in pool}
    inside = [one.id for one in pool if first <= one.first_frame and one.last_frame <= last]
    most = max(shared, key=lambda id: shared[id])
    return inside or [most] * (shared[most] > 0)


def _pool_findings(events: list[StoryEventAnswer], pool: list[PoolEvent]) -> list[Finding]:
    named = {id for event in events for id in event.event_ids}
    findings = [
        Finding("pool_event_dropped", WARNING, f"no description names {one.id}: {_short(one.description)}")
        for one in pool
        if one.id not in named
    ]
    texts = {one.description.casefold() for one in pool}
    if all(event.description.casefold() in texts for event in events):
        findings.append(Finding("copies_pool", INFO, "every description is that of an annotation"))
    return findings


def _cleaned_subjects(
    subjects: list[SubjectAnswer], events: list[StoryEventAnswer]
) -> tuple[list[SubjectAnswer], list[Finding]]:
    text = " ".join(event.description for event in events)
    cleaned, findings, seen = [], [], set()
    for subject in subjects:
        name, appearance = _plain(subject.name), _plain(subject.appearance)
        if not name or name.casefold() in seen:
            problem = f"subject {name!r} is given twice" if name else "a subject has no name"
            findings.append(Finding("duplicate_subject", WARNING, f"{problem}: left out"))
            continue
        seen.add(name.casefold())
        if _REFUSAL.search(name) or _REFUSAL.search(appearance):
            findings.append(Finding("refusal_text", ERROR, f"subject {_short(name)} is a refusal"))
        if not _is_referenced(name, text):
            detail = f"no description speaks of the subject {name!r}"
            findings.append(Finding("subject_unreferenced", WARNING, detail))
        cleaned.append(SubjectAnswer.model_construct(name=name, appearance=appearance))
    if not cleaned:
        people = _PEOPLE.search(text)
        detail = "no subjects are given" + (f", but descriptions speak of {people[0]!r}" if people else "")
        findings.append(Finding("subjects_empty", ERROR if people else WARNING, detail))
    findings += _alias_findings(cleaned, events)
    return cleaned, findings


def _is_referenced(name: str, text: str) -> bool:
    """By the last word of the name or a capitalised one: "girl" of "the girl", "Ada" of "Ada Lane"."""
    words = [word for word in re.findall(r"\w+", name) if word.casefold() not in _ARTICLES]
    if not words:
        return name.casefold() in text.casefold()
    candidates = {words[-1], *(word for word in words if word[0].isupper())}
    return any(re.search(rf"\b{re.escape(word)}(?:e?s)?\b", text, re.I) for word in candidates)


def _alias_findings(subjects: list[SubjectAnswer], events: list[StoryEventAnswer]) -> list[Finding]:
    """Names of people that no subject has: one person under two names is two people to a network."""
    known = {
        word.casefold()
        for subject in subjects
        for word in re.findall(r"\w+", f"{subject.name} {subject.appearance}")
    }
    aliases = dict.fromkeys(
        match[1]
        for event in events
        for match in _ACTING_NAME.finditer(event.description)
        if not known & set(match[1].casefold().split())
        and not _AFTER_PLACE_WORD.search(event.description[: match.start()])
    )
    return [
        Finding("subject_alias", WARNING, f"a description names {name!r}, who is no subject")
        for name in aliases
    ]


def _budget_findings(text: str, counter: "TokenCounter", *, grave: set[str]) -> list[Finding]:
    """Nothing is cut here: what would be lost is asked for again if it is `grave`, else told."""
    from storyanchors.caption_encoder import fit_caption  # imports transformers: seconds that few runs need

    num_tokens, code = counter.count_tokens(text), "tokens_over_limit"
    if counter.max_tokens is None or num_tokens <= counter.max_tokens:
        return []
    found = f"{num_tokens} tokens, at most {counter.max_tokens} can be encoded"
    try:
        lost = Counter(part.kind for part in fit_caption(text, counter).dropped)
    except ValueError:
        return [Finding(code, ERROR, f"{found}: say everything much more briefly")]
    losses = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in lost.items())
    severity = ERROR if grave & set(lost) else WARNING
    return [Finding(code, severity, f"{found}; {losses} would be lost: say everything more briefly")]


def _changed(answer: BaseModel, **values) -> BaseModel:
    """A copy of an answer that may break its schema's bounds: what it means is judged here, not its form."""
    return answer.model_copy(update=values)


def _order(event: EventAnswer | StoryEventAnswer) -> tuple[int, int]:
    return event.first_frame, event.last_frame


def _range(event: EventAnswer | StoryEventAnswer) -> str:
    return f"{event.first_frame}-{event.last_frame}"


def _same_text(one: EventAnswer | StoryEventAnswer, other: EventAnswer | StoryEventAnswer) -> bool:
    return one.description.casefold() == other.description.casefold()


def _touches(one: EventAnswer | StoryEventAnswer, other: EventAnswer | StoryEventAnswer) -> bool:
    return one.first_frame <= other.last_frame + 1 and other.first_frame <= one.last_frame + 1


def _joined(one: EventAnswer | StoryEventAnswer, other: EventAnswer | StoryEventAnswer):
    values = {
        "first_frame": min(one.first_frame, other.first_frame),
        "last_frame": max(one.last_frame, other.last_frame),
    }
    if isinstance(one, StoryEventAnswer):
        values["event_ids"] = list(dict.fromkeys([*one.event_ids, *other.event_ids]))
    return _changed(one, **values)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """[3, 4, 7] -> [(3, 4), (7, 7)]."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
