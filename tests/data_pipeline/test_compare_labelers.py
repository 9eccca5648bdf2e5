import json

import pytest

from data_pipeline.captions import write_captions, write_run
from data_pipeline.compare_labelers import Matched, boundaries, compare_runs, match_boundaries, match_subjects
from data_pipeline.shard_writer import ShardWriter
from storyanchors.clip import CaptionRecord
from storyanchors.story import Event, Story


def story(*ranges, subjects=("a red robot", "a small dog")) -> Story:
    return Story([Event(first, last, f"Something in {first}.") for first, last in ranges], list(subjects))


@pytest.fixture
def dataset(tmp_path):
    """One shard of three clips, of which only the keys count here."""
    frames = tmp_path / "frames"
    frames.mkdir()
    with ShardWriter(frames, "000000") as shard:
        for key in ("film-1", "film-2", "film-3"):
            shard.add(key, {"001.jpg": b"a", "clip.json": b"b"})
        shard.finish()
    record = {"schema_version": 1, "made_by": "a test", "config": {}, "tool": {}, "license_note": ""}
    (tmp_path / "dataset.json").write_text(json.dumps(record | {"finished": True, "counts": {"shards": 1}}))
    return tmp_path


def write_stories(dataset, name, stories):
    write_captions(dataset, name, "000000", [CaptionRecord(key, "", story) for key, story in stories.items()])
    write_run(dataset, name, "a test")


def test_boundaries_are_inside_the_clip_and_overlaps_have_two():
    assert boundaries(story((1, 3), (4, 9))) == [3]
    assert boundaries(story((1, 5), (4, 9))) == [3, 5]
    assert boundaries(story((1, 9))) == []


def test_boundaries_match_one_to_one_within_one_frame():
    assert match_boundaries([3, 6], [4, 7]) == Matched(2, 2, 2)
    assert match_boundaries([3], [5]).matched == 0
    assert match_boundaries([3, 4, 5], [4]) == Matched(1, 3, 1)
    assert match_boundaries([1, 3], [2, 2 + 2]).matched == 2  # not the nearest first, but the most pairs


def test_subjects_match_by_their_words_whatever_their_order():
    a, b = ["a red robot", "a small brown dog"], ["the small dog", "robot, red"]
    assert match_subjects(a, b) == match_subjects(list(reversed(a)), b)
    assert match_subjects(a, b).matched == pytest.approx(1 + 2 / 3)
    assert match_subjects([], []).f1 == 1
    assert match_subjects(a, []).f1 == 0


def test_a_run_agrees_with_itself_and_less_with_what_is_shifted(dataset):
    stories = {key: story((1, 4), (5, 9), (10, 20)) for key in ("film-1", "film-2")}
    shifted = {key: story((1, 7), (8, 12), (13, 20)) for key in stories}
    write_stories(dataset, "one", stories)
    write_stories(dataset, "two", shifted)
    same, other = compare_runs(dataset, "one", "one"), compare_runs(dataset, "one", "two")
    assert same.boundaries.f1 == same.subjects.f1 == 1
    assert same.chance.f1 < 0.6  # two boundaries of 19 places
    assert other.boundaries.f1 == 0
    assert same.least == [] and other.least == [(0.5, "film-1"), (0.5, "film-2")]
    assert other == compare_runs(dataset, "one", "two")


def test_clips_that_one_labeler_left_out_lower_the_coverage_and_nothing_else(dataset, command):
    stories = {key: story((1, 2), (3, 6)) for key in ("film-1", "film-2", "film-3")}
    write_stories(dataset, "one", stories)
    write_stories(dataset, "two", {"film-2": stories["film-2"]})
    status, printed, errors = command("compare_labelers", f"dataset={dataset}", "a=one", "b=two")
    assert status == 0, errors
    assert "1 clips in both, 0.333 of all" in printed and "F1         1.000" in printed
    assert "film" not in printed  # where all agree no clip is named


def test_runs_without_a_common_story_are_no_error_and_unknown_runs_are_named(dataset, command, refused):
    write_stories(dataset, "one", {"film-1": story((1, 2))})
    write_stories(dataset, "two", {"film-2": story((1, 2))})
    assert "nothing to compare" in command("compare_labelers", f"dataset={dataset}", "a=one", "b=two")[1]
    assert "'three', found one, two" in refused("compare_labelers", f"dataset={dataset}", "a=one", "b=three")
    write_stories(dataset, "four", {"film-1": story((1, 3))})
    assert "2 and 3 frames" in refused("compare_labelers", f"dataset={dataset}", "a=one", "b=four")
