from dataclasses import replace

import pytest

from storyanchors.story import Event, Story
from storyanchors.story_world import from_story, sample_story, to_story
from storyanchors.story_world.world import COLOURS, SCENES, SHAPES

STORY = Story(
    [
        Event(
            1,
            2,
            "in the city, the yellow square stands and the red circle holds a ball, wide shot from the left",
        ),
        Event(3, 3, "in the cave, the red circle sleeps, close shot from the center"),
    ],
    ["yellow square", "red circle"],
    "flat cartoon",
)


@pytest.mark.parametrize("num_frames", [None, 2, 16])
def test_captions_read_back_as_the_story_they_were_made_from(num_frames):
    for seed in range(200):
        world_story = sample_story(seed, num_frames=num_frames)
        assert from_story(to_story(world_story)) == world_story


def test_the_prompt_alone_carries_every_fact():
    for seed in range(200):
        world_story = sample_story(seed)
        assert from_story(Story.from_prompt(to_story(world_story).prompt())) == world_story


def test_a_handwritten_story_is_understood():
    caption = to_story(from_story(STORY))
    assert (caption.events, caption.subjects, caption.style) == (STORY.events, STORY.subjects, STORY.style)


def test_the_vocabulary_is_small_and_plain():
    words = set()
    for seed in range(500):
        caption = to_story(sample_story(seed))
        text = " ".join(
            [*(event.description for event in caption.events), *caption.subjects, caption.global_caption]
        )
        words |= set(text.replace(",", " ").split())
    assert len(words) <= 50
    assert all(word.isalpha() and word.islower() for word in words)


def test_the_global_caption_names_cast_and_scenes_in_order_without_numbers():
    world_story = sample_story(3)
    text = to_story(world_story).global_caption
    assert all(f"{subject.colour} {subject.shape}" in text for subject in world_story.cast)
    scenes = [word for word in text.replace(",", " ").split() if word in SCENES]
    assert scenes == [event.facts.scene for event in world_story.events]
    assert not any(character.isdigit() for character in text)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("on the moon, ...", "event 2: found 'on', expected 'in'"),
        (
            "in the moon, the red circle runs",
            "event 2: found 'moon' after 'in the', expected 'forest' or 'cave' or",
        ),
        (
            "in the cave, the red circle",
            "found the end of the line after 'in the cave, the red circle', expected 'st",
        ),
        ("in the cave, the red square", "found 'square' after 'in the cave, the red', expected 'circle'"),
        ("in the cave, the blue circle", "found 'blue' after 'in the cave, the', expected 'yellow' or 'red'"),
        (
            "in the cave, the red circle dances",
            "found 'dances' after 'in the cave, the red circle', expected 'stands",
        ),
        ("in the cave, the red circle holds a cup", "found 'cup' .* expected 'ball'"),
        (
            "in the cave, the red circle runs, wide shot from the left side",
            "found 'side' .* expected the end of",
        ),
        (
            "in the cave, the yellow square runs and the red circle runs, close shot from the left",
            "found 'close' .* expected 'wide' or 'medium'",
        ),
        (
            "in the cave, the red circle runs and the yellow square runs, wide shot from the left",
            "event 2: subjects are named once each, from left to right",
        ),
    ],
)
def test_an_event_outside_the_grammar_is_refused_with_line_word_and_expectation(description, message):
    with pytest.raises(ValueError, match=message):
        from_story(replace(STORY, events=[STORY.events[0], Event(3, 3, description)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": []}, "found 0 subjects, expected 1 to 2"),
        ({"subjects": ["yellow square", "tall man"]}, "subject 2: found 'tall', expected 'red' or"),
        ({"subjects": ["red square", "red circle"]}, "subjects 1 and 2 are both red"),
        ({"style": "oil painting"}, "found the style 'oil painting', expected 'flat cartoon'"),
        (
            {"events": [STORY.events[0], Event(2, 3, STORY.events[1].description)]},
            "event 2 starts at frame 2, exp",
        ),
        ({"events": [Event(1, 33, STORY.events[1].description)]}, "found 33 frames, expected 2 to 32"),
    ],
)
def test_a_story_that_the_world_cannot_show_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_story(replace(STORY, **change))


def test_an_anonymous_story_says_all_but_what_its_heroes_look_like():
    for seed in range(50):
        world_story = sample_story(seed)
        named, anonymous = to_story(world_story), to_story(world_story, anonymous=True)
        text = anonymous.prompt() + anonymous.global_caption
        assert not any(name in text for name in (*COLOURS, *SHAPES))
        for number, subject in enumerate(named.subjects, start=1):
            text = text.replace(f"hero{number}", subject)
        assert text == named.prompt() + named.global_caption
