from pathlib import Path

import pytest

from data_pipeline.captions import read_captions, read_run_maker
from data_pipeline.labeling.ledger import count_money
from data_pipeline.labeling.partition import label_lines, labels_folder
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from storyanchors.vlm import VlmConfig
from tests.data_pipeline.labeling.stages_for_tests import Captions, CountingScript, write_dataset

SCRIPTED = dict(
    backend="scripted", input_usd_per_million=1.0, output_usd_per_million=4.0, price_date="2026-11-21"
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("labels") / "dataset")


@pytest.fixture
def dataset(frames, tmp_path) -> Path:
    """A dataset of its own with the same frames."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for path in frames.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def config(dataset: Path, **settings) -> LabelingConfig:
    return LabelingConfig(
        dataset=str(dataset), run="first", vlm=VlmConfig(**SCRIPTED), back_off_s=1e-3, **settings
    )


def content(dataset: Path, folder: str = "labels/first/global") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (dataset / folder).glob("*.jsonl")}


def test_every_clip_is_labelled_once_and_gets_its_caption(dataset):
    script = CountingScript()
    run_stage(config(dataset), Captions(), script=script)
    assert set(script.asked.values()) == {1} and len(script.asked) == 12
    captions = [line.record for shard in range(3) for line in read_captions(dataset, "first", f"{shard:06d}")]
    assert len({record.global_caption for record in captions}) == 12
    assert read_run_maker(dataset, "first") == "labels"
    lines = [line for shard in range(3) for line in label_lines(dataset, "first", "global", f"{shard:06d}")]
    assert [line["key"] for line in lines] == [record.key for record in captions]
    money = count_money(labels_folder(dataset, "first"), "global")
    assert money.usd == pytest.approx(sum(line["usd"] for line in lines)) and money.usd > 0
    assert (money.num_requests, money.in_doubt) == (12, 0)
    run_stage(config(dataset), Captions(), script=script)  # nothing is left to do
    assert set(script.asked.values()) == {1}
