"""Who replaces a broken clip is a pure function of its row; too many broken ones stop the run."""

import json

import numpy as np
import pytest

from train.clips.quarantine import MAX_REPLACEMENTS, BrokenClip, Quarantine, Replacements

TOKENS = np.array([40] * 30 + [10, 20] * 40 + [99])
BROKEN = BrokenClip("a", "000000.tar", "001.jpg", "crc32", "b", 0)


def test_a_replacement_has_as_many_tokens_first_and_never_more():
    replacements = Replacements(TOKENS)
    for row in range(len(TOKENS)):
        others = list(replacements.of(row))
        assert len(set(others)) == len(others) == MAX_REPLACEMENTS and row not in others
        tokens = TOKENS[others]
        assert (tokens <= TOKENS[row]).all() and (np.diff(tokens) <= 0).all()
        if row < 110:
            assert (tokens == TOKENS[row]).all()
    assert (TOKENS[list(replacements.of(110))] == 40).all()  # nothing has as many as the only longest


def test_replacements_are_the_same_in_every_process_and_not_neighbours():
    assert list(Replacements(TOKENS).of(3)) == list(Replacements(TOKENS).of(3))
    others = np.array([list(Replacements(TOKENS).of(row)) for row in range(30)])
    assert (np.abs(others - np.arange(30)[:, None]) > 1).mean() > 0.8  # a damaged shard has neighbours
    assert list(Replacements(np.array([5, 7])).of(0)) == []
    assert list(Replacements(np.array([5, 7])).of(1)) == [0]


def test_a_share_of_broken_clips_is_allowed_and_ten_always(tmp_path):
    quarantine = Quarantine(tmp_path, rank=3, max_share=0.01)
    for _ in range(10):
        quarantine.add([BROKEN], num_clips=1)
    with pytest.raises(
        ValueError, match=r"11 of 21 clips read are broken, more than data.max_broken_share=0.01"
    ):
        quarantine.add([BROKEN], num_clips=0)
    lines = (tmp_path / "rank_00003.jsonl").read_text().splitlines()
    assert len(lines) == 11 and BrokenClip(**json.loads(lines[0])) == BROKEN
    later = Quarantine(tmp_path, rank=4, max_share=0.01)
    later.add([], num_clips=10_000)
    later.add([BROKEN] * 100, num_clips=0)
    with pytest.raises(ValueError, match="102 of"):
        later.add([BROKEN] * 2, num_clips=0)
    with pytest.raises(ValueError, match="1 of 2 clips"):
        Quarantine(tmp_path, rank=5, max_share=0).add([BROKEN], num_clips=1)
