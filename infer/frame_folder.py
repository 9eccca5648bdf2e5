"""Story frames as files: a folder of 001.png, 002.png, ..., one picture, and the PNG of a picture."""

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from storyanchors.clip import MAX_FRAME_PIXELS, RGB_WITHOUT_LOSS


def find_frames(folder: Path) -> dict[int, Path]:
    """Numbered images of a folder: 001.png, 2.jpg, ... ValueError for none, and for two of one number."""
    if not folder.is_dir():
        raise NotADirectoryError(f"frames={folder} is not a folder")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.stem.isdecimal() and path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            if (number := int(path.stem)) in found:
                raise ValueError(f"{folder} has frame {number} twice: {found[number].name} and {path.name}")
            found[number] = path
    if not found:
        raise ValueError(f"{folder} has no numbered frames, expected 001.png, 002.png, ... or .jpg")
    return found


def read_frame(path: Path) -> Image.Image:
    """The decoded image; ValueError, naming the file, for one that is broken or too large."""
    try:
        return decode_frame(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"cannot read the frame {path}: {error}") from error


def read_given(given: Mapping[int, Path]) -> dict[int, Image.Image]:
    """Frames by number from files; ValueError, naming the file, for one that does not go with the others."""
    frames = {number: read_frame(path) for number, path in sorted(given.items())}
    for number, frame in frames.items():
        check_frame(frame, f"frame {number}, {given[number]},", frames[min(frames)].size)
    return frames


def decode_frame(content: bytes, where: object) -> Image.Image:
    """The image in a PNG or JPEG file; ValueError, naming where, for another, a broken or a too large one.

    An alpha channel that is opaque everywhere says nothing and is left out.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            if image.width * image.height > MAX_FRAME_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, at most {MAX_FRAME_PIXELS} are read"
                )
            image.load()
            return _without_opaque_alpha(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError: broken PNG
        raise ValueError(f"cannot read the frame {where}: {error}") from error


def check_frame(frame: Image.Image, where: str, size: tuple[int, int]) -> None:
    """ValueError unless the image has this size (width, height) and a mode that RGB holds without loss."""
    if frame.size != size:
        expected = f"{size[0]} x {size[1]}"
        raise ValueError(f"{where} has {frame.width} x {frame.height} pixels, expected {expected}")
    if frame.mode not in RGB_WITHOUT_LOSS:
        raise ValueError(f"{where} is an image of mode {frame.mode}, expected RGB{_cure(frame)}")


def _cure(frame: Image.Image) -> str:
    """What a person can do about a mode."""
    if "A" not in frame.getbands():
        return ": save it as 8-bit RGB"
    return " without transparent parts; ImageMagick flattens it: convert IN -background white -flatten OUT"


def _without_opaque_alpha(image: Image.Image) -> Image.Image:
    opaque = image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (255, 255)
    return image.convert(image.mode.removesuffix("A")) if opaque else image


def as_png(frame: Image.Image | Path) -> bytes:
    """A frame's PNG file; one that is a PNG file already stays the same, byte for byte."""
    if isinstance(frame, Path):
        content = frame.read_bytes()
        if content.startswith(b"\x89PNG"):
            return content
        frame = decode_frame(content, frame)
    content = io.BytesIO()
    frame.save(content, "PNG")
    return content.getvalue()
