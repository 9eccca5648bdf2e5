"""What can be done to a story: every operation is one StoryEdit, without a pixel.

A story tells every frame one or several texts; an edit is a list operation on them (`Story.descriptions`),
so a text that goes on from frame to frame is one event, and an event around a changed frame is split.
Which frames are drawn is what `kept` leaves out: one mask for all operations.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from storyanchors.clip import MAX_FRAMES
from storyanchors.story import Story


@dataclass(frozen=True)
class StoryEdit:
    """A story after an operation, and which frames of the story before stand where in it.

    kept: frame number after -> frame number before; every other frame of the story is to be drawn. Frames
    never change places: ValueError for one that is kept twice, or before an earlier one, or outside.
    """

    story: Story
    kept: dict[int, int]
    what: str  # one line for people and for a project's history

    def __post_init__(self):
        kept = dict(sorted(self.kept.items()))
        object.__setattr__(self, "kept", kept)
        _check_frames(kept, self.story.num_frames, "kept")
        before = list(kept.values())
        if before != sorted(set(before)) or min(before, default=1) < 1:
            raise ValueError(f"kept frames must stay in their order, each once, found {kept}")

    def drawn(self) -> list[int]:
        """Numbers after the edit of the frames to be drawn, ascending; none for a mere deletion."""
        return [number for number in range(1, self.story.num_frames + 1) if number not in self.kept]

    def then(self, other: "StoryEdit") -> "StoryEdit":
        """Both as one edit: other was made from self.story; what either draws is drawn."""
        _check_frames(other.kept.values(), self.story.num_frames, "the second edit keeps")
        kept = {after: self.kept[between] for after, between in other.kept.items() if between in self.kept}
        return StoryEdit(other.story, kept, f"{self.what}; {other.what}")


def keep_frames(story: Story, numbers: Collection[int]) -> StoryEdit:
    """These frames stay, all others are drawn: continue, fill in, find a beginning; [] draws all anew."""
    return replace_story(story, story, numbers)


def redraw_frames(story: Story, numbers: Collection[int]) -> StoryEdit:
    """These frames are drawn anew from the same text, all others stay."""
    _check_named(numbers, story.num_frames, "redraw")
    return StoryEdit(story, _without(story, numbers), f"redraw {_frames(numbers)}")


def edit_frames(story: Story, descriptions: Mapping[int, str]) -> StoryEdit:
    """Frames get a new text, which is all that is told of them, and are drawn; all others stay."""
    if not isinstance(descriptions, Mapping):
        raise ValueError(f"edit: found {descriptions!r}, expected texts by frame number: {{4: text}}")
    _check_named(descriptions, story.num_frames, "edit")
    told = story.descriptions()
    for number in sorted(descriptions):
        told[number - 1] = (_text(descriptions[number], f"frame {number}"),)
    texts = "; ".join(f"{number}: {told[number - 1][0]}" for number in sorted(descriptions))
    return StoryEdit(_retold(story, told), _without(story, descriptions), f"edit {texts}")


def insert_event(story: Story, after: int, description: str, num_frames: int = 1) -> StoryEdit:
    """num_frames new frames behind frame `after` (0 = before the first); what comes later moves up."""
    if not _is_whole(after) or not 0 <= after <= story.num_frames:
        raise ValueError(f"insert after frame {after!r}: expected 0 to {story.num_frames}")
    return _insert(story, after, [(description, num_frames)])


def extend_right(story: Story, events: Sequence[tuple[str, int]]) -> StoryEdit:
    """Events, each (description, num_frames), behind the last frame, in reading order."""
    return _insert(story, story.num_frames, events)


def extend_left(story: Story, events: Sequence[tuple[str, int]]) -> StoryEdit:
    """Events, each (description, num_frames), before the first frame, in reading order."""
    return _insert(story, 0, events)


def delete_frames(story: Story, numbers: Collection[int]) -> StoryEdit:
    """Frames go, the rest closes up; events shrink, or vanish with their last frame. Nothing is drawn."""
    _check_named(numbers, story.num_frames, "delete")
    rest = list(_without(story, numbers))
    if not rest:
        raise ValueError(f"delete {_frames(numbers)}: these are all, a story needs at least one frame")
    told = story.descriptions()
    story = _retold(story, [told[number - 1] for number in rest])
    return StoryEdit(story, dict(enumerate(rest, start=1)), f"delete {_frames(numbers)}")


def replace_story(story: Story, new_story: Story, keep: Collection[int]) -> StoryEdit:
    """Another story, of any length, around frames that keep their numbers."""
    _check_length(new_story.num_frames)
    _check_frames(keep, min(story.num_frames, new_story.num_frames), "keep")
    kept = {number: number for number in keep}
    drawn = [number for number in range(1, new_story.num_frames + 1) if number not in kept]
    parts = [f"{verb} {_frames(numbers)}" for verb, numbers in (("keep", kept), ("draw", drawn)) if numbers]
    what = ", ".join(parts) + ("" if new_story == story else " of another story")
    return StoryEdit(new_story, kept, what)


def window(story: Story, first: int, last: int) -> Story:
    """The part of a story that frames first..last tell, numbered from 1; subjects and style stay.

    The global caption tells of all frames and is left out, except where the part is the whole story.
    """
    _check_frames((first, last), story.num_frames, "a window of a story")
    if first > last:
        raise ValueError(f"a window's frames run backwards: found {first}..{last}")
    return _retold(story, story.descriptions()[first - 1 : last])


def _insert(story: Story, after: int, events: Sequence[tuple[str, int]]) -> StoryEdit:
    places = {story.num_frames: "at the end", 0: "at the beginning"}
    where = places.get(after, f"after frame {after}")
    if not events:
        raise ValueError(f"insert {where}: found no event, expected (description, num_frames)")
    for _, num_frames in events:
        if not _is_whole(num_frames) or num_frames < 1:
            raise ValueError(f"insert {where}: num_frames must be at least 1, found {num_frames!r}")
    _check_length(story.num_frames + sum(num_frames for _, num_frames in events))
    texts = [_text(description, f"an event {where}") for description, _ in events]
    new = [(text,) for text, (_, num_frames) in zip(texts, events) for _ in range(num_frames)]
    told = story.descriptions()
    kept = {n if n <= after else n + len(new): n for n in range(1, len(told) + 1)}
    what = f"insert {len(new)} frame{'s' * (len(new) > 1)} {where}: {'; '.join(texts)}"
    return StoryEdit(_retold(story, told[:after] + new + told[after:]), kept, what)


def _retold(story: Story, told: list[tuple[str, ...]]) -> Story:
    """The story with other texts; its global caption would lie about them. Same texts: the same story."""
    if told == story.descriptions():
        return story
    return Story.from_descriptions(told, story.subjects, story.style)


def _without(story: Story, numbers: Iterable[int]) -> dict[int, int]:
    return {number: number for number in range(1, story.num_frames + 1) if number not in numbers}


def _text(description: str, where: str) -> str:
    if not isinstance(description, str) or not description.strip():
        raise ValueError(f"the text of {where} is empty, found {description!r}")
    return " ".join(description.split())


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _check_length(num_frames: int) -> None:
    if num_frames > MAX_FRAMES:
        raise ValueError(f"a story of {num_frames} frames is too long, expected at most {MAX_FRAMES}")


def _check_frames(numbers: Iterable[int], num_frames: int, what: str) -> None:
    for number in numbers:
        if not _is_whole(number) or not 1 <= number <= num_frames:
            raise ValueError(f"{what}: frame {number!r}, expected one of 1 to {num_frames}")


def _check_named(numbers: Collection[int], num_frames: int, what: str) -> None:
    if not numbers:
        raise ValueError(f"{what}: no frame is named, expected some of 1 to {num_frames}")
    _check_frames(numbers, num_frames, what)


def _frames(numbers: Collection[int]) -> str:
    """'frame 3' or 'frames 1-4, 6'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"frame{'s' * (len(set(numbers)) > 1)} {', '.join(parts)}"
