"""Prints how far two captions runs of one dataset agree: two labelers, or a labeler and stories by hand.

python data_pipeline/compare_labelers.py dataset=DATASET a=RUN b=RUN

Of the clips that have a story in both runs: F1 of the event boundaries within one frame, beside what as many
boundaries at random places would reach, and the overlap of the subjects. The clips that agree least are
named.
"""

import heapq
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from data_pipeline.captions import caption_runs, read_captions
from data_pipeline.dataset import FRAMES_FOLDER, read_record
from data_pipeline.shard_reader import finished_shards, read_marker
from storyanchors.story import Story

TOLERANCE_FRAMES = 1
RANDOM_DRAWS = 20  # per clip, for the F1 that chance reaches
CLIPS_NAMED = 10
_UNTELLING = frozenset("a an the of in on at to with and or his her its their who is are".split())


@dataclass
class CompareLabelersConfig:
    dataset: str = MISSING
    a: str = MISSING
    b: str = MISSING


@dataclass
class Matched:
    """Things of a that were matched with things of b."""

    matched: float = 0
    num_a: int = 0
    num_b: int = 0

    def __add__(self, other: "Matched") -> "Matched":
        return Matched(self.matched + other.matched, self.num_a + other.num_a, self.num_b + other.num_b)

    @property
    def f1(self) -> float:
        """1 where neither has anything: they agree that there is none."""
        return 2 * self.matched / (self.num_a + self.num_b) if self.num_a + self.num_b else 1.0


@dataclass
class Agreement:
    """Of two captions runs; the sums are over clips with a story in both."""

    num_clips: int = 0
    captions_a: int = 0  # clips with a global caption
    captions_b: int = 0
    stories_a: int = 0
    stories_b: int = 0
    both: int = 0
    events_a: int = 0
    events_b: int = 0
    boundaries: Matched = field(default_factory=Matched)
    chance: Matched = field(default_factory=Matched)
    subjects: Matched = field(default_factory=Matched)
    boundary_f1_sum: float = 0.0
    subject_f1_sum: float = 0.0
    least: list[tuple[float, str]] = field(
        default_factory=list
    )  # (agreement, key) of clips that differ, the least first


def main(config: CompareLabelersConfig) -> None:
    dataset = Path(config.dataset)
    read_record(dataset)
    found = caption_runs(dataset)
    for name in (config.a, config.b):
        if name not in found:
            runs = ", ".join(found) or "none"
            raise ValueError(f"{dataset} has no finished captions run {name!r}, found {runs}")
    print("\n".join(describe(compare_runs(dataset, config.a, config.b), config.a, config.b)))


def compare_runs(dataset: Path, a: str, b: str) -> Agreement:
    """One shard at a time; ValueError where two stories of a clip have different numbers of frames."""
    agreement, least = Agreement(), []
    for shard in finished_shards(dataset / FRAMES_FOLDER):
        agreement.num_clips += read_marker(dataset / FRAMES_FOLDER, shard).num_clips
        of_a, of_b = (
            {line.record.key: line.record for line in read_captions(dataset, name, shard)} for name in (a, b)
        )
        agreement.captions_a += sum(bool(record.global_caption) for record in of_a.values())
        agreement.captions_b += sum(bool(record.global_caption) for record in of_b.values())
        stories_a = {key: record.story for key, record in of_a.items() if record.story}
        stories_b = {key: record.story for key, record in of_b.items() if record.story}
        agreement.stories_a += len(stories_a)
        agreement.stories_b += len(stories_b)
        for key in sorted(stories_a.keys() & stories_b.keys()):
            agreed = _add_clip(agreement, key, stories_a[key], stories_b[key])
            if agreed < 1:
                heapq.heappush(least, (-agreed, key))
            if len(least) > CLIPS_NAMED:
                heapq.heappop(least)
    agreement.least = sorted((-negated, key) for negated, key in least)
    return agreement


def describe(agreement: Agreement, a: str, b: str) -> list[str]:
    """The lines to print."""
    total = max(agreement.num_clips, 1)
    lines = [
        f"clips                     {agreement.num_clips}",
        f"global captions           {agreement.captions_a} in {a}, {agreement.captions_b} in {b}",
        f"stories                   {agreement.stories_a} in {a}, {agreement.stories_b} in {b}",
        f"coverage                  {agreement.both} clips in both, {agreement.both / total:.3f} of all",
    ]
    if not agreement.both:
        return [*lines, "no clip has a story in both runs: nothing to compare"]
    per_story = (
        f"{agreement.events_a / agreement.both:.2f} in {a}, {agreement.events_b / agreement.both:.2f} in {b}"
    )
    boundary_mean = agreement.boundary_f1_sum / agreement.both
    subject_mean = agreement.subject_f1_sum / agreement.both
    lines += [
        f"events per story          {per_story}",
        f"event-boundary F1         {agreement.boundaries.f1:.3f} within {TOLERANCE_FRAMES} frame, "
        f"{agreement.chance.f1:.3f} by chance; mean over clips {boundary_mean:.3f}",
        f"subject overlap           {agreement.subjects.f1:.3f}; mean over clips {subject_mean:.3f}",
    ]
    if agreement.least:
        named = ", ".join(f"{key} ({agreed:.2f})" for agreed, key in agreement.least)
        lines.append(f"least agreement           {named}")
    return lines


def boundaries(story: Story) -> list[int]:
    """The frames after which an event ends or another begins, rising; the ends of the clip are none."""
    starts = {event.first_frame - 1 for event in story.events}
    ends = {event.last_frame for event in story.events}
    return sorted((starts | ends) - {0, story.num_frames})


def match_boundaries(a: list[int], b: list[int]) -> Matched:
    """As many pairs as there can be of one boundary each at most TOLERANCE_FRAMES apart; a and b rise."""
    matched = i = j = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= TOLERANCE_FRAMES:
            matched, i, j = matched + 1, i + 1, j + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return Matched(matched, len(a), len(b))


def match_subjects(a: list[str], b: list[str]) -> Matched:
    """Pairs of one subject each, the most similar first; a pair counts as the share of words in common."""
    words_a, words_b = [_words(subject) for subject in a], [_words(subject) for subject in b]
    pairs = sorted(
        (-len(one & other) / max(len(one | other), 1), i, j)
        for i, one in enumerate(words_a)
        for j, other in enumerate(words_b)
    )
    matched, taken_a, taken_b = 0.0, set(), set()
    for negated, i, j in pairs:
        if i not in taken_a and j not in taken_b:
            matched -= negated
            taken_a.add(i)
            taken_b.add(j)
    return Matched(matched, len(a), len(b))


def _add_clip(agreement: Agreement, key: str, a: Story, b: Story) -> float:
    """Adds a clip; returns the mean of its two F1."""
    if a.num_frames != b.num_frames:
        raise ValueError(
            f"the stories of {key} have {a.num_frames} and {b.num_frames} frames, expected one clip's"
        )
    of_boundaries = match_boundaries(boundaries(a), boundaries(b))
    of_subjects = match_subjects(a.subjects, b.subjects)
    agreement.both += 1
    agreement.events_a += len(a.events)
    agreement.events_b += len(b.events)
    agreement.boundaries += of_boundaries
    agreement.chance += _match_by_chance(key, a, b)
    agreement.subjects += of_subjects
    agreement.boundary_f1_sum += of_boundaries.f1
    agreement.subject_f1_sum += of_subjects.f1
    return (of_boundaries.f1 + of_subjects.f1) / 2


def _match_by_chance(key: str, a: Story, b: Story) -> Matched:
    """The boundaries of a against as many as b has, anywhere: the mean of draws seeded by the key."""
    wanted, given = boundaries(a), len(boundaries(b))
    draw = random.Random(key)
    places = range(1, a.num_frames)
    drawn = [
        match_boundaries(wanted, sorted(draw.sample(places, given))).matched for _ in range(RANDOM_DRAWS)
    ]
    return Matched(sum(drawn) / RANDOM_DRAWS, len(wanted), given)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - _UNTELLING


if __name__ == "__main__":
    run(main, CompareLabelersConfig, "compare_labelers")
