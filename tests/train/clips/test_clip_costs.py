"""A clip costs what the network computes; one above the cap is an error that names it, or dropped aloud."""

import logging
import re

import numpy as np
import pytest

from storyanchors.dit_config import StoryDiTConfig
from storyanchors.flops import ClipSize, model_flops
from train.clips.clip_costs import CAPTION_TOKENS, clip_flops, plan_clips
from train.clips.clip_index import ClipIndex
from train.clips.data_config import DataConfig, DatasetShare

NETWORK = StoryDiTConfig.preset("tiny")
KEYS = dict(spatial_stride=4, packs_per_batch=1, seed=0, stage="s")


def test_a_clip_costs_what_the_network_computes_for_it(dataset):
    index = ClipIndex.open(dataset)
    for number, cost in enumerate(clip_flops(index, NETWORK, 4)):
        size = ClipSize(index.row(number).conditions.num_frames, 16, 16, CAPTION_TOKENS)
        assert cost == model_flops(NETWORK, [size])


def test_a_clip_above_the_cap_is_named_or_dropped(dataset, caplog):
    index = ClipIndex.open(dataset)
    frames = index.numbers("num_frames")
    cap = 64 * 4
    first = index.row(int(np.argmax(frames > 4))).key
    with pytest.raises(ValueError, match=rf"such as {first} with 320: .* data\.drop_too_long=true"):
        plan_clips(index, DataConfig(max_tokens=cap), NETWORK, **KEYS)
    with caplog.at_level(logging.WARNING):
        kept, plan = plan_clips(index, DataConfig(max_tokens=cap, drop_too_long=True), NETWORK, **KEYS)
    assert (kept.numbers("num_frames") <= 4).all() and len(kept) == (frames <= 4).sum() == len(plan.tokens)
    assert f"{(frames > 4).sum()} of 10 clips" in caplog.text and first in caplog.text
    with pytest.raises(ValueError, match="none is left"):
        plan_clips(index, DataConfig(max_tokens=1, drop_too_long=True), NETWORK, **KEYS)


@pytest.mark.parametrize(("height", "warned"), [(64, False), (1024, True)])
def test_a_clip_that_costs_a_hundred_times_the_median_is_named(dataset, monkeypatch, caplog, height, warned):
    index = ClipIndex.open(dataset)
    numbers = ClipIndex.numbers

    def with_one_large(self, column: str) -> np.ndarray:
        found = numbers(self, column)
        if column in ("height", "width"):
            found[3] = height
        return found

    monkeypatch.setattr(ClipIndex, "numbers", with_one_large)
    plan_clips(index, DataConfig(), NETWORK, **KEYS)
    named = [line for line in caplog.messages if line.startswith(f"clip {index.row(3).key} with")]
    assert bool(named) == warned
    assert not warned or ("data.max_tokens" in named[0] and "data.drop_too_long" in named[0])


def test_a_mix_follows_the_datasets_after_clips_were_left_out(dataset):
    mix = [DatasetShare(str(dataset), 3.0), DatasetShare(f"{dataset}/", 1.0)]
    data = DataConfig(mix=mix, max_tokens=64 * 4, drop_too_long=True)
    kept, plan = plan_clips(ClipIndex.open(*data.datasets), data, NETWORK, **KEYS)
    assert plan.mix.num_clips == kept.num_clips and plan.mix.weights == (3.0, 1.0)
    rows, _ = plan.stream.clips(0, 4000)
    assert np.mean(rows < kept.num_clips[0]) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_tokens=0), "data.max_tokens is 0, expected at least 1"),
        (dict(drop_too_long=True), "needs data.max_tokens"),
        (dict(mix=[{"dataset": "a"}, {"dataset": "a"}]), "names a dataset twice"),
        (dict(mix=[{"dataset": "a", "weight": 1.0}, {"dataset": "b"}]), "give all or none"),
        (dict(mix=[{"dataset": "a", "weight": -1.0}]), "is -1.0, expected above 0"),
        (dict(max_broken_share=1.0), "data.max_broken_share is 1.0"),
    ],
)
def test_settings_of_the_data_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**settings)


def test_one_of_dataset_and_mix_is_given():
    assert DataConfig(dataset="a").datasets == ["a"]
    assert DataConfig(mix=[{"dataset": "a"}, {"dataset": "b"}]).datasets == ["a", "b"]
    for neither_or_both in (DataConfig(), DataConfig(dataset="a", mix=[{"dataset": "b"}])):
        with pytest.raises(ValueError, match=r"expected data\.dataset=FOLDER or data\.mix"):
            neither_or_both.datasets  # noqa: B018


def test_datasets_without_weights_are_one_list_of_clips():
    assert DataConfig(mix=[{"dataset": "a"}, {"dataset": "b"}]).mix_of((3, 5)) is None
