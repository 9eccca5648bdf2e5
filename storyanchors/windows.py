"""Stories longer than a model draws at once: windows of frames that share some, drawn one after another."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Frames first..last of a story, drawn in one go; all numbers are those of the whole story, from 1."""

    first: int
    last: int
    given: tuple[int, ...]  # known beforehand, or drawn by an earlier window
    drawn: tuple[int, ...]


def plan_windows(num_frames: int, known: Collection[int], *, window: int, overlap: int) -> list[Window]:
    """Windows in drawing order, which together draw every unknown frame once. Nothing unknown: none.

    Each draws all that is unknown in it and sees all that is known. No frame is drawn beside a known one that
    its window does not see; only where that asks for it has a window fewer than `window` frames (a shorter
    story: all of them). Where frames are known it shares at least `overlap` of them, if so many lie near
    enough. Then it rather has known frames on both sides of what it draws than only before it, and rather
    those than only ones behind it; then it draws as many as it can. So a story grows to the right first, then
    to the left, and the last window of a gap sees both of its ends.
    """
    if num_frames < 1:
        raise ValueError(f"a story has at least one frame, found {num_frames}")
    if window < 3:
        raise ValueError(f"a window of {window} cannot show both sides of a frame, expected 3 frames or more")
    if not 1 <= overlap < window:
        raise ValueError(f"overlap is {overlap}, expected 1 to {window - 1} for windows of {window} frames")
    if outside := sorted(number for number in known if not 1 <= number <= num_frames):
        raise ValueError(f"known frames {outside} are outside the story's 1 to {num_frames}")
    seen, plan = set(known), []
    while len(seen) < num_frames:
        candidates = _longest_windows(num_frames, window, seen)
        plan.append(max(candidates, key=lambda candidate: _preference(candidate, overlap)))
        seen.update(plan[-1].drawn)
    return plan


def _longest_windows(num_frames: int, most: int, seen: set[int]) -> list[Window]:
    """The windows that draw something and are not blind, of the greatest length that has any."""
    for length in range(most, 0, -1):
        places = range(1, num_frames - length + 2)
        windows = [_window(first, first + length - 1, seen) for first in places]
        if fitting := [window for window in windows if window.drawn and not _is_blind(window, seen)]:
            return fitting
    raise AssertionError("a gap always has a window of 3 frames or fewer")


def _window(first: int, last: int, seen: set[int]) -> Window:
    numbers = range(first, last + 1)
    return Window(
        first,
        last,
        given=tuple(number for number in numbers if number in seen),
        drawn=tuple(number for number in numbers if number not in seen),
    )


def _is_blind(window: Window, seen: set[int]) -> bool:
    """Whether a frame would be drawn at the window's edge, with a known one just outside."""
    blind_before = window.first in window.drawn and window.first - 1 in seen
    return blind_before or (window.last in window.drawn and window.last + 1 in seen)


def _preference(window: Window, overlap: int) -> tuple[int, ...]:
    before = sum(number < window.drawn[0] for number in window.given)
    after = sum(number > window.drawn[-1] for number in window.given)
    sides = (before > 0) + (after > 0)
    shared = min(len(window.given), overlap)
    return shared, sides, before > 0, len(window.drawn), min(before, after), -window.first
