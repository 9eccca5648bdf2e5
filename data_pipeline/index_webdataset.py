"""Makes a dataset of WebDataset tars made by others: images stay where they are, videos are cut into shards.

python data_pipeline/index_webdataset.py tars=FOLDER out=DATASET
python data_pipeline/index_webdataset.py tars=LIST.txt out=DATASET caption_key=text source_key=video_id
python train/run_stage.py data.dataset=DATASET ...

tars is a folder (searched to the bottom for .tar), a .txt list (per line a path, relative to the list, or an
https:// or s3:// URL) or one tar. A sample's images are the story frames of one clip; its mp4 is sampled as
sample_frames does. Captions come from its json or txt. DATASET/rejected.jsonl names what cannot be used.
Stopped or killed, the same command continues.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np
import pyarrow as pa
from omegaconf import MISSING
from tqdm import tqdm

from conf.command import Stopped, run
from data_pipeline.build_index import CLIP_COLUMNS, build_index
from data_pipeline.captions import write_captions, write_run
from data_pipeline.clip_cutter import Video, cut_video, write_rejection
from data_pipeline.dataset import (
    FRAMES_FOLDER,
    DatasetRecord,
    finish,
    tool_versions,
    write_atomically,
    writing,
)
from data_pipeline.sample_frames import REJECTED_FILE, SampleFramesConfig, stop_signals
from data_pipeline.shard_parts import PARTS_FOLDER, PlannedShard, remove_parts
from data_pipeline.shard_reader import finished_shards, read_entries, read_marker
from data_pipeline.tar_records import (
    TARS_FOLDER,
    TarBytes,
    TarRecord,
    copy_member,
    read_tar_captions,
    read_tar_records,
    write_tar_record,
)
from data_pipeline.tar_samples import SampleRules, TarContents, read_tar
from data_pipeline.worker_pool import num_workers, run_isolated
from storyanchors.clip import MAX_FRAME_PIXELS, CaptionRecord
from storyanchors.shard_store import ShardStore, printable, scheme_of

TARS_FILE = "tars.jsonl"
_COMPRESSED_TARS = ("*.tar.*", "*.tgz")


@dataclass
class IndexWebdatasetConfig:
    tars: str = MISSING
    out: str = MISSING
    captions: str = "original"  # the captions run that json and txt become
    caption_key: str = "caption"  # of a sample's json; without it, its txt
    story_key: str = "story"  # of a sample's json: events, subjects, style, as in a story file
    source_key: str | None = None  # of a sample's json: the video it comes from, which is held out as one
    min_frames: int = 1
    max_frames: int = 24
    max_pixels: int = MAX_FRAME_PIXELS  # of an image: in place, none is made smaller
    frame_interval: int = 69  # of videos: source frames strictly between two story frames
    video_max_pixels: int = 409600  # of a story frame of a video
    workers: int | None = None  # processes; None: one per core
    timeout_s: float = 3600.0  # for one tar or one video
    license_note: str = ""  # goes into dataset.json

    def __post_init__(self):
        _ = self.for_videos  # which has limits of its own
        if not 256 <= self.max_pixels <= MAX_FRAME_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}, expected 256 to {MAX_FRAME_PIXELS}")

    @property
    def for_videos(self) -> SampleFramesConfig:
        same = ("out", "frame_interval", "max_frames", "min_frames", "workers", "timeout_s")
        values = {name: getattr(self, name) for name in same}
        return SampleFramesConfig(videos=self.tars, max_pixels=self.video_max_pixels, **values)

    @property
    def rules(self) -> SampleRules:
        return SampleRules(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(SampleRules)}
        )


def main(config: IndexWebdatasetConfig) -> None:
    out = Path(config.out)
    with stop_signals() as stop_requested:
        counts = index_webdataset(find_tars(config.tars), out, config, stop_requested)
    if not counts["clips"]:
        raise ValueError(_no_clip(config, counts, out / REJECTED_FILE))
    summary = build_index(out, config.captions if counts["captions"] else None, workers=config.workers)
    print(
        f"{counts['tars']} tars: {counts['in_place']} clips of images in place, {counts['videos']} videos cut"
        f" into {summary.num_clips - counts['in_place']} clips; {summary.num_frames} story frames"
    )
    print(f"captions {config.captions}: {summary.num_global_captions} global, {summary.num_stories} stories")
    if counts["rejected"]:
        print(f"not used: {counts['rejected']} samples or members, see {out / REJECTED_FILE}")


def _no_clip(config: IndexWebdatasetConfig, counts: dict[str, int], rejected: Path) -> str:
    """Why, by the first of the reasons."""
    first = json.loads(rejected.read_text().partition("\n")[0])
    where = f"{first['tar']}, sample {first['sample']}" if first["sample"] else first["tar"]
    return (
        f"found no clip in {counts['tars']} tars of {config.tars}: {where}: {first['reason']} "
        f"(the first of {counts['rejected']} reasons in {rejected})"
    )


def find_tars(where: str) -> dict[str, str]:
    """Location (absolute path or URL) of every tar by its id, which keys are made from; in a fixed order."""
    path = Path(where)
    if scheme_of(where):
        found = {where: where}
    elif path.is_dir():
        found = {
            tar.relative_to(path).as_posix(): str(tar.absolute())
            for tar in path.rglob("*.tar")
            if tar.is_file()
        }
    elif path.suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
        found = {name: name if scheme_of(name) else str((path.parent / name).absolute()) for name in names}
        if len(found) < len(names):
            raise ValueError(f"{where} lists a tar more than once")
    elif path.is_file():
        found = {path.name: str(path.absolute())}
    else:
        raise ValueError(f"tars={where}: no such folder, .txt list or tar")
    if not found:
        packed = next((file for kind in _COMPRESSED_TARS for file in path.rglob(kind)), None)
        hint = f", only compressed ones such as {packed}: clips are read in place, unpack the tars themselves"
        raise ValueError(f"found no .tar in {where}{hint if packed else ''}")
    for location in found.values():
        if printable(location) != location:
            raise ValueError(f"{printable(location)} has a user or a query: the index would show it to all")
    return dict(sorted(found.items()))


def index_webdataset(
    tars: dict[str, str],
    out: Path,
    config: IndexWebdatasetConfig,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, int]:
    """Writes, or goes on writing, everything but the index; returns what there is.

    Raises Stopped soon after stop_requested() is true; calling it again continues.
    """
    decides = dataclasses.asdict(config.rules) | dataclasses.asdict(config.for_videos.recipe)
    record = DatasetRecord(
        made_by="index_webdataset",
        config=decides | {"captions": config.captions, "max_pixels_in_place": config.max_pixels},
        tool=tool_versions("av", "numpy"),
        license_note=config.license_note,
    )
    with writing(out, record):
        (out / TARS_FOLDER).mkdir(exist_ok=True)
        sizes = _begin_tar_list(out, tars)
        _read_missing_tars(out, tars, sizes, config, stop_requested)
        records = read_tar_records(out)
        _cut_missing_videos(out, records, config, stop_requested)
        num_captions = _write_captions(out, records, config.captions)
        num_rejected = _write_rejected(out, records)
        remove_parts(out)
        shards = finished_shards(out / FRAMES_FOLDER)
        in_place = sum(record.num_clips for record in records)
        counts = {
            "tars": len(records),
            "shards": len(shards),
            "in_place": in_place,
            "clips": in_place + sum(read_marker(out / FRAMES_FOLDER, name).num_clips for name in shards),
            "videos": sum(len(record.videos) for record in records),
            "captions": num_captions,
            "rejected": num_rejected,
        }
        finish(out, record, counts)
    return counts


def _begin_tar_list(out: Path, tars: dict[str, str]) -> dict[str, int]:
    """The bytes of every tar; ValueError where the dataset was begun with other ones."""
    store = ShardStore()
    now = {}
    for tar, location in tars.items():
        num_bytes, version = store.state(location)
        now[tar] = {"location": location, "bytes": num_bytes, "version": version}
    path = out / TARS_FILE
    if not path.exists():
        lines = [json.dumps({"tar": tar, **state}) + "\n" for tar, state in now.items()]
        write_atomically(path, "".join(lines).encode())
    begun = {entry.pop("tar"): entry for entry in map(json.loads, path.read_text().splitlines())}
    if changed := sorted(tar for tar in begun.keys() | now if begun.get(tar) != now.get(tar)):
        raise ValueError(
            f"{out} was begun with other tars: {_difference(changed[0], begun, now)}, {len(changed)} differ; "
            "give the same, or index these into a new out=FOLDER (data.mix trains on both)"
        )
    return {tar: state["bytes"] for tar, state in now.items()}


def _difference(tar: str, begun: dict[str, dict], now: dict[str, dict]) -> str:
    if tar not in begun:
        return f"{tar} was not there then"
    if tar not in now:
        return f"{tar} is not there now"
    if (then := begun[tar]["location"]) != now[tar]["location"]:
        return f"{tar} was at {then} then, is at {now[tar]['location']} now"
    if (then := begun[tar]["bytes"]) != now[tar]["bytes"]:
        return f"{tar} had {then} bytes then, {now[tar]['bytes']} now"
    return f"{tar} was written again since then"


def _read_missing_tars(
    out: Path,
    tars: dict[str, str],
    sizes: dict[str, int],
    config: IndexWebdatasetConfig,
    stop_requested: Callable[[], bool],
) -> None:
    """A process for each tar that has no record yet: whatever a tar does to it, the others go on."""
    numbered = {f"{number:06d}": tar for number, tar in enumerate(tars)}
    missing = [name for name in numbered if not (out / TARS_FOLDER / f"{name}.json").exists()]
    bytes_of_task = np.frombuffer(RawArray("q", max(1, len(missing))), np.int64)  # each writes its own

    def read(task: int) -> None:
        name = missing[task]
        tar = numbered[name]
        progress = partial(bytes_of_task.__setitem__, task)
        tar_bytes = TarBytes(tars[tar], sizes[tar])
        contents = read_tar(tar_bytes.read_at, sizes[tar], tar, config.rules, progress)
        write_tar_record(out, name, tars[tar], sizes[tar], contents, pa.schema(CLIP_COLUMNS))

    done = sum(sizes[tar] for name, tar in numbered.items() if name not in missing)
    with _progress("reading", sum(sizes.values()), done, unit="B", unit_scale=True) as bar:

        def tick() -> None:
            bar.update(done + int(bytes_of_task.sum()) - bar.n)
            if stop_requested():
                raise Stopped(f"{bar.n} of {bar.total} bytes are read; the same command continues")

        workers = num_workers(config.workers)
        for task, death in run_isolated(
            read, range(len(missing)), workers=workers, timeout_s=config.timeout_s, tick=tick
        ):
            if death:
                tar, contents = numbered[missing[task]], TarContents(rejected=[(None, death)])
                write_tar_record(out, missing[task], tars[tar], sizes[tar], contents, pa.schema(CLIP_COLUMNS))
        tick()


def _cut_missing_videos(
    out: Path, records: list[TarRecord], config: IndexWebdatasetConfig, stop_requested: Callable[[], bool]
) -> None:
    """The videos of a tar become the shard of its number, cut as sample_frames does: one process for each."""
    recipe, tasks, missing = config.for_videos.recipe, [], {}
    for record in records:
        shard = _planned_shard(out, record)
        if record.videos and not shard.is_finished():
            videos = dict(zip(shard.videos, record.videos, strict=True))
            missing[shard] = shard.missing_parts()
            tasks += [(part, record, videos[part.video]) for part in missing[shard]]
            if not missing[shard]:
                shard.join()

    def cut(task: int) -> None:
        part, record, video = tasks[task]
        part.video.path.parent.mkdir(exist_ok=True)
        try:
            copy_member(record, video, part.video.path)
            cut_video(part.video, recipe, part.shard.parts_folder, part.name, lambda num_clips: None)
        finally:
            part.video.path.unlink(missing_ok=True)

    if not (total := sum(len(record.videos) for record in records)):
        return
    with _progress("cutting", total, total - len(tasks), unit="video") as bar:

        def tick() -> None:
            bar.update(0)
            if stop_requested():
                raise Stopped(f"{bar.n} of {bar.total} videos are cut; the same command continues")

        workers = num_workers(config.workers)
        for task, death in run_isolated(
            cut, range(len(tasks)), workers=workers, timeout_s=config.timeout_s, tick=tick
        ):
            part = tasks[task][0]
            if death:
                write_rejection(part.video.id, death, part.shard.parts_folder, part.name)
            missing[part.shard].remove(part)
            if not missing[part.shard]:
                part.shard.join()
            bar.update()


def _planned_shard(out: Path, record: TarRecord) -> PlannedShard:
    copies = out / PARTS_FOLDER / "videos"
    videos = [
        Video(video.source, copies / f"{record.name}-{video.key}.{video.suffix}", video.key)
        for video in record.videos
    ]
    return PlannedShard(out, record.name, tuple(videos))


def _write_captions(out: Path, records: list[TarRecord], captions: str) -> int:
    """Of images, and of each video that gave one clip: a text about a whole video does not tell a part."""
    num_captions = 0
    for record in records:
        texts = {caption.key: caption for caption in read_tar_captions(out, record.name)}
        if record.videos:
            marker = read_marker(out / FRAMES_FOLDER, record.name)
            num_frames = {
                entry.key: len(entry.members) - 1 for entry in read_entries(out / FRAMES_FOLDER, marker)
            }
            for video, report in zip(record.videos, marker.videos, strict=True):
                if (caption := texts.pop(video.key, None)) and report.num_clips == 1:
                    key = f"{video.key}-00000"
                    story = caption.story
                    if story and story.num_frames != num_frames[key]:
                        story = None
                    texts[key] = CaptionRecord(key, caption.global_caption, story)
        texts = [caption for caption in texts.values() if caption.global_caption or caption.story]
        if texts:
            write_captions(out, captions, record.name, texts)
        num_captions += len(texts)
    if num_captions:
        write_run(out, captions, "index_webdataset")
    return num_captions


def _write_rejected(out: Path, records: list[TarRecord]) -> int:
    lines = []
    for record in records:
        tar = printable(record.tar)
        lines += [{"tar": tar, "sample": sample, "reason": reason} for sample, reason in record.rejected]
        if record.videos:
            reports = read_marker(out / FRAMES_FOLDER, record.name).videos
            lines += [
                {"tar": tar, "sample": video.sample, "reason": report.rejected or "too short for a clip"}
                for video, report in zip(record.videos, reports, strict=True)
                if not report.num_clips
            ]
    write_atomically(out / REJECTED_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return len(lines)


def _progress(what: str, total: int, done: int, **settings) -> tqdm:
    """A bar on a terminal, a line now and then in a log."""
    tqdm.monitor_interval = 0  # its thread would be in the way of fork
    interval_s = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(desc=what, total=total, initial=done, mininterval=interval_s, **settings)


if __name__ == "__main__":
    run(main, IndexWebdatasetConfig, "index_webdataset")
