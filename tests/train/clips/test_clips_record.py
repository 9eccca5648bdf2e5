"""A run goes on with the clips and the packs that it was begun with, or says what is different."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from conf.command import read_config
from data_pipeline.index_file import write_index
from train.clips.clip_index import ClipIndex, open_index
from train.clips.clips_record import check_clips, write_clips
from train.run_folder import read_settings
from train.run_stage import RunStageConfig, share_packs, with_pinned_packs


def test_other_clips_than_at_the_start_are_refused(dataset, tmp_path):
    index = ClipIndex.open(dataset)
    write_clips(tmp_path, index)
    check_clips(tmp_path, ClipIndex.open(dataset))
    with pytest.raises(ValueError, match=r"9 clips of .*, its plan is of 10"):
        check_clips(tmp_path, index.only(np.arange(10) > 0))
    with pytest.raises(ValueError, match=r"the 10 clips of .* are not those"):
        check_clips(tmp_path, ClipIndex(index.datasets, index.tables, [index.chosen[0][::-1]]))


def test_a_run_does_not_go_on_with_another_dataset(train, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    settings = ["stage=multi_event", f"data.dataset={copy}", "data.packs_per_batch=2"]
    run_dir = train(tmp_path / "run", *settings, "stage.steps=1")
    assert json.loads((run_dir / "clips.json").read_text())["clips"] == len(
        ClipIndex.open(copy).split(0.2)[0]
    )
    moved = copy.rename(tmp_path / "moved")  # the same clips elsewhere, and the packs that were pinned
    train(run_dir, "stage=multi_event", f"data.dataset={moved}", "stage.steps=2")
    assert read_settings(run_dir)["data"]["packs_per_batch"] == 2
    write_index(moved, open_index(str(moved)).slice(1))
    with pytest.raises(ValueError, match="cannot go on"):
        train(run_dir, "stage=multi_event", f"data.dataset={moved}", "stage.steps=3")


def config_of(arguments, run_dir, *more: str) -> RunStageConfig:
    return read_config(RunStageConfig, "run_stage", arguments(run_dir, "data.clips_per_batch=12", *more))


def trainer(world_size: int) -> SimpleNamespace:
    return SimpleNamespace(world_size=world_size, num_devices=world_size, global_rank=0)


@pytest.mark.parametrize(("asked", "ranks", "packs"), [(None, 3, 3), (4, 2, 4), (12, 4, 12), (None, 1, 1)])
def test_each_rank_takes_its_share_of_the_packs(arguments, tmp_path, asked, ranks, packs):
    more = [] if asked is None else [f"data.packs_per_batch={asked}"]
    of_ranks = trainer(ranks)
    config = share_packs(config_of(arguments, tmp_path, *more), of_ranks)
    assert config.data.packs_per_batch == packs == of_ranks.accumulate_grad_batches * ranks


def test_packs_that_the_ranks_cannot_share_are_refused_with_what_can(arguments, tmp_path):
    config = config_of(arguments, tmp_path, "data.packs_per_batch=4")
    with pytest.raises(ValueError, match=r"by 3 ranks: use 1, 2, 4 ranks, or .*packs_per_batch=6"):
        share_packs(config, trainer(3))


def test_a_run_keeps_the_packs_of_its_start_unless_others_are_asked_for(arguments, tmp_path):
    config = config_of(arguments, tmp_path)
    assert with_pinned_packs(config) == config
    (tmp_path / "config.yaml").write_text("data: {packs_per_batch: 6}")
    assert with_pinned_packs(config).data.packs_per_batch == 6
    other = config_of(arguments, tmp_path, "data.packs_per_batch=2")
    assert with_pinned_packs(other) == other  # the settings check refuses it where there is a checkpoint
