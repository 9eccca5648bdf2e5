"""Which clips become samples."""

import numpy as np
import pytest

from train.clips.clip_index import ClipIndex
from train.watching.story_samples import read_sample_stories


@pytest.mark.parametrize(("asked", "warned"), [(2, False), (3, True)])
def test_fewer_samples_than_asked_for_are_said(dataset, caplog, asked, warned):
    index = ClipIndex.open(dataset).only(np.arange(10) < 2)
    assert len(read_sample_stories(index, asked)) == 2
    assert bool(caplog.messages) == warned
    assert not warned or "samples.num_stories=3, found 2 among the 2 clips" in caplog.text
