"""Dense mode: the source frames between two story frames, and clips of them, which train interpolation.

A story-world video has FRAME_INTERVAL source frames between story frames. From a story frame on, its subjects
move a little and come back (renderer's phase); where the next story frame shows another event, the film cuts.
"""

from dataclasses import dataclass

import numpy as np

from storyanchors.story import Event, Story
from storyanchors.story_world.captions import to_story
from storyanchors.story_world.renderer import render_frame
from storyanchors.story_world.world import WorldStory, sample_story

FPS = 24
FRAME_INTERVAL = 69
GAP = FRAME_INTERVAL + 1  # steps from a story frame to the next one
MAX_CLIP_FRAMES = 11
# Coarse to fine, as a gap is filled: ten strides of 7 over all of it, then seven of 1 in one of them; others
WHOLE_GAP, PART, ANY = 0.35, 0.35, 0.3
MAX_STRIDE = 14


@dataclass(frozen=True)
class DenseClip:
    """num_frames source frames, `stride` steps apart, from step `start` after story frame number `gap`."""

    story: WorldStory
    gap: int
    start: int
    stride: int
    num_frames: int

    @property
    def positions(self) -> list[int]:
        """Steps after story frame `gap`; the last one may be GAP, which is the next story frame."""
        return [self.start + index * self.stride for index in range(self.num_frames)]


def sample_dense_clip(seed: int, *, num_story_frames: int | None = None) -> DenseClip:
    """A clip within one gap of the story of this seed."""
    story = sample_story(seed, num_frames=num_story_frames)
    rng = np.random.default_rng((seed, 1))
    gap = int(rng.integers(1, story.num_frames))
    kind = rng.choice(3, p=[WHOLE_GAP, PART, ANY])
    if kind == 0:
        return DenseClip(story, gap, 0, GAP // 10, 11)
    if kind == 1:
        return DenseClip(story, gap, 7 * int(rng.integers(10)), 1, 8)
    stride = int(rng.integers(1, MAX_STRIDE + 1))
    num_frames = int(rng.integers(3, min(MAX_CLIP_FRAMES, GAP // stride + 1) + 1))
    start = int(rng.integers(GAP - (num_frames - 1) * stride + 1))
    return DenseClip(story, gap, start, stride, num_frames)


def dense_frames(clip: DenseClip) -> list[np.ndarray]:
    """The clip's pictures, each (64, 64, 3) uint8."""
    return [dense_frame(clip.story, clip.gap, position) for position in clip.positions]


def dense_frame(story: WorldStory, gap: int, position: int) -> np.ndarray:
    """The source frame `position` steps (0 to GAP) after story frame number `gap`."""
    if position == GAP:
        return render_frame(story, gap + 1)
    return render_frame(story, gap, phase=position / GAP)


def dense_story(clip: DenseClip) -> Story:
    """The events that the clip's frames show, in its own numbers; no global caption."""
    whole = to_story(clip.story)
    [before], [after] = (
        [event for event in whole.events if event.first_frame <= number <= event.last_frame]
        for number in (clip.gap, clip.gap + 1)
    )
    num_frames = clip.num_frames
    if clip.positions[-1] < GAP or before == after:
        events = [Event(1, num_frames, before.description)]
    else:
        events = [
            Event(1, num_frames - 1, before.description),
            Event(num_frames, num_frames, after.description),
        ]
    return Story(events, whole.subjects, whole.style)
