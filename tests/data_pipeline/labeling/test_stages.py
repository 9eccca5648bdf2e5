"""Stages with an ask of a few lines: what is asked, and what the lines say."""

import asyncio
import json
import random

import pytest
from PIL import Image

from data_pipeline.captions import write_captions, write_run
from data_pipeline.labeling.exact_labeler import exact_script
from data_pipeline.labeling.findings import ERROR, Finding, worst
from data_pipeline.labeling.ledger import request_key
from data_pipeline.labeling.partition import StageRecord, begin_stage
from data_pipeline.labeling.prompts import EVENTS
from data_pipeline.labeling.runner import LabelClip, Settled
from data_pipeline.labeling.stages import Events, GlobalCaptions, UnifiedStory, reopen_stage
from storyanchors.clip import CaptionRecord, ClipInfo, encode_jpeg, read_jpeg_size
from storyanchors.story import Event, Story
from storyanchors.vlm import VlmUsage, parse_answer


def clip_of(num_frames, *, key="a-clip", size=(64, 48), earlier=None) -> LabelClip:
    """Every frame has its own colour."""
    colours = [(40 + 5 * k % 200, 90, 255 - 7 * k % 200) for k in range(num_frames)]
    jpegs = [encode_jpeg(Image.new("RGB", size, colour)) for colour in colours]
    numbers = tuple(range(num_frames))
    info = ClipInfo(
        key=key,
        source=key,
        frame_numbers=numbers,
        seconds=tuple(map(float, numbers)),
        width=size[0],
        height=size[1],
    )
    return LabelClip(key, info, jpegs, earlier)


class Asked:
    """An ask that answers from a function and keeps the requests; there is no repair turn."""

    def __init__(self, script):
        self.script, self.requests = script, []

    async def __call__(self, request, check) -> Settled:
        self.requests.append(request)
        answer, findings = check(parse_answer(self.script(request), request.answer))
        status = "quarantined" if worst(findings) == ERROR else "ok"
        return Settled(status, answer, findings, VlmUsage(100, 10, 1), 0.25, 1)


def label(stage, clip, script):
    ask = Asked(script)
    return asyncio.run(stage.label(clip, ask)), ask.requests


def held_shots(request) -> str:
    """One event per frame that is shown."""
    shown = [int(part.split()[1]) for part in request.parts if isinstance(part, str) and part[:6] == "Frame "]
    events = [{"first_frame": k, "last_frame": k, "description": f"A lamp burns in room {k}."} for k in shown]
    return json.dumps({"events": events})


def test_frames_are_named_by_their_number_in_the_clip_also_in_later_subsets():
    clip = clip_of(22)
    line, requests = label(Events(), clip, held_shots)
    assert [request.name for request in requests] == ["a-clip/events/1-11", "a-clip/events/12-22"]
    for request, first in zip(requests, (1, 12)):
        prompt, _, *parts = request.parts
        assert prompt == EVENTS.text
        assert parts[::2] == [f"Frame {k}" for k in range(first, first + 11)]
        assert parts[1::2] == clip.jpegs[first - 1 : first + 10]  # byte for byte as stored
    assert line["subsets"] == [{"first": 1, "last": 11}, {"first": 12, "last": 22}]
    assert [event["id"] for event in line["events"]] == [f"e{k:02d}" for k in range(1, 23)]
    assert [event["representative"] for event in line["events"]] == list(range(1, 23))
    assert line["usage"] == {"input_tokens": 200, "output_tokens": 20, "thought_tokens": 2}
    assert (line["usd"], line["num_requests"], line["status"]) == (0.5, 2, "ok")


def test_overlapping_events_have_different_pictures():
    events = [(1, 5, "Rain falls on roofs."), (2, 4, "A cat runs home.")]
    rows = [{"first_frame": a, "last_frame": b, "description": text} for a, b, text in events]
    line, _ = label(Events(), clip_of(5), lambda request: json.dumps({"events": rows}))
    assert [event["representative"] for event in line["events"]] == [3, 2]


def test_large_frames_are_made_smaller_and_small_ones_are_not_touched():
    clip = clip_of(2, size=(800, 600))
    _, [request] = label(Events(max_pixels=120_000), clip, held_shots)
    assert [read_jpeg_size(part) for part in request.parts if isinstance(part, bytes)] == [(400, 300)] * 2
    _, [again] = label(Events(max_pixels=120_000), clip, held_shots)
    assert again.parts == request.parts  # the same bytes: the ledger knows the question


def test_no_more_images_than_a_model_takes():
    caption = lambda request: json.dumps({"caption": "Lamps burn in many rooms."})  # noqa: E731
    line, [request] = label(GlobalCaptions(max_images=5), clip_of(30), caption)
    assert [part for part in request.parts[2::2]] == [f"Frame {k}" for k in (1, 8, 16, 23, 30)]
    assert line["status"] == "warned" and line["findings"][0]["code"] == "images_left_out"
    _, requests = label(Events(max_images=8), clip_of(30), held_shots)
    assert all(sum(isinstance(part, bytes) for part in request.parts) <= 8 for request in requests)


def test_a_global_caption_is_kept_with_its_warnings():
    line, [request] = label(
        GlobalCaptions(), clip_of(3), lambda request: '{"caption": "The image shows a red lamp."}'
    )
    assert request.name == "a-clip/global/1-3"
    assert line["global_caption"] == "The image shows a red lamp."
    assert line["status"] == "warned" and [one["code"] for one in line["findings"]] == ["meta_text"]


def test_a_refusal_leaves_no_label():
    line, _ = label(
        GlobalCaptions(), clip_of(3), lambda request: '{"caption": "Sorry, I cannot help with it."}'
    )
    assert (line["status"], line["global_caption"]) == ("quarantined", "")
    refusal = json.dumps(
        {"events": [{"first_frame": 1, "last_frame": 11, "description": "I can't view it."}]}
    )
    line, _ = label(
        Events(),
        clip_of(22),
        lambda request: refusal if request.name.endswith("/1-11") else held_shots(request),
    )
    assert line["status"] == "quarantined"
    assert [event["first_frame"] for event in line["events"]] == list(range(12, 23))


@pytest.mark.parametrize("status", ["quarantined", "blocked"])
def test_a_clip_without_events_is_not_asked_about_again(status):
    line, requests = label(UnifiedStory(), clip_of(3, earlier={"status": status, "events": []}), None)
    assert requests == [] and line["status"] == status and line["story"] is None
    assert [one["code"] for one in line["findings"]] == ["events_missing"]


def test_a_blocked_question_blocks_the_clip():
    async def ask(request, check):
        return Settled("blocked", None, [Finding("blocked", ERROR, "SAFETY")])

    for stage in (GlobalCaptions(), Events()):
        assert asyncio.run(stage.label(clip_of(3), ask))["status"] == "blocked"
    earlier = {"status": "ok", "events": [POOL_EVENT]}
    assert asyncio.run(UnifiedStory().label(clip_of(3, earlier=earlier), ask))["status"] == "blocked"


POOL_EVENT = {
    "id": "e01",
    "first_frame": 1,
    "last_frame": 3,
    "description": "A lamp burns.",
    "representative": 2,
}
STORY = {
    "subjects": [{"name": "the lamp", "appearance": "brass"}],
    "style": "warm light",
    "events": [
        {"first_frame": 1, "last_frame": 3, "event_ids": ["e01"], "description": "The lamp burns in a room."}
    ],
}


def test_the_pool_is_shown_with_one_frame_per_event():
    clip = clip_of(3, earlier={"status": "warned", "events": [POOL_EVENT]})
    line, [request] = label(UnifiedStory("words"), clip, lambda request: json.dumps(STORY))
    assert request.parts[2:] == (
        "Annotation e01 [1-3] (Frame 2)",
        clip.jpegs[1],
        "A lamp burns.",
    )
    story = Story.from_dict(line["story"])
    assert story.subjects == ["the lamp, brass"] and story.style == "warm light"
    assert line["event_ids"] == [["e01"]] and line["token_counts"]["words"] > 10


def test_another_prompt_is_another_question():
    _, [request] = label(Events(), clip_of(2), held_shots)
    key = lambda request: request_key("events", Events().prompts, "a model", request)  # noqa: E731
    _, [same] = label(Events(), clip_of(2), held_shots)
    assert key(same) == key(request)
    changed = EVENTS.text.replace("film", "movie")
    assert key(type(request)(request.name, (changed, *request.parts[1:]), request.answer)) != key(request)


@pytest.mark.parametrize(
    "stage", [GlobalCaptions(max_images=7), Events(max_pixels=999), UnifiedStory("words")]
)
def test_a_stage_is_opened_again_as_it_was_asked(stage, tmp_path):
    record = StageRecord("a model", [], stage.prompts, stage.settings, [], {})
    begin_stage(tmp_path, "a", stage.name, record, None)
    again = reopen_stage(tmp_path, "a", stage.name)
    assert type(again) is type(stage) and again.settings == stage.settings
    with pytest.raises(ValueError, match="has no unseen labels"):
        reopen_stage(tmp_path, "a", "unseen")


def random_story(rng: random.Random, num_frames: int) -> Story:
    """Events in order, some of them overlapping, each with its own words."""
    spans, first = [], 1
    while first <= num_frames:
        last = min(num_frames, first + rng.randint(0, 14))
        spans.append((first, last))
        first = last + 1 if rng.random() < 0.7 else rng.randint(first + 1, last + 1)
    events = [Event(a, b, f"the girl lights lamp number {k}") for k, (a, b) in enumerate(spans)]
    return Story(events, ["the girl"], "oil painting", "A girl lights one lamp after another.")


def test_the_exact_labeler_gives_stories_with_overlaps_back(tmp_path):
    rng = random.Random(0)
    truths = [
        CaptionRecord(f"clip-{number:03d}", story.global_caption, story)
        for number in range(60)
        for story in [random_story(rng, rng.randint(1, 30))]
    ]
    for shard in range(3):
        write_captions(tmp_path, "truth", f"{shard:06d}", truths[20 * shard : 20 * shard + 20])
    write_run(tmp_path, "truth", "a test")
    script = exact_script(tmp_path)
    for truth in truths:
        clip = clip_of(truth.story.num_frames, key=truth.key)
        caption, _ = label(GlobalCaptions(), clip, script)
        assert caption["global_caption"] == truth.global_caption
        events, _ = label(Events(), clip, script)
        clip = LabelClip(clip.key, clip.info, clip.jpegs, events)
        line, _ = label(UnifiedStory(), clip, script)
        found = Story.from_dict(line["story"])
        assert (found.events, found.subjects, found.style) == (
            truth.story.events,
            truth.story.subjects,
            truth.story.style,
        )
    with pytest.raises(ValueError, match=r"clip-999 has no captions"):
        label(GlobalCaptions(), clip_of(2, key="clip-999"), script)
    with pytest.raises(ValueError, match="holds no captions"):
        exact_script(tmp_path, "nothing")
