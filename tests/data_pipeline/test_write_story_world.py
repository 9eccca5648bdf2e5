import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.build_index import build_index
from data_pipeline.captions import read_captions
from data_pipeline.sample_frames import SampleFramesConfig, find_videos, sample_frames
from data_pipeline.shard_reader import finished_shards, read_clips, read_marker
from data_pipeline.write_story_world import WriteStoryWorldConfig, story_of, write_dataset, write_videos
from storyanchors.clip import StoryClip
from storyanchors.story_world import from_story, render_frame, score_stories, to_story


def read_dataset(dataset, run="truth") -> list[StoryClip]:
    frames = dataset / "frames"
    clips = []
    for name in finished_shards(frames):
        captions = {line.record.key: line.record for line in read_captions(dataset, run, name)}
        for key, members in read_clips(frames, read_marker(frames, name)):
            clips.append(StoryClip.from_members(members, captions[key]))
    return clips


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "ds"
    write_dataset(out, WriteStoryWorldConfig(str(out), num_stories=12, seed=3, clips_per_shard=5, workers=2))
    build_index(out, "truth")
    return out


def test_every_clip_shows_what_its_captions_say(dataset):
    clips = read_dataset(dataset)
    assert len(clips) == 12
    for number, clip in enumerate(clips):
        world_story = from_story(clip.story)
        assert world_story == story_of(WriteStoryWorldConfig(seed=3), number)
        assert clip.global_caption == clip.story.global_caption
        for k, frame in enumerate(clip.frames, start=1):
            error = np.abs(np.asarray(frame, int) - render_frame(world_story, k).astype(int))
            assert error.mean() < 2


def test_jpegs_keep_every_fact(dataset):
    clips = read_dataset(dataset)[:4]
    scores = score_stories([clip.frames for clip in clips], [from_story(clip.story) for clip in clips])
    assert scores["pfa_f1"] == scores["subject_consistency"] == scores["event_accuracy"] == 1.0


def test_lengths_are_drawn_from_the_asked_range(tmp_path):
    config = WriteStoryWorldConfig(str(tmp_path / "ds"), num_stories=40, num_frames=[3, 5])
    lengths = {story_of(config, number).num_frames for number in range(40)}
    assert lengths == {3, 4, 5}


def test_the_index_holds_every_story_and_caption(dataset):
    rows = pq.read_table(dataset / "index.parquet").to_pylist()
    assert len(rows) == 12 and all(row["story_words"] and row["global_caption_words"] for row in rows)
    assert {row["caption_run"] for row in rows} == {"truth"}
    assert len({row["source"] for row in rows}) == 12


def test_the_number_of_workers_changes_no_byte_and_a_lost_shard_comes_back(dataset, tmp_path, tree):
    out = tmp_path / "ds"
    config = WriteStoryWorldConfig(str(out), num_stories=12, seed=3, clips_per_shard=5, workers=1)
    write_dataset(out, config)
    for path in (out / "frames").glob("000001.*"):
        path.unlink()
    write_dataset(out, config)
    build_index(out, "truth")
    assert tree(out) == tree(dataset)
    assert json.loads((out / "dataset.json").read_bytes())["counts"]["clips"] == 12


def test_its_videos_go_the_whole_way_of_real_ones(tmp_path):
    """H.264 in, sampled at interval 69: the frames still show every fact of their stories."""
    videos, out = tmp_path / "videos", tmp_path / "ds"
    write_videos(videos, WriteStoryWorldConfig(str(videos), num_stories=4, num_frames=[4, 6], videos=True))
    assert sorted(path.suffix for path in videos.iterdir()) == [".mp4"] * 4 + [".yaml"] * 4
    counts, _ = sample_frames(find_videos(videos), out, SampleFramesConfig(str(videos), str(out)))
    assert (counts["clips"], counts["rejected"], counts["short_rests"]) == (4, 0, 0)
    build_index(out, "truth", videos)
    clips = read_dataset(out)
    stories = [from_story(clip.story) for clip in clips]
    scores = score_stories([clip.frames for clip in clips], stories)
    assert scores["pfa_f1"] > 0.99 and scores["event_order_tau"] == 1.0
    assert all(clip.info.motion > 0 for clip in clips)


def test_anonymous_and_dense_clips_tell_what_they_show(tmp_path):
    clips = {}
    for kind in ("anonymous", "dense"):
        out = tmp_path / kind
        write_dataset(out, WriteStoryWorldConfig(str(out), num_stories=10, clips=kind, workers=1))
        clips[kind] = read_dataset(out)
    for number, clip in enumerate(clips["anonymous"]):
        assert clip.story == to_story(story_of(WriteStoryWorldConfig(), number), anonymous=True)
    for clip in clips["dense"]:
        steps = np.diff(clip.info.frame_numbers)
        assert set(steps) == {clip.info.frame_interval + 1} and clip.info.frame_interval < 14
        assert clip.story.num_frames == len(clip.frames)


def test_an_unknown_kind_of_clips_is_an_error():
    with pytest.raises(ValueError, match="clips is 'dens', expected one of stories, anonymous, dense"):
        WriteStoryWorldConfig(clips="dens")
    with pytest.raises(ValueError, match="videos=true writes videos of whole stories"):
        WriteStoryWorldConfig(clips="dense", videos=True)
