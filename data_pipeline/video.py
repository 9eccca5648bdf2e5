"""Decodes chosen frames of a video, exactly: source frame k is the k-th that a player would present.

Two ways lead to the same frames. Planned: the packets are listed once (their sorted presentation timestamps
number the frames), and only the groups of pictures that hold a wanted frame are decoded; a frame counts only
if its timestamp is the wanted one. Sequential: every frame is decoded and counted. What the planned way
cannot do exactly and without a complaint of the decoder (Inexact) is done again sequentially; what the
sequential way cannot do is a VideoError, which says why the video is unusable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# Containers that hold pixels themselves: no playlists, nothing that names other files or addresses.
FORMATS = "mov,mp4,matroska,webm,mpegts,avi,flv,mpeg,mpegvideo,asf,ogg,h264,hevc,m4v,ivf,obu,mxf"
MAX_SOURCE_PIXELS = 2**26  # 8192 x 8192
PLAN_WORTH = 0.8  # above this share of frames to decode, seeking costs more than it saves
Message = tuple[int, str, str]  # level, who speaks (a format or a codec), text
_SKIPS_NONREF = ("h264", "hevc")  # decoders that can leave out frames no other frame needs


class VideoError(ValueError):
    """The video cannot be used, in words for rejected.jsonl."""


class Inexact(Exception):
    """The planned way did not give every wanted frame: decode sequentially."""


@dataclass(frozen=True)
class Packet:
    """One entry of the list of packets, in decoding order."""

    pts: int | None
    seek_ticks: int | None  # what to seek for to land here
    is_keyframe: bool
    is_discard: bool  # decoded, but cut away by the container's edit list


@dataclass(frozen=True)
class VideoFacts:
    """What the containers' headers and one pass over the packets say; nothing was decoded for it."""

    path: Path
    codec: str
    fps: float | None
    seconds_per_tick: float
    sample_aspect: float  # width of a pixel over its height
    packets: tuple[Packet, ...]

    @cached_property
    def presented(self) -> list[int] | None:
        """Timestamps of all frames in presentation order; None where they do not number the frames."""
        pts = [packet.pts for packet in self.packets if not packet.is_discard]
        if not pts or None in pts or len(set(pts)) != len(pts):
            return None
        return sorted(pts)


@dataclass(frozen=True)
class SourceFrame:
    """A decoded frame, its number in presentation order (from 0) and its time after frame 0."""

    number: int
    seconds: float
    picture: VideoFrame


def read_facts(path: Path) -> VideoFacts:
    """Lists the packets of the best video stream; VideoError for what is not a video that can be read."""
    _check_file(path)
    with _opened(path) as (container, stream, messages):
        by_dts = container.format.name == "mpegts"
        packets = []
        for packet in container.demux(stream):
            if packet.size:
                seek_ticks = packet.dts if by_dts else packet.pts
                packets.append(Packet(packet.pts, seek_ticks, packet.is_keyframe, packet.is_discard))
                if packet.is_corrupt:
                    raise VideoError(
                        f"cut or damaged: frame {len(packets)} of {_expected(stream)} is not whole"
                    )
        if not packets:
            raise VideoError("no frames: the video stream is empty")
        if complaints := [text for text in _complaints(messages) if text.startswith(container.format.name)]:
            raise VideoError(
                f"cut or damaged after {len(packets)} frames of {_expected(stream)}: {complaints[0]}"
            )
        return VideoFacts(
            path=path,
            codec=stream.codec_context.name,
            fps=_average_fps(stream, packets),
            seconds_per_tick=float(stream.time_base),
            sample_aspect=float(stream.sample_aspect_ratio or 1),
            packets=tuple(packets),
        )


def plan_is_worthwhile(facts: VideoFacts, wanted: Callable[[int], bool]) -> bool:
    """Whether the planned way is possible and decodes clearly fewer frames than there are."""
    if facts.presented is None or not facts.packets[0].is_keyframe:
        return False
    decoded = sum(group.num_packets for group in _plan(facts, wanted))
    return decoded <= PLAN_WORTH * len(facts.packets)


def planned_frames(facts: VideoFacts, wanted: Callable[[int], bool]) -> Iterator[SourceFrame]:
    """The wanted frames in order, from as few decoded frames as possible.

    Raises Inexact, perhaps after some frames, when a frame is missing or the decoder complains.
    """
    numbers = {pts: number for number, pts in enumerate(facts.presented)}
    try:
        with _opened(facts.path) as (container, stream, messages):
            for group in _plan(facts, wanted):
                missing = set(group.wanted_pts)
                container.seek(group.keyframe.seek_ticks, stream=stream)
                stream.codec_context.flush_buffers()
                for picture in _decode_group(container, stream, group):
                    if picture.pts in missing:
                        missing.remove(picture.pts)
                        seconds = _seconds(picture.pts, facts.presented[0], facts)
                        yield SourceFrame(numbers[picture.pts], seconds, picture)
                if missing or _complaints(messages):
                    raise Inexact
    except VideoError as error:
        raise Inexact from error


def sequential_frames(facts: VideoFacts, wanted: Callable[[int], bool]) -> Iterator[SourceFrame]:
    """The wanted frames in order, from decoding everything.

    VideoError as soon as the decoder complains: libav shows damaged pictures without any other sign.
    """
    number, first_pts = 0, None
    with _opened(facts.path) as (container, stream, messages):
        begun = False
        for packet in container.demux(stream):
            begun = begun or packet.is_keyframe  # a recording may begin in the middle of a group of pictures
            if not begun:
                continue
            if packet.is_keyframe and number == 0:
                messages.clear()  # complaints about what lies before the first keyframe
            for picture in _decode(packet, messages, number):
                if first_pts is None:
                    first_pts = picture.pts
                if wanted(number):
                    yield SourceFrame(number, _sequential_seconds(picture, number, first_pts, facts), picture)
                number += 1
    if not number:
        raise VideoError("no frames: nothing could be decoded")


@dataclass(frozen=True)
class _Group:
    """What one seek is for: the keyframe to begin at, and the wanted timestamps that it governs."""

    keyframe: Packet
    wanted_pts: tuple[int, ...]
    num_packets: int  # from the keyframe to the last wanted packet


def _plan(facts: VideoFacts, wanted: Callable[[int], bool]) -> list[_Group]:
    """Each wanted frame belongs to the last keyframe that is presented no later than itself."""
    wanted_pts = [pts for number, pts in enumerate(facts.presented) if wanted(number)]
    place = {packet.pts: i for i, packet in enumerate(facts.packets)}
    keyframes = sorted(
        (packet for packet in facts.packets if packet.is_keyframe), key=lambda packet: packet.pts
    )
    groups: list[_Group] = []
    next_keyframe, begun = 0, 0
    while begun < len(wanted_pts):
        while next_keyframe + 1 < len(keyframes) and keyframes[next_keyframe + 1].pts <= wanted_pts[begun]:
            next_keyframe += 1
        later = keyframes[next_keyframe + 1].pts if next_keyframe + 1 < len(keyframes) else None
        end = begun
        while end < len(wanted_pts) and (later is None or wanted_pts[end] < later):
            end += 1
        governed = tuple(wanted_pts[begun:end])
        keyframe = keyframes[next_keyframe]
        num_packets = max(place[pts] for pts in governed) - place[keyframe.pts] + 1
        groups.append(_Group(keyframe, governed, num_packets))
        begun = end
    return groups


def _decode_group(container: InputContainer, stream: VideoStream, group: _Group) -> Iterator[VideoFrame]:
    """Feeds packets up to the last wanted one, then drains the decoder."""
    decoder = stream.codec_context
    outstanding, landed = set(group.wanted_pts), False
    for packet in container.demux(stream):
        if packet.size:
            if not landed and packet.pts > group.keyframe.pts:
                raise Inexact  # the seek went too far
            landed = True
            if decoder.name in _SKIPS_NONREF:
                decoder.skip_frame = "DEFAULT" if packet.pts in group.wanted_pts else "NONREF"
            yield from decoder.decode(packet)
            outstanding.discard(packet.pts)
        if not outstanding:
            break
    yield from decoder.decode(None)


def _decode(packet: av.Packet, messages: list[Message], number: int) -> list[VideoFrame]:
    """The pictures that a packet brings to light; VideoError for the least complaint of the decoder."""
    try:
        pictures = packet.decode()
    except av.FFmpegError as error:
        raise VideoError(f"damaged near frame {number}: {_in_words(error)}") from error
    if complaints := _complaints(messages):
        raise VideoError(f"damaged near frame {number}: {complaints[0]}")
    return pictures


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream, list[Message]]]:
    """The container, its best video stream, and what libav says from then on; its errors are VideoErrors."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with av.logging.Capture() as messages, av.open(path.absolute(), options=options) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError("no video stream")
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > MAX_SOURCE_PIXELS:
                raise VideoError(
                    f"pictures of {stream.codec_context.width} x {stream.codec_context.height} pixels, "
                    f"at most {MAX_SOURCE_PIXELS} are decoded"
                )
            stream.codec_context.thread_count = 1  # one process per video uses the cores better
            messages.clear()  # opening a recording that begins in the middle makes the decoder complain
            yield container, stream, messages
    except av.FFmpegError as error:
        raise VideoError(f"not readable as a video: {_in_words(error)}") from error


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise VideoError("no such file")
        if path.stat().st_size == 0:
            raise VideoError("an empty file: 0 bytes")
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error


def _in_words(error: av.FFmpegError) -> str:
    """libav's reason without the path, which rejected.jsonl names anyway, and without its error number."""
    message = error.log[2].strip() if error.log else ""
    return error.strerror + (f" ({message})" if message else "")


def _expected(stream: VideoStream) -> str:
    return str(stream.frames or "an unknown number")


def _average_fps(stream: VideoStream, packets: list[Packet]) -> float | None:
    """Frames over time by the timestamps, which is right for variable frame rates too."""
    pts = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
    if len(pts) > 1 and max(pts) > min(pts):
        return (len(pts) - 1) / ((max(pts) - min(pts)) * float(stream.time_base))
    return float(stream.average_rate) if stream.average_rate else None


def _seconds(pts: int, first_pts: int, facts: VideoFacts) -> float:
    return (pts - first_pts) * facts.seconds_per_tick


def _sequential_seconds(picture: VideoFrame, number: int, first_pts: int | None, facts: VideoFacts) -> float:
    """By the timestamps where the stream has them, else by the frame rate that it declares."""
    if facts.presented is not None and picture.pts is not None and first_pts is not None:
        return _seconds(picture.pts, first_pts, facts)
    return number / facts.fps if facts.fps else 0.0


def _complaints(messages: list[Message]) -> list[str]:
    return [f"{name}: {text.strip()}" for level, name, text in messages if level <= av.logging.ERROR]
