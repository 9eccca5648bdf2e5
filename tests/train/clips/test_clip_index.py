"""Rows of one or several mapped indexes: chosen without copies, each found again in its own dataset."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.build_index import build_index
from data_pipeline.index_file import write_index
from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from train.clips.clip_index import ClipIndex, open_index
from train.stable_hash import stable_hash


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Four more clips, of other stories."""
    folder = tmp_path_factory.mktemp("other") / "world"
    settings = WriteStoryWorldConfig(str(folder), num_stories=4, num_frames=[6, 8], seed=1, workers=1)
    write_dataset(folder, settings)
    build_index(folder, "truth")
    return folder


@pytest.fixture
def both(dataset, other) -> ClipIndex:
    return ClipIndex.open(dataset, other)


def test_rows_of_several_datasets_follow_one_another(both, dataset, other):
    parts = [ClipIndex.open(dataset), ClipIndex.open(other)]
    assert both.num_clips == (10, 4) and len(both) == 14
    rows = [part.row(number) for part in parts for number in range(len(part))]
    assert [both.row(number) for number in range(14)] == rows
    assert {row.dataset for row in rows[:10]} == {str(dataset)} and rows[10].dataset == str(other)
    for column in ("num_frames", "height"):
        expected = np.concatenate([part.numbers(column) for part in parts])
        np.testing.assert_array_equal(both.numbers(column), expected)


@pytest.mark.parametrize("seed", range(6))
def test_chosen_rows_stay_what_they_were(both, seed):
    rng = np.random.default_rng(seed)
    kept, numbers = both, np.arange(len(both))
    for share in (0.7, 0.6):  # chosen again among the chosen
        mask = rng.random(len(kept)) < share
        kept, numbers = kept.only(mask), numbers[mask]
    assert sum(kept.num_clips) == len(kept) == len(numbers)
    assert [kept.row(n) for n in range(len(kept))] == [both.row(n) for n in numbers.tolist()]
    np.testing.assert_array_equal(kept.numbers("num_frames"), both.numbers("num_frames")[numbers])
    assert kept.texts("source") == [both.texts("source")[n] for n in numbers.tolist()]
    bytes_of_rows = [sum(both.row(n).frame_sizes) for n in numbers.tolist()]
    assert kept.frame_bytes().tolist() == bytes_of_rows


def test_a_video_is_held_out_wherever_it_is_used(both, dataset, tmp_path):
    twin = shutil.copytree(dataset, tmp_path / "twin")  # the same videos in another dataset
    train, held_out = ClipIndex.open(dataset, twin).split(0.4)
    sources = lambda part: set(part.texts("source"))  # noqa: E731
    assert not sources(train) & sources(held_out) and len(held_out.num_clips) == 2
    assert held_out.num_clips[0] == held_out.num_clips[1]
    expected = {s for s in sources(train) | sources(held_out) if stable_hash("holdout", s) / 2**63 < 0.4}
    assert sources(held_out) == expected


def test_a_share_that_holds_nothing_out_is_said(dataset, caplog):
    index = ClipIndex.open(dataset)
    assert len(index.split(0.5)[1]) and not len(index.split(0)[1]) and not caplog.messages
    assert not len(index.split(1e-9)[1])
    [line] = caplog.messages
    assert "data.holdout=1e-09" in line and "no held-out loss" in line


@pytest.mark.parametrize("seed", range(3))
def test_a_fingerprint_is_of_the_chosen_clips(both, dataset, other, seed):
    kept = np.random.default_rng(seed).random(14) < 0.6
    fingerprint = both.only(kept).fingerprint()
    assert ClipIndex.open(dataset, other).only(kept).fingerprint() == fingerprint
    for number in np.flatnonzero(kept).tolist():
        fewer = kept & (np.arange(14) != number)
        assert both.only(fewer).fingerprint() != fingerprint
    assert ClipIndex.open(other, dataset).fingerprint() != both.fingerprint()


def test_a_fingerprint_does_not_depend_on_how_the_file_is_cut(dataset):
    whole = ClipIndex.open(dataset)
    cut = pa.concat_tables([whole.tables[0].slice(start, 3) for start in range(0, 10, 3)])
    kept = np.arange(10) % 2 == 0
    assert ClipIndex(["d"], [cut], whole.chosen).only(kept).fingerprint() == whole.only(kept).fingerprint()


def test_a_worker_maps_the_files_itself(both):
    copy = pickle.loads(pickle.dumps(both.only(np.arange(14) % 3 == 0)))
    assert [copy.row(n) for n in range(5)] == [both.row(n) for n in range(0, 14, 3)]
    assert len(pickle.dumps(both)) < 4000


def test_the_commonest_frame_size_and_of_equals_the_largest(both):
    def index(sizes: list[tuple[int, int]]) -> ClipIndex:
        columns = {name: [size[axis] for size in sizes] for axis, name in enumerate(("height", "width"))}
        return ClipIndex(["d"], [pa.table(columns)], [np.arange(len(sizes))])

    assert both.common_frame_size() == (64, 64)
    assert index([(480, 832), (832, 480), (480, 832), (720, 1280)]).common_frame_size() == (480, 832)
    assert index([(480, 832), (832, 480)]).common_frame_size() == (832, 480)


def test_both_files_have_the_same_rows_and_bytes_that_repeat(dataset, tmp_path):
    table = open_index(str(dataset))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_index(tmp_path / folder, table)
    for name in ("index.parquet", "index.arrow"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    parquet = pa.parquet.read_table(tmp_path / "one" / "index.parquet")
    assert parquet.to_pylist() == open_index(str(tmp_path / "one")).to_pylist() == table.to_pylist()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["index.arrow", "index.parquet"]


def test_an_index_that_is_mapped_takes_no_memory_of_the_process(tmp_path, dataset):
    """The rows' byte ranges stay in the file: 200,000 clips with 40 MB of them."""
    one = open_index(str(dataset)).slice(0, 1)
    table = pa.concat_tables([one] * 200).combine_chunks()
    write_index(tmp_path, pa.concat_tables([table] * 1000))
    del table
    before = pa.total_allocated_bytes()
    index = ClipIndex.open(tmp_path)
    index.row(123_456)
    assert pa.total_allocated_bytes() - before < 2**20
    assert (tmp_path / "index.arrow").stat().st_size > 30 * 2**20
