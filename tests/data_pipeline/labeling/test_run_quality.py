import random
from statistics import mean

from data_pipeline.labeling.ledger import LedgerLine
from data_pipeline.labeling.run_quality import RunQuality, Tally
from storyanchors.vlm import VlmUsage

# what the runner writes for a clip that a stage stumbled over: nothing of the stage's own
BROKEN = {
    "key": "film-1",
    "status": "quarantined",
    "findings": [{"code": "labeler_failed", "severity": "error", "detail": "KeyError: 'x'"}],
    "usage": {"input_tokens": 1, "output_tokens": 2, "thought_tokens": 3},
    "usd": 0.5,
    "num_requests": 1,
}


def reply(seconds: float, status: str = "ok") -> LedgerLine:
    name = "film-1/events/1-2"
    words = {"finish": "stop", "text": "", "model_version": "", "writer": "w", "detail": ""}
    numbers = {"attempt": 1, "usage": VlmUsage(), "usd": 0.0, "started": 0.0, "seconds": seconds}
    return LedgerLine("k", name, "film-1", "events", status=status, **words, **numbers)


def test_percentiles_are_those_of_the_sorted_values():
    draw = random.Random(0)
    for size in (1, 2, 19, 100):
        values, tally = [draw.randint(0, 30) for _ in range(size)], Tally()
        for value in values:
            tally.add(value)
        assert tally.num == size and abs(tally.mean - mean(values)) < 1e-9
        for percent in (5, 50, 95, 100):
            assert tally.percentile(percent) == sorted(values)[-(-size * percent // 100) - 1]
    assert Tally().percentile(50) == Tally().mean == 0


def test_a_clip_that_broke_a_stage_counts_with_its_cost_and_its_finding():
    quality = RunQuality()
    for stage in ("global", "events", "story"):
        quality.add_line(stage, BROKEN)
    outcome, findings = quality.tables(num_shards=1, num_clips=2)
    rows = {row[0]: row[1:] for row in outcome.rows}
    assert rows["clips settled"] == ["1 of 2"] * 3 and rows["quarantined"] == ["1 (100.0%)"] * 3
    assert rows["dollars in all"] == ["0.50"] * 3 and rows["good at the first try"] == ["0 (0.0%)"] * 3
    assert [row[0] for row in findings.rows] == ["labeler_failed"] * 3


def test_latencies_are_of_answers_and_take_bounded_memory():
    quality = RunQuality()
    draw = random.Random(0)
    for _ in range(5000):
        quality.add_reply(reply(draw.uniform(0.5, 60)))
        quality.add_reply(reply(1000.0, "transient"))
    tally = quality.stages["events"].milliseconds
    assert tally.num == 5000 and len(tally.counts) < 200
    assert 28_000 < tally.percentile(50) < 32_000
