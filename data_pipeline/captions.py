"""Caption runs: captions/<run>/<shard>.jsonl, one CaptionRecord per line in key order, and run.json.

Labels are a layer beside the frames, so relabelling never touches pixels and several runs live side by side.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.dataset import CAPTIONS_FOLDER, write_atomically
from storyanchors.clip import CaptionRecord

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class CaptionLine:
    """A record and the byte range of its line, without the newline, in its file."""

    record: CaptionRecord
    offset: int
    size: int


def run_folder(dataset: Path, run: str) -> Path:
    """ValueError for a run name that is not safe as a folder's name."""
    if not _RUN_NAME.fullmatch(run):
        raise ValueError(
            f"a captions run is named with letters, digits, dashes and underscores, found {run!r}"
        )
    return dataset / CAPTIONS_FOLDER / run


def caption_runs(dataset: Path) -> list[str]:
    return sorted(path.parent.name for path in (dataset / CAPTIONS_FOLDER).glob(f"*/{RUN_FILE}"))


def write_captions(dataset: Path, run: str, shard: str, records: list[CaptionRecord]) -> None:
    """The captions of one shard's clips, whole or not at all."""
    folder = run_folder(dataset, run)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [record.to_json() + "\n" for record in sorted(records, key=lambda record: record.key)]
    write_atomically(folder / f"{shard}.jsonl", "".join(lines).encode())


def write_run(dataset: Path, run: str, made_by: str) -> None:
    """run.json, written last: what made the captions of this run."""
    content = {"schema_version": SCHEMA_VERSION, "run": run, "made_by": made_by}
    write_atomically(run_folder(dataset, run) / RUN_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_run_maker(dataset: Path, run: str) -> str:
    """Who made a run, from its run.json."""
    path = run_folder(dataset, run) / RUN_FILE
    try:
        return json.loads(path.read_bytes())["made_by"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a captions run: {error!r}") from error


def read_captions(dataset: Path, run: str, shard: str) -> Iterator[CaptionLine]:
    """The captions of one shard, none where the run has no file for it; errors name the file and the line."""
    path = run_folder(dataset, run) / f"{shard}.jsonl"
    if not path.exists():
        return
    offset = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            try:
                yield CaptionLine(CaptionRecord.from_json(line), offset, len(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        offset += len(line) + 1
