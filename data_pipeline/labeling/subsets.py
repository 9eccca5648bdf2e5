"""Which frames are shown together, and which one stands for an event.

Frames are numbered from 1 through the whole clip, also in later subsets.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from PIL import Image

MAX_SUBSET = 12  # paper 2.1: events are annotated in disjoint subsets of at most 12 frames
BLACK_LUMA = 24  # of 255; blocks of a black frame are darker, those of white letters on it are not
PLAIN_BYTES_PER_PIXEL = 0.5  # black frames have less, also with film grain


@dataclass(frozen=True)
class FrameLook:
    """What decides whether a frame can stand for an event: is there anything to see, and how sharp is it."""

    black: bool
    sharpness: int


def balanced_subsets(num_frames: int, max_frames: int = MAX_SUBSET) -> list[tuple[int, int]]:
    """(first, last) of the fewest consecutive subsets, whose sizes differ by one at most: 22 -> 11 + 11."""
    num_subsets = ceil(num_frames / max_frames)
    size, larger = divmod(num_frames, num_subsets)
    subsets, first = [], 1
    for number in range(num_subsets):
        last = first + size + (number < larger) - 1
        subsets.append((first, last))
        first = last + 1
    return subsets


def evenly_chosen(num_frames: int, max_frames: int | None) -> list[int]:
    """At most max_frames frame numbers from the first to the last, all of them where they are few enough."""
    if max_frames is None or num_frames <= max_frames:
        return list(range(1, num_frames + 1))
    if max_frames == 1:
        return [(num_frames + 1) // 2]
    steps = max_frames - 1
    return [1 + (2 * step * (num_frames - 1) + steps) // (2 * steps) for step in range(max_frames)]


def look_at(jpeg: bytes) -> FrameLook:
    """Judges a story frame by its file: JPEGs of one quality are the larger the more detail they hold.

    Only what is small enough to be black is decoded, at an eighth of its size.
    """
    image = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
    if len(jpeg) > PLAIN_BYTES_PER_PIXEL * image.width * image.height:
        return FrameLook(False, len(jpeg))
    image.draft("L", (image.width // 8, image.height // 8))
    return FrameLook(image.convert("L").getextrema()[1] < BLACK_LUMA, len(jpeg))


def representative_frame(first: int, last: int, used: set[int], look: Callable[[int], FrameLook]) -> int:
    """The frame that stands for the event of frames first..last; the same for the same pixels.

    Of its frames, those that are not black, and of these those that stand for no other event (`used`); where
    that leaves none, the condition is dropped. The frame nearest the middle is looked for, and of it and its
    two neighbours the sharpest is taken; in a draw the one nearest the middle, then the first.
    """
    by_distance = sorted(range(first, last + 1), key=lambda frame: (abs(2 * frame - first - last), frame))

    unused = [frame for frame in by_distance if frame not in used]
    for frames in (unused, by_distance):
        if visible := _visible_near_middle(frames, look):
            return max(visible, key=lambda frame: look(frame).sharpness)  # of equals the first: the nearest
    return (unused or by_distance)[0]


def _visible_near_middle(by_distance: list[int], look: Callable[[int], FrameLook]) -> list[int]:
    """The first frame that is not black and those beside it; frames farther away are not looked at."""
    for frame in by_distance:
        if not look(frame).black:
            return [other for other in by_distance if abs(other - frame) <= 1 and not look(other).black]
    return []
