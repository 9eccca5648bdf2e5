"""A stand-in for a dataset that does not exist yet: clips of given sizes, as the data plan asks for them."""

import re
from dataclasses import dataclass

import numpy as np

from train.stable_hash import stable_hash

NUM_DRAWN = 20_000  # clips of the stand-in; the plan's first batches need no more
MULTIPLE = 16
STORY_WORLD_FRAMES, STORY_WORLD_SIZES = [6, 7, 8], ["64x64"]  # of write_story_world: the tiny preset's
VIDEO_FRAMES = list(range(6, 25))
VIDEO_SIZES = ["480x832"] * 8 + ["832x480"] * 3 + ["624x624"] * 3 + ["720x1280"] * 6


@dataclass
class ClipMixConfig:
    """Every number of frames and every size equally often: what is listed twice comes twice as often."""

    clips: int = 2_000_000
    frames: list[int] | None = None  # None: what the preset is made for
    sizes: list[str] | None = None  # HEIGHTxWIDTH; None: likewise

    def __post_init__(self):
        if self.clips < 1:
            raise ValueError(f"mix.clips is {self.clips}, expected at least 1")
        if self.frames is not None and min(self.frames, default=0) < 1:
            raise ValueError(f"mix.frames is {self.frames}, expected numbers of at least 1")
        if self.sizes is not None and not self.sizes:
            raise ValueError("mix.sizes is [], expected HEIGHTxWIDTH, as 480x832")
        for size in self.sizes or ():
            sides = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", size)
            if not sides or any(int(side) % MULTIPLE for side in sides.groups()):
                raise ValueError(
                    f"mix.sizes has {size!r}, expected HEIGHTxWIDTH in multiples of {MULTIPLE}, as 480x832"
                )

    def frames_of(self, preset: str) -> list[int]:
        return self.frames or (STORY_WORLD_FRAMES if preset == "tiny" else VIDEO_FRAMES)

    def sizes_of(self, preset: str) -> list[str]:
        return self.sizes or (STORY_WORLD_SIZES if preset == "tiny" else VIDEO_SIZES)


@dataclass(frozen=True)
class MixedClip:
    key: str


class ClipMix:
    """What train/clips/clip_costs.py needs of a ClipIndex."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.columns = columns

    @classmethod
    def draw(cls, config: ClipMixConfig, preset: str, seed: int) -> "ClipMix":
        generator = np.random.Generator(np.random.Philox(key=stable_hash("clip mix", seed)))
        sides = np.array([[int(side) for side in size.split("x")] for size in config.sizes_of(preset)])
        heights, widths = sides[generator.integers(len(sides), size=NUM_DRAWN)].T
        num_frames = generator.choice(config.frames_of(preset), NUM_DRAWN)
        return cls({"num_frames": num_frames, "height": heights, "width": widths})

    def __len__(self) -> int:
        return len(self.columns["num_frames"])

    @property
    def num_clips(self) -> tuple[int, ...]:
        return (len(self),)

    def numbers(self, column: str) -> np.ndarray:
        return self.columns[column]

    def num_tokens(self, pixels_per_token: int) -> np.ndarray:
        frames, height, width = (self.columns[name] for name in ("num_frames", "height", "width"))
        return frames * (height // pixels_per_token) * (width // pixels_per_token)

    def row(self, number: int) -> MixedClip:
        frames, height, width = (
            int(self.columns[name][number]) for name in ("num_frames", "height", "width")
        )
        return MixedClip(f"{frames} frames of {height}x{width}")

    def only(self, kept: np.ndarray) -> "ClipMix":
        return ClipMix({name: column[kept] for name, column in self.columns.items()})
