"""The folder of a dataset: what every writer of one does the same way (docs/data_format.md).

One process at a time writes into a dataset. It first records what it is going to write (dataset.json), so
that a later run either continues exactly that or is refused with what differs.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

SCHEMA_VERSION = 1
RECORD_FILE = "dataset.json"
FRAMES_FOLDER = "frames"
CAPTIONS_FOLDER = "captions"
LOCK_PATIENCE_S = 5.0  # the workers of a killed run may hold the lock for a moment

Number = int | float


@dataclass(frozen=True)
class DatasetRecord:
    """dataset.json. `config` is all that decides the bytes of the shards; counts are filled in at the end."""

    made_by: str
    config: dict[str, object]
    tool: dict[str, str]
    license_note: str = ""
    finished: bool = False
    counts: dict[str, Number] = field(default_factory=dict)

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps([self.config, self.tool], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        content = {
            "schema_version": SCHEMA_VERSION,
            "made_by": self.made_by,
            "tool": self.tool,
            "config": self.config,
            "config_hash": self.config_hash,
            "license_note": self.license_note,
            "finished": self.finished,
            "counts": self.counts,
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def tool_versions(*packages: str) -> dict[str, str]:
    """The versions that the bytes of a shard may depend on."""
    return {package: version(package) for package in ("storyanchors", "pillow", *packages)}


def read_record(dataset: Path) -> DatasetRecord:
    """ValueError where the folder is not a dataset of a version that we know."""
    path = dataset / RECORD_FILE
    if not path.is_file():
        raise ValueError(f"{dataset} is not a dataset: found no {RECORD_FILE} in it")
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}, expected {SCHEMA_VERSION}")
        names = ("made_by", "config", "tool", "license_note", "finished", "counts")
        return DatasetRecord(**{name: content[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a dataset: {error!r}") from error


@contextmanager
def writing(dataset: Path, record: DatasetRecord) -> Iterator[None]:
    """Holds the folder for this process, new or continued; in a finished dataset there is nothing left to do.

    ValueError where the folder holds something else, was begun with another config, or is being written.
    """
    try:
        dataset.mkdir(parents=True, exist_ok=True)
        lock = os.open(dataset, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{dataset} cannot be made a folder for the dataset: {error.strerror}") from error
    try:
        _lock(lock, dataset)
        if (dataset / RECORD_FILE).exists():
            _check_same(read_record(dataset), record, dataset)
        else:
            found = sorted(path.name for path in dataset.iterdir() if not path.name.endswith(".tmp"))
            if found:
                raise ValueError(
                    f"{dataset} is not empty and no dataset, found {found[0]}: choose another folder"
                )
            write_atomically(dataset / RECORD_FILE, record.to_json())
        (dataset / FRAMES_FOLDER).mkdir(exist_ok=True)
        remove_temporary_files(dataset)
        yield
    finally:
        os.close(lock)


def finish(dataset: Path, record: DatasetRecord, counts: dict[str, Number]) -> None:
    """The last thing that a writer does."""
    write_atomically(dataset / RECORD_FILE, replace(record, finished=True, counts=counts).to_json())


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


def rename_durably(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporary_files(dataset: Path) -> None:
    """What a killed run left half-written."""
    for path in dataset.rglob("*.tmp"):
        path.unlink()


def _lock(folder: int, dataset: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another process is writing into {dataset}: wait for it or stop it"
                ) from error
            time.sleep(0.1)


def _check_same(begun: DatasetRecord, wanted: DatasetRecord, dataset: Path) -> None:
    if begun.made_by != wanted.made_by:
        raise ValueError(
            f"{dataset} was made by {begun.made_by}, not by {wanted.made_by}: choose another folder"
        )
    for kind in ("config", "tool"):
        old, new = getattr(begun, kind), getattr(wanted, kind)
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{dataset} was begun with {name}={old.get(name)}, now {name}={new.get(name)}: "
                    "use the same value, or choose another folder"
                )
