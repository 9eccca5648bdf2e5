"""Verifies a dataset's shards, joins the captions of one run, and writes the index, which training reads.

python data_pipeline/build_index.py dataset=DATASET captions=RUN
python data_pipeline/build_index.py dataset=DATASET captions=RUN stories=FOLDER
python data_pipeline/build_index.py dataset=DATASET captions=RUN caption_encoder=FOLDER_OR_HUB_ID

With stories=FOLDER, <name of a video>.story.yaml becomes the caption of the one clip of that video, in
captions run RUN, which is written anew each time. With caption_encoder, the tokens of every caption are
counted, and those that are too long for that encoder are named with what they would lose.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
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
from data_pipeline.dataset import FRAMES_FOLDER, read_record
from data_pipeline.index_file import write_index
from data_pipeline.shard_reader import finished_shards, read_entries, read_marker, verify_shard
from data_pipeline.shard_writer import ClipEntry
from data_pipeline.tar_records import tables_in_place
from data_pipeline.worker_pool import map_in_order, num_workers
from storyanchors.clip import CaptionRecord, ClipInfo
from storyanchors.index_file import PARQUET_FILE
from storyanchors.story import Story

STORY_SUFFIX = ".story.yaml"
_BY_HAND = "build_index stories=..."

CLIP_COLUMNS = [
    ("key", pa.string()),
    ("shard", pa.string()),
    ("location", pa.string()),  # of the tar; null: frames/SHARD.tar
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
]
CAPTION_COLUMNS = [
    ("caption_run", pa.string()),
    ("caption_offset", pa.int64()),
    ("caption_size", pa.int64()),
    ("global_caption_words", pa.int32()),
    ("story_words", pa.int32()),
    ("global_caption_tokens", pa.int32()),
    ("story_tokens", pa.int32()),
]


@dataclass
class BuildIndexConfig:
    dataset: str = MISSING
    captions: str | None = None  # the run to join; None: an index without captions
    stories: str | None = None  # a folder of story files to import as that run
    caption_encoder: str | None = None  # whose tokens to count: a folder, a Hub id or words; None: none
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
    token_report: list[str]  # lines; none without a caption encoder


def main(config: BuildIndexConfig) -> None:
    dataset = Path(config.dataset)
    stories = Path(config.stories) if config.stories else None
    summary = build_index(
        dataset, config.captions, stories, caption_encoder=config.caption_encoder, workers=config.workers
    )
    counts = f"{summary.num_clips} clips, {summary.num_frames} frames, {summary.num_shards} shards"
    print(f"{dataset / PARQUET_FILE}: {counts}")
    if config.captions:
        print(
            f"captions {config.captions}: {summary.num_global_captions} global, {summary.num_stories} stories"
        )
        for line in summary.token_report:
            print(line)
    elif runs := caption_runs(dataset):
        print(f"no captions were joined; captions=NAME joins one of: {', '.join(runs)}")
    else:
        print("no captions yet: write a .story.yaml beside a video and add captions=NAME stories=FOLDER")


def build_index(
    dataset: Path,
    captions: str | None = None,
    stories: Path | None = None,
    *,
    caption_encoder: str | None = None,
    workers: int | None = None,
) -> IndexSummary:
    """Writes the index, one row per clip, sorted by key.

    ValueError, and no index, for a dataset that is not finished, a shard that is not what its marker says,
    captions of a clip that is not there or has another number of frames, and a key that is there twice.
    """
    if stories and not captions:
        raise ValueError("stories=FOLDER becomes a captions run, name it with captions=NAME")
    if caption_encoder and not captions:
        raise ValueError(
            "caption_encoder=... counts the tokens of a captions run, name it with captions=NAME"
        )
    if caption_encoder:
        from data_pipeline.token_counts import token_counter  # here: transformers takes 3 s to import

        token_counter(caption_encoder)  # one that cannot be read is an error before the shards are verified
    shards = _read_shards(dataset, workers)
    if stories:
        _import_stories(dataset, captions, stories, shards)
    table = pa.concat_tables(_with_captions(dataset, captions, shards)).sort_by("key")
    _check_unique(table)
    token_report = []
    if caption_encoder:
        table, token_report = _with_tokens(table, dataset, captions, list(shards), caption_encoder, workers)
    write_index(dataset, table)
    return IndexSummary(
        num_shards=len(shards),
        num_clips=len(table),
        num_frames=pc.sum(table["num_frames"]).as_py(),
        num_global_captions=pc.sum(pc.greater(table["global_caption_words"], 0)).as_py() or 0,
        num_stories=len(table) - table["story_words"].null_count,
        token_report=token_report,
    )


def _read_shards(dataset: Path, workers: int | None) -> dict[str, pa.Table]:
    """The clips of every shard, all of them finished and verified, in columns."""
    record, frames = read_record(dataset), dataset / FRAMES_FOLDER
    names = finished_shards(frames)
    if not record.finished or len(names) != record.counts.get("shards"):
        expected = record.counts.get("shards", "more")
        raise ValueError(
            f"{dataset} is not finished, found {len(names)} shards with a marker, expected {expected}: "
            "repeat the command that wrote it, it continues where it was"
        )
    shards: dict[str, pa.Table] = {}
    with tqdm(total=len(names), desc="verifying", unit="shard", disable=None) as bar:
        rows_of_shards = map_in_order(partial(_verified_rows, frames), names, workers=num_workers(workers))
        for name, rows in zip(names, rows_of_shards, strict=True):
            shards[name] = pa.Table.from_pylist(rows, schema=pa.schema(CLIP_COLUMNS))
            bar.update()
    for name, table in tables_in_place(dataset, pa.schema(CLIP_COLUMNS)).items():
        shards[name] = pa.concat_tables([shards[name], table]) if name in shards else table
    if not any(map(len, shards.values())):
        raise ValueError(f"{dataset} holds no clip")
    return shards


def _verified_rows(frames: Path, name: str) -> list[dict]:
    marker = read_marker(frames, name)
    entries = read_entries(frames, marker)
    infos = verify_shard(frames, marker, entries)
    return [_row(name, entry, info) for entry, info in zip(entries, infos, strict=True)]


def _row(shard: str, entry: ClipEntry, info: ClipInfo) -> dict:
    frames = entry.members[:-1]  # the last member is clip.json
    return {
        "key": info.key,
        "shard": shard,
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
    }


def _check_unique(table: pa.Table) -> None:
    """The table is sorted by key."""
    keys = table["key"].combine_chunks()
    same = pc.equal(keys[1:], keys[:-1])
    if twice := pc.index(same, True).as_py() + 1:
        one, other = table["shard"][twice - 1].as_py(), table["shard"][twice].as_py()
        raise ValueError(f"clip {keys[twice]} is in shard {one} and again in {other}")


def _with_captions(dataset: Path, captions: str | None, shards: dict[str, pa.Table]) -> list[pa.Table]:
    """The tables of all shards with the columns of one captions run, null for clips without captions."""
    if captions is not None:
        folder, runs = run_folder(dataset, captions), caption_runs(dataset)
        if captions not in runs:
            found = ", ".join(runs) or "none"
            raise ValueError(f"{dataset} has no finished captions run {captions!r}, found {found}")
        for path in sorted(folder.glob("*.jsonl")):
            if path.stem not in shards:
                raise ValueError(f"{path} has captions of shard {path.stem}, which is not there")
    return [_join_captions(dataset, captions, name, table) for name, table in shards.items()]


def _join_captions(dataset: Path, captions: str | None, shard: str, table: pa.Table) -> pa.Table:
    keys, lengths = table["key"].to_pylist(), table["num_frames"].to_pylist()
    lines: dict[str, CaptionLine] = {}
    if captions is not None:
        path = run_folder(dataset, captions) / f"{shard}.jsonl"
        num_frames = dict(zip(keys, lengths))
        for line in read_captions(dataset, captions, shard):
            record = line.record
            if record.key not in num_frames:
                raise ValueError(f"{path} has captions of {record.key}, which is no clip of shard {shard}")
            if record.key in lines:
                raise ValueError(f"{path} has two captions of {record.key}")
            if record.story and record.story.num_frames != num_frames[record.key]:
                raise ValueError(
                    f"{path}: the story of {record.key} has {record.story.num_frames} frames, "
                    f"the clip {num_frames[record.key]}"
                )
            lines[record.key] = line
    rows = [_caption_row(captions, lines.get(key)) for key in keys]
    columns = pa.Table.from_pylist(rows, schema=pa.schema(CAPTION_COLUMNS))
    return pa.table(table.columns + columns.columns, schema=pa.schema(CLIP_COLUMNS + CAPTION_COLUMNS))


def _caption_row(captions: str | None, line: CaptionLine | None) -> dict:
    if line is None:
        return {}
    story = line.record.story
    return {
        "caption_run": captions,
        "caption_offset": line.offset,
        "caption_size": line.size,
        "global_caption_words": len(line.record.global_caption.split()),
        "story_words": len(story.prompt().split()) if story else None,
    }


def _with_tokens(
    table: pa.Table, dataset: Path, captions: str, shards: list[str], encoder: str, workers: int | None
) -> tuple[pa.Table, list[str]]:
    """The table with its token columns filled, and the report."""
    from data_pipeline.token_counts import count_tokens, describe_tokens

    counted = count_tokens(dataset, captions, shards, encoder, workers=workers)
    for kind, name in (("global caption", "global_caption_tokens"), ("story", "story_tokens")):
        num_tokens = {caption.key: caption.num_tokens for caption in counted if caption.kind == kind}
        column = pa.array([num_tokens.get(key) for key in table["key"].to_pylist()], pa.int32())
        table = table.set_column(table.column_names.index(name), name, column)
    return table, describe_tokens(counted, encoder)


def _import_stories(dataset: Path, captions: str, stories: Path, shards: dict[str, pa.Table]) -> None:
    """Writes captions run `captions` from hand-written story files, matched by the video's name."""
    if captions in caption_runs(dataset) and (maker := read_run_maker(dataset, captions)) != _BY_HAND:
        raise ValueError(
            f"captions run {captions!r} was made by {maker}: choose another name for the stories"
        )
    if not stories.is_dir():
        raise ValueError(f"stories={stories} is not a folder")
    clips_of_video: dict[str, list[dict]] = {}
    for table in shards.values():
        for clip in table.select(["key", "shard", "source", "num_frames", "frame_interval"]).to_pylist():
            clips_of_video.setdefault(PurePosixPath(clip["source"]).stem, []).append(clip)
    records: dict[str, list[CaptionRecord]] = {shard: [] for shard in shards}
    for video, clips in clips_of_video.items():
        path = stories / f"{video}{STORY_SUFFIX}"
        if not path.is_file():
            continue
        if len(clips) > 1:
            raise ValueError(f"{path} is one story, but {len(clips)} clips come from a video of that name")
        story, [clip] = Story.from_file(path), clips
        if story.num_frames != clip["num_frames"]:
            raise ValueError(
                f"{path} tells {story.num_frames} frames, its clip has {clip['num_frames']} "
                f"(frame_interval={clip['frame_interval']})"
            )
        records[clip["shard"]].append(CaptionRecord(clip["key"], story.global_caption, story))
    if not any(records.values()):
        raise ValueError(
            f"{stories} has no story file for any of {len(clips_of_video)} videos, "
            f"expected e.g. {min(clips_of_video, default='video')}{STORY_SUFFIX}"
        )
    for shard, of_shard in records.items():
        write_captions(dataset, captions, shard, of_shard)
    write_run(dataset, captions, _BY_HAND)


if __name__ == "__main__":
    run(main, BuildIndexConfig, "build_index")
