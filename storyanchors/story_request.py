"""What is asked of a StoryGenerator: a story with what is known of its frames, and how to sample it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from PIL import Image

from storyanchors.clip import MAX_FRAME_PIXELS, MAX_FRAMES, RGB_WITHOUT_LOSS
from storyanchors.conditioning import ClipConditions
from storyanchors.sampling import SAMPLERS
from storyanchors.story import Story

# Guidance leads away from it. The lists of the video models (Wan's shared_config.py) also name stillness and
# still pictures, and for first-last-frame films changes of shot: a story frame is a still, and its story
# changes shots. What is left are the faults of a picture.
NEGATIVE_STORY_PROMPT = (
    "Blurred, overexposed or washed-out picture, low quality, compression artefacts, noise, subtitles, "
    "letters, watermark, logo, frame around the picture, split screen, collage, deformed body, disfigured "
    "face, badly drawn hands, extra fingers, fused fingers, missing or extra limbs, duplicated person."
)


@dataclass(frozen=True)
class StoryRequest:
    """One story to draw; None is the story's number of frames, the model's frame size, story.prompt()."""

    story: Story
    given: Mapping[int, Image.Image] = field(default_factory=dict)  # by number from 1; they come back as is
    num_frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    conditions: ClipConditions = field(default_factory=ClipConditions)
    caption: str | None = None  # the text that the network reads
    seed: int = 0

    def filled(self, frame_size: tuple[int, int], multiple: int) -> "StoryRequest":
        """With every size known; frame_size (height, width) is the default, `multiple` divides every side.

        ValueError for sizes, given frames and a seed that do not fit; frames come back in mode RGB.
        """
        height = frame_size[0] if self.height is None else self.height
        width = frame_size[1] if self.width is None else self.width
        num_frames = self.story.num_frames if self.num_frames is None else self.num_frames
        _check_size(height, width, multiple)
        if num_frames > MAX_FRAMES:
            raise ValueError(f"num_frames={num_frames} is too many, expected at most {MAX_FRAMES}")
        if num_frames < 1 or num_frames < self.story.num_frames:
            raise ValueError(
                f"num_frames={num_frames} is too few: the story has {self.story.num_frames} frames"
            )
        for number, frame in self.given.items():
            _check_given(number, frame, num_frames, (height, width))
        if len(self.given) == num_frames:
            raise ValueError(f"all {num_frames} frames are given: there is none to generate")
        if self.seed < 0:
            raise ValueError(f"seed must not be below 0, found {self.seed}")
        conditions = self.conditions
        known = {"num_frames": conditions.num_frames or num_frames}
        if conditions.height is None:
            known |= {"height": height, "width": width}
        return StoryRequest(
            self.story,
            {number: self.given[number].convert("RGB") for number in sorted(self.given)},
            num_frames,
            height,
            width,
            replace(conditions, **known),
            self.story.prompt() if self.caption is None else self.caption,
            self.seed,
        )


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample; None is the model's own setting. ValueError for what makes no sense."""

    num_steps: int | None = None
    guidance_scale: float | None = None  # 1 = no guidance, and one forward instead of two
    shift: float | None = None  # of the sigmas, see flow.shift_sigmas
    sampler: str = "euler"
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # the sigmas at which guidance acts (2404.07724)
    negative_prompt: str = ""  # what guidance leads away from, see NEGATIVE_STORY_PROMPT
    cache_threshold: float = 0.0  # of the first-block cache, see block_cache.py; 0 = off

    def __post_init__(self):
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"sampling needs at least one step, found num_steps={self.num_steps}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale must be a number from 0 (1 = no guidance), found {self.guidance_scale}"
            )
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a number above 0, found {self.shift}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}, expected one of {', '.join(SAMPLERS)}")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        if not (
            len(self.guidance_interval) == 2
            and 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1
        ):
            raise ValueError(
                f"guidance_interval is {list(self.guidance_interval)}, expected two sigmas [low, high] "
                "between 0 (data) and 1 (noise)"
            )
        if not 0 <= self.cache_threshold < math.inf:
            raise ValueError(f"cache_threshold must be a number from 0 (off), found {self.cache_threshold}")


def _check_size(height: int, width: int, multiple: int) -> None:
    for name, pixels in (("height", height), ("width", width)):
        if pixels < multiple or pixels % multiple:
            raise ValueError(f"{name}={pixels} is not a multiple of {multiple} pixels, which the model needs")
    if height * width > MAX_FRAME_PIXELS:
        raise ValueError(f"height={height} x width={width} is more than {MAX_FRAME_PIXELS} pixels")


def _check_given(number: int, frame: Image.Image, num_frames: int, size: tuple[int, int]) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= num_frames:
        raise ValueError(f"given frame {number!r} is outside the story's frames 1..{num_frames}")
    if (frame.height, frame.width) != size:
        raise ValueError(
            f"given frame {number} has {frame.width} x {frame.height} pixels, expected {size[1]} x {size[0]}"
        )
    if frame.mode not in RGB_WITHOUT_LOSS:
        raise ValueError(f"given frame {number} is an image of mode {frame.mode}, expected RGB")
