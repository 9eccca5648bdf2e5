"""The real clip through all stages; the answers beside it were written by looking at its frames."""

from pathlib import Path

import pytest

from data_pipeline.build_index import build_index
from data_pipeline.captions import read_captions
from data_pipeline.compare_labelers import compare_runs
from data_pipeline.labeling.partition import label_lines
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import Events, GlobalCaptions, UnifiedStory
from data_pipeline.review_labels import review
from data_pipeline.sample_frames import SampleFramesConfig, find_videos, sample_frames
from storyanchors.story import Story
from storyanchors.vlm import VlmConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "videos"
ANSWERS = {69: "sintel_trailer_30s.answers.jsonl", 34: "sintel_trailer_30s.interval_34.answers.jsonl"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> dict[int, Path]:
    """The clip sampled at both intervals, and labelled."""
    datasets = {}
    for frame_interval, answers in ANSWERS.items():
        dataset = datasets[frame_interval] = tmp_path_factory.mktemp("sintel") / "ds"
        config = SampleFramesConfig(str(EXAMPLES), str(dataset), frame_interval=frame_interval)
        sample_frames(find_videos(EXAMPLES), dataset, config)
        vlm = VlmConfig("replay", replay=str(EXAMPLES / answers))
        for stage in (GlobalCaptions(), Events(), UnifiedStory()):
            run_stage(LabelingConfig(str(dataset), "by_eye", vlm), stage)
    return datasets


@pytest.mark.parametrize("frame_interval, num_frames, num_subsets", [(69, 11, 1), (34, 21, 2)])
def test_the_real_clip_is_labelled_and_no_question_stays_open(
    frame_interval, num_frames, num_subsets, labelled
):
    dataset = labelled[frame_interval]
    lines = {
        stage: label_lines(dataset, "by_eye", stage, "000000") for stage in ("global", "events", "story")
    }
    for [line] in lines.values():
        assert line["status"] in ("ok", "warned"), line["findings"]
        # at 34 there are two black frames; nothing else is worth a remark
        assert {finding["code"] for finding in line["findings"]} <= {"duplicate_text"}
    [events], [story] = lines["events"], lines["story"]
    assert len(events["subsets"]) == num_subsets
    assert Story.from_dict(story["story"]).num_frames == num_frames
    used = {id for ids in story["event_ids"] for id in ids}
    assert used == {event["id"] for event in events["events"]}
    build_index(dataset, "by_eye", None, workers=1)
    [caption] = read_captions(dataset, "by_eye", "000000")
    assert caption.record.global_caption and caption.record.story
    assert review(dataset, "by_eye", 50, 50).count("<article") == 1


def test_the_answers_have_the_boundaries_of_the_story_that_was_written_before_them(labelled):
    build_index(labelled[69], "by_hand", EXAMPLES, workers=1)
    agreement = compare_runs(labelled[69], "by_hand", "by_eye")
    assert agreement.both == 1 and agreement.boundaries.f1 == 1
    assert 0.2 < agreement.subjects.f1 < 1  # told in other words
