"""First-block cache: what it leaves out, what it must not change, and that nothing of it outlives its run."""

import math
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from storyanchors.block_cache import active_cache, block_cache
from storyanchors.conditioning import stack_condition_channels
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.sequence_parallel import share_tokens

CONFIG = StoryDiTConfig(2, 16, 3, 48, text_dim=12, latent_channels=3, freq_dim=32)
SIZES = [(4, 4, 6, 5), (2, 8, 2, 3)]  # frames, height, width, caption tokens


@pytest.fixture(scope="module")
def dit() -> StoryDiT:
    generator = torch.Generator().manual_seed(0)
    dit = StoryDiT(CONFIG).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return dit


@pytest.fixture(autouse=True)
def sampling():
    """Without gradients, as in the cache: attention on a CPU takes another kernel with them."""
    with torch.no_grad():
        yield


def draw(clip: int, number: int) -> Tensor:
    F, H, W, _ = SIZES[clip % 2]
    return torch.randn(F, 3, H, W, generator=torch.Generator().manual_seed(10 * clip + number))


def step(dit: StoryDiT, changes: list[float], timestep: float = 500.0) -> list[Tensor]:
    """One forward of as many clips as there are changes, each so far away from its first noise."""
    inputs, captions = [], []
    for clip, change in enumerate(changes):
        noisy = draw(clip, 0) + change * draw(clip, 1)
        given = torch.tensor([1.0] + [0.0] * (len(noisy) - 1))
        inputs.append(stack_condition_channels(noisy, draw(clip, 2), given))
        generator = torch.Generator().manual_seed(clip)
        captions.append(torch.randn(SIZES[clip % 2][3], CONFIG.text_dim, generator=generator))
    return dit(inputs, torch.full((len(changes),), timestep), None, captions)


@contextmanager
def recorded(block):
    """What a block added to its input in each of its runs."""
    runs = []
    hook = block.register_forward_hook(lambda _, args, out: runs.append(out - args[0]))
    yield runs
    hook.remove()


@pytest.mark.parametrize("threshold", [0.0, 1e-9])
def test_a_threshold_that_nothing_is_below_leaves_every_bit_as_it_is(dit, threshold):
    expected = [step(dit, [change, 2 * change]) for change in (0.0, 0.1, 0.2)]
    with block_cache(dit, threshold) as cache:
        found = [step(dit, [change, 2 * change]) for change in (0.0, 0.1, 0.2)]
    for clips, expected_clips in zip(found, expected, strict=True):
        assert all(map(torch.equal, clips, expected_clips))
    assert (cache.num_forwards, cache.num_skipped) == (6, 0)


def test_threshold_zero_runs_all_blocks_even_where_nothing_changed(dit):
    with recorded(dit.blocks[-1]) as runs, block_cache(dit, 0.0):
        assert all(map(torch.equal, step(dit, [0.0]), step(dit, [0.0])))
    assert len(runs) == 2


def test_where_nothing_changed_only_the_first_block_runs_and_the_result_is_the_same(dit):
    expected = step(dit, [0.3, 0.6])
    with recorded(dit.blocks[0]) as first, recorded(dit.blocks[1]) as others, block_cache(dit, 0.01) as cache:
        for _ in range(3):
            torch.testing.assert_close(step(dit, [0.3, 0.6]), expected, atol=1e-5, rtol=1e-5)
    assert (len(first), len(others)) == (3, 1)
    assert (cache.num_forwards, cache.num_skipped) == (6, 4)


def test_a_step_is_skipped_if_and_only_if_the_first_block_changed_by_less_than_the_threshold(dit):
    """Measured against the last step that was not skipped: small changes do not add up unseen."""
    threshold, last, skipped = 0.05, None, []
    with recorded(dit.blocks[0]) as first, recorded(dit.blocks[-1]) as others, block_cache(dit, threshold):
        for number in range(30):
            step(dit, [0.02 * number])
            change = math.inf if last is None else (first[-1] - last).abs().mean() / last.abs().mean()
            skipped.append(bool(change < threshold))
            last = last if skipped[-1] else first[-1]
            assert len(others) == skipped.count(False)
    assert 5 <= skipped.count(False) <= 25


def test_a_skipped_step_adds_what_the_other_blocks_added_in_the_last_full_one(dit):
    def blocks(bias: float):
        return [lambda x, *args: 2 * x, lambda x, *args: x + bias, lambda x, *args: x + bias]

    x, share = torch.ones(3, 2), share_tokens([3], None)
    args = (torch.zeros(1, 2), torch.zeros(1, 6, 2), torch.zeros(3, 1, 1, 2), share, [1])
    with block_cache(dit, 0.1) as cache:
        assert cache.run_blocks(blocks(3.0), x, *args).equal(2 * x + 6)
        assert cache.run_blocks(blocks(50.0), 1.05 * x, *args).equal(2 * (1.05 * x) + 6)
        assert cache.run_blocks(blocks(50.0), 1.2 * x, *args).equal(2 * (1.2 * x) + 100)
    assert (cache.num_forwards, cache.num_skipped) == (3, 1)


def test_a_clip_does_not_depend_on_its_neighbours(dit):
    """One clip stands nearly still, one jumps, and together they do what each does alone."""
    slow, fast = ([0.0, 0.01, 0.02, 0.03, 0.04], [0.0, 2.0, -2.0, 2.01, 3.0])
    with block_cache(dit, 0.05) as cache:
        together = [step(dit, [a, b, b]) for a, b in zip(slow, fast, strict=True)]
    assert 0 < cache.num_skipped < cache.num_forwards - 3
    with block_cache(dit, 0.05) as cache:
        alone = [step(dit, [a]) for a in slow]
    assert cache.num_skipped > 0
    for packed, (clip,) in zip(together, alone, strict=True):
        torch.testing.assert_close(packed[0], clip, atol=1e-5, rtol=1e-5)
    with block_cache(dit, 0.05):
        others = [step(dit, [0.0, b, b]) for b in fast]  # another first clip beside the two that jump
    for packed, other in zip(together, others, strict=True):
        torch.testing.assert_close(packed[1:], other[1:], atol=1e-5, rtol=1e-5)


def test_a_half_of_guidance_that_is_missing_in_some_steps_goes_on_from_where_it_was(dit):
    with block_cache(dit, 0.01) as cache:
        _, before = step(dit, [0.0, 0.5])
        step(dit, [1.0])
        assert cache.num_skipped == 0
        _, after = step(dit, [3.0, 0.5])
    assert (cache.num_forwards, cache.num_skipped) == (5, 1)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_clips_of_another_length_are_not_mistaken_for_those_before(dit):
    with block_cache(dit, 10.0) as cache:
        step(dit, [0.0])
        [clip] = dit([torch.zeros(1, 7, 4, 6)], torch.tensor([500.0]), None, [torch.ones(5, 12)])
    assert cache.num_skipped == 0
    [expected] = dit([torch.zeros(1, 7, 4, 6)], torch.tensor([500.0]), None, [torch.ones(5, 12)])
    assert clip.equal(expected)


def test_what_is_not_finite_is_never_reused(dit):
    with block_cache(dit, 10.0) as cache:
        step(dit, [math.nan])
        [clip] = step(dit, [0.0])
    assert cache.num_skipped == 0 and clip.isfinite().all()


def test_nothing_outlives_its_run_and_no_other_thread_or_network_sees_it(dit):
    other, seen = StoryDiT(CONFIG), []
    with block_cache(dit, 10.0) as cache:
        assert active_cache(dit) is cache and active_cache(other) is None
        thread = threading.Thread(target=lambda: seen.append(active_cache(dit)))
        thread.start()
        thread.join()
        step(dit, [0.0])
        with block_cache(dit, 10.0) as inner:
            step(dit, [0.0])
        assert inner.num_skipped == 0 and active_cache(dit) is cache
    assert seen == [None] and active_cache(dit) is None
    with pytest.raises(KeyError), block_cache(dit, 10.0):
        raise KeyError
    assert active_cache(dit) is None


@torch.enable_grad()
def test_there_are_no_gradients_inside_which_would_be_wrong():
    dit = StoryDiT(CONFIG)
    with block_cache(dit, 0.1):
        [velocity] = step(dit, [0.0])
    assert not velocity.requires_grad


def test_compiled_blocks_are_skipped_too(dit):
    compiled = StoryDiT(CONFIG).eval()
    compiled.load_state_dict(dit.state_dict())
    compiled.compile_blocks(backend="eager")
    with block_cache(dit, 0.05), block_cache(compiled, 0.05) as cache:
        found = [step(compiled, [change]) for change in (0.0, 0.01, 2.0)]
    with block_cache(dit, 0.05):
        expected = [step(dit, [change]) for change in (0.0, 0.01, 2.0)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert cache.num_skipped == 1


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_that_is_none_is_refused(dit, threshold):
    with pytest.raises(ValueError, match="cache_threshold must be a number from 0"):
        with block_cache(dit, threshold):
            pass


def test_tokens_that_are_split_over_processes_are_refused():
    dit = StoryDiT(CONFIG)
    dit.sequence_group = "a group"
    with pytest.raises(ValueError, match="sequence parallelism splits"):
        with block_cache(dit, 0.1):
            pass
