"""Decoded frame -> story frame: upright, square pixels, within a pixel budget, sides in multiples of 16.

The picture is scaled so that it covers the new size, and the overhang, less than 16 pixels along one side, is
cut off evenly. It is never enlarged, except where a side has fewer than 16 pixels.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from av import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from data_pipeline.video import VideoError

MULTIPLE = 16
MOTION_SIZE = 64  # pixels; motion is judged on 64 x 64 luma
HD_LINES = 720  # pictures from here on are BT.709 unless they say otherwise; libav assumes BT.601 for all
_SCALER = (
    Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)  # the same on every machine
_UNSPECIFIED = 2  # of ISO/IEC 23091-2 "matrix coefficients"
_MATRIX_NAMES = {0: "rgb", 1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


@dataclass(frozen=True)
class PictureForm:
    """How the frames of one video are to be seen; VideoError for what cannot be shown faithfully."""

    source_height: int
    source_width: int
    rotation: int  # degrees, counter-clockwise, a multiple of 90
    sample_aspect: float
    matrix: int
    assumed: bool  # the video does not name its colour matrix

    @classmethod
    def of(cls, picture: VideoFrame, sample_aspect: float) -> "PictureForm":
        if transfer := _HDR_TRANSFERS.get(int(picture.color_trc)):
            raise VideoError(f"HDR video ({transfer}): convert it to SDR first")
        if picture.rotation % 90:
            raise VideoError(f"rotated by {picture.rotation} degrees, expected a multiple of 90")
        matrix, assumed = int(picture.colorspace), False
        if matrix == _UNSPECIFIED:
            matrix, assumed = (1 if picture.height >= HD_LINES else 5), True
        if matrix not in _MATRIX_NAMES:
            raise VideoError(f"colour matrix {matrix} is not known, expected one of {sorted(_MATRIX_NAMES)}")
        return cls(picture.height, picture.width, picture.rotation % 360, sample_aspect, matrix, assumed)

    @property
    def colours(self) -> str:
        return _MATRIX_NAMES[self.matrix] + (" assumed" if self.assumed else "")

    @property
    def display_size(self) -> tuple[float, float]:
        """(height, width) as seen, with square pixels: the longer side of a pixel is shortened."""
        height, width = float(self.source_height), float(self.source_width)
        height, width = height / max(self.sample_aspect, 1.0), width * min(self.sample_aspect, 1.0)
        return (width, height) if self.rotation % 180 else (height, width)

    def check_same(self, picture: VideoFrame, number: int) -> None:
        """VideoError where the picture size changes in the middle of a video."""
        if (picture.height, picture.width) != (self.source_height, self.source_width):
            raise VideoError(
                f"frame {number} has {picture.width} x {picture.height} pixels, "
                f"the frames before it {self.source_width} x {self.source_height}"
            )


def story_frame_size(display_size: tuple[float, float], max_pixels: int) -> tuple[int, int]:
    """(height, width): multiples of 16 within the budget and the source, near the source's aspect."""
    height, width = display_size
    scale = min(1.0, sqrt(max_pixels / (height * width)))
    candidates = [
        (tall, wide)
        for tall in _multiples_near(height * scale, max_pixels)
        for wide in _multiples_near(width * scale, max_pixels)
        if tall * wide <= max_pixels and tall <= max(height, MULTIPLE) and wide <= max(width, MULTIPLE)
    ]
    kept = lambda size: min(size[0] * width, size[1] * height) / max(size[0] * width, size[1] * height)  # noqa: E731
    return max(candidates, key=lambda size: (kept(size), size))


def to_story_frame(picture: VideoFrame, form: PictureForm, size: tuple[int, int]) -> Image.Image:
    """The upright RGB image of that (height, width)."""
    scale = max(side / shown for side, shown in zip(size, form.display_size))
    scaled = [max(side, round(shown * scale)) for side, shown in zip(size, form.display_size)]
    height, width = reversed(scaled) if form.rotation % 180 else scaled
    pixels = _reformat(picture, form, width, height, "rgb24").to_ndarray()
    pixels = np.rot90(pixels, form.rotation // 90)
    top, left = ((have - side) // 2 for have, side in zip(scaled, size))
    return Image.fromarray(np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]]))


def motion_luma(picture: VideoFrame, form: PictureForm) -> np.ndarray:
    """(64, 64) int16 luma, 0..255: what motion is measured on."""
    return _reformat(picture, form, MOTION_SIZE, MOTION_SIZE, "gray").to_ndarray().astype(np.int16)


def motion_between(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference of two luma pictures, in levels of 255."""
    return float(np.abs(after - before).mean())


def _reformat(
    picture: VideoFrame, form: PictureForm, width: int, height: int, pixel_format: str
) -> VideoFrame:
    try:
        return picture.reformat(
            width=width,
            height=height,
            format=pixel_format,
            src_colorspace=Colorspace(5 if form.matrix in (0, 6) else form.matrix),
            src_color_range=ColorRange(picture.color_range),
            interpolation=_SCALER,
            threads=1,
        )
    except FFmpegError as error:
        raise VideoError(
            f"pixels of format {picture.format.name} cannot be converted: {error.strerror}"
        ) from error


def _multiples_near(length: float, max_pixels: int) -> list[int]:
    below = max(1, int(length / MULTIPLE + 1e-6)) * MULTIPLE
    most = (
        max_pixels // MULTIPLE // MULTIPLE * MULTIPLE
    )  # for a strip so flat that its other side has to grow to 16
    return [below, below + MULTIPLE, min(below, most)]
