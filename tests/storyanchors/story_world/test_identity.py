from dataclasses import replace
from itertools import combinations

import numpy as np

from storyanchors.story_world import (
    Subject,
    consistency_samples,
    identity_samples,
    members_seen,
    parse_frame,
    render_frame,
    sample_story,
)
from storyanchors.story_world.identity import CHANCE
from storyanchors.story_world.world import COLOURS, SHAPES

STORIES = [sample_story(3000 + seed) for seed in range(12)]


def parsed(story, cast=None):
    shown = replace(story, cast=cast or story.cast)
    return [parse_frame(render_frame(shown, facts)) for facts in story.frames]


def identity(frames, story, given=()):
    return identity_samples(frames, story, given, range(len(story.cast)))["identity"]


def test_the_true_cast_is_itself_in_every_frame():
    for story in STORIES:
        samples = identity_samples(parsed(story), story, (), range(len(story.cast)))
        assert set(samples) == {"identity", "colour", "shape"}
        assert all(all(values) for values in samples.values())
        assert len(samples["identity"]) == sum(len(facts.actions) for facts in story.frames)


def test_another_shape_or_colour_is_not_the_subject():
    story = next(story for story in STORIES if len(story.cast) == 1)
    [subject] = story.cast
    shape = next(shape for shape in SHAPES if shape != subject.shape)
    other_shape = identity_samples(parsed(story, (replace(subject, shape=shape),)), story, (), [0])
    assert not any(other_shape["identity"]) and not any(other_shape["shape"]) and all(other_shape["colour"])
    colour = next(colour for colour in COLOURS if colour != subject.colour)
    assert not any(identity(parsed(story, (replace(subject, colour=colour),)), story))


def test_two_subjects_in_each_others_places_are_not_themselves():
    story = next(story for story in STORIES if len(story.cast) == 2 and len(story.frames[0].actions) == 2)
    swapped = parsed(story, story.cast[::-1])
    assert not any(identity(swapped, story, given=range(2, story.num_frames + 1)))


def test_a_subject_too_many_or_too_few_leaves_nobody_in_place():
    story = next(story for story in STORIES if any(len(facts.actions) == 2 for facts in story.frames))
    facts = next(facts for facts in story.frames if len(facts.actions) == 2)
    frames = parsed(story)
    number = story.frames.index(facts)
    frames[number] = parse_frame(render_frame(story, replace(facts, actions=facts.actions[:1])))
    others = [n for n in range(1, story.num_frames + 1) if n != number + 1]
    assert identity(frames, story, given=others) == [False, False]


def test_given_frames_and_other_members_do_not_count():
    story = next(story for story in STORIES if len(story.cast) == 2)
    assert not identity_samples(parsed(story), story, range(1, story.num_frames + 1), [0, 1])
    only_second = identity_samples(parsed(story), story, (), [1])["identity"]
    assert len(only_second) == sum(1 in dict(facts.actions) for facts in story.frames)


def test_guessing_is_right_once_in_24():
    rng = np.random.default_rng(0)
    guesses = []
    for story in STORIES * 12:
        facts = story.frames[0]
        subjects = [Subject(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in story.cast]
        frame = parse_frame(render_frame(replace(story, cast=tuple(subjects)), facts))
        frames = [frame] * story.num_frames
        guesses += identity(frames, story, given=range(2, story.num_frames + 1))
    assert CHANCE == 1 / 24 and abs(np.mean(guesses) - CHANCE) < 0.04  # three standard errors


def test_consistency_counts_the_members_that_both_frames_ask_for():
    story = next(story for story in STORIES if len(story.cast) == 2)
    pairs = list(combinations(range(1, story.num_frames + 1), 2))
    samples = consistency_samples(parsed(story), story, pairs)
    asked = [{member for member, _ in facts.actions} for facts in story.frames]
    assert all(samples) and len(samples) == sum(len(a & b) for a, b in combinations(asked, 2))


def test_members_seen_are_those_that_frames_ask_for():
    story = next(story for story in STORIES if len(story.cast) == 2)
    assert members_seen(story, range(1, story.num_frames + 1)) == {0, 1}
    assert members_seen(story, [1]) == {member for member, _ in story.frames[0].actions}
    assert members_seen(story, []) == set()
