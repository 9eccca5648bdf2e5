"""CPU time of a labeling job per request, requests in flight, and memory over a dataset that grows.

python benchmarks/labeling_throughput.py

Clips of 12 frames of 40 kB go through the events stage to a local server that answers after two seconds; the
server is a process of its own and its time does not count. Everything else does: reading shards, checksums,
keys, base64, HTTP, checking answers, ledger, labels; imports do not.
"""

import argparse
import hashlib
import io
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.dataset import FRAMES_FOLDER, DatasetRecord, finish, tool_versions, writing
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import Events
from data_pipeline.shard_writer import ShardWriter
from storyanchors.clip import INFO_MEMBER, ClipInfo, frame_member
from storyanchors.vlm import VlmConfig
from tests.vlm_servers import KEY, Parts, serve

NUM_FRAMES, FRAME_BYTES, CLIPS_PER_SHARD = 12, 40_000, 100
LATENCY_S = 2.0
KEY_NAME = "STORYANCHORS_TEST_KEY"
_FRAME = re.compile(r"Frame (\d+)")
_fork = get_context("fork")


@dataclass(frozen=True)
class Job:
    """What one labeling process used."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    before_mb: float
    most_in_flight: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--in-flight", type=int, default=128)
    arguments = parser.parse_args()
    os.environ[KEY_NAME] = KEY
    print(
        f"{NUM_FRAMES} frames of {FRAME_BYTES // 1000} kB a request, {arguments.in_flight} in flight allowed"
    )
    with tempfile.TemporaryDirectory() as folder:
        for num_clips in arguments.clips:
            dataset = Path(folder) / f"clips{num_clips}"
            write_clips(dataset, num_clips)
            for protocol in ("openai", "gemini"):
                job = measure(dataset, protocol, arguments.in_flight)
                print(
                    f"{protocol}: {num_clips} requests, {1e3 * job.cpu_s / num_clips:.1f} ms of CPU each, "
                    f"{job.most_in_flight} in flight, {num_clips / job.wall_s:.0f} requests per second, "
                    f"peak memory {job.peak_mb:.0f} MB ({job.before_mb:.0f} MB before the first)",
                    flush=True,
                )


def measure(dataset: Path, protocol: str, in_flight: int) -> Job:
    with answering(protocol) as server:
        config = LabelingConfig(
            dataset=str(dataset),
            run=protocol,
            vlm=VlmConfig(protocol, "m", base_url=server.recv(), api_key_env=KEY_NAME),
            in_flight=in_flight,
        )
        mine, theirs = _fork.Pipe()
        process = _fork.Process(target=label, args=(config, theirs))
        process.start()
        used = mine.recv()
        process.join()
        server.send(None)
        return Job(**used, most_in_flight=server.recv())


def label(config: LabelingConfig, results: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    run_stage(config, Events())
    after = resource.getrusage(resource.RUSAGE_SELF)
    results.send(
        {
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "wall_s": time.monotonic() - began,
            "peak_mb": after.ru_maxrss / 1024,
            "before_mb": before.ru_maxrss / 1024,
        }
    )


@contextmanager
def answering(protocol: str) -> Iterator[Connection]:
    mine, theirs = _fork.Pipe()
    process = _fork.Process(target=_serve, args=(protocol, theirs), daemon=True)
    process.start()
    yield mine
    process.join()


def _serve(protocol: str, orders: Connection) -> None:
    with serve(protocol, answer, latency_s=LATENCY_S) as server:
        orders.send(server.url)
        orders.recv()
        orders.send(server.most_in_flight)


def answer(parts: Parts) -> str:
    """Two events over the frames that are shown."""
    shown = [int(match[1]) for part in parts if isinstance(part, str) and (match := _FRAME.fullmatch(part))]
    first, last, middle = min(shown), max(shown), sum(shown) // len(shown)
    ranges = [
        (first, middle, "A red boat leaves the harbour."),
        (middle, last, "The boat is out on the sea."),
    ]
    events = [{"first_frame": a, "last_frame": b, "description": text} for a, b, text in ranges]
    return json.dumps({"events": events})


def write_clips(dataset: Path, num_clips: int) -> None:
    """Every frame is the same picture with a comment of its own."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 288, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=80)
    picture = buffer.getvalue()
    record = DatasetRecord("labeling_throughput", {"num_clips": num_clips}, tool_versions())
    with writing(dataset, record):
        for first in range(0, num_clips, CLIPS_PER_SHARD):
            with ShardWriter(dataset / FRAMES_FOLDER, f"{first // CLIPS_PER_SHARD:06d}") as writer:
                for number in range(first, min(first + CLIPS_PER_SHARD, num_clips)):
                    writer.add(f"clip-{number:07d}", clip_members(f"clip-{number:07d}", picture))
                writer.finish()
        finish(dataset, record, {"clips": num_clips})


def clip_members(key: str, picture: bytes) -> dict[str, bytes]:
    jpegs = []
    for number in range(NUM_FRAMES):
        comment = f"{key} {number} ".encode().ljust(FRAME_BYTES - len(picture) - 4)
        jpegs.append(b"\xff\xd8\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + picture[2:])
    info = ClipInfo(
        key=key,
        source="benchmark",
        frame_numbers=tuple(range(NUM_FRAMES)),
        seconds=tuple(map(float, range(NUM_FRAMES))),
        height=160,
        width=288,
        checksums=tuple(hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs),
    )
    return {frame_member(i): jpeg for i, jpeg in enumerate(jpegs, start=1)} | {INFO_MEMBER: info.to_json()}


if __name__ == "__main__":
    main()
