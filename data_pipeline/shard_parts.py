"""The shards that a job is going to write, and their parts: one per video, each a small shard of its own.

The videos of a shard are fixed from the start, and a part, once it has its marker, is never cut again. So
neither the number of workers nor a kill changes what comes out.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.clip_cutter import Video
from data_pipeline.dataset import FRAMES_FOLDER
from data_pipeline.shard_reader import read_clips, read_marker
from data_pipeline.shard_writer import ShardMarker, ShardWriter, VideoReport

PARTS_FOLDER = "parts"


@dataclass(frozen=True)
class PlannedShard:
    dataset: Path
    name: str
    videos: tuple[Video, ...]

    @property
    def parts_folder(self) -> Path:
        return self.dataset / PARTS_FOLDER / self.name

    def is_finished(self) -> bool:
        return (self.dataset / FRAMES_FOLDER / f"{self.name}.json").exists()

    def read_marker(self) -> ShardMarker:
        return read_marker(self.dataset / FRAMES_FOLDER, self.name)

    def parts(self) -> list["Part"]:
        return [Part(self, f"{place:06d}", video) for place, video in enumerate(self.videos)]

    def missing_parts(self) -> list["Part"]:
        """Makes room for the parts and says which of them are still to be cut."""
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        return [part for part in self.parts() if not (self.parts_folder / f"{part.name}.json").exists()]

    def join(self) -> ShardMarker:
        """The parts, all of which are there, become the shard."""
        reports: list[VideoReport] = []
        with ShardWriter(self.dataset / FRAMES_FOLDER, self.name) as shard:
            for part in self.parts():
                marker = read_marker(self.parts_folder, part.name)
                for key, members in read_clips(self.parts_folder, marker):
                    shard.add(key, members)
                reports += marker.videos
            joined = shard.finish(reports)
        shutil.rmtree(self.parts_folder)
        return joined


@dataclass(frozen=True)
class Part:
    """One video's share of a shard, and its name in the shard's parts folder."""

    shard: PlannedShard
    name: str
    video: Video


def plan_shards(dataset: Path, videos: list[Video], videos_per_shard: int) -> list[PlannedShard]:
    firsts = range(0, len(videos), videos_per_shard)
    return [
        PlannedShard(dataset, f"{number:06d}", tuple(videos[first : first + videos_per_shard]))
        for number, first in enumerate(firsts)
    ]


def remove_parts(dataset: Path) -> None:
    """When all shards are finished; a kill may have left some behind."""
    shutil.rmtree(dataset / PARTS_FOLDER, ignore_errors=True)
