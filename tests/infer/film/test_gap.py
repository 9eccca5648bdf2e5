import pytest
from PIL import Image

from infer.film.gap import gaps_between, read_anchors
from storyanchors.story import Event, Story
from storyanchors.story_world import to_story
from storyanchors.story_world.dense import GAP, dense_story, sample_dense_clip


def picture(level, size=(8, 6), mode="RGB"):
    return Image.new("RGB", size, (level, level, level)).convert(mode)


def gaps_of(story):
    return gaps_between([picture(number) for number in range(story.num_frames)], story)


def test_a_gap_has_its_anchors_and_what_is_told_of_them():
    story = Story([Event(1, 2, "A fox sleeps."), Event(2, 4, "It rains.")], ["a fox"], "ink")
    gaps = gaps_of(story)
    levels = [tuple(anchor.getpixel((0, 0))[0] for anchor in (gap.first, gap.last)) for gap in gaps]
    assert levels == [(0, 1), (1, 2), (2, 3)]
    assert [gap.story.descriptions() for gap in gaps] == [
        [("A fox sleeps.",), ("A fox sleeps.", "It rains.")],
        [("A fox sleeps.", "It rains."), ("It rains.",)],
        [("It rains.",), ("It rains.",)],
    ]
    assert all((gap.story.subjects, gap.story.style) == (["a fox"], "ink") for gap in gaps)


@pytest.mark.parametrize("seed", range(40))
def test_a_clip_is_told_what_dense_training_clips_are_told(seed):
    clip = sample_dense_clip(seed)
    gap = gaps_of(to_story(clip.story))[clip.gap - 1]
    ends_at_anchor = clip.positions[-1] == GAP
    assert (
        gap.clip_story(clip.num_frames, ends_at_anchor=ends_at_anchor).prompt() == dense_story(clip).prompt()
    )


def test_one_sentence_names_each_text_once_in_order():
    story = Story([Event(1, 3, "A fox sleeps."), Event(2, 3, "It rains")], ["a fox"], "ink")
    assert [gap.sentence() for gap in gaps_of(story)] == [
        "A fox sleeps, then A fox sleeps and It rains. ink.",
        "A fox sleeps and It rains. ink.",
    ]


@pytest.mark.parametrize(
    "num_anchors, expected",
    [(1, "two story frames or more, found 1"), (3, "found 3 story frames for a story of 4")],
)
def test_too_few_anchors_are_refused(num_anchors, expected):
    with pytest.raises(ValueError, match=expected):
        gaps_between([picture(0)] * num_anchors, Story([Event(1, 4, "rain")]))


@pytest.mark.parametrize(
    "second, expected",
    [
        (picture(1, (9, 6)), "2.png has 9 x 6 pixels, expected 8 x 6"),
        (Image.new("RGBA", (8, 6), (1, 1, 1, 9)), "mode RGBA, expected RGB without transparent parts"),
    ],
)
def test_anchors_that_do_not_fit_are_named(tmp_path, second, expected):
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for path, frame in zip(paths, (picture(0), second), strict=True):
        frame.save(path)
    with pytest.raises(ValueError, match=expected):
        read_anchors(paths)
