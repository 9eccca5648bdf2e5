"""The labeling commands as a user calls them, on the story world and without a network."""

import json
import os
import re
from dataclasses import replace

import pytest

from benchmarks.exact_labels import compare, label_exactly, write_long_stories
from data_pipeline.captions import read_captions
from data_pipeline.labeling import findings, stages
from data_pipeline.labeling.ledger import ledger_files, read_lines
from data_pipeline.labeling.partition import label_lines, labels_folder
from data_pipeline.labeling.prompts import Prompt

STAGES = ("global", "events", "story")
COMMANDS = ("caption_globally", "label_events", "unify_story")


@pytest.fixture(scope="module")
def long_stories(tmp_path_factory):
    """24 clips of 6 to 30 frames with their truth, labelled exactly."""
    dataset = tmp_path_factory.mktemp("long") / "ds"
    write_long_stories(dataset, 24)
    label_exactly(dataset)
    return dataset


@pytest.fixture
def small_world(command, tmp_path):
    dataset = tmp_path / "ds"
    command("write_story_world", f"out={dataset}", "num_stories=5", "num_frames=[13,16]", "workers=1")
    return dataset


def label(command, dataset, *arguments, names=COMMANDS, run="a"):
    for name in names:
        status, _, printed = command(
            name, f"dataset={dataset}", f"run={run}", "vlm=scripted", "script=story_world", *arguments
        )
        assert status == 0, printed


def everything(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def test_stories_of_6_to_30_frames_come_back_as_they_were(long_stories):
    """500 of them: benchmarks/exact_labels.py."""
    counts = compare(long_stories)
    assert counts["clips"] == counts["stories_equal"] == counts["global_captions_equal"] == 24
    assert counts["cut_events"] > 5  # events on both sides of a subset's border were joined


def test_three_commands_label_a_dataset(command, small_world):
    label(command, small_world)
    truths = {line.record.key: line.record for line in read_captions(small_world, "truth", "000000")}
    labels = {line.record.key: line.record for line in read_captions(small_world, "a", "000000")}
    assert {key: replace(one.story, global_caption=one.global_caption) for key, one in labels.items()} == {
        key: one.story for key, one in truths.items()
    }
    status, _, printed = command("build_index", f"dataset={small_world}", "captions=a")
    assert status == 0, printed
    before = everything(small_world)
    label(command, small_world)  # nothing is left to do
    assert everything(small_world) == before


def test_revalidating_with_the_same_checks_changes_nothing(command, long_stories):
    before = everything(long_stories)
    status, printed, _ = command("revalidate_labels", f"dataset={long_stories}", "run=exact")
    assert status == 0 and "before" not in printed and "story: 24 clips" in printed
    assert everything(long_stories) == before


def test_a_new_check_is_applied_without_asking(command, small_world, monkeypatch):
    label(command, small_world)
    folder = labels_folder(small_world, "a")
    ledgers = {path: path.read_bytes() for stage in STAGES for path in ledger_files(folder, stage)}
    assert len([line for path in ledgers for line in read_lines(path)]) == 5 + 10 + 5
    monkeypatch.setattr(findings, "_META", re.compile(r"\bthe\b"))
    status, printed, _ = command("revalidate_labels", f"dataset={small_world}", "run=a")
    assert status == 0
    assert printed.count("clips warned: 5, before 0") == printed.count("clips ok: 0, before 5") == 3
    lines = label_lines(small_world, "a", "story", "000000")
    assert all("meta_text" in {one["code"] for one in line["findings"]} for line in lines)
    assert {path: path.read_bytes() for path in ledgers} == ledgers


def test_revalidating_without_a_ledger_keeps_the_labels(command, small_world):
    label(command, small_world, names=["caption_globally"])
    for path in ledger_files(labels_folder(small_world, "a"), "global"):
        path.unlink()
    before = label_lines(small_world, "a", "global", "000000")
    status, printed, _ = command("revalidate_labels", f"dataset={small_world}", "run=a")
    assert status == 0 and "5 clips keep their labels" in printed
    assert label_lines(small_world, "a", "global", "000000") == before


def test_answers_to_another_prompt_are_not_revalidated(command, refused, small_world, monkeypatch):
    label(command, small_world, names=["caption_globally"])
    monkeypatch.setattr(stages, "GLOBAL_CAPTION", Prompt("global-v1", "Describe it."))
    assert "prompt global-v1" in refused("revalidate_labels", f"dataset={small_world}", "run=a")


def test_a_ledger_is_replayed(command, small_world):
    label(command, small_world, names=["caption_globally"])
    ledger = labels_folder(small_world, "a") / "ledger"
    status, _, printed = command(
        "caption_globally", f"dataset={small_world}", "run=b", "vlm=replay", f"vlm.replay={ledger}"
    )
    assert status == 0, printed
    texts = [
        [line["global_caption"] for line in label_lines(small_world, run, "global", "000000")]
        for run in ("a", "b")
    ]
    assert texts[0] == texts[1] and all(texts[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_writes_nothing(command, small_world, name):
    if name == "unify_story":
        label(command, small_world, names=["label_events"])
    before = everything(small_world)
    status, printed, _ = command(
        name, f"dataset={small_world}", "run=a", "vlm=scripted", "script=story_world", "dry_run=true"
    )
    assert status == 0 and "requests" in printed
    assert everything(small_world) == before


def test_a_story_needs_events_first(refused, small_world):
    arguments = (f"dataset={small_world}", "run=a", "vlm=scripted", "script=story_world")
    assert "label events first" in refused("unify_story", *arguments)


def test_a_run_keeps_its_settings(command, refused, small_world):
    label(command, small_world, names=["caption_globally"])
    arguments = (f"dataset={small_world}", "run=a", "vlm=scripted", "script=story_world", "max_pixels=1000")
    assert "max_pixels" in refused("caption_globally", *arguments)


def test_a_budget_is_told_and_kept_with_the_label(command, small_world):
    label(command, small_world, names=["label_events"])
    label(command, small_world, "caption_encoder=words", names=["unify_story"])
    for line in label_lines(small_world, "a", "story", "000000"):
        assert 20 < line["token_counts"]["words"] < 4096
    run = json.loads((labels_folder(small_world, "a") / "run.json").read_bytes())
    assert run["stages"]["story"]["asked_with"]["caption_encoder"] == "words"
    assert "story-v1" in run["stages"]["story"]["prompts"]


def test_a_dry_run_needs_no_key_and_leaves_none_behind(command, small_world, monkeypatch):
    monkeypatch.delenv("LABELER_KEY", raising=False)
    model = ["vlm=openai", "vlm.model=m", "vlm.base_url=http://127.0.0.1:9/v1", "vlm.api_key_env=LABELER_KEY"]
    status, printed, _ = command(
        "caption_globally", f"dataset={small_world}", "run=dry", *model, "dry_run=true"
    )
    assert status == 0 and "nothing was sent" in printed
    assert "LABELER_KEY" not in os.environ and not (small_world / "labels" / "dry").exists()
