"""A run that is killed again and again ends as if nothing had been."""

from pathlib import Path

import pytest

from data_pipeline.build_index import build_index
from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from tests.train.killed_training import kill_often


@pytest.mark.slow
def test_25_kills_lose_no_clip_and_change_no_bit(tmp_path: Path):
    dataset = tmp_path / "dataset"
    write_dataset(dataset, WriteStoryWorldConfig(str(dataset), num_stories=20, num_frames=[3, 5], workers=1))
    build_index(dataset, "truth")
    audit = kill_often(tmp_path, dataset, num_kills=25, seed=1)
    assert audit.faults == []
    assert len(audit.kills) == 25 and set(audit.counts("phase")) == {"start", "step", "save", "hand-over"}
    assert audit.compared > 500
