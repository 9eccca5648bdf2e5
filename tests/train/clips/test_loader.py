"""Packs come in the plan's order, whatever the workers; a broken clip is noted and replaced by rule."""

import json
import shutil
from functools import partial

import pyarrow as pa
import pytest
import torch

from storyanchors.caption_encoder import WordEncoder
from tests.range_server import serve
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import ClipReader
from train.clips.loader import PlannedClips, PlannedLoader, leave_out_uncuttable
from train.clips.quarantine import Quarantine
from train.data_plan import DataPlan, PlannedClip, PlannedPack


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def break_clips(dataset, numbers) -> list[str]:
    """Damages the second frame of these rows; returns their keys."""
    path, index = dataset / "frames" / "000000.tar", ClipIndex.open(dataset)
    content = bytearray(path.read_bytes())
    rows = [index.row(number) for number in numbers]
    for row in rows:
        content[row.frame_offsets[1] + 40] ^= 0xFF
    path.write_bytes(content)
    return [row.key for row in rows]


def open_loader(dataset, folder, *, start=0, num_packs=6, num_workers=0, max_share=0.5) -> PlannedLoader:
    index = ClipIndex.open(dataset)
    tokens = index.num_tokens(16)
    plan = DataPlan(tokens, tokens.astype(float), seed=0, stage="s", clips_per_batch=4, packs_per_batch=2)
    return PlannedLoader(
        PlannedClips(index, tokens),
        partial(plan.packs, rank=0, world_size=1),
        position=lambda: start,
        num_packs=lambda: num_packs,
        quarantine=Quarantine(folder, 0, max_share),
        num_workers=num_workers,
        prefetch=2,
    )


def keys(batches) -> list[tuple]:
    return [([(clip.key, clip.epoch) for clip in batch.clips], batch.next_position) for batch in batches]


def test_two_workers_give_what_none_gives_and_the_waits_are_timed(dataset, tmp_path):
    """Also from another position on: it is asked for when an iteration begins."""
    here = list(open_loader(dataset, tmp_path))
    for start, expected in ((0, here), (here[1].next_position, here[2:])):
        loader = open_loader(dataset, tmp_path, start=start, num_packs=len(expected), num_workers=2)
        found = list(loader)
        assert keys(found) == keys(expected) and len(loader) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a.frames, b.frames) for a, b in zip(one.clips, other.clips, strict=True))
            assert one.num_tokens == other.num_tokens and one.wait_s > 0
    assert not list(tmp_path.iterdir())  # nothing was broken


def test_a_broken_clip_is_noted_and_replaced_and_no_other_changes(dataset, copy, tmp_path):
    whole = list(open_loader(dataset, tmp_path / "whole"))
    broken_keys = break_clips(copy, [3, 7])
    batches = list(open_loader(copy, tmp_path / "q"))
    lines = list(map(json.loads, (tmp_path / "q" / "rank_00000.jsonl").read_text().splitlines()))
    replacement = {(line["key"], line["epoch"]): line["replacement"] for line in lines}
    assert {key for key, _ in replacement} == set(broken_keys)
    assert not set(replacement.values()) & set(broken_keys)
    assert all(line["member"].endswith(".002.jpg") and "crc32 is" in line["reason"] for line in lines)
    assert all(line["shard"] == str(copy / "frames" / "000000.tar") for line in lines)
    expected = [
        ([(replacement.get((key, epoch), key), epoch) for key, epoch in clips], end)
        for clips, end in keys(whole)
    ]
    assert keys(batches) == expected
    assert all(a.num_tokens <= b.num_tokens for a, b in zip(batches, whole, strict=True))
    assert [len(batch.broken) > 0 for batch in batches].count(True) >= 1
    assert keys(open_loader(copy, tmp_path / "again")) == keys(batches)
    assert len({(tmp_path / name / "rank_00000.jsonl").read_text() for name in ("q", "again")}) == 1


def test_where_no_clip_is_whole_the_run_stops(copy, tmp_path):
    index = ClipIndex.open(copy)
    (copy / "frames" / "000000.tar").write_bytes(b"\0" * 10_000_000)
    with pytest.raises(ValueError, match=r"clip .* is broken .*, and so are the \d+ clips that may take its"):
        list(open_loader(copy, tmp_path))
    assert len(index) == 10


def test_too_many_broken_clips_stop_the_run(copy, tmp_path):
    break_clips(copy, [0, 1, 2, 3, 4])
    with pytest.raises(
        ValueError, match=r"1\d of \d+ clips read are broken, more than data.max_broken_share"
    ):
        list(open_loader(copy, tmp_path, num_packs=100, max_share=0.1))
    with pytest.raises(ValueError, match=r"\d of \d+ clips read are broken, .*share=0 "):
        list(open_loader(copy, tmp_path, num_packs=100, max_share=0))


def test_a_shard_that_vanishes_is_no_broken_clip(copy, tmp_path):
    loader = open_loader(copy, tmp_path)
    (copy / "frames" / "000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"000000\.tar"):
        list(loader)


def test_a_run_goes_on_where_one_clip_is_broken(train, dataset, copy, tmp_path):
    """It is met at the start too, where the codec is fitted to some clips."""
    train_index, _ = ClipIndex.open(dataset).split(0.2)
    key = train_index.row(0).key
    place = ClipIndex.open(dataset).texts("key").index(key)
    break_clips(copy, [place])
    run_dir = train(tmp_path / "run", f"data.dataset={copy}", "stage=multi_event", "stage.steps=5")
    lines = (run_dir / "quarantine" / "rank_00000.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {key}


def test_a_run_can_read_all_it_needs_from_a_server(train, dataset, tmp_path, monkeypatch):
    """Its first three answers are errors that pass; its losses are those of a run that reads the disk."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    losses = []
    with serve(dataset.parent) as server:
        server.faults = ["503", "", "cut"]
        for place in (dataset, f"{server.url}/{dataset.name}"):
            run_dir = train(tmp_path / f"run{len(losses)}", f"data.dataset={place}", "stage=multi_event")
            lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
            losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_setting_with_a_key_in_it_reaches_no_run_folder(train, tmp_path):
    with pytest.raises(ValueError, match="give the plain URL"):
        train(tmp_path / "run", "data.dataset='https://host/data?sig=s3cr3t'", "stage=multi_event")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"s3cr3t" in content for content in written)


def test_a_run_with_no_whole_clip_says_which_and_why(train, copy, tmp_path):
    break_clips(copy, range(10))
    with pytest.raises(
        ValueError, match=r"none of \d+ clips can be read .*000000\.tar: member story-world-.*crc32"
    ):
        train(tmp_path / "run", f"data.dataset={copy}", "stage=multi_event")


def test_a_missing_shard_stops_a_run_before_it_begins(train, copy, tmp_path):
    (copy / "frames" / "000000.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 files of the dataset are missing .*000000.tar"):
        train(tmp_path / "run", f"data.dataset={copy}", "stage=multi_event")


def test_the_errors_of_a_pack_come_back_as_values(copy):
    index = ClipIndex.open(copy)
    clips = PlannedClips(index, index.num_tokens(16))
    (copy / "frames" / "000000.tar").unlink()
    assert isinstance(clips[PlannedPack((PlannedClip(2, 0),), 1, 1)], FileNotFoundError)


def test_a_dataset_without_an_index_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="build_index"):
        ClipIndex.open(tmp_path)


def test_held_out_sources_are_a_share_and_never_trained_on(dataset):
    index = ClipIndex.open(dataset)
    train, held_out = index.split(0.3)
    sources = lambda part: set(part.texts("source"))  # noqa: E731
    assert not sources(train) & sources(held_out)
    assert sources(train) | sources(held_out) == sources(index)
    smaller = index.split(0.1)[1]
    assert sources(smaller) <= sources(held_out)  # a larger share only adds videos
    assert len(index.split(0.0)[1]) == 0


def test_tokens_are_counted_from_the_index(dataset):
    index = ClipIndex.open(dataset)
    frames = index.numbers("num_frames")
    assert (index.num_tokens(8) == frames * 64).all()


class ShortSighted(WordEncoder):
    """Takes so few words that of two events at most one fits."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens


def test_captions_that_no_cutting_makes_short_enough_are_left_out_where_they_were_counted(dataset, caplog):
    index = ClipIndex.open(dataset)
    reader = ClipReader()
    texts = [reader.caption(index.row(number)).story.prompt() for number in range(len(index))]
    shortest = min(WordEncoder().count_tokens(text) for text in texts)

    assert leave_out_uncuttable(index, ["multi_event"], ShortSighted(3)) is index  # none were counted
    [table] = index.tables
    counts = pa.array([WordEncoder().count_tokens(text) for text in texts], pa.int32())
    table = table.set_column(table.column_names.index("story_tokens"), "story_tokens", counts)
    counted = ClipIndex(index.datasets, [table], index.chosen)
    assert len(leave_out_uncuttable(counted, ["multi_event"], ShortSighted(shortest - 1))) == len(
        index
    )  # cut
    assert "left out" not in caplog.text
    assert not len(leave_out_uncuttable(counted, ["multi_event"], ShortSighted(3)))
    assert f"{len(index)} of {len(index)} clips are left out, such as {index.row(0).key}: " in caplog.text
