"""The plan report says what the plan does, in numbers that can be checked by hand."""

import numpy as np
import pytest

from conf.command import read_config
from train.clips.clip_index import ClipIndex
from train.clips.clip_stream import Mix
from train.data_plan import DataPlan
from train.plan_report import describe_plan, pack_costs, useful_share
from train.run_stage import RunStageConfig, main


def test_the_useful_share_is_work_over_time():
    batches = [[9.0, 5.0, 3.0, 1.0], [4.0, 4.0, 4.0, 4.0]]
    assert useful_share(batches, 1, waits_each_micro_step=True) == 1
    # two ranks: 9 + 1 and 5 + 3; waiting after each pack costs 9 + 3
    assert useful_share(batches, 2, waits_each_micro_step=False) == pytest.approx(34 / (2 * (10 + 8)))
    assert useful_share(batches, 2, waits_each_micro_step=True) == pytest.approx(34 / (2 * (12 + 8)))
    assert useful_share(batches, 4, waits_each_micro_step=False) == pytest.approx(34 / (4 * (9 + 4)))


def test_costs_of_packs_are_the_sums_of_their_clips():
    costs = np.arange(1.0, 21.0)
    plan = DataPlan(np.ones(20, int), costs, seed=0, stage="s", clips_per_batch=10, packs_per_batch=2)
    batches = pack_costs(plan, 4)  # one window of 40 clips: every clip twice
    assert sum(map(sum, batches)) == 2 * costs.sum()
    assert all(batch == sorted(batch, reverse=True) for batch in batches)


def test_the_report_counts_what_is_there(dataset):
    index = ClipIndex.open(dataset)
    tokens = index.num_tokens(8)
    plan = DataPlan(
        tokens, tokens * 1e9, seed=0, stage="s", clips_per_batch=4, packs_per_batch=2, max_tokens=1280
    )
    report = describe_plan(index, plan, held_out=3, dropped=0, num_steps=25)
    assert "10 clips in the plan; 3 held out, 0 dropped for their length" in report
    assert f"{dataset}: 10 clips of 10 videos, 100.0%" in report
    assert "sizes:  64x64 100.0%" in report and "the cap is 1,280; 0 tokens of padding" in report
    assert "epoch:  2.5 steps; 25 steps are 10 epochs" in report
    assert "    1 ranks,    2 packs each: 1.000, 1.000" in report and "    2 ranks" in report
    megabytes = np.mean([sum(index.row(n).frame_sizes) for n in range(10)]) / 1e6
    assert f"bytes:  {megabytes:.3g} MB a clip" in report


def test_a_mix_is_reported_as_it_is_trained_on(dataset):
    """Nine of ten clips come from a dataset whose frames are few; without weights one of two would."""
    frames = ClipIndex.open(dataset).numbers("num_frames")
    few, many = (f"{dataset}{end}" for end in ("", "/"))
    index = ClipIndex.open(few, many).only(np.concatenate([frames == frames.min(), frames == frames.max()]))
    tokens = index.num_tokens(8)
    mix = Mix(index.num_clips, (9.0, 1.0))
    plan = DataPlan(tokens, tokens * 7e5, seed=0, stage="s", clips_per_batch=4, packs_per_batch=1, mix=mix)
    report = describe_plan(index, plan, held_out=0, dropped=0, num_steps=90)
    mean = 0.9 * frames.min() + 0.1 * frames.max()
    assert f"frames: mean {mean:.3g}, median {frames.min()}, p95 {frames.max()}, " in report
    assert f"tokens: mean {64 * mean:,.0f}, median {64 * frames.min()}, " in report
    for name, count, share in zip((few, many), index.num_clips, (0.9, 0.1), strict=True):
        epochs = 90 * 4 * share / count
        told = f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
        assert f"epoch of {name}:  {count / (4 * share):.1f} steps; 90 steps are {told} epochs" in report


def test_numbers_can_be_read_without_powers_of_ten(dataset):
    index = ClipIndex.open(dataset)
    tokens = np.full(10, 69960)
    plan = DataPlan(tokens, tokens * 1e3, seed=0, stage="s", clips_per_batch=4, packs_per_batch=1)
    report = describe_plan(index, plan, held_out=0, dropped=0, num_steps=1)
    assert "tokens: mean 69,960, median 69,960, p95 69,960, 69,960 to 69,960" in report
    assert "MFLOP:  mean 210, median 210, " in report and "e-" not in report and "e+" not in report


def test_the_command_prints_it_and_writes_nothing(arguments, tmp_path, capsys):
    asked = arguments(tmp_path / "run", "--plan-report", "data.packs_per_batch=2", "stage=multi_event")
    main(read_config(RunStageConfig, "run_stage", asked))
    printed = capsys.readouterr().out
    assert "clips in the plan; " in printed and "    2 ranks,    1 packs each: " in printed
    assert list(tmp_path.iterdir()) == []
