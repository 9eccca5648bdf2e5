"""The data plan: a pure function; every clip once per epoch; balanced packs, whatever the number of ranks."""

from itertools import islice

import numpy as np
import pytest

from train.clips.clip_stream import BLOCK, ClipStream, Mix
from train.data_plan import DataPlan, pack_clips

CASES = range(12)


def random_plan(case: int, **changes) -> DataPlan:
    """Clips of very unequal length, batches of 1, 2 or 4 packs; every other case has a cap."""
    rng = np.random.default_rng(case)
    tokens = rng.integers(1, 40, size=int(rng.integers(1, 60)))
    packs_per_batch = int(rng.choice([1, 2, 4]))
    settings = dict(
        seed=case,
        stage="s",
        packs_per_batch=packs_per_batch,
        clips_per_batch=packs_per_batch * int(rng.integers(1, 5)),
        look_ahead=int(rng.integers(1, 6)),
        max_tokens=int(tokens.max() * rng.uniform(1, 3)) if case % 2 else None,
    )
    return DataPlan(tokens, (tokens + tokens**2 / 20).astype(float), **(settings | changes))


def batches(plan: DataPlan, num_clips: int, position: int = 0) -> list:
    """The first batches that hold at least so many clips."""
    found = []
    while position < num_clips:
        found.append(plan.batch(position))
        position = found[-1].end
    return found


def clips_of(batch) -> list:
    return [clip for pack in batch.packs for clip in pack]


@pytest.mark.parametrize("case", CASES)
def test_every_clip_comes_exactly_once_per_epoch(case):
    plan = random_plan(case)
    num_rows = len(plan.tokens)
    windows = -(-5 * num_rows // plan.window_clips) * plan.window_clips
    clips = [clip for batch in batches(plan, windows) for clip in clips_of(batch)]
    assert len(set(clips)) == len(clips) == windows
    for epoch in range(5):
        assert sorted(clip.row for clip in clips if clip.epoch == epoch) == list(range(num_rows))


@pytest.mark.parametrize("case", CASES)
def test_a_batch_depends_on_its_position_alone(case):
    expected = batches(random_plan(case), 300)
    assert [random_plan(case).batch(batch.start) for batch in reversed(expected)] == expected[::-1]
    middle = expected[len(expected) // 2].start  # resumed there
    assert batches(random_plan(case), 300, middle) == expected[len(expected) // 2 :]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_share_the_same_batches_whatever_their_number(case, world_size):
    plan = random_plan(case, packs_per_batch=4, clips_per_batch=12)
    expected = batches(plan, 200)
    steps = 4 // world_size
    ranks = [
        list(islice(plan.packs(0, rank=rank, world_size=world_size), steps * len(expected)))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(expected):
        packs = [pack for rank in ranks for pack in rank[number * steps : (number + 1) * steps]]
        assert sorted(pack.clips for pack in packs) == sorted(batch.packs)
        assert {pack.next_position for pack in packs} == {batch.end}
        # the weights of all clips sum to 1: each has 1 / num_global_clips
        assert {pack.num_global_clips for pack in packs} == {sum(len(pack.clips) for pack in packs)}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_changes_its_ranks_goes_on_where_it_was(case):
    plan = random_plan(case, packs_per_batch=4, clips_per_batch=12)
    expected = [clip for batch in batches(plan, 300) for clip in clips_of(batch)]
    seen, position = [], 0
    for world_size in (1, 2, 4, 2, 1):
        for _ in range(3):
            packs = []
            for rank in range(world_size):
                of_rank = plan.packs(position, rank=rank, world_size=world_size)
                packs += islice(of_rank, 4 // world_size)
            seen += sorted(clip for pack in packs for clip in pack.clips)
            position = packs[0].next_position
    assert sorted(seen) == sorted(expected[: len(seen)])


@pytest.mark.parametrize("case", CASES)
def test_no_pack_is_empty_or_above_the_cap_and_every_batch_has_its_packs(case):
    plan = random_plan(case)
    for batch in batches(plan, 400):
        assert len(batch.packs) == plan.packs_per_batch and all(batch.packs)
        if plan.max_tokens:
            assert max(sum(plan.tokens[clip.row] for clip in pack) for pack in batch.packs) <= plan.max_tokens


def test_a_cap_makes_more_batches_and_drops_nothing():
    tokens = np.full(64, 10)
    plan = DataPlan(
        tokens, tokens * 1.0, seed=0, stage="s", clips_per_batch=16, packs_per_batch=2, max_tokens=39
    )
    sizes = [batch.num_global_clips for batch in batches(plan, 64)]
    assert sum(sizes) == 64 and max(sizes) == 2 * 3  # three clips of 10 tokens fit under 39


def loads(plan: DataPlan, packs) -> list[float]:
    return [sum(plan.costs[clip.row] for clip in pack) for pack in packs]


def useful_share(plan: DataPlan, num_batches: int = 24) -> float:
    """Work over the time of all ranks when each micro-step takes as long as its dearest pack."""
    work = time = 0.0
    for batch in batches(plan, num_batches * plan.window_clips // plan.look_ahead):
        work += sum(loads(plan, batch.packs))
        time += max(loads(plan, batch.packs)) * plan.packs_per_batch
    return work / time


def many_clips(**changes) -> DataPlan:
    """Like long stories at several sizes: half of the cost in a fifth of the clips."""
    tokens = np.random.default_rng(0).lognormal(3.0, 0.7, size=5000).clip(5, 120).astype(int)
    settings = dict(seed=0, stage="s", clips_per_batch=64, packs_per_batch=16)
    return DataPlan(tokens, (tokens * (60 + tokens)).astype(float), **(settings | changes))


def test_packs_are_balanced_and_looking_ahead_balances_better():
    shares = [useful_share(many_clips(look_ahead=look_ahead)) for look_ahead in (1, 2, 4, 8)]
    assert shares == sorted(shares) and shares[0] < shares[2] - 0.1 and shares[3] > 0.9
    alone = many_clips(clips_per_batch=16, look_ahead=1)  # one clip per pack: nothing to balance
    assert useful_share(alone) < 0.3


def test_the_ranks_of_a_step_and_of_each_micro_step_have_similar_work():
    plan = many_clips(look_ahead=1)
    of_ranks = [list(islice(plan.packs(0, rank=rank, world_size=4), 4 * 12)) for rank in range(4)]
    for start in range(0, 48, 4):
        batch = plan.batch(of_ranks[0][start].next_position - of_ranks[0][start].num_global_clips)
        work = np.array([loads(plan, [pack.clips for pack in rank[start : start + 4]]) for rank in of_ranks])
        dearest = sorted(loads(plan, batch.packs), reverse=True)
        assert sorted(work[:, 0], reverse=True) == pytest.approx(dearest[:4])
        in_order = np.array(dearest).reshape(4, 4).sum(0)  # always the same rank first
        assert work.sum(1).max() <= in_order.max() and np.ptp(work.sum(1)) < np.ptp(in_order)


@pytest.mark.parametrize("case", range(30))
def test_the_dearest_pack_is_within_the_known_bound_of_longest_first(case):
    rng = np.random.default_rng(case)
    costs = rng.exponential(size=int(rng.integers(8, 200)))
    packs = pack_clips(np.ones(len(costs), int), costs, 4, 2, None)
    work = [costs[pack].sum() for pack in packs]
    assert work == sorted(work, reverse=True)
    assert sorted(clip for pack in packs for clip in pack) == list(range(len(costs)))
    bound = max(costs.max(), costs.sum() / 8, np.sort(costs)[::-1][7:9].sum())  # none is above the optimum
    assert work[0] <= (4 / 3 - 1 / 24) * bound or work[0] == pytest.approx(bound)  # Graham 1969


def test_epochs_seeds_and_stages_are_shuffled_apart():
    rows = lambda **key: ClipStream(50, **({"seed": 0, "stage": "s"} | key), mix=None).clips(0, 100)[0]  # noqa: E731
    assert (rows()[:50] != rows()[50:]).any()
    assert (rows() != rows(seed=1)).any() and (rows() != rows(stage="t")).any()


def test_a_mix_has_its_shares_and_each_dataset_its_own_epochs():
    mix = Mix((70, 5000, 31), (1.0, 2.0, 0.25))
    stream = ClipStream(5101, seed=3, stage="s", mix=mix)
    rows, epochs = stream.clips(0, 2 * BLOCK)
    dataset = np.searchsorted([70, 5070], rows, side="right")
    shares = np.bincount(dataset) / len(rows)
    np.testing.assert_allclose(shares, np.array(mix.weights) / 3.25, atol=1 / BLOCK)
    for number, num_clips in enumerate(mix.num_clips):
        of_dataset = list(zip(rows[dataset == number].tolist(), epochs[dataset == number].tolist()))
        assert len(set(of_dataset)) == len(of_dataset)
        assert epochs[dataset == number].tolist() == [i // num_clips for i in range(len(of_dataset))]
    first = np.bincount(dataset[:500], minlength=3) / 500  # shares hold on short stretches too
    np.testing.assert_allclose(first, shares, atol=0.07)


def test_a_mix_is_found_at_any_position_without_walking_there():
    stream = lambda: ClipStream(15, seed=0, stage="s", mix=Mix((5, 10), (1.0, 1.0)))  # noqa: E731
    whole = stream().clips(0, 3 * BLOCK)
    for start, end in ((0, 7), (BLOCK - 3, BLOCK + 3), (17, 2 * BLOCK + 1)):
        for part, expected in zip(stream().clips(start, end), whole):
            np.testing.assert_array_equal(part, expected[start:end])
    far = 10**12 + 4321  # a stream is endless
    np.testing.assert_array_equal(stream().clips(far, far + 5)[0], stream().clips(far - 9, far + 5)[0][9:])


def test_a_mix_of_packs_keeps_its_clips():
    plan = random_plan(0, mix=Mix((len(random_plan(0).tokens) - 1, 1), (3.0, 1.0)))
    clips = [clip for batch in batches(plan, 5 * plan.window_clips) for clip in clips_of(batch)]
    assert len(set(clips)) == len(clips)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(clips_per_batch=3), "too few for 4 packs"),
        (dict(max_tokens=39), "a clip has 40 tokens"),
        (dict(max_tokens=80, clips_per_batch=5, look_ahead=1), "must be a multiple of packs_per_batch=4"),
        (dict(mix=Mix((1, 1), (1.0, 1.0))), "does not describe 3 clips"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes, message):
    settings = dict(seed=0, stage="s", clips_per_batch=8, packs_per_batch=4)
    with pytest.raises(ValueError, match=message):
        DataPlan(np.array([1, 40, 3]), np.ones(3), **(settings | changes))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, float("nan")), (1.0, 1e-6), (1.0,)])
def test_weights_that_make_no_mix_are_refused(weights):
    with pytest.raises(ValueError, match=r"weight|of the clips"):
        Mix((1, 1), weights)


def test_a_position_between_batches_is_refused():
    plan = random_plan(0, packs_per_batch=1, clips_per_batch=4)
    inside = next(batch.start + 1 for batch in batches(plan, 100) if batch.num_global_clips > 1)
    with pytest.raises(ValueError, match=f"begins at clip {inside}"):
        plan.batch(inside)


def test_packs_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match="packs_per_batch=4 cannot be shared by 3 ranks"):
        next(random_plan(0, packs_per_batch=4, clips_per_batch=8).packs(0, rank=0, world_size=3))
