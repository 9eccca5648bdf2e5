"""What a labeling run is worth, in numbers: built line by line, so that it takes any number of clips.

Distributions are kept as counts of whole numbers, which gives exact percentiles in little memory.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import ceil

from data_pipeline.labeling.findings import ERROR, INFO, WARNING
from data_pipeline.labeling.ledger import LedgerLine
from data_pipeline.labeling.review_page import Table
from storyanchors.story import Story
from storyanchors.vlm import VlmUsage

GOOD = ("ok", "warned")  # the lines that give captions
STATUSES = (*GOOD, "quarantined", "blocked")
MILLISECONDS = 1000
SEVERITIES = (ERROR, WARNING, INFO)


class Tally:
    """How often each whole number was seen."""

    def __init__(self):
        self.counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self.counts[value] += 1

    @property
    def num(self) -> int:
        return self.counts.total()

    @property
    def mean(self) -> float:
        return sum(value * count for value, count in self.counts.items()) / max(self.num, 1)

    def percentile(self, percent: float) -> int:
        """The smallest value that so many percent of all values do not exceed; 0 where there are none."""
        wanted, seen = ceil(self.num * percent / 100), 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= wanted:
                return value
        return 0


@dataclass
class StageQuality:
    """One stage of a run: its lines and its ledger."""

    shards: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    first_try: int = 0  # good clips that needed no repair turn and no other repetition
    num_requests: int = 0
    usage: VlmUsage = field(default_factory=VlmUsage)
    usd: float = 0.0
    replies: Counter[str] = field(default_factory=Counter)  # in the ledger, by the status of the reply
    milliseconds: Tally = field(default_factory=Tally)  # of replies that are answers
    findings: Counter[tuple[str, str]] = field(default_factory=Counter)  # clips, by severity and code
    examples: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)  # -> key, detail

    @property
    def clips(self) -> int:
        return self.statuses.total()


class RunQuality:
    """The tables of a run's review."""

    def __init__(self):
        self.stages: dict[str, StageQuality] = defaultdict(StageQuality)
        self.captions, self.annotations, self.events, self.subjects = Tally(), Tally(), Tally(), Tally()
        self.event_frames, self.prompt_words = Tally(), Tally()
        self.tokens: dict[str, Tally] = defaultdict(Tally)  # by caption encoder
        self.frames = self.shared_frames = 0

    def add_line(self, stage: str, line: dict) -> None:
        """A settled clip, as it stands in labels/<run>/<stage>/<shard>.jsonl."""
        quality = self.stages[stage]
        status = line["status"]
        quality.statuses[status] += 1
        quality.num_requests += line["num_requests"]
        quality.usage += VlmUsage(**line["usage"])
        quality.usd += line["usd"]
        expected = len(line.get("subsets", [0])) if stage == "events" else 1
        quality.first_try += status in GOOD and line["num_requests"] <= expected
        for finding in {(one["severity"], one["code"]): one for one in line["findings"]}.values():
            kind = finding["severity"], finding["code"]
            quality.findings[kind] += 1
            quality.examples.setdefault(kind, (line["key"], finding["detail"]))
        if status in GOOD:
            self._add_content(stage, line)

    def add_reply(self, line: LedgerLine) -> None:
        quality = self.stages[line.stage]
        quality.replies[line.status] += 1
        if line.status == "ok":
            quality.milliseconds.add(_two_digits(round(line.seconds * MILLISECONDS)))

    def tables(self, num_shards: int, num_clips: int) -> list[Table]:
        """num_shards and num_clips are those of the dataset."""
        return [
            table
            for table in (self._outcome(num_shards, num_clips), self._content(), self._findings())
            if table.rows
        ]

    def _add_content(self, stage: str, line: dict) -> None:
        if stage == "global":
            self.captions.add(len(line["global_caption"].split()))
        elif stage == "events":
            self.annotations.add(len(line["events"]))
        else:
            story = Story.from_dict(line["story"])
            self.events.add(len(story.events))
            self.subjects.add(len(story.subjects))
            self.prompt_words.add(len(story.prompt().split()))
            for encoder, count in line.get("token_counts", {}).items():
                self.tokens[encoder].add(count)
            covering = Counter(
                frame for event in story.events for frame in range(event.first_frame, event.last_frame + 1)
            )
            self.frames += len(covering)
            self.shared_frames += sum(count > 1 for count in covering.values())
            for event in story.events:
                self.event_frames.add(event.last_frame - event.first_frame + 1)

    def _outcome(self, num_shards: int, num_clips: int) -> Table:
        names, stages = list(self.stages), list(self.stages.values())
        rows = [
            ["shards settled", *(f"{one.shards:,} of {num_shards:,}" for one in stages)],
            ["clips settled", *(f"{one.clips:,} of {num_clips:,}" for one in stages)],
            *(
                [status, *(_share(one.statuses[status], one.clips) for one in stages)]
                for status in STATUSES
                if any(one.statuses[status] for one in stages)
            ),
            ["good at the first try", *(_share(one.first_try, one.clips) for one in stages)],
            ["answered requests per clip", *(_ratio(one.num_requests, one.clips) for one in stages)],
            ["input tokens per clip", *(_ratio(one.usage.input_tokens, one.clips) for one in stages)],
            ["output tokens per clip", *(_ratio(one.usage.output_tokens, one.clips) for one in stages)],
            ["thought tokens per clip", *(_ratio(one.usage.thought_tokens, one.clips) for one in stages)],
            ["dollars per clip", *(f"{one.usd / max(one.clips, 1):.5f}" for one in stages)],
            ["dollars in all", *(f"{one.usd:,.2f}" for one in stages)],
        ]
        for status in sorted({status for one in stages for status in one.replies}):
            replies = [_share(one.replies[status], one.replies.total()) for one in stages]
            rows.append([f"replies: {status}", *replies])
        for percent in (50, 95):
            seconds = [one.milliseconds.percentile(percent) / MILLISECONDS for one in stages]
            rows.append([f"seconds per answer, p{percent}", *(f"{value:.2f}" for value in seconds)])
        return Table("Stages", ["", *names], rows if names else [])

    def _content(self) -> Table:
        tallies = [
            ("words of a global caption", self.captions),
            ("annotations per clip", self.annotations),
            ("events per story", self.events),
            ("frames per event", self.event_frames),
            ("subjects per story", self.subjects),
            ("words of a prompt", self.prompt_words),
            *((f"tokens of a prompt, {encoder}", tally) for encoder, tally in sorted(self.tokens.items())),
        ]
        rows = [
            [name, f"{tally.mean:.1f}", *(f"{tally.percentile(percent):,}" for percent in (5, 50, 95, 100))]
            for name, tally in tallies
            if tally.num
        ]
        if self.frames:
            rows.append(["frames in several events", f"{self.shared_frames / self.frames:.1%}"])
        return Table("Labels of good clips", ["", "mean", "p5", "p50", "p95", "most"], rows)

    def _findings(self) -> Table:
        found = [
            (SEVERITIES.index(kind[0]), -count, stage, kind)
            for stage, quality in self.stages.items()
            for kind, count in quality.findings.items()
        ]
        rows = []
        for _, negated, stage, kind in sorted(found):
            key, detail = self.stages[stage].examples[kind]
            share = _share(-negated, self.stages[stage].clips)
            rows.append([kind[1], kind[0], stage, share, f"{detail} ({key})"])
        return Table("Findings", ["code", "severity", "stage", "clips", "for example"], rows)


def _two_digits(value: int) -> int:
    """Two digits and zeros: few different values, however many are counted."""
    step = 10 ** max(len(str(value)) - 2, 0)
    return value // step * step


def _share(part: int, total: int) -> str:
    return f"{part:,} ({part / total:.1%})" if total else "-"


def _ratio(amount: int, number: int) -> str:
    return f"{amount / number:,.1f}" if number else "-"
