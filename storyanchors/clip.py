"""A clip of story frames: in memory, and as the files of one shard sample (clip.json, 001.jpg, ...).

Labels are a layer beside the frames: a CaptionRecord is one line of captions/<run>/<shard>.jsonl.
Nothing here trusts what it reads: names, sizes and checksums are verified before an image is decoded.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from storyanchors.conditioning import ClipConditions
from storyanchors.story import Story

SCHEMA_VERSION = 1
MAX_FRAMES = 999  # a frame's member name has three digits
MAX_FRAME_PIXELS = 2**24
RGB_WITHOUT_LOSS = ("RGB", "L", "P", "1")  # PIL modes
MAX_CROP = 15  # pixels on a side: frames made by others are cut to multiples of 16
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
INFO_MEMBER = "clip.json"
KEY_PATTERN = re.compile(
    r"[a-z0-9]+(-[a-z0-9]+)*"
)  # no dot: WebDataset cuts a member's name at the first one


class ClipInfo(BaseModel):
    """Where a clip comes from: everything known about its story frames but the pixels and the captions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    key: str = Field(max_length=90)
    source: str  # the video's id: its path below the folder of videos, or the seed of a story-world story
    fps: float | None = Field(default=None, gt=0)  # of the source, on average
    frame_interval: int | None = Field(default=None, ge=0)  # source frames strictly between two story frames
    frame_numbers: tuple[int, ...] = Field(min_length=1, max_length=MAX_FRAMES)  # in the source, from 0
    seconds: tuple[float, ...]  # presentation times of the story frames, 0 at the source's first frame
    height: int = Field(gt=0)  # pixels, of every story frame
    width: int = Field(gt=0)
    motion: float | None = Field(default=None, ge=0)  # luma levels (0..255) per source frame
    checksums: tuple[str, ...] = ()  # SHA-256 of each JPEG file; empty while the clip has not been written

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version} is not known, expected {SCHEMA_VERSION}")
        return version

    @field_validator("key")
    @classmethod
    def _plain_key(cls, key: str) -> str:
        return check_key(key)

    @model_validator(mode="after")
    def _consistent(self) -> "ClipInfo":
        if self.height * self.width > MAX_FRAME_PIXELS:
            raise ValueError(
                f"frames of {self.width} x {self.height} pixels, at most {MAX_FRAME_PIXELS} are read"
            )
        if len(self.seconds) != self.num_frames:
            raise ValueError(f"{len(self.seconds)} times in seconds for {self.num_frames} story frames")
        if self.checksums and len(self.checksums) != self.num_frames:
            raise ValueError(f"{len(self.checksums)} checksums for {self.num_frames} story frames")
        return self

    @property
    def num_frames(self) -> int:
        return len(self.frame_numbers)

    def to_json(self) -> bytes:
        """The content of clip.json: the same clip always gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "ClipInfo":
        """Inverse of to_json(); ValueError, in one line, for anything else."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise ValueError(f"not a {INFO_MEMBER}: {first_problem(error)}") from error


@dataclass(frozen=True)
class CaptionRecord:
    """The captions of one clip, either or both: one JSON line of captions/<run>/<shard>.jsonl."""

    key: str
    global_caption: str = ""
    story: Story | None = None

    def to_json(self) -> str:
        """One line, without its newline."""
        story = self.story.to_dict() if self.story else None
        record = {
            "schema_version": SCHEMA_VERSION,
            "key": self.key,
            "global_caption": self.global_caption,
            "story": story,
        }
        return json.dumps(record, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str | bytes) -> "CaptionRecord":
        """Inverse of to_json(); ValueError for an unknown version or field, and for what Story refuses."""
        record = json.loads(line)
        expected = {"schema_version", "key", "global_caption", "story"}
        if not isinstance(record, dict) or set(record) != expected:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"a caption record has the fields {sorted(expected)}, found {found}")
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"caption schema version {record['schema_version']!r} is not known, expected {SCHEMA_VERSION}"
            )
        if not isinstance(record["global_caption"], str):
            raise ValueError(f"the global caption must be a text, found {record['global_caption']!r}")
        story = Story.from_dict(record["story"]) if record["story"] is not None else None
        return cls(check_key(record["key"]), record["global_caption"], story)


@dataclass(frozen=True)
class StoryClip:
    """Story frames of one size (RGB), what is known about them and, where labelled, their captions."""

    info: ClipInfo
    frames: list[Image.Image]
    story: Story | None = None
    global_caption: str = ""

    def __post_init__(self):
        if len(self.frames) != self.info.num_frames:
            raise ValueError(
                f"clip {self.info.key}: {len(self.frames)} frames, clip.json names {self.info.num_frames}"
            )
        for number, frame in enumerate(self.frames, start=1):
            if frame.size != (self.info.width, self.info.height):
                raise ValueError(
                    f"clip {self.info.key}: frame {number} has {frame.width} x {frame.height} pixels, "
                    f"expected {self.info.width} x {self.info.height}"
                )
        if self.story and self.story.num_frames != self.info.num_frames:
            raise ValueError(
                f"clip {self.info.key} has {self.info.num_frames} frames, its story {self.story.num_frames}"
            )

    @property
    def conditions(self) -> ClipConditions:
        """The five facts that a network may be told about this clip."""
        info = self.info
        return ClipConditions(
            info.fps, info.frame_interval, info.motion, info.height, info.width, info.num_frames
        )

    def to_members(self) -> dict[str, bytes]:
        """{"001.jpg": ..., "002.jpg": ..., "clip.json": ...}: the files of one shard sample."""
        jpegs = [encode_jpeg(frame) for frame in self.frames]
        info = self.info.model_copy(update={"checksums": tuple(map(_sha256, jpegs))})
        members = {frame_member(number): jpeg for number, jpeg in enumerate(jpegs, start=1)}
        return members | {INFO_MEMBER: info.to_json()}

    @classmethod
    def from_members(cls, members: dict[str, bytes], caption: CaptionRecord | None = None) -> "StoryClip":
        """Inverse of to_members(), with the clip's captions where they are at hand.

        ValueError for a missing or unknown member, a wrong checksum, an image whose size is not the one in
        clip.json (found before it is decoded) and captions of another clip.
        """
        if INFO_MEMBER not in members:
            raise ValueError(f"a clip without {INFO_MEMBER}, found {sorted(members)}")
        info = ClipInfo.from_json(members[INFO_MEMBER])
        expected = [frame_member(number) for number in range(1, info.num_frames + 1)]
        if sorted(members) != [*expected, INFO_MEMBER]:
            raise ValueError(
                f"clip {info.key}: expected {', '.join([*expected, INFO_MEMBER])}, found {sorted(members)}"
            )
        for name, checksum in zip(expected, info.checksums):
            if _sha256(members[name]) != checksum:
                raise ValueError(
                    f"clip {info.key}: {name} is damaged, its SHA-256 is not the one in clip.json"
                )
        size = (info.width, info.height)
        try:
            frames = [decode_jpeg(members[name], size) for name in expected]
        except ValueError as error:
            raise ValueError(f"clip {info.key}: {error}") from error
        if caption is None:
            return cls(info, frames)
        if caption.key != info.key:
            raise ValueError(f"captions of clip {caption.key} were given to clip {info.key}")
        return cls(info, frames, caption.story, caption.global_caption)


def frames_to_levels(frames: list[Image.Image]) -> Tensor:
    """F images of one size -> (F, 3, H, W), uint8 levels 0..255."""
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"frames of one size were expected, found {sorted(sizes) or 'no frame'}")
    levels_FHWC = torch.from_numpy(np.stack([np.asarray(frame.convert("RGB")) for frame in frames]))
    return levels_FHWC.permute(0, 3, 1, 2)


def levels_to_pixels(levels: Tensor) -> Tensor:
    """uint8 levels 0..255 -> float32 in [-1, 1], in the same shape and on the same device."""
    return levels.float() / 127.5 - 1


def frames_to_tensor(frames: list[Image.Image]) -> Tensor:
    """F images of one size -> (F, 3, H, W), float32 in [-1, 1]."""
    return levels_to_pixels(frames_to_levels(frames))


def tensor_to_frames(pixels: Tensor) -> list[Image.Image]:
    """(F, 3, H, W) in [-1, 1], clamped -> F images; undoes frames_to_tensor exactly."""
    levels_FHWC = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(frame) for frame in levels_FHWC.cpu().numpy()]


def frame_member(number: int) -> str:
    """The name of story frame `number` (from 1) inside a sample."""
    return f"{number:03d}.jpg"


def check_key(key: str) -> str:
    """The key; ValueError unless it is made of [a-z0-9] and single dashes, and so is safe in any path."""
    if not isinstance(key, str) or not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"a clip's key is made of a-z, 0-9 and dashes, found {key!r}")
    return key


def encode_jpeg(frame: Image.Image) -> bytes:
    """Quality 95 at full colour resolution: fast to decode, which is what a loader pays for."""
    buffer = io.BytesIO()
    frame.convert("RGB").save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def read_jpeg_size(content: bytes) -> tuple[int, int]:
    """(width, height) from the header alone, at most MAX_FRAME_PIXELS; nothing is decoded."""
    return _open_image(content, ("JPEG",)).size


def decode_jpeg(content: bytes, size: tuple[int, int]) -> Image.Image:
    """The RGB image of that (width, height); ValueError, before decoding, where its header says otherwise."""
    image = _open_image(content, ("JPEG",))
    if image.size != size:
        raise ValueError(
            f"a JPEG of {image.width} x {image.height} pixels, expected {size[0]} x {size[1]}: not decoded"
        )
    return _to_rgb(image)


def decode_image(content: bytes, size: tuple[int, int]) -> Image.Image:
    """The middle (width, height) of a JPEG, PNG or WebP file made by others, as RGB.

    ValueError, before decoding, for an image that is smaller or more than MAX_CROP pixels larger on a side,
    and for one with more than 8 bits a channel.
    """
    image = _open_image(content, IMAGE_FORMATS)
    margins = [found - expected for found, expected in zip(image.size, size)]
    if not all(0 <= margin <= MAX_CROP for margin in margins):
        raise ValueError(
            f"a {image.format} of {image.width} x {image.height} pixels, expected {size[0]} x {size[1]} "
            f"and at most {MAX_CROP} more a side: not decoded"
        )
    if image.mode not in IMAGE_MODES:
        raise ValueError(f"a {image.format} in mode {image.mode}, expected one of {', '.join(IMAGE_MODES)}")
    left, top = margins[0] // 2, margins[1] // 2
    return _to_rgb(image).crop((left, top, left + size[0], top + size[1]))


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on damaged files
        raise ValueError(f"a damaged {image.format}: {error}") from error


def _open_image(content: bytes, formats: tuple[str, ...]) -> Image.Image:
    names = " or ".join(formats)
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"a {names} with more pixels than any story frame; it was not decoded ({error})"
        ) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a {names} ({len(content)} bytes)") from error
    if image.width * image.height > MAX_FRAME_PIXELS:
        raise ValueError(
            f"a {image.format} of {image.width} x {image.height} pixels, "
            f"at most {MAX_FRAME_PIXELS} are decoded"
        )
    return image


def first_problem(error: ValidationError) -> str:
    """One line for a user: which field, what is wrong with it, and what was found."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
