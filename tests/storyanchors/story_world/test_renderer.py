import zlib
from itertools import combinations, pairwise, product

import numpy as np
import pytest

from storyanchors.story_world import FrameFacts, Subject, WorldStory, render_frame, sample_story, to_story
from storyanchors.story_world.renderer import part_shares, subject_columns
from storyanchors.story_world.world import (
    ACTIONS,
    BALL,
    COLOURS,
    EYE,
    PANS,
    SCENES,
    SHADOW,
    SHAPES,
    STREAK,
    ZOOMS,
)


def test_all_colours_are_at_least_25_steps_apart():
    palette = [*sum(SCENES.values(), ()), *COLOURS.values(), EYE, SHADOW, STREAK, BALL]
    for one, other in combinations(palette, 2):
        assert np.linalg.norm(np.subtract(one, other)) >= 25


def test_frames_and_captions_are_what_the_shipped_model_was_trained_on():
    """Who changes a pixel, a draw or a word must train the shipped model again and renew these numbers."""
    stories = [sample_story(seed) for seed in range(50)]
    frames = [render_frame(story, facts) for story in stories for facts in story.frames]
    captions = [to_story(story) for story in stories]
    texts = "".join(caption.prompt() + caption.global_caption for caption in captions)
    assert (zlib.crc32(np.stack(frames).tobytes()), zlib.crc32(texts.encode())) == (649488092, 3105021199)


def test_a_frame_number_counts_from_one_and_shows_the_facts_of_that_frame():
    story = sample_story(1)
    for number, facts in enumerate(story.frames, start=1):
        np.testing.assert_array_equal(render_frame(story, number), render_frame(story, facts))
    for number in (0, story.num_frames + 1):
        with pytest.raises(ValueError, match=f"frame number is {number}, expected 1 to {story.num_frames}"):
            render_frame(story, number)


def test_every_pose_of_a_subject_looks_different():
    story = WorldStory(tuple(Subject("red", shape) for shape in SHAPES), ())
    frames = {
        render_frame(story, FrameFacts("city", zoom, pan, ((member, action),))).tobytes()
        for zoom, pan, member, action in product(ZOOMS, PANS, range(len(SHAPES)), ACTIONS)
    }
    assert len(frames) == len(ZOOMS) * len(PANS) * len(SHAPES) * len(ACTIONS)


def test_two_subjects_never_overlap():
    """The parser adds up the gains of two subjects, which is exact only without overlap."""
    for zoom, pan in product(("wide", "medium"), PANS):
        touched = [
            sum(part_shares(shape, action, zoom, column).sum(-1) for shape in SHAPES for action in ACTIONS)
            > 0
            for column in subject_columns(zoom, pan, 2)
        ]
        assert not (touched[0] & touched[1]).any()


def test_the_first_named_subject_is_on_the_left():
    story = WorldStory((Subject("red", "circle"), Subject("blue", "square")), ())
    frame = render_frame(story, FrameFacts("snow", "medium", "center", ((0, "stands"), (1, "stands"))))
    columns = [np.argwhere((frame == COLOURS[colour]).all(-1))[:, 1].mean() for colour in ("red", "blue")]
    assert columns[0] < 32 < columns[1]


@pytest.mark.parametrize("action", ACTIONS)
def test_dense_mode_starts_at_the_story_frame_moves_little_and_comes_back(action):
    story = WorldStory((Subject("green", "triangle"),), ())
    facts = FrameFacts("desert", "medium", "left", ((0, action),))
    video = [render_frame(story, facts, phase=step / 70).astype(int) for step in range(70)]
    np.testing.assert_array_equal(video[0], render_frame(story, facts))
    assert abs(video[35] - video[0]).max() > 50
    loop = [*video, video[0]]
    steps = [abs(following - frame).mean() for frame, following in pairwise(loop)]
    assert max(steps) < 1


def test_a_phase_outside_a_frame_is_refused():
    with pytest.raises(ValueError, match="phase is 1, expected 0 <= phase < 1"):
        render_frame(sample_story(0), 1, phase=1)
