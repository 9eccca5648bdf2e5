"""A film as H.264 in an mp4 that players play: chapters, title, comment, a keyframe at every anchor.

The one file of infer/ that needs PyAV (extra `video`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from storyanchors.story import Story

CRF = "14"  # x264's quality; 18 is called visually lossless, and story frames are flat enough to afford more


@dataclass(frozen=True)
class Chapter:
    """Film frames first..last (from 0, inclusive), in which the same events happen."""

    first: int
    last: int
    title: str


def chapters_of(story: Story, frame_interval: int) -> list[Chapter]:
    """A chapter for each run of story frames that tell the same events.

    An mp4's chapters follow each other without overlap; events that happen at once share one. It lasts up to
    the anchor that begins the next.
    """
    step, chapters, number = frame_interval + 1, [], 0
    for told, frames in groupby(story.descriptions()):
        first, number = number, number + len(list(frames))
        last = min(number * step, (story.num_frames - 1) * step + 1) - 1
        chapters.append(Chapter(first * step, last, "; ".join(told)))
    return chapters


def write_mp4(
    path: Path,
    frames: Iterable[Image.Image],
    *,
    size: tuple[int, int],
    fps: float,
    keyframes: Collection[int] = (),
    chapters: Iterable[Chapter] = (),
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes RGB frames of one size (width, height), whole or not at all.

    keyframes are numbers from 0; metadata has the names of ffmpeg, title and comment among them. Colours are
    BT.709 and say so, with half the resolution (yuv420p); an odd width or height, which that cannot have,
    grows by one pixel, the edge's again.
    """
    rate = Fraction(fps).limit_denominator(1001)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": CRF})
            stream.width, stream.height = (side + side % 2 for side in size)
            stream.pix_fmt = "yuv420p"
            codec = stream.codec_context
            codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            container.metadata.update(metadata or {})
            container.set_chapters([_chapter(*entry, rate) for entry in enumerate(chapters, start=1)])
            for number, frame in enumerate(frames):
                picture = _picture(frame, (stream.width, stream.height))
                picture.pts = number
                picture.pict_type = PictureType.I if number in keyframes else PictureType.NONE
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _chapter(number: int, chapter: Chapter, rate: Fraction) -> dict:
    return {
        "id": number,
        "start": chapter.first,
        "end": chapter.last + 1,
        "time_base": 1 / rate,
        "metadata": {"title": chapter.title},
    }


def _picture(frame: Image.Image, size: tuple[int, int]) -> av.VideoFrame:
    pixels = np.asarray(frame)
    pad = [(0, size[1] - pixels.shape[0]), (0, size[0] - pixels.shape[1]), (0, 0)]
    picture = av.VideoFrame.from_ndarray(np.pad(pixels, pad, mode="edge"), "rgb24")
    return picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
