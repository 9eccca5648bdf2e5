"""Facts -> pixels: one frame of the story world, 64 x 64 RGB.

A subject is drawn on a grid four times finer and averaged, which gives for every pixel the share of each
part (`part_shares`). Shares are sixteenths and colours integers, so float32 arithmetic is exact in any order:
the same facts give the same bytes on every machine.

P parts (PARTS), H W frame size.
"""

from functools import cache

import numpy as np

from storyanchors.story_world.world import (
    BALL,
    COLOURS,
    EYE,
    RGB,
    SCENES,
    SHADOW,
    STREAK,
    FrameFacts,
    WorldStory,
)

FRAME_SIZE = 64
SUPERSAMPLING = 4
PARTS = ("shadow", "streak", "body", "eye", "ball")

RADIUS = 10.5
SCALE = {"wide": 0.6, "medium": 1.0, "close": 1.6}
HORIZON_ROW = {"wide": 24, "medium": 34, "close": 44}
FOOT_ROW = {"wide": 42, "medium": 52, "close": 56}
PAN_SIGN = {"left": -1, "center": 0, "right": 1}
PAN_SHIFT_ALONE = {"wide": 18, "medium": 15, "close": 12}
PAN_SHIFT_PAIR = {"wide": 9, "medium": 5}
SLOT_SHIFT = 14  # two subjects stand this far left and right of the middle

_axis = (np.arange(FRAME_SIZE * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
_X, _Y = _axis[None, :], _axis[:, None]


def render_frame(story: WorldStory, frame: FrameFacts | int, *, phase: float = 0.0) -> np.ndarray:
    """(64, 64, 3) uint8. `frame` is a 1-based frame number or the facts themselves.

    Phase 0 is the story frame. Phases up to 1 are the frames between it and the next one (dense mode): a
    small motion that starts and ends at the story frame's pose.
    """
    if isinstance(frame, int):
        if not 1 <= frame <= story.num_frames:
            raise ValueError(f"frame number is {frame}, expected 1 to {story.num_frames}")
        frame = story.frames[frame - 1]
    if not 0 <= phase < 1:
        raise ValueError(f"phase is {phase}, expected 0 <= phase < 1")
    canvas = background(frame.scene, frame.zoom)
    columns = subject_columns(frame.zoom, frame.pan, len(frame.actions))
    for column, (index, action) in zip(columns, frame.actions, strict=True):
        subject = story.cast[index]
        pose = subject.shape, action, frame.zoom, column
        shares = _draw_subject(*pose, phase) if phase else part_shares(*pose)
        canvas = canvas * (1 - shares.sum(-1, keepdims=True)) + shares @ part_colours(subject.colour)
    return np.rint(canvas).astype(np.uint8)


def subject_columns(zoom: str, pan: str, num_subjects: int) -> list[int]:
    """Horizontal centres of the visible subjects, in cast order."""
    middle = FRAME_SIZE // 2
    if num_subjects == 1:
        return [middle + PAN_SIGN[pan] * PAN_SHIFT_ALONE[zoom]]
    middle += PAN_SIGN[pan] * PAN_SHIFT_PAIR[zoom]
    return [middle - SLOT_SHIFT, middle + SLOT_SHIFT]


@cache
def background(scene: str, zoom: str) -> np.ndarray:
    """Sky over ground, (H, W, 3) float32, read-only."""
    sky, ground = SCENES[scene]
    canvas = np.empty((FRAME_SIZE, FRAME_SIZE, 3), np.float32)
    canvas[: HORIZON_ROW[zoom]] = sky
    canvas[HORIZON_ROW[zoom] :] = ground
    canvas.setflags(write=False)
    return canvas


@cache
def part_colours(colour: str) -> np.ndarray:
    """(P, 3) float32: the colours of PARTS for a subject of this body colour."""
    colours: dict[str, RGB] = {
        "shadow": SHADOW,
        "streak": STREAK,
        "body": COLOURS[colour],
        "eye": EYE,
        "ball": BALL,
    }
    return np.array([colours[part] for part in PARTS], np.float32)


@cache
def part_shares(shape: str, action: str, zoom: str, column: int) -> np.ndarray:
    """(H, W, P) float32: share of each part in each pixel, in sixteenths; the rest is background. Read-only.

    Kept for all 420 poses of story frames (34 MB).
    """
    shares = _draw_subject(shape, action, zoom, column, phase=0.0)
    shares.setflags(write=False)
    return shares


def _draw_subject(shape: str, action: str, zoom: str, column: int, phase: float) -> np.ndarray:
    radius = RADIUS * SCALE[zoom]
    foot = FOOT_ROW[zoom]
    swing = 4 * phase * (1 - phase)  # 0 at both story frames, 1 half-way
    x, width, height, lean, lift = float(column), radius, radius, 0.0, 0.0
    if action == "stands":
        x += 0.15 * radius * swing
    elif action == "jumps":
        lift = radius * (0.75 + 0.25 * swing)
    elif action == "sleeps":
        width, height = 1.2 * radius, radius * (0.5 + 0.06 * swing)
    elif action == "runs":
        x += 0.25 * radius * swing
        lean = 0.3
    y = foot - lift - height

    layers: dict[str, np.ndarray] = {}
    if action == "jumps":
        layers["shadow"] = _ellipse(x, foot + 0.05 * radius, 0.9 * radius, 0.2 * radius)
    if action == "runs":
        layers["streak"] = _streaks(x, foot, radius)
    layers["body"] = _body(shape, x, y, width, height, lean)
    if action != "sleeps":
        layers["eye"] = _ellipse(x - 0.28 * radius, y, 0.14 * radius, 0.2 * radius)
        layers["eye"] |= _ellipse(x + 0.28 * radius, y, 0.14 * radius, 0.2 * radius)
    if action == "holds":
        layers["ball"] = _ellipse(x, y - height - radius * (0.4 + 0.3 * swing), 0.48 * radius, 0.48 * radius)
    return _shares(layers)


def _body(shape: str, x: float, y: float, width: float, height: float, lean: float) -> np.ndarray:
    v = (_Y - np.float32(y)) / np.float32(height)
    u = (_X - np.float32(x)) / np.float32(width)
    if lean:
        u = u + np.float32(lean) * v
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "triangle":
        return (2 * abs(u) <= v + 1) & (v <= 1)
    return abs(u) + abs(v) <= 1


def _ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    return _body("circle", x, y, width, height, 0.0)


def _streaks(x: float, foot: float, radius: float) -> np.ndarray:
    """Speed lines: two on the ground under the feet, the lower one trailing."""
    upper = _body("square", x - 0.2 * radius, foot + 0.1 * radius, 1.1 * radius, 0.1 * radius, 0.0)
    lower = _body("square", x - 0.5 * radius, foot + 0.42 * radius, 0.8 * radius, 0.1 * radius, 0.0)
    return upper | lower


def _shares(layers: dict[str, np.ndarray]) -> np.ndarray:
    """Opaque layers on the fine grid, later ones in front -> (H, W, P) shares."""
    shares = np.zeros((FRAME_SIZE, FRAME_SIZE, len(PARTS)), np.float32)
    free = np.ones((FRAME_SIZE * SUPERSAMPLING,) * 2, bool)
    for part in reversed(PARTS):
        if part in layers:
            seen = layers[part] & free
            free &= ~seen
            rows = seen.view(np.uint8).reshape(FRAME_SIZE, SUPERSAMPLING, -1).sum(1, dtype=np.uint8)
            shares[:, :, PARTS.index(part)] = rows.reshape(FRAME_SIZE, FRAME_SIZE, SUPERSAMPLING).sum(
                2, dtype=np.uint8
            )
    return shares / SUPERSAMPLING**2
