"""The plan report says what the plan does, in numbers that can be checked by hand."""

import numpy as np
import pytest

from conf.command import read_config
from train.clips.clip_index import ClipIndex
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
    assert "sizes:  64x64 100.0%" in report and "the cap is 1280; 0 tokens of padding" in report
    assert "epoch:  2.5 steps; 25 steps are 10.00 epochs" in report
    assert "    1 ranks,    2 packs each: 1.000, 1.000" in report and "    2 ranks" in report
    megabytes = np.mean([sum(index.row(n).frame_sizes) for n in range(10)]) / 1e6
    assert f"bytes:  {megabytes:.3g} MB a clip" in report


def test_the_command_prints_it_and_writes_nothing(arguments, tmp_path, capsys):
    asked = arguments(tmp_path / "run", "--plan-report", "data.packs_per_batch=2", "stage=multi_event")
    main(read_config(RunStageConfig, "run_stage", asked))
    printed = capsys.readouterr().out
    assert "clips in the plan; " in printed and "    2 ranks,    1 packs each: " in printed
    assert list(tmp_path.iterdir()) == []
