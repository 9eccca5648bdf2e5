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

    Each has `window` frames (a shorter story: all of them), draws all that is unknown in it and sees all that
    is known. Where frames are known it shares at least `overlap` of them, if so many lie near enough; then
    it rather has known frames on both sides of what it draws than before it only, and that rather than behind
    it only; then it draws as many as it can. So a story grows to the right first, then to the left, and the
    last window of a gap sees both of its ends.
    """
    if not 1 <= overlap < window:
        raise ValueError(f"overlap is {overlap}, expected 1 to {window - 1} for windows of {window} frames")
    if outside := sorted(number for number in known if not 1 <= number <= num_frames):
        raise ValueError(f"known frames {outside} are outside the story's 1 to {num_frames}")
    size = min(window, num_frames)
    seen, plan = set(known), []
    while len(seen) < num_frames:
        candidates = [_window(first, first + size - 1, seen) for first in range(1, num_frames - size + 2)]
        plan.append(max((w for w in candidates if w.drawn), key=lambda w: _preference(w, overlap)))
        seen.update(plan[-1].drawn)
    return plan


def _window(first: int, last: int, seen: set[int]) -> Window:
    numbers = range(first, last + 1)
    return Window(
        first,
        last,
        given=tuple(number for number in numbers if number in seen),
        drawn=tuple(number for number in numbers if number not in seen),
    )


def _preference(window: Window, overlap: int) -> tuple[int, ...]:
    before = sum(number < window.drawn[0] for number in window.given)
    after = sum(number > window.drawn[-1] for number in window.given)
    sides = (before > 0) + (after > 0)
    shared = min(len(window.given), overlap)
    return shared, sides, before > 0, len(window.drawn), min(before, after), -window.first
