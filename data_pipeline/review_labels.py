"""Writes one HTML page that shows a labeling run: its numbers, clips drawn at random, and its worst clips.

python data_pipeline/review_labels.py dataset=DATASET run=RUN out=FILE.html

Of every clip: its frames, events as coloured bars over them, subjects, style, findings, cost, and where it
failed the model's answers. The page needs no server and no network; it can be sent to a colleague as it is.
"""

import base64
import hashlib
import heapq
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm

from conf.command import run
from data_pipeline.dataset import FRAMES_FOLDER, read_record, write_atomically
from data_pipeline.labeling.findings import ERROR, WARNING, Finding, PoolEvent
from data_pipeline.labeling.ledger import ledger_files, read_lines
from data_pipeline.labeling.partition import STAGES, label_lines, labels_folder, read_run, settled_shards
from data_pipeline.labeling.review_page import (
    RawAnswer,
    ReviewedClip,
    Section,
    StageOutcome,
    Table,
    Thumbnail,
    review_page,
)
from data_pipeline.labeling.run_quality import GOOD, RunQuality
from data_pipeline.labeling.subsets import balanced_subsets
from data_pipeline.shard_reader import finished_shards, read_clips, read_marker
from storyanchors.clip import ClipInfo, StoryClip
from storyanchors.story import Story

THUMBNAIL_PX = 224  # wide at most, as the browser shows two of three at 100
SMALL_PX = 100
THUMBNAIL_QUALITY = 80
ANSWERS_SHOWN = 6
ANSWER_CHARACTERS = 6000
Place = tuple[str, str]  # shard, key


@dataclass
class ReviewLabelsConfig:
    dataset: str = MISSING
    run: str = MISSING
    out: str = MISSING
    num_random: int = 50
    num_worst: int = 50


def main(config: ReviewLabelsConfig) -> None:
    dataset, out = Path(config.dataset), Path(config.out)
    for name in ("num_random", "num_worst"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}, expected 0 or above")
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: {out.parent} is no folder")
    page = review(dataset, config.run, config.num_random, config.num_worst)
    write_atomically(out, page.encode())
    print(f"{out}: {len(page) / 1e6:.1f} MB, open it in a browser")


def review(dataset: Path, run: str, num_random: int, num_worst: int) -> str:
    """The page; ValueError where there is no such run, or it has settled nothing yet."""
    read_record(dataset)
    record = read_run(dataset, run)
    shards = finished_shards(dataset / FRAMES_FOLDER)
    num_clips = sum(read_marker(dataset / FRAMES_FOLDER, shard).num_clips for shard in shards)
    quality, drawn, worst = _read(dataset, run, shards, num_random, num_worst)
    if not quality.stages:
        raise ValueError(f"labeling run {run!r} of {dataset} has settled no shard yet")
    clips = _reviewed(dataset, run, {*drawn, *worst})
    also = [place for place in drawn if place in worst]
    sections = [
        Section(
            f"The worst clips ({len(worst)})",
            "By failed stages, then errors, then warnings, then requests.",
            [clips[place] for place in worst],
        ),
        Section(
            f"Clips at random ({len(drawn)})",
            "Drawn by the hash of their keys: the same clips in every run of this dataset.",
            [clips[place] for place in drawn if place not in worst],
            [key for _, key in also],
        ),
    ]
    tables = [*quality.tables(len(shards), num_clips), _models(record)]
    return review_page(f"Labels {run}", [f"Dataset {dataset.name}"], tables, sections)


def _read(
    dataset: Path, run: str, shards: list[str], num_random: int, num_worst: int
) -> tuple[RunQuality, list[Place], list[Place]]:
    """The run's numbers, and where the random and the worst clips are; one shard at a time."""
    quality, folder = RunQuality(), labels_folder(dataset, run)
    settled = {stage: settled_shards(dataset, run, stage) for stage in STAGES}
    drawn: list[tuple[int, Place]] = []  # of numbers that are negated hashes, the largest
    worst: list[tuple[tuple[int, ...], str, Place]] = []
    for shard in tqdm(shards, desc="reading", unit="shard", disable=None):
        badness: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for stage in STAGES:
            if shard in settled[stage]:
                quality.stages[stage].shards += 1
                for line in label_lines(dataset, run, stage, shard):
                    quality.add_line(stage, line)
                    for number, more in enumerate(_badness(line)):
                        badness[line["key"]][number] += more
            for path in ledger_files(folder, stage, shard):
                for reply in read_lines(path):
                    quality.add_reply(reply)
        for key, bad in badness.items():
            _keep(drawn, (-_hash(key), (shard, key)), num_random)
            if any(bad[:3]):
                _keep(worst, (tuple(bad), _reversed(key), (shard, key)), num_worst)
    return (
        quality,
        [place for _, place in sorted(drawn, reverse=True)],
        [place for *_, place in sorted(worst, reverse=True)],
    )


def _reviewed(dataset: Path, run: str, places: set[Place]) -> dict[Place, ReviewedClip]:
    """What the page shows of these clips; only their shards are opened."""
    keys_of: dict[str, set[str]] = defaultdict(set)
    for shard, key in places:
        keys_of[shard].add(key)
    clips = {}
    frames = dataset / FRAMES_FOLDER
    for shard in tqdm(sorted(keys_of), desc="drawing", unit="shard", disable=None):
        lines: dict[str, dict[str, dict]] = defaultdict(dict)  # key -> stage -> line
        for stage in STAGES:
            for line in label_lines(dataset, run, stage, shard):
                lines[line["key"]][stage] = line
        failed = {
            (stage, key) for key in keys_of[shard] for stage in lines[key] if _has_failed(lines[key][stage])
        }
        answers = _answers(labels_folder(dataset, run), shard, failed)
        for key, members in read_clips(frames, read_marker(frames, shard)):
            if key in keys_of[shard]:
                clips[shard, key] = _clip(StoryClip.from_members(members), lines[key], answers[key])
    return clips


def _clip(clip: StoryClip, lines: dict[str, dict], answers: list[RawAnswer]) -> ReviewedClip:
    info, events, story = clip.info, lines.get("events", {}), lines.get("story", {})
    subsets = [(subset["first"], subset["last"]) for subset in events.get("subsets", [])]
    return ReviewedClip(
        key=info.key,
        facts=_facts(info),
        thumbnails=[_thumbnail(frame) for frame in clip.frames],
        rows=subsets or balanced_subsets(info.num_frames),
        outcomes=[_outcome(stage, line) for stage, line in lines.items()],
        global_caption=lines.get("global", {}).get("global_caption", ""),
        pool=[PoolEvent(**event) for event in events.get("events", [])],
        story=Story.from_dict(story["story"]) if story.get("story") else None,
        event_ids=story.get("event_ids", []),
        answers=answers,
    )


def _answers(folder: Path, shard: str, failed: set[tuple[str, str]]) -> dict[str, list[RawAnswer]]:
    """By key: the last answers in stages (stage, key) that have failed."""
    answers: dict[str, list[RawAnswer]] = defaultdict(list)
    for stage in sorted({stage for stage, _ in failed}, key=STAGES.index):
        for path in ledger_files(folder, stage, shard):
            for line in read_lines(path):
                if (stage, line.clip) in failed and (line.text or line.detail):
                    text = (line.text or line.detail)[:ANSWER_CHARACTERS]
                    answer = RawAnswer(line.request, line.status, line.finish, text)
                    answers[line.clip] = [*answers[line.clip], answer][-ANSWERS_SHOWN:]
    return answers


def _outcome(stage: str, line: dict) -> StageOutcome:
    findings = [Finding(**finding) for finding in line["findings"]]
    tokens = sum(line["usage"].values())
    return StageOutcome(stage, line["status"], findings, line["num_requests"], tokens, line["usd"])


def _facts(info: ClipInfo) -> str:
    times = f"{info.seconds[0]:.1f} s to {info.seconds[-1]:.1f} s"
    return f"{info.source}, {info.num_frames} frames of {info.width} x {info.height}, {times}"


def _thumbnail(frame: Image.Image) -> Thumbnail:
    """Encoded anew: the page holds pixels, never a file as it came."""
    small = frame.width <= SMALL_PX
    if frame.width > THUMBNAIL_PX:
        height = max(1, round(frame.height * THUMBNAIL_PX / frame.width))
        frame = frame.resize((THUMBNAIL_PX, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return Thumbnail(base64.b64encode(buffer.getvalue()).decode(), small)


def _models(record: dict) -> Table:
    """What was asked of whom, at which price."""
    rows = [
        [
            stage,
            "; ".join([asked["identity"], *(f"else {name}" for name in asked["fallback"])]),
            ", ".join(sorted(asked["prompts"])),
            "; ".join(map(_price, asked["prices"])),
        ]
        for stage, asked in (
            (stage, record["stages"][stage]) for stage in STAGES if stage in record["stages"]
        )
    ]
    return Table("Models", ["stage", "model", "prompts", "price"], rows)


def _price(price: dict) -> str:
    found = (
        f"{price['input_usd_per_million']} in, {price['output_usd_per_million']} out USD per million tokens"
    )
    return f"{found} ({price['price_date']})" if price["price_date"] else found


def _badness(line: dict) -> tuple[int, int, int, int]:
    severities = [finding["severity"] for finding in line["findings"]]
    return _has_failed(line), severities.count(ERROR), severities.count(WARNING), line["num_requests"]


def _has_failed(line: dict) -> bool:
    return line["status"] not in GOOD


def _keep(heap: list, item: tuple, most: int) -> None:
    """Keeps the `most` largest items."""
    heapq.heappush(heap, item)
    if len(heap) > most:
        heapq.heappop(heap)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _reversed(key: str) -> tuple[int, ...]:
    """Of equally bad clips the first in the order of keys is kept."""
    return tuple(-ord(char) for char in key)


if __name__ == "__main__":
    run(main, ReviewLabelsConfig, "review_labels")
