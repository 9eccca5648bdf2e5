"""The folder of a labeling run: labels/<run>/run.json, who labels which shard, and what is settled.

dataset/labels/<run>/run.json                                what is asked, of which model, in how many tasks
dataset/labels/<run>/ledger/<stage>/<shard>.<writer>.jsonl   every request and what became of it (ledger.py)
dataset/labels/<run>/<stage>/<shard>.jsonl                   one line per clip, sorted by key; appears whole
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.captions import caption_runs, read_run_maker, run_folder
from data_pipeline.dataset import FRAMES_FOLDER, write_atomically
from data_pipeline.shard_reader import finished_shards

SCHEMA_VERSION = 1
LABELS_FOLDER = "labels"
RUN_FILE = "run.json"
STAGES = ("global", "events", "story")
CAPTIONS_MADE_BY = "labels"
LOCK_PATIENCE_S = 10.0


@dataclass(frozen=True)
class StageRecord:
    """What decides the answers of a stage, and what they were said to cost."""

    identity: str  # of the model
    fallback: list[str]  # identities of the models that are asked where it refuses
    prompts: dict[str, str]  # id -> text
    asked_with: dict[str, object]  # the stage's own settings
    prices: list[dict[str, object]]  # of all these models, with their dates
    settings: dict[str, object]  # how fast, how much at most


def labels_folder(dataset: Path, run: str) -> Path:
    """ValueError for a run name that is not safe as a folder's name."""
    return dataset / LABELS_FOLDER / run_folder(dataset, run).name


def read_run(dataset: Path, run: str) -> dict:
    """run.json: {"schema_version", "run", "num_tasks", "stages": {stage: StageRecord as a dict}}."""
    path = labels_folder(dataset, run) / RUN_FILE
    if not path.is_file():
        found = ", ".join(sorted(folder.parent.name for folder in path.parents[1].glob(f"*/{RUN_FILE}")))
        raise ValueError(f"{dataset} has no labeling run {run!r}, found {found or 'none'}")
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}, expected {SCHEMA_VERSION}")
        if not (isinstance(content["num_tasks"], int) and isinstance(content["stages"], dict)):
            raise ValueError("num_tasks and stages are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a labeling run: {error!r}") from error
    return content


def shards_of_task(shards: list[str], task: int, num_tasks: int) -> list[str]:
    """The shards of one task, by their names alone: a dataset that grows moves no shard to another task."""
    return [shard for shard in shards if _number(shard) % num_tasks == task]


def label_lines(dataset: Path, run: str, stage: str, shard: str) -> list[dict]:
    """The settled clips of a shard, in key order; empty where the stage has not settled the shard."""
    path = labels_folder(dataset, run) / stage / f"{shard}.jsonl"
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} does not hold label lines: {error}") from error


def settled_shards(dataset: Path, run: str, stage: str) -> set[str]:
    return {path.stem for path in (labels_folder(dataset, run) / stage).glob("*.jsonl")}


def missing_tasks(dataset: Path, run: str, stage: str) -> list[int]:
    """The tasks that own a shard that the stage has not settled."""
    num_tasks = read_run(dataset, run)["num_tasks"]
    missing = set(finished_shards(dataset / FRAMES_FOLDER)) - settled_shards(dataset, run, stage)
    return sorted({_number(shard) % num_tasks for shard in missing})


def task_ranges(tasks: list[int]) -> str:
    """Ascending numbers as a Slurm array writes them: [0, 2, 3, 4] -> "0,2-4"."""
    ranges: list[list[int]] = []
    for task in tasks:
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def begin_stage(dataset: Path, run: str, stage: str, record: StageRecord, num_tasks: int | None) -> int:
    """Writes what is going to be asked into run.json, or checks that it is what was begun; the tasks' number.

    The number of tasks is pinned by whoever comes first, so that an array of only the missing tasks labels
    what those tasks own. ValueError for another number, another model, other prompts, and a captions run of
    that name that was not made from labels.
    """
    folder = labels_folder(dataset, run)
    if not (folder / RUN_FILE).exists():
        _check_captions(dataset, run)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "run.lock", f"labeling run {run!r} is being begun by another process"):
        if (folder / RUN_FILE).exists():
            content = read_run(dataset, run)
        else:
            content = {
                "schema_version": SCHEMA_VERSION,
                "run": run,
                "num_tasks": num_tasks or 1,
                "stages": {},
            }
        pinned = content["num_tasks"]
        if num_tasks not in (None, pinned):
            raise ValueError(
                f"{folder / RUN_FILE} was begun with num_tasks={pinned}, found num_tasks={num_tasks}"
            )
        begun = content["stages"].get(stage)
        content["stages"][stage] = _merged(begun, record, folder / RUN_FILE, stage)
        encoded = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
        if not (folder / RUN_FILE).exists() or (folder / RUN_FILE).read_bytes() != encoded:
            write_atomically(folder / RUN_FILE, encoded)
    return pinned


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds a file for this process; the kernel lets go of it, however the process ends.

    ValueError(busy) where another process holds it for more than ten seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ValueError(f"{busy}: {path} is locked") from error
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _number(shard: str) -> int:
    return int.from_bytes(hashlib.sha256(shard.encode()).digest()[:8], "big")


def _merged(begun: dict | None, record: StageRecord, path: Path, stage: str) -> dict:
    """What was begun, with models to fall back on and prices that are new; settings are the latest."""
    if begun is None:
        return dict(vars(record))
    if begun["identity"] != record.identity:
        raise ValueError(
            f"{path}: {stage} was begun with the model {begun['identity']!r}, found {record.identity!r}: "
            "use the same, or choose another run"
        )
    for kind, new in (("prompt", record.prompts), ("setting", record.asked_with)):
        old = begun["prompts" if kind == "prompt" else "asked_with"]
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{path}: {stage} was begun with another {kind} {name}, {_shortened(old.get(name))}, "
                    f"found {_shortened(new.get(name))}: use the same, or choose another run"
                )
    fallback = begun["fallback"] + [name for name in record.fallback if name not in begun["fallback"]]
    prices = begun["prices"] + [price for price in record.prices if price not in begun["prices"]]
    return dict(vars(record)) | {"fallback": fallback, "prices": prices}


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_captions(dataset: Path, run: str) -> None:
    if run in caption_runs(dataset) and (maker := read_run_maker(dataset, run)) != CAPTIONS_MADE_BY:
        raise ValueError(f"captions run {run!r} was made by {maker}: choose another run for the labels")
