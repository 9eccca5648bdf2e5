"""CPU time of reading and decoding a clip: our loader from disk and from a server, and WebDataset's.

python benchmarks/loader.py > benchmarks/results/loader.txt

CPU seconds of the reading process, so that other work on the machine counts little; files are in the page
cache, and the HTTP server is a process of its own on the same machine. Both loaders decode with the same
function. Ours also reads the caption and compares checksums, WebDataset does neither.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline.build_index import build_index
from data_pipeline.captions import write_captions, write_run
from data_pipeline.dataset import DatasetRecord, finish, writing
from data_pipeline.shard_writer import ShardWriter
from storyanchors.clip import CaptionRecord, ClipInfo, StoryClip, decode_jpeg, frames_to_levels
from storyanchors.story import Event, Story
from train.clips.clip_index import ClipIndex, ClipRow
from train.clips.clip_reader import ClipReader
from train.clips.loader import PlannedClips, PlannedLoader
from train.clips.quarantine import Quarantine
from train.data_plan import DataPlan

HEIGHT, WIDTH, NUM_FRAMES = 480, 832, 12
NEED = {"1.3B": 0.44, "4B": 0.23, "14B": 0.08}  # clips per second and GPU at full speed
SERVER = """
import sys, time
from pathlib import Path
from tests.range_server import serve
with serve(Path(sys.argv[1])) as server:
    print(server.url, flush=True)
    time.sleep(3600)
"""


def draw_frame(rng: np.random.Generator) -> Image.Image:
    """Blurred noise with a little grain: a JPEG of about 210 kB, much for a frame of a film of this size."""
    coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, 2.0, (HEIGHT, WIDTH, 1))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def write_dataset(folder: Path, num_shards: int, clips_per_shard: int) -> None:
    rng = np.random.default_rng(0)
    record = DatasetRecord(made_by="benchmarks/loader.py", config={}, tool={}, license_note="")
    with writing(folder, record):
        for shard in range(num_shards):
            with ShardWriter(folder / "frames", f"{shard:06d}") as writer:
                captions = []
                for number in range(clips_per_shard):
                    info = ClipInfo(
                        key=f"clip-{shard}-{number:04d}",
                        source=f"video-{shard}-{number}",
                        frame_numbers=tuple(range(NUM_FRAMES)),
                        seconds=tuple(map(float, range(NUM_FRAMES))),
                        height=HEIGHT,
                        width=WIDTH,
                    )
                    clip = StoryClip(info, [draw_frame(rng) for _ in range(NUM_FRAMES)])
                    writer.add(info.key, clip.to_members())
                    story = Story([Event(1, NUM_FRAMES, "Clouds of colour drift by. " * 20)])
                    captions.append(CaptionRecord(info.key, "Clouds.", story))
                write_captions(folder, "made", f"{shard:06d}", captions)
                writer.finish()
        write_run(folder, "made", "benchmarks/loader.py")
        finish(folder, record, {"shards": num_shards})
    build_index(folder, "made", workers=1)


def decode_sample(sample: dict) -> torch.Tensor:
    """A WebDataset sample -> uint8 (F, 3, H, W), as our reader gives it."""
    names = sorted(name for name in sample if name.endswith(".jpg"))
    return frames_to_levels([decode_jpeg(sample[name], (WIDTH, HEIGHT)) for name in names])


def open_webdataset(folder: Path, num_workers: int, *, decode: bool) -> Iterable:
    """One shuffled pass, as training would make it."""
    shards = [str(path) for path in sorted((folder / "frames").glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(16)
    samples = samples.map(decode_sample) if decode else samples
    return webdataset.WebLoader(samples, batch_size=None, num_workers=num_workers)


def open_ours(index: ClipIndex, num_workers: int, num_clips: int) -> Iterable:
    tokens = index.num_tokens(16)
    plan = DataPlan(tokens, tokens * 1.0, seed=0, stage="s", clips_per_batch=1, packs_per_batch=1)
    return PlannedLoader(
        PlannedClips(index, tokens),
        lambda position: plan.packs(position, rank=0, world_size=1),
        position=lambda: 0,
        num_packs=lambda: num_clips,
        quarantine=Quarantine(Path("unused"), 0, 0.0),
        num_workers=num_workers,
        prefetch=4,
    )


def read_only(rows: list[ClipRow]) -> Iterable:
    reader = ClipReader()
    for row in rows:
        yield reader.contents(row)


def cpu_seconds(clips: Iterable, num_repeats: int) -> float:
    """The least CPU seconds per clip of this process, over several passes."""
    best = float("inf")
    for _ in range(num_repeats):
        start, count = time.process_time(), 0
        for _ in clips:
            count += 1
        best = min(best, (time.process_time() - start) / count)
    return best


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder, "data")
        write_dataset(dataset, arguments.shards, arguments.clips)
        num_clips = arguments.shards * arguments.clips
        megabytes = sum(path.stat().st_size for path in dataset.rglob("*.tar")) / num_clips / 1e6
        print(
            f"{num_clips} clips of {NUM_FRAMES} frames of {WIDTH} x {HEIGHT} pixels, {megabytes:.2f} MB each"
        )
        command = [sys.executable, "-c", SERVER, folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        try:
            measure(
                dataset, f"{server.stdout.readline().strip()}/data", num_clips, megabytes, arguments.repeats
            )
        finally:
            server.kill()


def measure(dataset: Path, url: str, num_clips: int, megabytes: float, repeats: int) -> None:
    here, there = ClipIndex.open(dataset), ClipIndex.open(url)
    rows = {index: [index.row(number) for number in range(num_clips)] for index in (here, there)}

    def report(name: str, clips: Iterable) -> float:
        seconds = cpu_seconds(clips, repeats)
        rate = 1 / seconds
        print(
            f"{name:58} {1000 * seconds:7.2f} ms {rate:9.1f} clips/s {rate * megabytes:9.1f} MB/s", flush=True
        )
        return seconds

    print(f"{'per core, CPU time of the process that reads':58} {'per clip':>10}")
    report("ours, bytes and checksums only, disk", _again(lambda: read_only(rows[here])))
    report("ours, bytes and checksums only, HTTP", _again(lambda: read_only(rows[there])))
    report("WebDataset, bytes only, disk", open_webdataset(dataset, 0, decode=False))
    disk = report("ours, decoded, disk", open_ours(here, 0, num_clips))
    report("ours, decoded, HTTP", open_ours(there, 0, num_clips))
    report("WebDataset, decoded, disk", open_webdataset(dataset, 0, decode=True))
    print("\nper clip in the training process, where one worker reads and decodes")
    report("ours", open_ours(here, 1, num_clips))
    report("WebDataset's WebLoader", open_webdataset(dataset, 1, decode=True))
    print("\nworkers that a GPU needs (clips of this size), and how often one worker meets the need")
    for model, need in NEED.items():
        print(f"{model:5} {need:.2f} clips/s: {need * disk:.3f} workers, {1 / disk / need:.0f} times")


class _again:
    """Iterates what a function makes, anew each time."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--clips", type=int, default=10, help="in each shard")
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
