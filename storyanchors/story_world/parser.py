"""Pixels -> facts by analysis and synthesis: the legal frame nearest to an image, in squared error.

Sky and ground give scene and zoom. Then every pose (pan, shape, action) in every colour is compared with the
image at once: for the empty scene B, an image I and the change M that drawing a pose makes to B,
    |I - B|^2 - |I - B - M|^2  =  2 <I - B, M> - |M|^2
is the error that drawing it removes, its gain. M is linear in the pose's colours, so the inner products with
the part shares of all poses, taken once for sky and once for ground, serve every colour. Two subjects never
overlap, so their gains add up.

R regions (sky, ground), S scenes, N poses, P parts, K colours, H W frame size.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from storyanchors.story_world.renderer import (
    FRAME_SIZE,
    HORIZON_ROW,
    background,
    part_colours,
    part_shares,
    render_frame,
    subject_columns,
)
from storyanchors.story_world.world import (
    ACTIONS,
    COLOURS,
    PANS,
    SCENES,
    SHAPES,
    FrameFacts,
    Subject,
    WorldStory,
)

# A subject is seen where drawing it removes at least this share of the error that a perfect one would cause.
MIN_GAIN = 0.25
# Squared RGB distance at which a pixel counts as half an outlier to a sky or ground: the palette's spacing.
OUTLIER_DISTANCE = 40.0**2


@dataclass(frozen=True)
class ParsedSubject:
    colour: str
    shape: str
    action: str


@dataclass(frozen=True)
class ParsedFrame:
    """The facts of the nearest legal frame, subjects from left to right; no subject, no pan.

    legal_rmse is the distance to that frame in RGB steps: a measure of realism that needs no network.
    """

    scene: str
    zoom: str
    pan: str | None
    subjects: tuple[ParsedSubject, ...]
    legal_rmse: float


def parse_frame(image: Image.Image | np.ndarray) -> ParsedFrame:
    """The facts of a 64 x 64 RGB image, (H, W, 3) in steps of 0..255; ValueError for another shape."""
    pixels = np.asarray(image, np.float32)
    if pixels.shape != (FRAME_SIZE, FRAME_SIZE, 3):
        raise ValueError(f"found a frame of shape {pixels.shape}, expected {(FRAME_SIZE, FRAME_SIZE, 3)}")
    scene, zoom = _nearest_background(pixels)
    pan, subjects = _best_subjects(pixels - background(scene, zoom), scene, zoom)
    nearest = background(scene, zoom)
    if subjects:
        cast = tuple(Subject(subject.colour, subject.shape) for subject in subjects)
        actions = tuple((index, subject.action) for index, subject in enumerate(subjects))
        nearest = render_frame(WorldStory(cast, ()), FrameFacts(scene, zoom, pan, actions))
    rmse = float(np.sqrt(np.square(pixels - nearest).mean()))
    return ParsedFrame(scene, zoom, pan, subjects, rmse)


def _nearest_background(pixels: np.ndarray) -> tuple[str, str]:
    """Scene and zoom by a vote of all pixels, each with a bounded cost, so that subjects hardly weigh in."""
    colours = np.array(list(SCENES.values()), np.float32)  # (S, R, 3)
    distances = np.square(pixels - colours[:, :, None, None]).sum(-1)  # (S, R, H, W)
    outlier_distance = max(OUTLIER_DISTANCE, float(np.median(distances.min((0, 1)))))
    row_costs = (distances / (distances + outlier_distance)).sum(-1)  # (S, R, H)
    costs = np.stack(
        [row_costs[:, 0, :row].sum(-1) + row_costs[:, 1, row:].sum(-1) for row in HORIZON_ROW.values()],
        axis=1,
    )
    scene, zoom = np.unravel_index(costs.argmin(), costs.shape)
    return list(SCENES)[scene], list(HORIZON_ROW)[zoom]


@dataclass(frozen=True)
class _PoseBank:
    """All poses at one zoom; `groups[pan, slot, slots]` is the slice of its SHAPES x ACTIONS poses."""

    groups: dict[tuple[str, int, int], slice]
    shares_NPM: np.ndarray  # M pixels, row by row: sky first, then ground
    products_RNPP: np.ndarray  # inner products of the parts' shares within sky and within ground


@cache
def _pose_bank(zoom: str) -> _PoseBank:
    """Built at first use: 5 MB for close shots, 15 MB for each other zoom."""
    groups, poses = {}, []
    for pan in PANS:
        for slots in (1,) if zoom == "close" else (1, 2):
            for slot, column in enumerate(subject_columns(zoom, pan, slots)):
                groups[pan, slot, slots] = slice(len(poses), len(poses) + len(SHAPES) * len(ACTIONS))
                poses += [part_shares(shape, action, zoom, column) for shape in SHAPES for action in ACTIONS]
    shares = np.stack([pose.reshape(FRAME_SIZE**2, -1).T for pose in poses])
    horizon = HORIZON_ROW[zoom] * FRAME_SIZE
    regions = shares[:, :, :horizon], shares[:, :, horizon:]
    return _PoseBank(groups, shares, np.stack([region @ region.transpose(0, 2, 1) for region in regions]))


def _gains(residual: np.ndarray, scene: str, zoom: str) -> tuple[_PoseBank, np.ndarray]:
    """(N, K): error that each pose in each colour removes; minus infinity where it is not to be seen."""
    bank = _pose_bank(zoom)
    num_poses, _, num_pixels = bank.shares_NPM.shape
    horizon = HORIZON_ROW[zoom] * FRAME_SIZE
    rows = bank.shares_NPM.reshape(-1, num_pixels)
    residual = residual.reshape(num_pixels, 3)
    matches, energies = 0.0, 0.0
    for region, pixels in enumerate((slice(None, horizon), slice(horizon, None))):
        observed = (rows[:, pixels] @ residual[pixels]).reshape(num_poses, -1)  # (N, P*3)
        offsets = np.stack([part_colours(colour) - SCENES[scene][region] for colour in COLOURS])  # (K, P, 3)
        offsets = offsets.astype(np.float32)
        matches = matches + observed @ offsets.reshape(len(COLOURS), -1).T
        offset_products = (offsets @ offsets.transpose(0, 2, 1)).reshape(len(COLOURS), -1)
        energies = energies + bank.products_RNPP[region].reshape(num_poses, -1) @ offset_products.T
    gains = 2 * matches - energies
    return bank, np.where(gains >= MIN_GAIN * energies, gains, -np.inf)


def _best_subjects(
    residual: np.ndarray, scene: str, zoom: str
) -> tuple[str | None, tuple[ParsedSubject, ...]]:
    """None, one or two subjects: whatever removes the most error."""
    bank, gains = _gains(residual, scene, zoom)
    best = (0.0, None, ())
    for pan in PANS:
        for gain, subject in _best_pose_by_colour(gains[bank.groups[pan, 0, 1]]):
            best = max(best, (gain, pan, (subject,)), key=lambda option: option[0])
        if (pan, 0, 2) not in bank.groups:
            continue
        left = _best_pose_by_colour(gains[bank.groups[pan, 0, 2]])
        right = _best_pose_by_colour(gains[bank.groups[pan, 1, 2]])
        for (left_gain, left_subject), (right_gain, right_subject) in product(left, right):
            if left_subject.colour != right_subject.colour:
                option = (left_gain + right_gain, pan, (left_subject, right_subject))
                best = max(best, option, key=lambda option: option[0])
    return best[1], best[2]


def _best_pose_by_colour(gains: np.ndarray) -> list[tuple[float, ParsedSubject]]:
    """gains (SHAPES x ACTIONS, K) -> for each colour the gain of its best pose and the subject in it."""
    best = []
    for colour, column in zip(COLOURS, gains.T, strict=True):
        shape, action = divmod(int(column.argmax()), len(ACTIONS))
        best.append((float(column.max()), ParsedSubject(colour, SHAPES[shape], ACTIONS[action])))
    return best
