"""Is it still the same subject? Identity against what only pixels told, and consistency over chosen pairs.

A story told of hero1 and hero2 leaves their looks to given frames. Who is who is then known by place: the
subjects of a frame stand from left to right in the order of the cast.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from storyanchors.story_world.parser import ParsedFrame
from storyanchors.story_world.world import COLOURS, SHAPES, WorldStory

CHANCE = 1 / (len(COLOURS) * len(SHAPES))  # of guessing a subject's colour and shape


def identity_samples(
    parsed: Sequence[ParsedFrame], story: WorldStory, given: Collection[int], members: Collection[int]
) -> dict[str, list[float]]:
    """For every generated frame that asks for one of these cast members: does it look as in the story?

    identity is colour and shape together; both also alone. In a frame that shows another number of subjects
    than asked for nobody stands in place, and all three are 0. given: 1-based numbers of frames.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    for number, (frame, facts) in enumerate(zip(parsed, story.frames, strict=True), start=1):
        if number in given:
            continue
        in_place = len(frame.subjects) == len(facts.actions)
        for place, (member, _) in enumerate(facts.actions):
            if member in members:
                subject, seen = story.cast[member], frame.subjects[place] if in_place else None
                same_colour = seen is not None and seen.colour == subject.colour
                same_shape = seen is not None and seen.shape == subject.shape
                samples["identity"].append(same_colour and same_shape)
                samples["colour"].append(same_colour)
                samples["shape"].append(same_shape)
    return samples


def consistency_samples(
    parsed: Sequence[ParsedFrame], story: WorldStory, pairs: Iterable[tuple[int, int]]
) -> list[float]:
    """Over these pairs of 1-based frame numbers, for each cast member that both ask for: same shape in both?

    A member is known by its colour, so this is for stories whose text names it.
    """
    same = []
    for first, second in pairs:
        for member in _members(story, first) & _members(story, second):
            shapes = [_shapes(parsed[number - 1], story.cast[member].colour) for number in (first, second)]
            same.append(bool(shapes[0] & shapes[1]))
    return same


def members_seen(story: WorldStory, numbers: Iterable[int]) -> set[int]:
    """Which of the cast these frames (numbers from 1) show."""
    return {member for number in numbers for member in _members(story, number)}


def _members(story: WorldStory, number: int) -> set[int]:
    return {member for member, _ in story.frames[number - 1].actions}


def _shapes(frame: ParsedFrame, colour: str) -> set[str]:
    return {seen.shape for seen in frame.subjects if seen.colour == colour}
