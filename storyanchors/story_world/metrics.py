"""Exact scores of generated story frames against what their stories asked for.

Every score is a mean over frames, pairs of frames or stories. Frames that were given are left out, so that
scores speak of generated frames only. Ground truth scores 1, and 0 for gaps, legal_rmse and copy_paste.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations, groupby

import numpy as np
from PIL import Image

from storyanchors.story_world.identity import consistency_samples
from storyanchors.story_world.parser import ParsedFrame, ParsedSubject, parse_frame
from storyanchors.story_world.world import FrameFacts, WorldStory

# The scores, each with its value for flawless frames. That value also stands where a score is undefined: no
# two frames of different events, no subject asked for twice, no given frame whose caption says otherwise.
FLAWLESS = {
    "pfa_f1": 1.0,
    "subject_consistency": 1.0,
    "scene_accuracy": 1.0,
    "shot_accuracy": 1.0,
    "action_accuracy": 1.0,
    "event_accuracy": 1.0,
    "event_completeness": 1.0,
    "event_order_tau": 1.0,
    "scene_order_tau": 1.0,
    "scene_sequence": 1.0,
    "scene_diversity_gap": 0.0,
    "shot_diversity_gap": 0.0,
    "legal_rmse": 0.0,
    "copy_paste": 0.0,
}
MIN_JACCARD = 0.5  # a frame shows the event whose scene and actions it shares most, if it shares this much

Facts = frozenset[tuple[str, ...]]


def score_stories(
    frames: Sequence[Sequence[Image.Image | np.ndarray]],
    stories: Sequence[WorldStory],
    given: Sequence[set[int]] | None = None,
) -> dict[str, float]:
    """The scores of FLAWLESS, in that order.

    frames: for each story its frames (64 x 64 RGB), in order. given: for each story the 1-based numbers of
    frames that were not generated.
    - pfa_f1: prompt-frame alignment, F1 of the facts read from a frame and those asked for: scene, zoom, pan,
      each subject's colour with its shape, and each subject's colour with its action
    - subject_consistency: over pairs of frames that should both show a cast member, at least one of them
      generated: seen in both with the same shape
    - scene_accuracy, shot_accuracy (zoom and pan), action_accuracy (of each subject asked for)
    - event_accuracy: of all events, the frame's scene and actions are nearest to its own event's
    - event_completeness: of the events with a frame to be generated, those that some generated frame shows
    - event_order_tau, scene_order_tau: Kendall, over pairs of frames of different events: +1 where the events
      (the scenes) that they show are in order, -1 where reversed, 0 where equal or unreadable
    - scene_sequence: of the stories, those whose generated frames go through the scenes asked for and no
      others, in order, whatever the frame at which each begins
    - scene_diversity_gap, shot_diversity_gap: |exp(entropy) of those shown - exp(entropy) of those asked|
    - legal_rmse: distance to the nearest frame that the world can draw, in RGB steps
    - copy_paste: the frame repeats scene, zoom and actions of a given frame whose caption says otherwise

    Raises ValueError when the numbers of stories or frames do not match, or no frame was generated.
    """
    given = [set()] * len(stories) if given is None else given
    if not len(frames) == len(stories) == len(given):
        raise ValueError(
            f"found {len(frames)} lists of frames, {len(stories)} stories and {len(given)} given sets"
        )
    pooled: dict[str, list[float]] = defaultdict(list)
    for number, (story_frames, story, given_frames) in enumerate(zip(frames, stories, given, strict=True), 1):
        if len(story_frames) != story.num_frames:
            raise ValueError(f"story {number} has {len(story_frames)} frames, expected {story.num_frames}")
        for name, values in story_samples(list(map(parse_frame, story_frames)), story, given_frames).items():
            pooled[name] += values
    if not pooled["pfa_f1"]:
        raise ValueError(f"nothing to score: no frame of {len(stories)} stories was generated")
    return {name: float(np.mean(pooled[name])) if pooled[name] else value for name, value in FLAWLESS.items()}


def story_samples(
    parsed: list[ParsedFrame], story: WorldStory, given: Collection[int] = ()
) -> dict[str, list[float]]:
    """What the scores are means of: for each of score_stories a number per frame, pair of frames or event.

    parsed: what the frames of one story show. given: the 1-based numbers of those that were not generated.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    generated = [index for index in range(story.num_frames) if index + 1 not in given]
    if generated:
        _add_frame_scores(samples, parsed, story, generated)
        pairs = combinations(range(1, story.num_frames + 1), 2)
        new = [pair for pair in pairs if not set(pair) <= set(given)]
        samples["subject_consistency"] += consistency_samples(parsed, story, new)
        _add_order(samples, parsed, story, generated)
        _add_diversity(samples, parsed, story, generated)
        _add_copies(samples, parsed, story, generated)
    return samples


def _add_frame_scores(
    samples: dict[str, list[float]], parsed: list[ParsedFrame], story: WorldStory, generated: list[int]
) -> None:
    for index in generated:
        frame, facts = parsed[index], story.frames[index]
        shown, asked = _shown_facts(frame), _asked_facts(facts, story)
        samples["pfa_f1"].append(2 * len(shown & asked) / (len(shown) + len(asked)))
        samples["scene_accuracy"].append(frame.scene == facts.scene)
        samples["shot_accuracy"].append((frame.zoom, frame.pan) == (facts.zoom, facts.pan))
        samples["action_accuracy"] += [fact in shown for fact in asked if fact[0] == "action"]
        samples["legal_rmse"].append(frame.legal_rmse)


def _add_order(
    samples: dict[str, list[float]], parsed: list[ParsedFrame], story: WorldStory, generated: list[int]
) -> None:
    signatures = [_signature(_asked_facts(event.facts, story)) for event in story.events]
    own_event = [
        number
        for number, event in enumerate(story.events)
        for _ in range(event.first_frame, event.last_frame + 1)
    ]
    shown_event, shown_scene = {}, {}
    for index in generated:
        shown = _signature(_shown_facts(parsed[index]))
        jaccards = [len(shown & asked) / len(shown | asked) for asked in signatures]
        same_scene = [float(event.facts.scene == parsed[index].scene) for event in story.events]
        shown_event[index] = _closest_event(jaccards, own_event[index])
        shown_scene[index] = _closest_event(same_scene, own_event[index])
        samples["event_accuracy"].append(shown_event[index] == own_event[index])
    for event in sorted({own_event[index] for index in generated}):
        samples["event_completeness"].append(event in shown_event.values())
    for first, second in combinations(generated, 2):
        if own_event[first] != own_event[second]:
            samples["event_order_tau"].append(_order(shown_event[first], shown_event[second]))
            samples["scene_order_tau"].append(_order(shown_scene[first], shown_scene[second]))


def _add_diversity(
    samples: dict[str, list[float]], parsed: list[ParsedFrame], story: WorldStory, generated: list[int]
) -> None:
    shown, asked = [parsed[index] for index in generated], [story.frames[index] for index in generated]
    scenes_shown, scenes_asked = [one.scene for one in shown], [one.scene for one in asked]
    shot_gap = _diversity((one.zoom, one.pan) for one in shown) - _diversity(
        (one.zoom, one.pan) for one in asked
    )
    samples["scene_sequence"].append(_without_repeats(scenes_shown) == _without_repeats(scenes_asked))
    samples["scene_diversity_gap"].append(abs(_diversity(scenes_shown) - _diversity(scenes_asked)))
    samples["shot_diversity_gap"].append(abs(shot_gap))


def _add_copies(
    samples: dict[str, list[float]], parsed: list[ParsedFrame], story: WorldStory, generated: list[int]
) -> None:
    def asked_view(facts: FrameFacts) -> tuple:
        return (
            facts.scene,
            facts.zoom,
            {(story.cast[member].colour, action) for member, action in facts.actions},
        )

    def shown_view(frame: ParsedFrame) -> tuple:
        return frame.scene, frame.zoom, {(subject.colour, subject.action) for subject in frame.subjects}

    for index in generated:
        others = [
            other
            for other in range(story.num_frames)
            if other not in generated and asked_view(story.frames[other]) != asked_view(story.frames[index])
        ]
        if others:
            copied = any(shown_view(parsed[index]) == shown_view(parsed[other]) for other in others)
            samples["copy_paste"].append(copied)


def _asked_facts(facts: FrameFacts, story: WorldStory) -> Facts:
    subjects = [
        ParsedSubject(story.cast[member].colour, story.cast[member].shape, action)
        for member, action in facts.actions
    ]
    return _facts(facts.scene, facts.zoom, facts.pan, subjects)


def _shown_facts(frame: ParsedFrame) -> Facts:
    return _facts(frame.scene, frame.zoom, frame.pan, frame.subjects)


def _facts(scene: str, zoom: str, pan: str | None, subjects: Iterable[ParsedSubject]) -> Facts:
    facts = {("scene", scene), ("zoom", zoom)} | ({("pan", pan)} if pan else set())
    for subject in subjects:
        facts |= {("shape", subject.colour, subject.shape), ("action", subject.colour, subject.action)}
    return frozenset(facts)


def _signature(facts: Facts) -> Facts:
    """Scene and actions: what tells the events of a sampled story apart."""
    return frozenset(fact for fact in facts if fact[0] in ("scene", "action"))


def _closest_event(similarities: list[float], own: int) -> int | None:
    """Index of the most similar event, the frame's own among equals; None where none is similar enough."""
    best = max(similarities)
    if best < MIN_JACCARD:
        return None
    return own if similarities[own] == best else similarities.index(best)


def _order(first: int | None, second: int | None) -> float:
    if first is None or second is None:
        return 0.0
    return float(np.sign(second - first))


def _without_repeats(labels: Iterable[str]) -> list[str]:
    return [label for label, _ in groupby(labels)]


def _diversity(labels: Iterable) -> float:
    """exp(entropy): the number of equally frequent labels that would be as diverse."""
    counts = np.array(list(Counter(labels).values()), float)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
