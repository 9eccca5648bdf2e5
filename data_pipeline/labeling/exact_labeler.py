"""A labeler that is always right: answers every question from the captions that a dataset was written with.

The story world's captions are true of its frames, so the whole path of labeling must give them back.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from data_pipeline.captions import run_folder
from storyanchors.clip import CaptionRecord
from storyanchors.story import Story
from storyanchors.vlm import VlmRequest

_REQUEST = re.compile(r"(?P<key>[^/]+)/(?P<stage>global|events|story)/(?P<first>\d+)-(?P<last>\d+)")
_ANNOTATION = re.compile(r"Annotation (e\d+) \[(\d+)-(\d+)\]")
NUM_OPEN_SHARDS = 4


def exact_script(dataset: Path, captions: str = "truth") -> Callable[[VlmRequest], str]:
    """request -> the answer's JSON, from that captions run; ValueError for a clip that it does not hold."""
    folder = run_folder(dataset, captions)
    shards = {path: first for path in sorted(folder.glob("*.jsonl")) if (first := _first_key(path))}
    if not shards:
        raise ValueError(f"{folder} holds no captions: the exact labeler knows only what is written there")
    by_first_key = sorted((first, path) for path, first in shards.items())
    lines_of = lru_cache(NUM_OPEN_SHARDS)(_lines_by_key)

    def script(request: VlmRequest) -> str:
        match = _REQUEST.match(request.name)
        if not match:
            raise ValueError(f"the request {request.name!r} is of no stage that the exact labeler knows")
        # keys are sorted inside a shard, and a story world's from shard to shard
        place = bisect_right(by_first_key, match["key"], key=lambda entry: entry[0]) - 1
        lines = lines_of(by_first_key[max(place, 0)][1])
        if match["key"] not in lines:
            raise ValueError(f"clip {match['key']} has no captions in {folder}")
        truth = CaptionRecord.from_json(lines[match["key"]])
        return json.dumps(_answer(match["stage"], truth, int(match["first"]), int(match["last"]), request))

    return script


def _answer(stage: str, truth: CaptionRecord, first: int, last: int, request: VlmRequest) -> dict:
    if stage == "global":
        return {"caption": truth.global_caption}
    if stage == "events":
        return {"events": _events_within(truth.story, first, last)}
    return _story(truth.story, [part for part in request.parts if isinstance(part, str)])


def _events_within(story: Story, first: int, last: int) -> list[dict]:
    """What can be known from frames first..last alone: an event that goes on outside is cut there."""
    return [
        {
            "first_frame": max(event.first_frame, first),
            "last_frame": min(event.last_frame, last),
            "description": event.description,
        }
        for event in story.events
        if event.first_frame <= last and event.last_frame >= first
    ]


def _story(story: Story, texts: list[str]) -> dict:
    pool = [(match[1], int(match[2]), int(match[3])) for text in texts if (match := _ANNOTATION.match(text))]
    events = [
        {
            "first_frame": event.first_frame,
            "last_frame": event.last_frame,
            "event_ids": [
                id for id, first, last in pool if first >= event.first_frame and last <= event.last_frame
            ],
            "description": event.description,
        }
        for event in story.events
    ]
    subjects = [{"name": subject, "appearance": ""} for subject in story.subjects]
    return {"subjects": subjects, "style": story.style, "events": events}


def _first_key(path: Path) -> str | None:
    with path.open(encoding="utf-8") as lines:
        line = lines.readline()
    return json.loads(line)["key"] if line else None


def _lines_by_key(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return {json.loads(line)["key"]: line for line in lines if line}
