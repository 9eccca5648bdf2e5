"""Verifies a dataset's shards, joins the captions of one run, and writes index.parquet, which training reads.

python data_pipeline/build_index.py dataset=DATASET captions=RUN
python data_pipeline/build_index.py dataset=DATASET captions=RUN stories=FOLDER

With stories=FOLDER, <name of a video>.story.yaml becomes the caption of the one clip of that video, in
captions run RUN, which is written anew each time.
"""

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import MISSING
from tqdm import tqdm

from conf.command import run
from data_pipeline.captions import (
    CaptionLine,
    caption_runs,
    read_captions,
    read_run_maker,
    run_folder,
    write_captions,
    write_run,
)
from data_pipeline.dataset import FRAMES_FOLDER, INDEX_FILE, read_record, write_atomically
from data_pipeline.shard_reader import finished_shards, read_entries, read_marker, verify_shard
from data_pipeline.shard_writer import ClipEntry
from data_pipeline.worker_pool import map_in_order, num_workers
from storyanchors.clip import CaptionRecord, ClipInfo
from storyanchors.story import Story

STORY_SUFFIX = ".story.yaml"
_BY_HAND = "build_index stories=..."

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("frame_offsets", pa.list_(pa.int64())),
        ("frame_sizes", pa.list_(pa.int64())),
        ("frame_crc32", pa.list_(pa.int64())),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("fps", pa.float64()),
        ("frame_interval", pa.int32()),
        ("motion", pa.float64()),
        ("source", pa.string()),
        ("caption_run", pa.string()),
        ("caption_offset", pa.int64()),
        ("caption_size", pa.int64()),
        ("global_caption_words", pa.int32()),
        ("story_words", pa.int32()),
    ]
)


@dataclass
class BuildIndexConfig:
    dataset: str = MISSING
    captions: str | None = None  # the run to join; None: an index without captions
    stories: str | None = None  # a folder of story files to import as that run
    workers: int | None = None  # processes; None: one per core

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected 1 or above")


@dataclass(frozen=True)
class IndexSummary:
    num_shards: int
    num_clips: int
    num_frames: int
    num_global_captions: int
    num_stories: int


def main(config: BuildIndexConfig) -> None:
    dataset = Path(config.dataset)
    stories = Path(config.stories) if config.stories else None
    summary = build_index(dataset, config.captions, stories, workers=config.workers)
    counts = f"{summary.num_clips} clips, {summary.num_frames} frames, {summary.num_shards} shards"
    print(f"{dataset / INDEX_FILE}: {counts}")
    if config.captions:
        print(
            f"captions {config.captions}: {summary.num_global_captions} global, {summary.num_stories} stories"
        )
    elif runs := caption_runs(dataset):
        print(f"no captions were joined; captions=NAME joins one of: {', '.join(runs)}")
    else:
        print("no captions yet: write a .story.yaml beside a video and add captions=NAME stories=FOLDER")


def build_index(
    dataset: Path, captions: str | None = None, stories: Path | None = None, *, workers: int | None = None
) -> IndexSummary:
    """Writes index.parquet, one row per clip, sorted by key.

    ValueError, and no index, for a dataset that is not finished, a shard that is not what its marker says,
    captions of a clip that is not there or has another number of frames, and a key that is there twice.
    """
    if not read_record(dataset).finished:
        raise ValueError(
            f"{dataset} is not finished: repeat the command that began it, it continues where it was"
        )
    if stories and not captions:
        raise ValueError("stories=FOLDER becomes a captions run, name it with captions=NAME")
    clips = _read_clips(dataset / FRAMES_FOLDER, workers)
    if not clips:
        raise ValueError(f"{dataset / FRAMES_FOLDER} holds no clip")
    if stories:
        _import_stories(dataset, captions, stories, clips)
    lines = _read_run(dataset, captions, clips) if captions else {}
    rows = [_row(clip, captions, lines.get(clip.info.key)) for clip in clips]
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomically(dataset / INDEX_FILE, buffer.getvalue())
    return IndexSummary(
        num_shards=len({clip.shard for clip in clips}),
        num_clips=len(clips),
        num_frames=sum(clip.info.num_frames for clip in clips),
        num_global_captions=sum(bool(line.record.global_caption) for line in lines.values()),
        num_stories=sum(line.record.story is not None for line in lines.values()),
    )


@dataclass(frozen=True)
class _ShardClip:
    shard: str
    entry: ClipEntry
    info: ClipInfo


def _read_clips(frames: Path, workers: int | None) -> list[_ShardClip]:
    """All clips of all finished shards, verified, sorted by key."""
    clips: dict[str, _ShardClip] = {}
    names = finished_shards(frames)
    with tqdm(total=len(names), desc="verifying", unit="shard", disable=None) as bar:
        for of_shard in map_in_order(partial(_read_shard, frames), names, workers=num_workers(workers)):
            for clip in of_shard:
                key = clip.info.key
                if key in clips:
                    raise ValueError(f"clip {key} is in shard {clips[key].shard} and again in {clip.shard}")
                clips[key] = clip
            bar.update()
    return [clips[key] for key in sorted(clips)]


def _read_shard(frames: Path, name: str) -> list[_ShardClip]:
    marker = read_marker(frames, name)
    entries = read_entries(frames, marker)
    infos = verify_shard(frames, marker, entries)
    return [_ShardClip(name, entry, info) for entry, info in zip(entries, infos, strict=True)]


def _row(clip: _ShardClip, captions: str | None, line: CaptionLine | None) -> dict:
    info, frames = clip.info, clip.entry.members[:-1]  # the last member is clip.json
    story = line.record.story if line else None
    return {
        "key": info.key,
        "shard": clip.shard,
        "frame_offsets": [member.offset for member in frames],
        "frame_sizes": [member.size for member in frames],
        "frame_crc32": [member.crc32 for member in frames],
        "num_frames": info.num_frames,
        "height": info.height,
        "width": info.width,
        "fps": info.fps,
        "frame_interval": info.frame_interval,
        "motion": info.motion,
        "source": info.source,
        "caption_run": captions if line else None,
        "caption_offset": line.offset if line else None,
        "caption_size": line.size if line else None,
        "global_caption_words": len(line.record.global_caption.split()) if line else None,
        "story_words": len(story.prompt().split()) if story else None,
    }


def _read_run(dataset: Path, captions: str, clips: list[_ShardClip]) -> dict[str, CaptionLine]:
    """The captions of a run by key; every one must belong to a clip of its shard and fit its frames."""
    folder = run_folder(dataset, captions)
    runs = caption_runs(dataset)
    if captions not in runs:
        raise ValueError(
            f"{dataset} has no finished captions run {captions!r}, found {', '.join(runs) or 'none'}"
        )
    by_key = {clip.info.key: clip for clip in clips}
    lines: dict[str, CaptionLine] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in read_captions(dataset, captions, path.stem):
            record = line.record
            clip = by_key.get(record.key)
            if clip is None or clip.shard != path.stem:
                raise ValueError(
                    f"{path} has captions of {record.key}, which is no clip of shard {path.stem}"
                )
            if record.key in lines:
                raise ValueError(f"{path} has two captions of {record.key}")
            if record.story and record.story.num_frames != clip.info.num_frames:
                raise ValueError(
                    f"{path}: the story of {record.key} has {record.story.num_frames} frames, "
                    f"the clip {clip.info.num_frames}"
                )
            lines[record.key] = line
    return lines


def _import_stories(dataset: Path, captions: str, stories: Path, clips: list[_ShardClip]) -> None:
    """Writes captions run `captions` from hand-written story files, matched by the video's name."""
    if captions in caption_runs(dataset) and (maker := read_run_maker(dataset, captions)) != _BY_HAND:
        raise ValueError(
            f"captions run {captions!r} was made by {maker}: choose another name for the stories"
        )
    if not stories.is_dir():
        raise ValueError(f"stories={stories} is not a folder")
    by_stem: dict[str, list[_ShardClip]] = {}
    for clip in clips:
        by_stem.setdefault(PurePosixPath(clip.info.source).stem, []).append(clip)
    records: dict[str, list[CaptionRecord]] = {clip.shard: [] for clip in clips}
    for stem, found in by_stem.items():
        path = stories / f"{stem}{STORY_SUFFIX}"
        if not path.is_file():
            continue
        if len(found) > 1:
            raise ValueError(f"{path} is one story, but {len(found)} clips come from a video of that name")
        story, [clip] = Story.from_file(path), found
        if story.num_frames != clip.info.num_frames:
            raise ValueError(
                f"{path} tells {story.num_frames} frames, its clip has {clip.info.num_frames} "
                f"(frame_interval={clip.info.frame_interval})"
            )
        records[clip.shard].append(CaptionRecord(clip.info.key, story.global_caption, story))
    if not any(records.values()):
        expected = f"{min(by_stem)}{STORY_SUFFIX}"
        raise ValueError(
            f"{stories} has no story file for any of {len(by_stem)} videos, expected e.g. {expected}"
        )
    for shard, of_shard in records.items():
        write_captions(dataset, captions, shard, of_shard)
    write_run(dataset, captions, _BY_HAND)


if __name__ == "__main__":
    run(main, BuildIndexConfig, "build_index")
