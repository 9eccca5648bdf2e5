"""A dry run tells the layout of hundreds of ranks on a machine that has no GPU, and writes nothing."""

import re

import pytest

from conf.command import read_config
from train.run_stage import RunStageConfig, main


def settings(dataset, tmp_path, *more: str) -> RunStageConfig:
    words = ["model=tiny", f"data.dataset={dataset}", f"run_dir={tmp_path}/run", "--dry-run"]
    return read_config(RunStageConfig, "run_stage", [*words, *more])


def test_512_ranks_are_laid_out(dataset, tmp_path, capsys):
    main(
        settings(dataset, tmp_path, "trainer.num_nodes=64", "trainer.devices=8", "data.clips_per_batch=1024")
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "512 ranks, 8 on each of 64 nodes; data ranks: 512"
    assert "512 packs, 1 for each data rank" in lines[1]
    # the look-ahead gives some steps more clips than others, and loses none
    assert all(re.search(r"step \d: \d+ clips, [1-9]\d* to \d+ a rank", line) for line in lines[2:5])
    assert not (tmp_path / "run").exists()


def test_ranks_that_share_clips_are_one_data_rank(dataset, tmp_path, capsys):
    main(
        settings(
            dataset, tmp_path, "trainer.devices=6", "model.sequence_parallel=3", "data.packs_per_batch=8"
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 ranks, 6 on each of 1 nodes; data ranks: 2"
    assert "8 packs, 4 for each data rank" in lines[1]


def test_a_world_that_cannot_share_the_packs_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="packs_per_batch=8 cannot be shared by 3 ranks"):
        main(settings(dataset, tmp_path, "trainer.devices=3", "data.packs_per_batch=8"))
