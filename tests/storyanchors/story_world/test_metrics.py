from dataclasses import replace

import numpy as np
import pytest

from storyanchors.story import Event, Story
from storyanchors.story_world import from_story, render_frame, sample_story, score_stories
from storyanchors.story_world.metrics import FLAWLESS
from storyanchors.story_world.world import SHAPES

STORIES = [sample_story(1000 + seed) for seed in range(18)]
TRUTH = [[render_frame(story, facts) for facts in story.frames] for story in STORIES]
ACCURACIES = {name for name, value in FLAWLESS.items() if value == 1}


def changed(scores: dict[str, float], tolerance: float = 0.01) -> set[str]:
    return {name for name, value in scores.items() if abs(value - FLAWLESS[name]) > tolerance}


def test_ground_truth_is_flawless():
    assert score_stories(TRUTH, STORIES) == FLAWLESS


def test_ground_truth_is_flawless_for_every_length_of_story():
    stories = [sample_story(num_frames, num_frames=num_frames) for num_frames in range(2, 33, 2)]
    frames = [[render_frame(story, facts) for facts in story.frames] for story in stories]
    assert score_stories(frames, stories) == FLAWLESS


def test_strong_noise_leaves_the_legal_frames_by_its_own_size():
    rng = np.random.default_rng(0)
    noisy = [
        [np.clip(frame + rng.normal(0, 64, frame.shape), 0, 255) for frame in frames] for frames in TRUTH
    ]
    scores = score_stories(noisy, STORIES)
    assert 50 < scores["legal_rmse"] < 64  # clipping takes some of it
    assert scores["pfa_f1"] > 0.95  # a person reads these frames, too


def test_noise_that_drowns_the_subjects_is_no_story():
    rng = np.random.default_rng(0)
    noise = [[rng.integers(0, 256, frame.shape) for frame in frames] for frames in TRUTH]
    scores = score_stories(noise, STORIES)
    assert scores["pfa_f1"] < 0.3 and scores["subject_consistency"] == 0 and scores["action_accuracy"] == 0


def test_shuffled_frames_lose_order_but_not_diversity_or_realism():
    rng = np.random.default_rng(0)
    shuffled = [[frames[index] for index in rng.permutation(len(frames))] for frames in TRUTH]
    scores = score_stories(shuffled, STORIES)
    assert abs(scores["event_order_tau"]) < 0.25 and abs(scores["scene_order_tau"]) < 0.25
    assert scores["pfa_f1"] < 0.75 and scores["event_accuracy"] < 0.6
    unchanged = {"scene_diversity_gap", "shot_diversity_gap", "legal_rmse", "copy_paste"}
    assert not changed(scores) & unchanged


def test_repeating_frame_1_keeps_the_subject_but_loses_diversity_and_order():
    copies = [[frames[0]] * len(frames) for frames in TRUTH]
    scores = score_stories(copies, STORIES)
    assert scores["subject_consistency"] > 0.85
    assert scores["scene_diversity_gap"] > 1 and scores["shot_diversity_gap"] > 1
    assert scores["event_order_tau"] == 0 and scores["event_accuracy"] < 0.5
    assert scores["legal_rmse"] == 0 and scores["copy_paste"] == 0
    assert score_stories(copies, STORIES, [{1}] * len(STORIES))["copy_paste"] == 1


def test_another_story_aligns_with_nothing_asked():
    others = [
        sample_story(9000 + number, num_frames=story.num_frames) for number, story in enumerate(STORIES)
    ]
    frames = [[render_frame(story, facts) for facts in story.frames] for story in others]
    scores = score_stories(frames, STORIES)
    assert all(scores[name] < 0.3 for name in ACCURACIES)
    assert scores["legal_rmse"] == 0


def test_a_shape_drawn_anew_in_every_frame_is_a_subject_that_does_not_stay_itself():
    rng = np.random.default_rng(0)
    frames = []
    for story in STORIES:
        casts = [
            tuple(replace(one, shape=SHAPES[rng.integers(4)]) for one in story.cast) for _ in story.frames
        ]
        frames.append(
            [render_frame(replace(story, cast=cast), f) for cast, f in zip(casts, story.frames, strict=True)]
        )
    scores = score_stories(frames, STORIES)
    assert changed(scores) == {"subject_consistency", "pfa_f1"}
    assert scores["subject_consistency"] < 0.45 and scores["pfa_f1"] > 0.75


def test_one_scene_for_all_events_loses_scenes_and_their_order_only():
    frames = [
        [render_frame(story, replace(facts, scene=story.frames[0].scene)) for facts in story.frames]
        for story in STORIES
    ]
    scores = score_stories(frames, STORIES)
    assert (
        scores["scene_accuracy"] < 0.6
        and scores["scene_order_tau"] < 0.3
        and scores["scene_diversity_gap"] > 1
    )
    unchanged = {
        "subject_consistency",
        "shot_accuracy",
        "action_accuracy",
        "shot_diversity_gap",
        "legal_rmse",
    }
    assert not changed(scores) & unchanged


def test_an_event_told_at_the_wrong_frames_is_told_in_sequence_and_complete():
    """What a global caption can be asked for: it names no frames."""
    story = next(s for s in STORIES if s.events[0].last_frame > 1 and len(s.events) > 2)
    late = [render_frame(story, facts) for facts in story.frames]
    late[story.events[0].last_frame - 1] = render_frame(story, story.events[1].facts)
    scores = score_stories([late], [story])
    assert scores["event_completeness"] == scores["scene_sequence"] == 1.0
    assert scores["event_accuracy"] < 1 and scores["event_order_tau"] < 1


def test_an_event_left_out_is_incomplete_and_out_of_sequence():
    story = next(s for s in STORIES if len(s.events) == 3)
    missing = [render_frame(story, facts) for facts in story.frames]
    for number in range(story.events[1].first_frame, story.events[1].last_frame + 1):
        missing[number - 1] = missing[0]
    scores = score_stories([missing], [story])
    assert scores["event_completeness"] == pytest.approx(2 / 3) and scores["scene_sequence"] == 0


def test_grey_frames_show_nothing():
    grey = [[np.full_like(frame, 128) for frame in frames] for frames in TRUTH]
    scores = score_stories(grey, STORIES)
    assert scores["pfa_f1"] < 0.2 and scores["legal_rmse"] > 25
    assert scores["subject_consistency"] == scores["action_accuracy"] == scores["shot_accuracy"] == 0


def test_given_frames_do_not_count():
    grey = np.full_like(TRUTH[0][0], 128)
    half_given = [[grey, *frames[1:-1], grey] for frames in TRUTH]
    given = [{1, story.num_frames} for story in STORIES]
    scores = score_stories(half_given, STORIES, given)
    assert changed(scores) == {"subject_consistency"}  # the subject is looked for in the given frames, too
    one_bad = [[*frames[:-1], grey] for frames in TRUTH]
    others_given = [set(range(1, story.num_frames)) for story in STORIES]
    assert (
        score_stories(one_bad, STORIES, others_given)["pfa_f1"]
        < 0.2
        < score_stories(one_bad, STORIES)["pfa_f1"]
    )


def test_an_edited_frame_is_scored_alone_against_the_given_ones():
    given = [set(range(1, story.num_frames)) for story in STORIES]
    assert score_stories(TRUTH, STORIES, given) == FLAWLESS


def test_reversed_frames_have_reversed_order():
    frames = [frames[::-1] for frames in TRUTH]
    scores = score_stories(frames, STORIES)
    assert scores["event_order_tau"] < -0.5 and scores["scene_order_tau"] < -0.4


def test_undefined_scores_take_the_flawless_value_and_are_never_nan():
    event = Event(1, 2, "in the snow, the red circle runs, wide shot from the left")
    story = from_story(Story([event], ["red circle"], "flat cartoon"))
    assert score_stories([[render_frame(story, 1), render_frame(story, 2)]], [story], [{1}]) == FLAWLESS


def test_wrong_numbers_of_stories_and_frames_are_refused():
    with pytest.raises(ValueError, match="found 1 lists of frames, 18 stories and 18 given sets"):
        score_stories(TRUTH[:1], STORIES)
    with pytest.raises(ValueError, match=f"story 2 has 1 frames, expected {STORIES[1].num_frames}"):
        score_stories([TRUTH[0], TRUTH[1][:1]], STORIES[:2])
    with pytest.raises(ValueError, match="nothing to score: no frame of 1 stories was generated"):
        score_stories(TRUTH[:1], STORIES[:1], [set(range(1, 17))])
