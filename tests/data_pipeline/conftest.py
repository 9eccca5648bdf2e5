"""Synthetic videos whose frames carry their own number, and commands called as a user would."""

import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from conf.command import run

HEIGHT, WIDTH, BITS = 96, 160, 12
FPS = 24
DISPLAY_MATRICES = {  # a, b, c, d of the track header: how a phone says that it was held upright
    -90: (0, 1, -1, 0),
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
}


def numbered_frame(number: int) -> np.ndarray:
    """(96, 160, 3) uint8: the number in twelve black or white blocks at the top, and something that moves."""
    pixels = np.full((HEIGHT, WIDTH, 3), 60 + number % 100, np.uint8)
    width = WIDTH // BITS
    for bit in range(BITS):
        pixels[:24, bit * width : (bit + 1) * width] = 255 * (number >> bit & 1)
    left = 3 * number % (WIDTH - 20)
    pixels[40:60, left : left + 20] = (250, 80, 30)
    return pixels


def number_of(image: Image.Image | np.ndarray) -> int:
    """Inverse of numbered_frame, also after lossy compression."""
    pixels, width = np.asarray(image), WIDTH // BITS
    bits = [pixels[6:18, bit * width + 3 : (bit + 1) * width - 3].mean() > 127 for bit in range(BITS)]
    return sum(1 << place for place, bit in enumerate(bits) if bit)


def write_video(
    path: Path,
    num_frames: int = 215,
    *,
    codec: str = "libx264",
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    milliseconds: Callable[[int], int] | None = None,
    sample_aspect: Fraction | None = None,
    **codec_options: str,
) -> Path:
    with av.open(path, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=FPS, options=codec_options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        if sample_aspect:
            stream.codec_context.sample_aspect_ratio = sample_aspect
        time_base = Fraction(1, 1000) if milliseconds else Fraction(1, FPS)
        stream.codec_context.time_base = time_base
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), "rgb24")
            frame.pts = milliseconds(number) if milliseconds else number
            frame.time_base = time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def remux(source: Path, path: Path, *, first_tick: int = 0, **options: str) -> Path:
    """The same packets in another container, their times moved by first_tick."""
    with av.open(source) as container, av.open(path, "w", options=options) as output:
        stream = output.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(container.streams.video[0]):
            if packet.size:
                packet.pts, packet.dts, packet.stream = (
                    packet.pts + first_tick,
                    packet.dts + first_tick,
                    stream,
                )
                output.mux(packet)
    return path


def rotate(source: Path, path: Path, degrees: int) -> Path:
    """The same mp4 with another display matrix in its track header."""
    content = bytearray(source.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in DISPLAY_MATRICES[degrees])
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> dict[str, Path]:
    """215 numbered frames each, in every form that a decoder may trip over."""
    folder = tmp_path_factory.mktemp("videos")
    plain = write_video(folder / "plain.mp4", bf="3", g="48")
    tick = 12288 // FPS  # libav's time base for 24 fps in mp4 is 1/12288 s
    edited = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    return {
        "h264 with B-frames": plain,
        "H.264 with open groups": write_video(folder / "open.mkv", **{"x264-params": "open-gop=1:bframes=3"}),
        "one I-frame": write_video(folder / "one.mp4", g="999", sc_threshold="0"),
        "intra refresh": write_video(folder / "refresh.mp4", **{"x264-params": "intra-refresh=1:keyint=48"}),
        "HEVC": write_video(
            folder / "hevc.mp4", codec="libx265", **{"x265-params": "log-level=none:keyint=40"}
        ),
        "VP9": write_video(
            folder / "vp9.webm", codec="libvpx-vp9", g="48", deadline="realtime", **{"cpu-used": "8"}
        ),
        "MPEG-4 in avi": write_video(folder / "old.avi", codec="mpeg4", g="48"),
        "MPEG-2 programme stream": write_video(folder / "dvd.mpg", codec="mpeg2video", g="15", bf="2"),
        "transport stream": write_video(folder / "broadcast.ts", bf="3", g="48"),
        "no timestamps": write_video(folder / "raw.h264", container="h264", bf="3", g="48"),
        "no duration": write_video(folder / "live.mkv", container_options={"live": "1"}, bf="3", g="48"),
        "variable frame rate": write_video(folder / "phone.mp4", milliseconds=lambda k: 40 * k + 5 * (k % 7)),
        "faststart": remux(plain, folder / "web.mp4", movflags="faststart"),
        "late start": remux(plain, folder / "late.mp4", first_tick=40 * tick),
        "edit list": remux(plain, folder / "cut.mp4", first_tick=-10 * tick, **edited),
        "rotated by -90": rotate(plain, folder / "upright.mp4", -90),
        "rotated by 90": rotate(plain, folder / "down.mp4", 90),
        "rotated by 180": rotate(plain, folder / "over.mp4", 180),
        "wide pixels": write_video(folder / "wide.mp4", sample_aspect=Fraction(4, 3)),
    }


@pytest.fixture(scope="session")
def short_videos(tmp_path_factory) -> Path:
    """A folder of twelve videos of different length, two of them broken."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "more").mkdir()
    for number in range(10):
        write_video(folder / ("more" if number % 2 else ".") / f"Video {number}.mp4", 30 + 9 * number, g="12")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "notes.txt").write_text("nor is this\n")
    return folder


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """command("build_index", "dataset=...") -> exit status, stdout, stderr."""

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        script = import_module(f"data_pipeline.{name}")
        schema = getattr(script, "".join(word.capitalize() for word in name.split("_")) + "Config")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        status = 0
        capsys.readouterr()
        try:
            run(script.main, schema, name)
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """The one line of a user's error: status 1, no traceback."""

    def call(name: str, *arguments: str) -> str:
        status, _, printed = command(name, *arguments)
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(errors) == 1 and "Traceback" not in printed, printed
        return errors[0]

    return call


@pytest.fixture(scope="session")
def film() -> SimpleNamespace:
    """The functions above, for the tests."""
    return SimpleNamespace(
        frame=numbered_frame, number_of=number_of, write=write_video, rotate=rotate, remux=remux
    )


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    return read
