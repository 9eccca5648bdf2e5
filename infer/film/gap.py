"""A gap: two story frames that follow each other, its anchors, and what their story says.

Between them lie frame_interval film frames, so the next anchor is frame_interval + 1 steps away. n anchors
make a film of (n - 1) (frame_interval + 1) + 1 frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from infer.frame_folder import check_frame, read_frame
from storyanchors.story import Story
from storyanchors.story_edit import window

MAX_FRAME_INTERVAL = 1000


@dataclass(frozen=True)
class Gap:
    """Two anchors of one size, RGB, and the story of these two frames, which are 1 and 2 in it."""

    first: Image.Image
    last: Image.Image
    story: Story

    def clip_story(self, num_frames: int, *, ends_at_anchor: bool) -> Story:
        """The story of a clip of num_frames film frames from within the gap.

        All of them show what is told of the first anchor; a last one that is the last anchor shows its own.
        """
        first, last = self.story.descriptions()
        told = [first] * (num_frames - 1) + [last if ends_at_anchor else first]
        return Story.from_descriptions(told, self.story.subjects, self.story.style)

    def sentence(self) -> str:
        """The gap's events in order, and the style, as one text for a model that knows no numbered events."""
        first, last = self.story.descriptions()
        told = ", then ".join(
            " and ".join(text.rstrip(".") for text in texts) for texts in dict.fromkeys((first, last))
        )
        return f"{told}. {self.story.style}".strip(". ") + "."


# A gap and its frame_interval -> the frames between its anchors
DrawGap = Callable[[Gap, int], Sequence[Image.Image]]


def gaps_between(anchors: Sequence[Image.Image], story: Story) -> list[Gap]:
    """ValueError unless there are two anchors or more, and as many as the story has frames."""
    if len(anchors) < 2:
        raise ValueError(f"a film needs two story frames or more, found {len(anchors)}")
    if len(anchors) != story.num_frames:
        raise ValueError(f"found {len(anchors)} story frames for a story of {story.num_frames}")
    return [
        Gap(anchors[number - 1], anchors[number], window(story, number, number + 1))
        for number in range(1, len(anchors))
    ]


def read_anchors(paths: Sequence[Path]) -> list[Image.Image]:
    """Story frames as RGB; ValueError for one that is broken, of another size or has more than colours."""
    frames = [read_frame(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        check_frame(frame, str(path), frames[0].size)
    return [frame.convert("RGB") for frame in frames]


def check_frame_interval(frame_interval: int) -> None:
    if not 0 <= frame_interval <= MAX_FRAME_INTERVAL:
        raise ValueError(f"frame_interval={frame_interval}, expected 0 to {MAX_FRAME_INTERVAL}")
