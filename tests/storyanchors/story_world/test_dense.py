import numpy as np
import pytest

from storyanchors.story_world import render_frame, to_story
from storyanchors.story_world.dense import (
    GAP,
    MAX_CLIP_FRAMES,
    DenseClip,
    dense_frame,
    dense_frames,
    dense_story,
    sample_dense_clip,
)

CLIPS = [sample_dense_clip(seed) for seed in range(300)]


def test_a_clip_lies_within_one_gap_of_its_story():
    for clip in CLIPS:
        assert 1 <= clip.gap < clip.story.num_frames
        assert 3 <= clip.num_frames <= MAX_CLIP_FRAMES
        assert 0 <= clip.positions[0] and clip.positions[-1] <= GAP


def test_clips_are_the_two_levels_at_which_a_gap_is_filled_and_others():
    kinds = {(clip.stride, clip.num_frames) for clip in CLIPS}
    whole, part = (
        sum((clip.stride, clip.num_frames) == kind for clip in CLIPS) / len(CLIPS)
        for kind in ((7, 11), (1, 8))
    )
    assert whole == pytest.approx(0.35, abs=0.08) and part == pytest.approx(0.35, abs=0.08)
    assert len(kinds) > 20


def test_a_gap_begins_and_ends_with_story_frames():
    story = CLIPS[0].story
    whole = dense_frames(DenseClip(story, 2, 0, 7, 11))
    assert np.array_equal(whole[0], render_frame(story, 2)) and np.array_equal(
        whole[-1], render_frame(story, 3)
    )


def test_subjects_move_between_story_frames():
    moving = [clip for clip in CLIPS if clip.stride == 7 and clip.num_frames == 11]
    assert all(
        not np.array_equal(dense_frame(clip.story, clip.gap, 0), dense_frame(clip.story, clip.gap, GAP // 2))
        for clip in moving
    )


def test_the_text_tells_the_event_of_every_frame():
    for clip in CLIPS:
        told, whole = dense_story(clip), to_story(clip.story)
        assert told.num_frames == clip.num_frames and told.subjects == whole.subjects
        for number, position in enumerate(clip.positions, start=1):
            shown = clip.gap + (position == GAP)
            [expected] = [e.description for e in whole.events if e.first_frame <= shown <= e.last_frame]
            [found] = [e.description for e in told.events if e.first_frame <= number <= e.last_frame]
            assert found == expected
