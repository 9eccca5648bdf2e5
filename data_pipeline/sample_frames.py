"""Samples story frames from videos into the frame shards of a dataset.

python data_pipeline/sample_frames.py videos=FOLDER out=DATASET frame_interval=69
python data_pipeline/sample_frames.py videos=LIST.txt out=DATASET frame_interval=139 max_frames=24

videos is a folder (searched to the bottom), a .txt list (one path per line, relative to the list) or a video.
The story frames are source frames 0, frame_interval + 1, ... in presentation order. Videos that cannot be
used are named in DATASET/rejected.jsonl. Stopped or killed, the same command continues.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import Value
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from omegaconf import MISSING
from tqdm import tqdm

from conf.command import Stopped, run
from data_pipeline.clip_cutter import Recipe, Video, cut_video, write_rejection
from data_pipeline.dataset import (
    FRAMES_FOLDER,
    DatasetRecord,
    Number,
    finish,
    tool_versions,
    write_atomically,
    writing,
)
from data_pipeline.shard_reader import read_clips, read_marker
from data_pipeline.shard_writer import ShardMarker, ShardWriter, VideoReport
from data_pipeline.worker_pool import num_workers, run_isolated
from storyanchors.clip import MAX_FRAME_PIXELS, MAX_FRAMES

VIDEO_SUFFIXES = set(
    ".mp4 .m4v .mov .mkv .webm .avi .ts .m2ts .mts .mpg .mpeg .flv .wmv .ogv .3gp .mxf .h264 .hevc".split()
)
LIST_SUFFIX = ".txt"
PARTS_FOLDER = "parts"  # finished videos of unfinished shards
VIDEOS_FILE = "videos.jsonl"
REJECTED_FILE = "rejected.jsonl"
MIN_PIXELS = 16 * 16


@dataclass
class SampleFramesConfig:
    videos: str = MISSING
    out: str = MISSING
    frame_interval: int = 69  # source frames strictly between two story frames
    max_frames: int = 24  # story frames of a clip; longer videos give several clips
    min_frames: int = 4  # a rest shorter than this is left out, and reported
    max_pixels: int = 409600  # of a story frame
    videos_per_shard: int = 32
    workers: int | None = None  # processes; None: one per core
    timeout_s: float = 3600.0  # for one video
    license_note: str = ""  # goes into dataset.json

    def __post_init__(self):
        limits = {
            "frame_interval": (0, 10**9),
            "max_frames": (1, MAX_FRAMES),
            "min_frames": (1, self.max_frames),
            "max_pixels": (MIN_PIXELS, MAX_FRAME_PIXELS),
            "videos_per_shard": (1, 10**6),
            "workers": (1, 10**4),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}, expected {least} to {most}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, expected above 0")

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.frame_interval, self.max_frames, self.min_frames, self.max_pixels)


@dataclass(frozen=True)
class Part:
    """One video's share of a shard: written by its own process as a shard of its own, then joined."""

    shard: str
    name: str
    video: Video


def main(config: SampleFramesConfig) -> None:
    videos = find_videos(Path(config.videos))
    out = Path(config.out)
    with _stopping(out):
        started = time.monotonic()
        counts, num_new_clips = sample_frames(videos, out, config)
    elapsed = time.monotonic() - started
    print(_summary(counts, out, num_new_clips, elapsed))


def find_videos(where: Path) -> list[Video]:
    """The videos of a folder, a list or one path, in the order of their clips' keys; ValueError for none."""
    if where.is_dir():
        paths = [
            path for path in where.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
        ]
        videos = [_video(path.relative_to(where).as_posix(), path) for path in paths]
        if not videos:
            raise ValueError(f"found no video in {where}, looked for {' '.join(sorted(VIDEO_SUFFIXES))}")
    elif where.suffix == LIST_SUFFIX and where.is_file():
        lines = [line.strip() for line in where.read_text(encoding="utf-8").splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
        if not names:
            raise ValueError(f"{where} lists no video")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{where} lists {twice[0]} more than once")
        videos = [_video(name, where.parent / name) for name in names]
    elif where.is_file():
        videos = [_video(where.name, where)]
    else:
        raise ValueError(f"videos={where}: no such folder, {LIST_SUFFIX} list or video")
    return sorted(videos, key=lambda video: video.key)


def sample_frames(
    videos: list[Video], out: Path, config: SampleFramesConfig
) -> tuple[dict[str, Number], int]:
    """Writes, or goes on writing, the dataset; returns its counts and how many of the clips are new.

    The videos of a shard are fixed from the start, so neither the workers nor a kill change what comes out.
    """
    recipe = config.recipe
    record = DatasetRecord(
        made_by="sample_frames",
        config=dataclasses.asdict(recipe) | {"videos_per_shard": config.videos_per_shard},
        tool=tool_versions("av", "numpy"),
        license_note=config.license_note,
    )
    with writing(out, record):
        _begin_video_list(out, videos)
        shards = _plan_shards(videos, config.videos_per_shard)
        frames = out / FRAMES_FOLDER
        markers = {name: read_marker(frames, name) for name in shards if (frames / f"{name}.json").exists()}
        unfinished = {name: parts for name, parts in shards.items() if name not in markers}
        num_new_clips = Value("q", 0)

        def cut(part: Part) -> None:
            cut_video(
                part.video, recipe, _parts_folder(out, part.shard), part.name, partial(_count, num_new_clips)
            )

        missing = {
            name: [part for part in parts if not _is_done(out, part)] for name, parts in unfinished.items()
        }
        num_done = len(videos) - sum(map(len, missing.values()))
        rejected = [report for marker in markers.values() for report in marker.videos if report.rejected]
        with _progress(len(videos), num_done) as bar:

            def show() -> None:
                clips = num_new_clips.value
                rate = clips / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(
                    f"{clips} clips, {rate:.1f} clips/s, {len(rejected)} rejected", refresh=False
                )
                bar.update(0)

            for name, parts in missing.items():
                _parts_folder(out, name).mkdir(parents=True, exist_ok=True)
                if not parts:
                    markers[name] = _join(out, name, shards[name])
            tasks = [part for parts in missing.values() for part in parts]
            workers = num_workers(config.workers)
            for part, death in run_isolated(
                cut, tasks, workers=workers, timeout_s=config.timeout_s, tick=show
            ):
                folder = _parts_folder(out, part.shard)
                if death:
                    write_rejection(part.video.id, death, folder, part.name)
                rejected += [report for report in read_marker(folder, part.name).videos if report.rejected]
                missing[part.shard].remove(part)
                bar.update()
                if not missing[part.shard]:
                    markers[part.shard] = _join(out, part.shard, shards[part.shard])
                    _write_rejected(out, rejected)
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
        reports = [report for name in sorted(markers) for report in markers[name].videos]
        _write_rejected(out, [report for report in reports if report.rejected])
        counts = _counts(reports, len(shards))
        finish(out, record, counts)
    return counts, num_new_clips.value


def _video(video_id: str, path: Path) -> Video:
    """The key has a readable half and one that is unique."""
    readable = re.sub("[^a-z0-9]+", "-", Path(video_id).stem.lower())[:40].strip("-") or "video"
    return Video(video_id, path, f"{readable}-{hashlib.sha1(video_id.encode()).hexdigest()[:12]}")


def _begin_video_list(out: Path, videos: list[Video]) -> None:
    """Writes down the videos of a new dataset; ValueError where a begun one was for others."""
    sizes = {video.id: video.path.stat().st_size if video.path.is_file() else None for video in videos}
    path = out / VIDEOS_FILE
    if not path.exists():
        lines = [json.dumps({"video": name, "bytes": size}) + "\n" for name, size in sizes.items()]
        return write_atomically(path, "".join(lines).encode())
    begun = {entry["video"]: entry["bytes"] for entry in map(json.loads, path.read_text().splitlines())}
    differences = {
        "new": sorted(set(sizes) - set(begun)),
        "gone": sorted(set(begun) - set(sizes)),
        "of another size": sorted(name for name in set(sizes) & set(begun) if sizes[name] != begun[name]),
    }
    if any(differences.values()):
        what = "; ".join(
            f"{len(names)} {kind} ({names[0]}, ...)" for kind, names in differences.items() if names
        )
        raise ValueError(
            f"{out} was begun with other videos: {what}. Use the same ones, or choose another folder"
        )


def _plan_shards(videos: list[Video], videos_per_shard: int) -> dict[str, list[Part]]:
    shards: dict[str, list[Part]] = {}
    for number, video in enumerate(videos):
        shard, place = divmod(number, videos_per_shard)
        name = f"{shard:06d}"
        shards.setdefault(name, []).append(Part(name, f"{place:06d}", video))
    return shards


def _parts_folder(out: Path, shard: str) -> Path:
    return out / PARTS_FOLDER / shard


def _is_done(out: Path, part: Part) -> bool:
    return (_parts_folder(out, part.shard) / f"{part.name}.json").exists()


def _join(out: Path, name: str, parts: list[Part]) -> ShardMarker:
    """The parts of a shard, in order, become the shard."""
    folder = _parts_folder(out, name)
    reports: list[VideoReport] = []
    with ShardWriter(out / FRAMES_FOLDER, name) as shard:
        for part in parts:
            marker = read_marker(folder, part.name)
            for key, members in read_clips(folder, marker):
                shard.add(key, members)
            reports += marker.videos
        joined = shard.finish(reports)
    shutil.rmtree(folder)
    return joined


def _count(counter: Synchronized, clips: int) -> None:
    with counter.get_lock():
        counter.value += clips


def _write_rejected(out: Path, reports: list[VideoReport]) -> None:
    lines = [json.dumps({"video": report.video, "reason": report.rejected}) + "\n" for report in reports]
    write_atomically(out / REJECTED_FILE, "".join(lines).encode())


def _counts(reports: list[VideoReport], num_shards: int) -> dict[str, Number]:
    return {
        "videos": len(reports),
        "shards": num_shards,
        "clips": sum(report.num_clips for report in reports),
        "frames": sum(report.num_frames for report in reports),
        "rejected": sum(report.rejected is not None for report in reports),
        "short_rests": sum(report.short_rest > 0 for report in reports),
        "short_rest_frames": sum(report.short_rest for report in reports),
        "source_frames": sum(report.source_frames for report in reports),
        "source_seconds": round(sum(report.source_seconds for report in reports), 3),
    }


def _summary(counts: dict[str, Number], out: Path, num_new_clips: int, elapsed_s: float) -> str:
    rejected = f", see {out / REJECTED_FILE}" if counts["rejected"] else ""
    return "\n".join(
        [
            f"videos         {counts['videos']} ({counts['source_seconds']:.1f} s of film)",
            f"clips          {counts['clips']} ({counts['frames']} story frames, {counts['shards']} shards)",
            f"rejected       {counts['rejected']}{rejected}",
            f"short rests    {counts['short_rests']} ({counts['short_rest_frames']} story frames left out)",
            f"speed          {num_new_clips / elapsed_s:.1f} clips/s ({num_new_clips} in {elapsed_s:.1f} s)",
            f"next           python data_pipeline/build_index.py dataset={out}",
        ]
    )


def _progress(num_videos: int, num_done: int) -> tqdm:
    """A bar on a terminal, a line now and then in a log."""
    tqdm.monitor_interval = 0  # its thread would be in the way of fork
    return tqdm(
        total=num_videos, initial=num_done, unit="video", mininterval=0.2 if sys.stderr.isatty() else 30
    )


@contextmanager
def _stopping(out: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop between two files; nothing that is done is lost."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"{out} is not finished; the same command continues") from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run(main, SampleFramesConfig, "sample_frames")
