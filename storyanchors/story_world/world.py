"""The facts of the story world: who and what can be shown, in which colours, and the story of a seed.

Everything that a caption says about a frame is visible in its pixels and can be read back, so that generated
frames are judged without a network (shared facts: story world, sections 6.2 and 6.3).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

RGB = tuple[int, int, int]

# Saturated body colours; one per cast member, so a colour says who a subject is.
COLOURS: dict[str, RGB] = {
    "red": (222, 36, 40),
    "orange": (250, 132, 20),
    "yellow": (252, 222, 40),
    "green": (30, 176, 60),
    "blue": (36, 84, 232),
    "purple": (150, 40, 196),
}
SHAPES = ("circle", "square", "triangle", "diamond")

# (sky, ground): muted, and at least 25 RGB steps from each other and from all other colours.
SCENES: dict[str, tuple[RGB, RGB]] = {
    "forest": ((152, 196, 164), (64, 98, 62)),
    "cave": ((74, 66, 88), (128, 106, 90)),
    "desert": ((240, 218, 170), (200, 164, 112)),
    "city": ((198, 196, 184), (90, 98, 114)),
    "snow": ((146, 166, 200), (204, 220, 234)),
    "meadow": ((156, 212, 244), (142, 174, 92)),
    "harbor": ((236, 176, 166), (76, 132, 154)),
    "canyon": ((188, 150, 192), (160, 94, 78)),
}
EYE: RGB = (14, 14, 18)
SHADOW: RGB = (44, 40, 52)
STREAK: RGB = (255, 255, 255)
BALL: RGB = (20, 222, 226)

ZOOMS = ("wide", "medium", "close")
PANS = ("left", "center", "right")
ACTIONS = ("stands", "jumps", "sleeps", "runs", "holds")

STYLE = "flat cartoon"
MIN_FRAMES, MAX_FRAMES = 2, 32
MAX_EVENTS = 5  # of a story of at most SHORT frames; longer ones keep about as many events per frame
SHORT = 16


@dataclass(frozen=True)
class Subject:
    """A cast member: its colour says who it is, its shape must stay the same through the story."""

    colour: str
    shape: str


@dataclass(frozen=True)
class FrameFacts:
    """All that one frame shows; `actions` has (cast index, action) for each visible subject, ascending."""

    scene: str
    zoom: str
    pan: str
    actions: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class WorldEvent:
    """Frames first_frame..last_frame (1-based, inclusive), all of which show the same facts."""

    first_frame: int
    last_frame: int
    facts: FrameFacts


@dataclass(frozen=True)
class WorldStory:
    """A cast of one or two subjects and the events that cover frames 1..num_frames one after another."""

    cast: tuple[Subject, ...]
    events: tuple[WorldEvent, ...]
    style: str = STYLE

    @property
    def num_frames(self) -> int:
        return self.events[-1].last_frame

    @cached_property
    def frames(self) -> tuple[FrameFacts, ...]:
        """The facts of each frame; frames[0] is frame number 1."""
        return tuple(
            event.facts for event in self.events for _ in range(event.first_frame, event.last_frame + 1)
        )


def sample_story(seed: int, *, num_frames: int | None = None) -> WorldStory:
    """The story of this seed: 2-5 events over num_frames frames (2-32; None draws 6-8).

    Above 16 frames there are num_frames/4 to num_frames/3 events. Consecutive events differ in scene, no two
    events share scene and actions (or their order could not be read from the frames), and every cast member
    is seen at least once.
    """
    if num_frames is not None and not MIN_FRAMES <= num_frames <= MAX_FRAMES:
        raise ValueError(f"num_frames is {num_frames}, expected {MIN_FRAMES} to {MAX_FRAMES}")
    rng = np.random.default_rng(seed)
    num_frames = int(rng.integers(6, 9)) if num_frames is None else num_frames
    cast = _sample_cast(rng)
    fewest, most = 2, min(MAX_EVENTS, num_frames)
    if num_frames > SHORT:
        fewest, most = num_frames // 4, num_frames // 3
    num_events = int(rng.integers(fewest, most + 1))
    cuts = np.sort(rng.permutation(num_frames - 1)[: num_events - 1]) + 1
    facts = _sample_facts(rng, len(cast), num_events)
    while len({index for one in facts for index, _ in one.actions}) < len(cast):
        facts = _sample_facts(rng, len(cast), num_events)
    firsts = [1, *(int(cut) + 1 for cut in cuts)]
    lasts = [*(int(cut) for cut in cuts), num_frames]
    return WorldStory(cast, tuple(map(WorldEvent, firsts, lasts, facts)))


def _sample_cast(rng: np.random.Generator) -> tuple[Subject, ...]:
    size = 1 if rng.random() < 0.4 else 2
    colours = rng.permutation(len(COLOURS))[:size]
    return tuple(Subject(list(COLOURS)[colour], _choose(rng, SHAPES)) for colour in colours)


def _sample_facts(rng: np.random.Generator, cast_size: int, num_events: int) -> list[FrameFacts]:
    events: list[FrameFacts] = []
    while len(events) < num_events:
        zoom = _choose(rng, ZOOMS)
        alone = zoom == "close" or rng.random() < 0.2
        visible = [int(rng.integers(cast_size))] if alone else range(cast_size)
        actions = tuple((index, _choose(rng, ACTIONS)) for index in visible)
        facts = FrameFacts(_choose(rng, tuple(SCENES)), zoom, _choose(rng, PANS), actions)
        seen_before = any((facts.scene, facts.actions) == (other.scene, other.actions) for other in events)
        if not seen_before and (not events or facts.scene != events[-1].scene):
            events.append(facts)
    return events


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
