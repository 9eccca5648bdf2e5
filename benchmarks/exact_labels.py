"""Does the two-stage path lose anything? The story world labelled by its exact labeler must equal the truth.

python benchmarks/exact_labels.py FOLDER [NUM_CLIPS]

Writes clips of 6 to 30 frames, so that events are cut by one or two borders of subsets, labels them as a user
would, with answers that are the truth, and compares every story and every global caption.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.captions import read_captions, write_captions, write_run
from data_pipeline.dataset import FRAMES_FOLDER, DatasetRecord, finish, tool_versions, writing
from data_pipeline.labeling.partition import label_lines
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import Events, GlobalCaptions, UnifiedStory
from data_pipeline.shard_reader import finished_shards
from data_pipeline.shard_writer import ShardWriter
from storyanchors.clip import CaptionRecord, ClipInfo, StoryClip
from storyanchors.story_world import render_frame, sample_story, to_story
from storyanchors.vlm import VlmConfig

NUM_FRAMES = (6, 30)
CLIPS_PER_SHARD = 100
RUN = "exact"


def write_long_stories(out: Path, num_clips: int) -> None:
    """A dataset of such clips, their lengths drawn evenly, with its captions run "truth"."""
    record = DatasetRecord("exact_labels", {"num_clips": num_clips}, tool_versions("numpy"))
    with writing(out, record):
        for shard, first in enumerate(range(0, num_clips, CLIPS_PER_SHARD)):
            truths = []
            with ShardWriter(out / FRAMES_FOLDER, f"{shard:06d}") as writer:
                for number in range(first, min(first + CLIPS_PER_SHARD, num_clips)):
                    num_frames = int(np.random.default_rng(number).integers(NUM_FRAMES[0], NUM_FRAMES[1] + 1))
                    world_story, key = sample_story(number, num_frames=num_frames), f"long-story-{number:05d}"
                    frames = [Image.fromarray(render_frame(world_story, k + 1)) for k in range(num_frames)]
                    writer.add(key, StoryClip(_info(key, frames), frames).to_members())
                    story = to_story(world_story)
                    truths.append(CaptionRecord(key, story.global_caption, story))
                write_captions(out, "truth", f"{shard:06d}", truths)
                writer.finish()
        write_run(out, "truth", "exact_labels")
        finish(out, record, {"clips": num_clips})


def label_exactly(dataset: Path) -> None:
    config = LabelingConfig(str(dataset), RUN, VlmConfig("scripted"), script="story_world")
    for stage in (GlobalCaptions(), Events(), UnifiedStory()):
        run_stage(config, stage)


def compare(dataset: Path) -> dict[str, int]:
    """Of all clips: those whose story and global caption are the truth, and how often events were cut."""
    counts = {"clips": 0, "frames": 0, "stories_equal": 0, "global_captions_equal": 0, "cut_events": 0}
    for shard in finished_shards(dataset / FRAMES_FOLDER):
        labels = {line.record.key: line.record for line in read_captions(dataset, RUN, shard)}
        for line in read_captions(dataset, "truth", shard):
            truth, found = line.record, labels.get(line.record.key, CaptionRecord(line.record.key))
            counts["clips"] += 1
            counts["frames"] += truth.story.num_frames
            counts["stories_equal"] += found.story == replace(truth.story, global_caption="")
            counts["global_captions_equal"] += found.global_caption == truth.global_caption
        for line in label_lines(dataset, RUN, "story", shard):
            counts["cut_events"] += sum(len(ids) > 1 for ids in line["event_ids"])
    return counts


def _info(key: str, frames: list[Image.Image]) -> ClipInfo:
    height, width = frames[0].height, frames[0].width
    numbers = tuple(range(len(frames)))
    seconds = tuple(map(float, numbers))
    return ClipInfo(key=key, source=key, frame_numbers=numbers, seconds=seconds, height=height, width=width)


if __name__ == "__main__":
    folder, num_clips = Path(sys.argv[1]), int((*sys.argv, "500")[2])
    write_long_stories(folder, num_clips)
    begin = time.process_time()
    label_exactly(folder)
    result = compare(folder) | {"cpu_seconds_of_labeling": round(time.process_time() - begin, 1)}
    print(json.dumps(result, indent=1))
    assert result["stories_equal"] == result["global_captions_equal"] == num_clips
