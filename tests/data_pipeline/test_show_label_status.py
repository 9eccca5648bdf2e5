from pathlib import Path

import pytest

from conf.command import Stopped, read_config
from data_pipeline.labeling.ledger import ShardLedger
from data_pipeline.labeling.partition import labels_folder, read_run
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.plan_label_retry import PlanLabelRetryConfig, main
from data_pipeline.show_label_status import describe_run
from storyanchors.vlm import VlmConfig
from tests.data_pipeline.labeling.stages_for_tests import Captions, answer, write_dataset

NUM_TASKS = 4


@pytest.fixture
def begun(tmp_path) -> Path:
    """Ten shards of three clips in four tasks, of which task 1 is done and task 0 stopped in between."""
    dataset = write_dataset(tmp_path / "dataset", num_shards=10, clips_per_shard=3)
    label(dataset, task=1)
    with pytest.raises(Stopped):
        label(dataset, task=0, max_usd=0.008)
    return dataset


def label(dataset: Path, **settings) -> None:
    vlm = VlmConfig(
        "scripted", input_usd_per_million=1.0, output_usd_per_million=1.0, price_date="2026-11-21"
    )
    config = LabelingConfig(dataset=str(dataset), run="r", vlm=vlm, num_tasks=NUM_TASKS, **settings)
    run_stage(config, Captions(), script=answer)


def retry_plan(dataset: Path, capsys) -> str:
    capsys.readouterr()
    words = [f"dataset={dataset}", "run=r", "labels=global"]
    main(read_config(PlanLabelRetryConfig, "plan_label_retry", words))
    return capsys.readouterr().out.strip()


def test_the_retry_plan_is_the_array_that_finishes_the_run(begun, capsys):
    plan = retry_plan(begun, capsys)
    assert plan == "0,2-3"
    for task in (0, 2, 3):
        label(begun, task=task)
    assert retry_plan(begun, capsys) == ""
    assert "10 of 10 shards, 30 clips: 30 ok" in "\n".join(describe_run(begun, "r", now=0.0))


def test_the_status_agrees_with_the_ledger(begun):
    ledger = ShardLedger(labels_folder(begun, "r"), "global", "000000", "killed")
    ledger.begin("key", "clip-000-00000/global/1-2", 0.125)
    ledger.close()
    text = "\n".join(describe_run(begun, "r", now=0.0))
    assert "run r: 30 clips in 10 shards, 4 tasks" in text
    assert "without a reply: 1 requests, at most 0.1250 USD" in text
    assert "not done: 3 tasks, 0,2-3" in text
    assert " h left" in text
    assert read_run(begun, "r")["stages"]["global"]["asked_with"] == {"side_px": 16}


def test_a_run_that_is_not_there_is_an_error_that_names_those_that_are(begun):
    with pytest.raises(ValueError, match="no labeling run 'other', found r"):
        describe_run(begun, "other", now=0.0)


def test_labels_of_no_kind_are_refused():
    with pytest.raises(ValueError, match="labels is 'event', expected one of global, events, story"):
        PlanLabelRetryConfig("d", "r", "event")
