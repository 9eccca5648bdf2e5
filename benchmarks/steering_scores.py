"""Scores of one case of a steering task, and what those get who draw nothing: they guess, or copy a frame."""

from collections import defaultdict
from dataclasses import replace
from itertools import combinations

import numpy as np
from PIL import Image

from benchmarks.steering_cases import Case, told, true_frames
from storyanchors.story_world import (
    FrameFacts,
    Subject,
    WorldStory,
    consistency_samples,
    identity_samples,
    parse_frame,
    story_samples,
)
from storyanchors.story_world.world import ACTIONS, COLOURS, PANS, SCENES, SHAPES, ZOOMS

Samples = dict[str, list[float]]


def score_case(frames: list[Image.Image], case: Case) -> Samples:
    """What the scores of a case are means of; generated frames only, except where it is said.

    Besides those of story_samples and identity_samples (of the case's members):
    - whole_order_tau: event_order_tau of all frames, kept ones too
    - locked: of the kept frames, those that are the same pixels as before
    - identity_shown: identity with the cast that the kept frames show, where that is another one
    - consistency_within, consistency_across: subject_consistency of frames that one window draws, and of
      frames that different windows draw
    - identity_last_window: identity in the frames that the last window draws
    """
    if len(frames) != case.truth.num_frames:
        raise ValueError(f"found {len(frames)} frames, expected {case.truth.num_frames}")
    parsed, given = [parse_frame(frame) for frame in frames], set(case.given)
    samples = defaultdict(list, story_samples(parsed, case.truth, given))
    samples |= identity_samples(parsed, case.truth, given, case.members)
    samples["whole_order_tau"] = story_samples(parsed, case.truth)["event_order_tau"]
    samples["locked"] = [same_pixels(frames[number - 1], frame) for number, frame in case.given.items()]
    if case.shown:
        seen = identity_samples(parsed, case.shown, given, case.members)
        samples["identity_shown"] = seen["identity"]
    if case.windows:
        drawn_by = {number: index for index, window in enumerate(case.windows) for number in window.drawn}
        pairs = {True: [], False: []}
        for first, second in combinations(sorted(drawn_by), 2):
            pairs[drawn_by[first] == drawn_by[second]].append((first, second))
        samples["consistency_within"] = consistency_samples(parsed, case.truth, pairs[True])
        samples["consistency_across"] = consistency_samples(parsed, case.truth, pairs[False])
        others = set(range(1, len(frames) + 1)) - set(case.windows[-1].drawn)
        last = identity_samples(parsed, case.truth, others, case.members)
        samples["identity_last_window"] = last["identity"]
    return {name: list(map(float, values)) for name, values in samples.items() if values}


def same_pixels(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.convert("RGB").tobytes() == second.convert("RGB").tobytes()


def guess(case: Case, rng: np.random.Generator) -> list[Image.Image]:
    """Right in who is in a frame, all else drawn evenly: a cast for the story, facts for every event."""
    colours = rng.permutation(list(COLOURS))
    cast = tuple(
        Subject(str(colour), SHAPES[rng.integers(len(SHAPES))])
        for colour, _ in zip(colours, case.truth.cast, strict=False)
    )
    facts: list[FrameFacts] = []
    for event in case.truth.events:
        zooms = ZOOMS if len(event.facts.actions) == 1 else ZOOMS[:-1]
        actions = tuple((member, ACTIONS[rng.integers(len(ACTIONS))]) for member, _ in event.facts.actions)
        scene = list(SCENES)[rng.integers(len(SCENES))]
        drawn = FrameFacts(scene, zooms[rng.integers(len(zooms))], PANS[rng.integers(len(PANS))], actions)
        facts += [drawn] * (event.last_frame - event.first_frame + 1)
    return _around_given(case, true_frames(told(cast, facts)))


def copy(case: Case) -> list[Image.Image] | None:
    """Every frame is the kept one nearest to it, the earlier of two; None where none is kept."""
    if not case.given:
        return None
    numbers = range(1, case.truth.num_frames + 1)
    nearest = [min(case.given, key=lambda kept: (abs(kept - number), kept)) for number in numbers]
    return [case.given[number] for number in nearest]


def truth(case: Case) -> list[Image.Image]:
    """What a flawless model draws: with somebody else's looks in the kept frames, those."""
    shown: WorldStory = replace(case.truth, cast=(case.shown or case.truth).cast)
    return _around_given(case, true_frames(shown))


def _around_given(case: Case, frames: tuple[Image.Image, ...]) -> list[Image.Image]:
    return [case.given.get(number, frame) for number, frame in enumerate(frames, start=1)]
