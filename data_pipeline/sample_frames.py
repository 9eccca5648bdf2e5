"""Samples story frames from videos into the frame shards of a dataset.

python data_pipeline/sample_frames.py videos=FOLDER out=DATASET frame_interval=69
python data_pipeline/sample_frames.py videos=LIST.txt out=DATASET frame_interval=139 max_frames=24

videos is a folder (searched to the bottom), a .txt list (one path per line, relative to the list) or a video.
The story frames are source frames 0, frame_interval + 1, ... in presentation order. Videos that cannot be
used are named in DATASET/rejected.jsonl. Stopped or killed, the same command continues.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from tqdm import tqdm

from conf.command import Stopped, run
from data_pipeline.clip_cutter import Recipe, Video, cut_video, readable_key, write_rejection
from data_pipeline.dataset import DatasetRecord, Number, finish, tool_versions, write_atomically, writing
from data_pipeline.shard_parts import Part, PlannedShard, plan_shards, remove_parts
from data_pipeline.shard_writer import VideoReport
from data_pipeline.worker_pool import num_workers, run_isolated
from storyanchors.clip import MAX_FRAME_PIXELS, MAX_FRAMES

VIDEO_SUFFIXES = set(
    ".mp4 .m4v .mov .mkv .webm .avi .ts .m2ts .mts .mpg .mpeg .flv .wmv .ogv .3gp .mxf .h264 .hevc".split()
)
LIST_SUFFIX = ".txt"
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


def main(config: SampleFramesConfig) -> None:
    videos = find_videos(Path(config.videos))
    out = Path(config.out)
    started = time.monotonic()
    with stop_signals() as stop_requested:
        counts, num_new_clips = sample_frames(videos, out, config, stop_requested)
    print(_summary(counts, out, num_new_clips, time.monotonic() - started))


def find_videos(where: Path) -> list[Video]:
    """The videos of a folder, a list or one path, in the order of their clips' keys; ValueError for none."""
    if where.is_dir():
        paths = [
            path for path in where.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
        ]
        videos = [_video(_as_text(path.relative_to(where)), path) for path in paths]
        if not videos:
            raise ValueError(f"found no video in {where}, looked for {' '.join(sorted(VIDEO_SUFFIXES))}")
    elif where.suffix == LIST_SUFFIX and where.is_file():
        try:
            lines = [line.strip() for line in where.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not a list of videos in UTF-8: {error}") from error
        names = [line for line in lines if line and not line.startswith("#")]
        if not names:
            raise ValueError(f"{where} lists no video")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{where} lists {twice[0]} more than once")
        videos = [_video(name, where.parent / name) for name in names]
    elif where.is_file():
        videos = [_video(_as_text(Path(where.name)), where)]
    else:
        raise ValueError(f"videos={where}: no such folder, {LIST_SUFFIX} list or video")
    return sorted(videos, key=lambda video: video.key)


def sample_frames(
    videos: list[Video],
    out: Path,
    config: SampleFramesConfig,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Number], int]:
    """Writes, or goes on writing, the dataset; returns its counts and how many of the clips are new.

    Raises Stopped soon after stop_requested() is true; calling it again continues.
    """
    record = DatasetRecord(
        made_by="sample_frames",
        config=dataclasses.asdict(config.recipe) | {"videos_per_shard": config.videos_per_shard},
        tool=tool_versions("av", "numpy"),
        license_note=config.license_note,
    )
    with writing(out, record):
        _begin_video_list(out, videos)
        shards = plan_shards(out, videos, config.videos_per_shard)
        num_new_clips = _cut_missing(shards, config, stop_requested)
        reports = [report for shard in shards for report in shard.read_marker().videos]
        _write_rejected(out, reports)
        remove_parts(out)
        counts = _counts(reports, len(shards))
        finish(out, record, counts)
    return counts, num_new_clips


def _cut_missing(
    shards: list[PlannedShard], config: SampleFramesConfig, stop_requested: Callable[[], bool]
) -> int:
    """Cuts all videos that are in no part yet, joins the parts of whole shards; returns the clips it cut."""
    missing: dict[PlannedShard, list[Part]] = {}
    for shard in shards:
        if shard.is_finished():
            continue
        if parts := shard.missing_parts():
            missing[shard] = parts
        else:
            shard.join()
    tasks = [part for parts in missing.values() for part in parts]
    clips_of_task = np.frombuffer(RawArray("q", max(1, len(tasks))), np.int64)  # each process writes its own

    def cut(task: int) -> None:
        part = tasks[task]
        progress = partial(clips_of_task.__setitem__, task)
        cut_video(part.video, config.recipe, part.shard.parts_folder, part.name, progress)

    with _progress(sum(len(shard.videos) for shard in shards), len(tasks)) as bar:

        def tick() -> None:
            if stop_requested():
                raise Stopped(f"{bar.n} of {bar.total} videos are done; the same command continues")
            clips = int(clips_of_task.sum())
            rate = clips / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix_str(f"{clips} clips, {rate:.1f} clips/s", refresh=False)
            bar.update(0)

        workers = num_workers(config.workers)
        outcomes = run_isolated(
            cut, range(len(tasks)), workers=workers, timeout_s=config.timeout_s, tick=tick
        )
        for task, death in outcomes:
            part = tasks[task]
            if death:
                write_rejection(part.video.id, death, part.shard.parts_folder, part.name)
                clips_of_task[task] = 0
            missing[part.shard].remove(part)
            if not missing[part.shard]:
                part.shard.join()
            bar.update()
        tick()
    return int(clips_of_task.sum())


def _video(video_id: str, path: Path) -> Video:
    return Video(video_id, path, readable_key(video_id))


def _as_text(path: Path) -> str:
    """A path as an id that can be written down, whatever bytes its name is made of."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


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


def _write_rejected(out: Path, reports: list[VideoReport]) -> None:
    rejected = sorted((report for report in reports if report.rejected), key=lambda report: report.video)
    lines = [json.dumps({"video": report.video, "reason": report.rejected}) + "\n" for report in rejected]
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


def _progress(num_videos: int, num_missing: int) -> tqdm:
    """A bar on a terminal, a line now and then in a log."""
    tqdm.monitor_interval = 0  # its thread would be in the way of fork
    interval_s = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=num_videos, initial=num_videos - num_missing, unit="video", mininterval=interval_s)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came. They only set a flag: an exception may get lost in a fork."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(main, SampleFramesConfig, "sample_frames")
