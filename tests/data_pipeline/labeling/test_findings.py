import random

import pytest

from data_pipeline.labeling.findings import (
    ERROR,
    PoolEvent,
    check_events,
    check_global_caption,
    check_story,
    to_story,
    worst,
)
from data_pipeline.labeling.schemas import EventsAnswer, GlobalCaptionAnswer, StoryAnswer
from storyanchors.story import Story
from storyanchors.vlm import parse_answer

TEXTS = (
    "Ada, a young pilot, runs to the hangar.",
    "The old man looks at the sea.",
    "A dog sleeps beside the fire.",
    "[1-2] The harbour lies in fog.",
    "Event 3: the ship leaves.",
    "This image shows a man in a boat.",
    "I'm sorry, I can't assist with that.",
    "Zwei M\u00e4nner",
    "\u4e24\u4e2a\u7537\u4eba\u5728\u8d70\u8def\u3002",
    "  \x00 ",
)


def events_of(*events) -> EventsAnswer:
    rows = [{"first_frame": a, "last_frame": b, "description": text} for a, b, text in events]
    return EventsAnswer.model_validate({"events": rows})


def story_of(
    *events, subjects=(("the old man", "grey beard"),), style="cinematic, cold light"
) -> StoryAnswer:
    rows = [
        {"first_frame": a, "last_frame": b, "event_ids": ids, "description": text}
        for a, b, ids, text in events
    ]
    subjects = [{"name": name, "appearance": looks} for name, looks in subjects]
    return StoryAnswer.model_validate({"subjects": subjects, "style": style, "events": rows})


def codes(findings) -> set[tuple[str, str]]:
    return {(finding.code, finding.severity) for finding in findings}


def spans(answer) -> list[tuple[int, int]]:
    return [(event.first_frame, event.last_frame) for event in answer.events]


def test_a_good_answer_has_no_findings():
    answer = events_of((1, 4, TEXTS[0]), (3, 6, TEXTS[1]), (7, 8, TEXTS[2]))  # two of them overlap
    repaired, findings = check_events(answer, 1, 8)
    assert repaired.model_dump() == answer.model_dump() and findings == []


@pytest.mark.parametrize(
    "events, expected, found",
    [
        ([(13, 24, TEXTS[0])], [(13, 24)], {("one_event_covers_all", "info")}),
        ([(13, 18, TEXTS[0]), (20, 24, TEXTS[1])], [(13, 19), (20, 24)], {("gap", "warning")}),
        ([(15, 18, TEXTS[0]), (19, 24, TEXTS[1])], [(13, 18), (19, 24)], {("gap", "warning")}),
        ([(13, 18, TEXTS[0]), (22, 24, TEXTS[1])], [(13, 18), (22, 24)], {("gap", "error")}),
        ([(19, 24, TEXTS[0]), (13, 18, TEXTS[1])], [(13, 18), (19, 24)], {("unsorted", "warning")}),
        (
            [(12, 18, TEXTS[0]), (19, 25, TEXTS[1])],
            [(13, 18), (19, 24)],
            {("range_out_of_subset", "warning")},
        ),
        ([(13, 18, TEXTS[0]), (19, 26, TEXTS[1])], [(13, 18), (19, 26)], {("range_out_of_subset", "error")}),
        ([(1, 6, TEXTS[0]), (7, 12, TEXTS[1])], [(13, 18), (19, 24)], {("numbered_from_one", "warning")}),
        ([(13, 18, TEXTS[0]), (19, 24, TEXTS[0])], [(13, 24)], {("duplicate_text", "warning")}),
    ],
)
def test_ranges_are_repaired_or_asked_for_again(events, expected, found):
    repaired, findings = check_events(events_of(*events), 13, 24)
    assert spans(repaired) == expected
    assert found <= codes(findings)


def test_a_reversed_range_is_asked_for_again():
    _, findings = check_events(events_of((1, 6, TEXTS[0]), (9, 7, TEXTS[1])), 1, 9)
    assert ("range_inverted", "error") in codes(findings)


def test_a_description_that_comes_back_again_and_again_is_an_error():
    shots = [(k, k, TEXTS[k % 2]) for k in range(1, 7)]
    assert ("duplicate_text", "error") in codes(check_events(events_of(*shots), 1, 6)[1])
    assert ("duplicate_text", "warning") in codes(check_events(events_of(*shots[:4]), 1, 4)[1])


@pytest.mark.parametrize(
    "text, code, severity",
    [
        ("I'm sorry, I can't assist with that.", "refusal_text", "error"),
        ("As an AI language model, I see a man.", "refusal_text", "error"),
        ("The image shows a man who walks away.", "meta_text", "warning"),
        ("In this frame, a man walks away.", "meta_text", "warning"),
        ("The man of frame 3 walks on.", "meta_text", "warning"),
        ("A man.", "too_short_text", "warning"),
        ("\u4e24\u4e2a\u7537\u4eba\u5728\u8d70\u8def\u3002 x x", "wrong_language", "warning"),
        (" \x07 ", "empty_text", "error"),
    ],
)
def test_texts_that_describe_nothing_are_found(text, code, severity):
    answer = GlobalCaptionAnswer(caption=text)
    assert (code, severity) in codes(check_global_caption(answer)[1])
    assert (code, severity) in codes(check_events(events_of((1, 1, text)), 1, 1)[1])


@pytest.mark.parametrize(
    "text",
    [
        "She frames the picture and hangs it on the wall.",
        'The guard says: "You cannot pass", and lowers his spear.',
        "A man takes a photo of the sea, ca\u00f1on and caf\u00e9 behind him.",
        "The old woman apologizes to the boy, who is sorry too.",
    ],
)
def test_harmless_texts_are_left_alone(text):
    assert check_global_caption(GlobalCaptionAnswer(caption=text)) == (GlobalCaptionAnswer(caption=text), [])


def test_ranges_written_into_a_description_are_taken_out():
    answer = events_of(
        (1, 2, "[1-2] The ship leaves."), (3, 4, "Event 2: the fog\n lifts."), (5, 5, "Frame 5: a dog.")
    )
    repaired, _ = check_events(answer, 1, 5)
    assert [event.description for event in repaired.events] == [
        "The ship leaves.",
        "the fog lifts.",
        "a dog.",
    ]


POOL = [
    PoolEvent("e01", 1, 3, "A man looks at the sea.", 2),
    PoolEvent("e02", 4, 6, "A sailor runs along the quay.", 5),
    PoolEvent("e03", 7, 9, "The runner jumps onto a ship.", 8),
]
GOOD = (
    (1, 3, ["e01"], "The old man looks at the sea."),
    (4, 9, ["e02", "e03"], "A sailor runs along the quay and jumps onto a ship."),
)


def test_a_good_story_has_no_findings_and_becomes_a_story():
    answer = story_of(*GOOD)
    repaired, findings = check_story(answer, POOL, 9)
    assert findings == [] and repaired.model_dump() == answer.model_dump()
    story = to_story(repaired)
    assert story.subjects == ["the old man, grey beard"] and story.num_frames == 9
    assert Story.from_prompt(story.prompt()) == story


@pytest.mark.parametrize(
    "answer, expected, found",
    [
        (
            story_of((1, 3, ["e01"], TEXTS[1]), (4, 8, ["e02", "e03"], TEXTS[0])),
            [(1, 3), (4, 9)],
            ("boundary_not_in_pool", "warning"),
        ),
        (
            story_of((1, 2, [], TEXTS[1]), (3, 9, ["e02", "e03"], TEXTS[0])),
            [(1, 3), (4, 9)],
            ("boundary_not_in_pool", "warning"),
        ),
        (
            story_of((1, 9, ["e01"], TEXTS[1]), (12, 14, [], TEXTS[0])),
            None,
            ("boundary_not_in_pool", "error"),
        ),
        (
            story_of((1, 6, ["e01", "e77"], TEXTS[1]), (7, 9, ["e03"], TEXTS[0])),
            [(1, 6), (7, 9)],
            ("unknown_event_id", "warning"),
        ),
        (
            story_of((1, 6, ["e01"], TEXTS[1]), (7, 9, ["e03"], TEXTS[0])),
            [(1, 6), (7, 9)],
            ("pool_event_dropped", "warning"),
        ),
        (
            story_of((1, 6, [], TEXTS[1]), (7, 9, ["e03"], TEXTS[0])),
            [(1, 6), (7, 9)],
            ("event_ids_missing", "warning"),
        ),
        (story_of((1, 3, ["e01"], TEXTS[1])), [(1, 3)], ("gap", "error")),
        (story_of(*GOOD, subjects=[("the young witch", "")]), None, ("subject_unreferenced", "warning")),
        (story_of(*GOOD, subjects=[("the sailor", ""), ("The sailor", "")]), None,
         ("duplicate_subject", "warning")),
        (story_of(*GOOD, subjects=[]), None, ("subjects_empty", "error")),
        (story_of((1, 9, ["e01", "e02", "e03"], "Fog lies over the empty quay."), subjects=[]), None,
         ("subjects_empty", "warning")),
        (story_of(*GOOD, style=""), None, ("empty_text", "error")),
        (story_of(*GOOD[:1], (4, 9, ["e02", "e03"], "On the quay, Ben Hall runs and jumps.")), None,
         ("subject_alias", "warning")),
        (story_of(*((a, b, ids, POOL[k].description) for k, (a, b, ids) in enumerate(
            [(1, 3, ["e01"]), (4, 6, ["e02"]), (7, 9, ["e03"])]))), None, ("copies_pool", "info")),
    ],
)  # fmt: skip
def test_a_story_is_held_against_the_events_that_it_was_made_from(answer, expected, found):
    repaired, findings = check_story(answer, POOL, 9)
    assert found in codes(findings)
    if expected is not None:
        assert spans(repaired) == expected


class Words:
    """Counts words, of which so many fit."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens

    def count_tokens(self, text):
        return len(text.split())


def test_a_story_over_the_encoders_budget_is_told_and_never_cut():
    answer = story_of(*GOOD)
    num_words = len(to_story(answer).prompt().split())
    for budget, found in [
        (num_words, set()),
        (num_words - 1, {("tokens_over_limit", "warning")}),  # the style would be lost
        (num_words - 20, {("tokens_over_limit", "error")}),  # an event would be lost
        (3, {("tokens_over_limit", "error")}),  # nothing fits
        (None, set()),
    ]:
        repaired, findings = check_story(answer, POOL, 9, Words(budget))
        assert codes(findings) == found
        assert repaired.model_dump() == answer.model_dump()


def test_a_global_caption_over_the_budget_is_asked_for_again():
    answer = GlobalCaptionAnswer(caption="A man walks home. He sits down by the fire.")
    repaired, findings = check_global_caption(answer, Words(8))
    assert repaired == answer and codes(findings) == {("tokens_over_limit", "error")}
    assert "1 sentence would be lost" in findings[0].detail


def random_answer(rng, first, last, ids) -> dict:
    """An answer of the right form by a model that is often wrong."""
    size, wide = rng.randint(1, 6), rng.random() < 0.2
    events = []
    for _ in range(size):
        low, high = (1, 999) if wide else (max(1, first - 2), last + 2)
        a = rng.randint(low, high)
        b = min(999, a + rng.randint(0, 6)) if rng.random() < 0.9 else rng.randint(1, 999)
        named = [rng.choice([*ids, "e99", ""]) for _ in range(rng.randint(0, 3))] if ids else []
        text = rng.choice(TEXTS if rng.random() < 0.3 else TEXTS[:3]) + rng.choice(
            ("", " Again.", " Ada waits.")
        )
        events.append({"first_frame": a, "last_frame": b, "event_ids": named, "description": text})
    return {
        "subjects": [{"name": rng.choice(("Ada", "the old man", " ")), "appearance": ""} for _ in range(2)],
        "style": rng.choice(("", "film noir")),
        "events": events,
    }


def test_what_passes_the_checks_is_a_legal_story_and_passes_again_unchanged():
    rng, passed = random.Random(0), 0
    for _ in range(3000):
        first = rng.choice((1, 8, 13))
        last = first + rng.randint(0, min(11, first if first > 1 else 11) - (first > 1))
        answer = EventsAnswer.model_validate(random_answer(rng, first, last, []))
        repaired, findings = check_events(answer, first, last)
        if worst(findings) != ERROR:
            passed += 1
            again, more = check_events(repaired, first, last)
            assert again.model_dump() == repaired.model_dump()
            assert {code for code, _ in codes(more)} <= {code for code, _ in codes(findings)}
            assert spans(repaired) == sorted(spans(repaired))
            covered = {k for a, b in spans(repaired) for k in range(a, b + 1)}
            assert covered == set(range(first, last + 1))
    assert passed > 100


def test_what_passes_as_a_story_can_be_trained_on():
    rng, passed = random.Random(1), 0
    for _ in range(3000):
        answer = StoryAnswer.model_validate(random_answer(rng, 1, 9, ["e01", "e02", "e03"]))
        repaired, findings = check_story(answer, POOL, 9)
        if worst(findings) != ERROR:
            passed += 1
            story = to_story(repaired)
            assert story.num_frames == 9 and Story.from_prompt(story.prompt()) == story
            assert check_story(repaired, POOL, 9)[0].model_dump() == repaired.model_dump()
            assert len(set(spans(repaired))) <= 6
    assert passed > 100


def test_a_fenced_answer_with_numbers_as_text_is_read():
    event = '{"first_frame": "1", "last_frame": 2.0, "description": "Rain falls on roofs."}'
    text = f'```json\n{{"events": [{event}]}}\n```'
    assert spans(parse_answer(text, EventsAnswer)) == [(1, 2)]


@pytest.mark.parametrize(
    "events",
    [[], [(0, 1, "x")], [(1, 1000, "x")], [(1, 2, "x" * 801)], [(1, 1, "Rain falls.")] * 25, [(1, 1, "")]],
    ids=["none", "frame 0", "frame 1000", "endless text", "endless list", "empty"],
)
def test_the_schema_bounds_what_a_model_can_ramble(events):
    with pytest.raises(ValueError):
        events_of(*events)
