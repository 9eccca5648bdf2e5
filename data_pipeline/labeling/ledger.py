"""Every request and what became of it, so that an answer is never paid twice, whatever was killed.

Append-only JSONL, one writer per file: ledger/<stage>/<shard>.<writer>.jsonl holds one line per reply, with
the raw answer. Beside it, <shard>.<writer>.sent has one line per request before it is sent: a request that
is there and has no reply is in doubt, its money may be spent.
"""

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from storyanchors.vlm import VlmRequest, VlmUsage
from storyanchors.vlm.question import schema_json

KEY_VERSION = 1  # of request_key
LEDGER_FOLDER = "ledger"
ANSWERED = frozenset({"ok", "invalid", "truncated", "blocked"})  # the same request is not sent again


@dataclass(frozen=True)
class LedgerLine:
    """One reply. `key` says what was asked, of whom; `request` names it for people and for replay."""

    key: str
    request: str
    clip: str
    stage: str
    attempt: int  # from 1, over all writers
    status: str  # of VlmReply
    finish: str
    text: str  # the raw answer
    usage: VlmUsage
    usd: float
    model_version: str
    started: float  # seconds since 1970
    seconds: float
    writer: str
    detail: str

    def to_json(self) -> bytes:
        return json.dumps(vars(self) | {"usage": asdict(self.usage)}).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> "LedgerLine":
        """ValueError for what is no ledger line."""
        try:
            record = json.loads(line)
            return cls(**record | {"usage": VlmUsage(**record["usage"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"no ledger line: {error!r}") from error


class Sent(NamedTuple):
    """A request on its way."""

    key: str
    attempt: int
    request: str
    usd: float  # at most


@dataclass
class Money:
    """What ledgers say was spent. In doubt are requests without a reply, at what they could cost."""

    num_requests: int = 0
    usage: VlmUsage = field(default_factory=VlmUsage)
    usd: float = 0.0
    in_doubt: list[str] = field(default_factory=list)  # their names
    in_doubt_usd: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    earliest: float = math.inf  # when the first of the recent ones was sent, in seconds since 1970
    latest: float = 0.0  # when the last reply came
    num_recent: int = 0  # requests answered since the time that was asked for


def request_key(stage: str, prompt_ids: Iterable[str], identity: str, request: VlmRequest) -> str:
    """What decides the answer, and nothing else: what is sent, to which model; not the clip's name."""
    digest = hashlib.sha256()
    header = [
        KEY_VERSION,
        stage,
        sorted(prompt_ids),
        identity,
        schema_json(request.answer),
        request.max_tokens,
    ]
    for part in (json.dumps(header), *request.parts):
        content = part.encode() if isinstance(part, str) else part
        kind = b"text" if isinstance(part, str) else b"jpeg"
        digest.update(kind + hashlib.sha256(content).digest())
    return digest.hexdigest()


def ledger_files(folder: Path, stage: str, shard: str = "*") -> list[Path]:
    """The ledger files of a run's stage; folder is labels/<run>."""
    return sorted((folder / LEDGER_FOLDER / stage).glob(f"{shard}.*.jsonl"))


def read_lines(path: Path) -> Iterator[LedgerLine]:
    """The lines of a ledger file, without one that a crash has torn; ValueError names a line that is none."""
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            yield LedgerLine.from_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def read_sent(path: Path) -> Iterator[Sent]:
    """The lines of one .sent file."""
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            yield Sent(*json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no request that was sent: {error!r}") from error


def count_money(
    folder: Path, stage: str, shards: Iterable[str] | None = None, *, since: float = 0.0
) -> Money:
    """All that the ledgers of a stage (of these shards) say, read as a stream."""
    money, wanted = Money(), None if shards is None else set(shards)
    for path in sorted((folder / LEDGER_FOLDER / stage).glob("*.sent")):
        if wanted is not None and path.name.split(".")[0] not in wanted:
            continue
        sent = {(one.key, one.attempt): one for one in read_sent(path)}
        if (replies := path.with_suffix(".jsonl")).exists():
            for line in read_lines(replies):
                sent.pop((line.key, line.attempt), None)
                money.num_requests += 1
                money.usage += line.usage
                money.usd += line.usd
                money.statuses[line.status] += 1
                money.latest = max(money.latest, line.started + line.seconds)
                if line.status in ANSWERED and line.started + line.seconds >= since:
                    money.num_recent += 1
                    money.earliest = min(money.earliest, line.started)
        money.in_doubt += [one.request for one in sent.values()]
        money.in_doubt_usd += sum(one.usd for one in sent.values())
    return money


class ShardLedger:
    """What is known about the requests of one shard, and the one file that this process adds to it."""

    def __init__(self, folder: Path, stage: str, shard: str, writer: str):
        self.path = folder / LEDGER_FOLDER / stage / f"{shard}.{writer}.jsonl"
        self.writer = writer
        self._answered: dict[str, LedgerLine] = {}
        self._attempts: Counter[str] = Counter()
        self._failures: dict[str, list[LedgerLine]] = defaultdict(list)
        self._files: tuple[int, int] | None = None  # opened with the first request
        self._unsynced = False
        for path in sorted(self.path.parent.glob(f"{shard}.*.sent")):
            self._attempts.update(sent.key for sent in read_sent(path))
        for path in ledger_files(folder, stage, shard):
            for line in read_lines(path):
                self._learn(line)

    def answer(self, key: str) -> LedgerLine | None:
        """The reply that makes asking again pointless."""
        return self._answered.get(key)

    def failures(self, key: str) -> list[LedgerLine]:
        """Replies that were no answer: transient and fatal ones, over all writers."""
        return self._failures[key]

    def begin(self, key: str, request: str, usd: float) -> int:
        """Says that a request of this name is being sent that costs at most usd; its attempt number."""
        if self._files is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._files = tuple(map(_create, (self.path.with_suffix(".sent"), self.path)))
        self._attempts[key] += 1
        _append(self._files[0], (json.dumps([key, self._attempts[key], request, usd]) + "\n").encode())
        return self._attempts[key]

    def end(self, line: LedgerLine) -> None:
        """Keeps the reply: once this returns, killing the process does not lose it."""
        _append(self._files[1], line.to_json())
        self._unsynced = True
        self._learn(line)

    def sync(self) -> None:
        """A power cut does not lose it either; called about once a second, in any thread."""
        if self._unsynced:
            self._unsynced = False
            for file in self._files:
                os.fsync(file)

    def close(self) -> None:
        self.sync()
        for file in self._files or ():
            os.close(file)
        self._files = None

    def _learn(self, line: LedgerLine) -> None:
        if line.status in ANSWERED:
            self._answered.setdefault(line.key, line)
        else:
            self._failures[line.key].append(line)


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)


def _append(file: int, content: bytes) -> None:
    """The line or, on a full disk, an OSError and nothing of it."""
    end, rest = os.fstat(file).st_size, memoryview(content)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, end)
        raise


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines that end with a newline; a power cut may leave zeros where the last ones were."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n") and not line.startswith(b"\0"):
                yield line
