from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build_index import build_index
from data_pipeline.captions import read_captions
from data_pipeline.sample_frames import SampleFramesConfig, find_videos, sample_frames
from data_pipeline.shard_reader import read_clips, read_marker
from storyanchors.clip import StoryClip

EXAMPLES = Path(__file__).parents[2] / "examples" / "videos"


@pytest.fixture(scope="module")
def sintel(tmp_path_factory) -> StoryClip:
    out = tmp_path_factory.mktemp("sintel") / "ds"
    sample_frames(find_videos(EXAMPLES), out, SampleFramesConfig(str(EXAMPLES), str(out), frame_interval=69))
    build_index(out, "by_hand", EXAMPLES)
    [line] = read_captions(out, "by_hand", "000000")
    [(_, members)] = read_clips(out / "frames", read_marker(out / "frames", "000000"))
    return StoryClip.from_members(members, line.record)


def test_the_film_gives_the_eleven_frames_of_its_story(sintel):
    assert sintel.info.num_frames == sintel.story.num_frames == 11
    assert sintel.info.frame_numbers == tuple(range(0, 701, 70))
    assert (sintel.info.height, sintel.info.width, sintel.info.fps) == (480, 848, 24.0)


def test_the_frames_look_as_they_are_described(sintel):
    luma = [np.asarray(frame.convert("L"), float) for frame in sintel.frames]
    warmth = [
        np.asarray(frame, float)[..., 0].mean() - np.asarray(frame, float)[..., 2].mean()
        for frame in sintel.frames
    ]
    assert luma[9].mean() < 2  # the screen is black
    assert luma[3].mean() < 5 and luma[3].max() > 150  # a black title card with letters
    assert max(warmth[k] for k in (0, 1, 2, 5)) < 10  # snow is cold
    assert min(warmth[k] for k in (8, 10)) > 30  # sunset and orange sky
