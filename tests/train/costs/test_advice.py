"""Advice of train.estimate: followed, it makes the run fit, with the clips a step that were asked for."""

import pytest

from conf.command import read_config
from train.costs.advice import most_tokens, remedies, smallest_machine
from train.costs.estimated_run import Estimate, EstimateConfig

TOO_LARGE = [  # for its GPUs
    "model=wan-1.3b cluster=one_gpu gpus_per_node=1",
    "model=wan-1.3b data.clips_per_batch=64",
    "model=wan-1.3b cluster=ddp nodes=2 data.clips_per_batch=256",
    "model=wan-1.3b strategy=zero2 gpus_per_node=6 gpu=a100 data.clips_per_batch=100",
    "model=step-4b",
    "model=step-4b cluster=zero2 nodes=3 data.clips_per_batch=200",
    "model=step-30b cluster=zero3 data.clips_per_batch=64",
    "model=wan-14b cluster=zero3 data.clips_per_batch=64",
    "model=wan-14b cluster=zero2 nodes=2 data.clips_per_batch=64 data.packs_per_batch=64",
    "model=wan-14b cluster=zero3 nodes=8 gpu=h200 data.clips_per_batch=256",
]


def estimate(words: str) -> Estimate:
    return Estimate.of(read_config(EstimateConfig, "run_stage", ["stage=multi_event", *words.split()]))


@pytest.mark.parametrize("words", TOO_LARGE)
def test_following_the_advice_makes_the_run_fit(words):
    before = estimate(words)
    assert not before.fits
    found = remedies(before)
    assert 0 < len(found) <= 5
    for remedy in found:
        after = estimate(f"{words} {remedy.words}")
        assert after.fits and after.work.largest_pack <= after.config.data.max_tokens
        assert (after.hours, after.work.clips) == (remedy.estimate.hours, remedy.estimate.work.clips)
        asked = before.config.data.clips_per_batch
        assert 0.99 * asked <= after.work.clips <= 1.25 * asked
    assert len({remedy.words for remedy in found}) == len(found)


def test_one_gpu_is_helped_by_accumulation():
    [remedy] = remedies(estimate("model=wan-1.3b cluster=one_gpu gpus_per_node=1"))
    assert remedy.words.startswith("data.packs_per_batch=8 data.max_tokens=")


def test_a_lora_comes_after_what_trains_the_whole_network():
    kinds = ["lora" in remedy.words for remedy in remedies(estimate(TOO_LARGE[-3]))]
    assert kinds == sorted(kinds) and kinds[0] is False


def test_where_nothing_fits_the_fewest_gpus_that_would_are_named():
    words = "model=wan-14b cluster=one_gpu gpus_per_node=1"
    before = estimate(words)
    assert remedies(before) == []
    machine = smallest_machine(before)
    after = estimate(f"{words} {machine.words}")
    assert after.fits and after.config.world_size > before.config.world_size


def test_the_largest_pack_fits_and_no_larger_one():
    config = estimate("model=wan-14b cluster=zero3 nodes=8 data.clips_per_batch=64").config
    most, limit = most_tokens(config), config.layout.gpu_bytes
    assert config.memory(most).total <= limit < config.memory(most + 100).total
