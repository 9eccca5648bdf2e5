"""Clips are read by offset; a byte that is not what the index says is an error that names the place."""

import shutil

import pyarrow as pa
import pytest
from PIL import Image

from storyanchors.caption_encoder import WordEncoder
from storyanchors.clip import frames_to_tensor
from storyanchors.story_world import from_story, render_frame
from train.clip_index import ClipIndex
from train.data_plan import PlannedClip, PlannedPack
from train.loader import BrokenSample, ClipReader, PlannedClips, leave_out_uncuttable


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def test_a_clip_is_what_was_rendered(dataset):
    index = ClipIndex.open(dataset)
    batch = PlannedClips(index)[PlannedPack((PlannedClip(3, epoch=5),), 1, 1)]
    clip, row = batch.clips[0], index.row(3)
    record = ClipReader().caption(row)
    story = from_story(record.story)
    rendered = [Image.fromarray(render_frame(story, number)) for number in range(1, story.num_frames + 1)]
    assert (clip.key, clip.epoch, clip.captions["multi_event"]) == (row.key, 5, record.story.prompt())
    assert clip.captions["global"] == record.global_caption
    assert clip.conditions.num_frames == len(clip.frames) == story.num_frames
    difference = (clip.frames - frames_to_tensor(rendered)).abs()  # of JPEG at quality 95
    assert difference.mean() < 0.02


@pytest.mark.parametrize("column", ["frame_offsets", "caption_offset"])
def test_a_changed_byte_is_found_and_named(copy, column):
    row = ClipIndex.open(copy).row(2)
    if column == "frame_offsets":
        path, offset, named = copy / "frames" / "000000.tar", row.frame_offsets[1] + 40, f"{row.key}.002.jpg"
    else:
        path, offset, named = copy / "captions" / "truth" / "000000.jsonl", row.caption_offset, row.key
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)
    error = PlannedClips(ClipIndex.open(copy))[PlannedPack((PlannedClip(2, 0),), 1, 1)]
    assert isinstance(error, BrokenSample)
    assert named in str(error) and str(path) in str(error)


def test_a_shard_cut_in_half_is_named(copy):
    path = copy / "frames" / "000000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    index = ClipIndex.open(copy)
    with pytest.raises(BrokenSample, match=r"000000.tar: member story-world-.*the index expects"):
        ClipReader().frames(index.row(len(index) - 1))


def test_a_broken_clip_stops_the_run_with_its_name(train, copy, tmp_path):
    (copy / "frames" / "000000.tar").write_bytes(b"")
    with pytest.raises(BrokenSample, match="story-world-"):
        train(tmp_path / "run", f"data.dataset={copy}", "data.num_workers=1", "stage=multi_event")


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
