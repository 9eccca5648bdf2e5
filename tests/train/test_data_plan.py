"""The data plan: a pure function, every clip once per epoch, whatever the ranks."""

from functools import partial

import numpy as np
import pytest

from train.data_plan import plan_batch

TOKENS = np.array([7, 3, 9, 4, 4, 8, 2, 6, 5, 1, 7])
PLANS = [
    partial(plan_batch, TOKENS, seed=0, stage="s", clips_per_batch=4),
    partial(plan_batch, TOKENS, seed=0, stage="s", clips_per_batch=8, max_tokens=16),
    partial(plan_batch, TOKENS[:1], seed=0, stage="s", clips_per_batch=4),
]


def stream(plan, num_clips: int) -> list:
    """The clips of the first batches, in order."""
    clips, position = [], 0
    while position < num_clips:
        batch = plan(position)
        clips += batch.clips
        position = batch.end
    return clips


@pytest.mark.parametrize("plan", PLANS)
def test_every_clip_comes_exactly_once_per_epoch(plan):
    num_rows = len(plan.args[0])
    clips = stream(plan, 5 * num_rows)
    for epoch in range(5):
        assert sorted(clip.row for clip in clips if clip.epoch == epoch)[:num_rows] == list(range(num_rows))


@pytest.mark.parametrize("plan", PLANS)
def test_a_batch_depends_on_its_position_alone(plan):
    positions = [0, 4, 8, 12, 20]
    forward = [plan(position) for position in positions]
    assert [plan(position) for position in reversed(positions)] == forward[::-1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_ranks_share_the_same_global_batch(plan, world_size):
    whole = plan(4)
    parts = [plan(4, rank=rank, world_size=world_size) for rank in range(world_size)]
    if plan.keywords.get("max_tokens") is None:
        assert {part.end for part in parts} == {whole.end}
        assert sorted(c.row for part in parts for c in part.clips) == sorted(c.row for c in whole.clips)
    assert sum(len(part.clips) for part in parts) == parts[0].num_global_clips
    assert all(part.clips for part in parts)


def test_epochs_seeds_and_stages_are_shuffled_apart():
    first = stream(PLANS[0], 22)
    rows = lambda clips: [clip.row for clip in clips]  # noqa: E731
    assert rows(first[:11]) != rows(first[11:22])
    for other in ({"seed": 1}, {"stage": "t"}):
        assert rows(stream(partial(PLANS[0], **other), 11)) != rows(first[:11])


def test_a_token_budget_holds_but_for_a_clip_that_is_larger():
    plan = partial(plan_batch, TOKENS, seed=0, stage="s", clips_per_batch=8, max_tokens=8)
    position = 0
    for _ in range(20):
        batch = plan(position)
        tokens = [TOKENS[clip.row] for clip in batch.clips]
        assert sum(tokens) <= 8 or len(tokens) == 1
        position = batch.end
