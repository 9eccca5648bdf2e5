"""Writes one clip of a dataset as a folder of frames, which continue_story.py takes as frames=FOLDER.

python data_pipeline/extract_clip.py dataset=DATASET key=KEY out=FOLDER

Writes the decoded frames 001.png, 002.png, ..., clip.json and, where index.parquet joins a story to the
clip, story.yaml. key may be left out when the dataset has a single clip.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import MISSING

from conf.command import run
from data_pipeline.captions import read_captions
from data_pipeline.dataset import FRAMES_FOLDER, read_record
from data_pipeline.shard_reader import read_clips, read_marker
from storyanchors.clip import INFO_MEMBER, StoryClip
from storyanchors.index_file import PARQUET_FILE
from storyanchors.output_folder import check_output_folder, output_folder

STORY_FILE = "story.yaml"
_KEYS_SHOWN = 5


@dataclass
class ExtractClipConfig:
    dataset: str = MISSING
    key: str | None = None  # None: the only clip there is
    out: str = MISSING


def main(config: ExtractClipConfig) -> None:
    out = Path(config.out)
    check_output_folder(out, made_with=INFO_MEMBER)
    clip = read_clip(Path(config.dataset), config.key)
    with output_folder(out, made_with=INFO_MEMBER) as folder:
        for number, frame in enumerate(clip.frames, start=1):
            frame.save(folder / f"{number:03d}.png")
        (folder / INFO_MEMBER).write_bytes(clip.info.to_json())
        if clip.story:
            clip.story.to_file(folder / STORY_FILE)
    info = clip.info
    story = f"with {STORY_FILE}" if clip.story else "without a story"
    print(f"{out}: {info.num_frames} frames of {info.width} x {info.height} pixels, {story}")
    facts = {"fps": info.fps, "frame_interval": info.frame_interval, "motion": info.motion}
    print("clip", info.key, *(f"{name}={value}" for name, value in facts.items() if value is not None))


def read_clip(dataset: Path, key: str | None) -> StoryClip:
    """A clip with the captions that the index joins to it; ValueError for a key that the index has not."""
    read_record(dataset)
    index, frames = dataset / PARQUET_FILE, dataset / FRAMES_FOLDER
    if not index.is_file():
        raise ValueError(f"no index at {index}: write it with data_pipeline/build_index.py dataset={dataset}")
    table = pq.read_table(index, columns=["key", "shard", "caption_run"])
    keys = table["key"].to_pylist()
    row = table.slice(_position(keys, key, dataset), 1).to_pylist()[0]
    key, shard, captions = row["key"], row["shard"], row["caption_run"]
    clips = read_clips(frames, read_marker(frames, shard))
    members = next((members for found, members in clips if found == key), None)
    if members is None:
        raise ValueError(f"{index} has clip {key} in shard {shard}, which has no such clip: build it anew")
    if captions is None:
        return StoryClip.from_members(members)
    lines = read_captions(dataset, captions, shard)
    caption = next((line.record for line in lines if line.record.key == key), None)
    if caption is None:
        raise ValueError(f"{index} has captions {captions} of clip {key}, that run has none: build it anew")
    return StoryClip.from_members(members, caption)


def _position(keys: list[str], key: str | None, dataset: Path) -> int:
    """Where the key is in the index; None means the only one."""
    if key in keys:
        return keys.index(key)
    if key is None and len(keys) == 1:
        return 0
    wrong = "key=... is missing" if key is None else f"no clip {key}"
    more = ", ..." if len(keys) > _KEYS_SHOWN else ""
    raise ValueError(f"{wrong}: {dataset} has {len(keys)} clips, {', '.join(keys[:_KEYS_SHOWN])}{more}")


if __name__ == "__main__":
    run(main, ExtractClipConfig, "extract_clip")
