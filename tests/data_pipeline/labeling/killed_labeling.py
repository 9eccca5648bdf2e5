"""Labels the story world over HTTP while servers fail and the labeling process is killed, and audits it all.

The servers are tests/vlm_servers.py, the backends, the stages and the runner are the real ones; a killed
process gets SIGKILL at a random number of requests and the same command is started again.
"""

import ctypes
import json
import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import import_module
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from conf.command import STOPPED, Stopped
from data_pipeline.captions import read_captions
from data_pipeline.dataset import FRAMES_FOLDER
from data_pipeline.labeling.exact_labeler import exact_script
from data_pipeline.labeling.ledger import ANSWERED, count_money, ledger_files, read_lines
from data_pipeline.labeling.partition import labels_folder
from data_pipeline.labeling.prompts import EVENTS, GLOBAL_CAPTION, STORY
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.schemas import EventsAnswer, GlobalCaptionAnswer, StoryAnswer
from data_pipeline.labeling.stages import open_stage
from data_pipeline.shard_reader import finished_shards, read_clips, read_marker
from storyanchors.clip import frame_member
from storyanchors.vlm import VlmConfig, VlmRequest, VlmUsage
from tests.vlm_servers import (
    FAULTS,
    INPUT_USD_PER_MILLION,
    KEY,
    OUTPUT_USD_PER_MILLION,
    UNPAID,
    Parts,
    VlmServer,
    serve,
)

ENDING = ("rate_limit_per_day", "redirect")  # faults that rightly end a run
BLOCKS = ("blocked_question", "blocked_answer")  # what one refuses, the other one answers
KEY_NAME = "STORYANCHORS_TEST_KEY"
STAGES = {
    "global": (GLOBAL_CAPTION, GlobalCaptionAnswer),
    "events": (EVENTS, EventsAnswer),
    "story": (STORY, StoryAnswer),
}
FIRST_MODEL = {"global": "openai", "events": "gemini", "story": "gemini"}  # the other one is the fallback
PR_SET_PDEATHSIG = 1  # linux/prctl.h
HANG_S = 60.0
_FRAME = re.compile(r"Frame (\d+)")
_NUM_FRAMES = re.compile(r"The clip has (\d+) frames")


@dataclass
class Audit:
    """What the ledger, the server and the labels say about one stage."""

    stage: str
    seconds: float = 0.0
    starts: int = 0
    kills: int = 0
    requests: int = 0  # at the servers
    faults: Counter[str] = field(default_factory=Counter)
    server_usd: float = 0.0
    ledger_usd: float = 0.0
    lost: int = 0  # answers that a server sent and a killed process could not write down
    lost_usd: float = 0.0
    in_doubt: int = 0  # requests of which the ledger knows that it does not know
    again: int = 0  # good answers that a server gave a second time, because the first was lost
    repeated: int = 0  # answers that the ledger of a shard holds twice
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def balance(self) -> float:
        """What servers charged and nobody knows of; nothing, but for rounding."""
        return self.server_usd - self.ledger_usd - self.lost_usd


class Labelers:
    """Processes that label, forked from one that has imported everything and has no threads.

    with Labelers() as labelers: pid = labelers.start(config, "events"); status = labelers.wait(timeout_s)
    """

    def __enter__(self) -> "Labelers":
        context = get_context("fork")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_fork_on_order, args=(theirs,), daemon=True)
        self._process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._orders.send(None)
        self._process.join()

    def start(self, config: LabelingConfig, stage: str) -> int:
        self._orders.send((config, stage))
        return self._orders.recv()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit status, minus the signal that killed it; None while it runs."""
        return self._orders.recv() if self._orders.poll(timeout_s) else None


def _fork_on_order(orders: Connection) -> None:
    _die_with(os.getppid())
    import_module("storyanchors.vlm.gemini")  # Google's SDK takes a second, here once
    while (order := orders.recv()) is not None:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _die_with(parent)
            os._exit(_label(*order))
        orders.send(pid)
        orders.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _die_with(parent: int) -> None:
    """A test that is interrupted leaves no process behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _label(config: LabelingConfig, stage: str) -> int:
    log = os.open(Path(config.dataset) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run_stage(config, open_stage(stage, {}))
    except Stopped as stopped:
        os.write(2, f"stopped: {stopped}\n".encode())
        return STOPPED
    except Exception as error:
        os.write(2, f"error: {type(error).__name__}: {error}\n".encode())
        return 1
    return 0


class Answering:
    """The exact labeler behind a server: finds out from the pictures which clip a question is about."""

    def __init__(self, dataset: Path):
        self.script = exact_script(dataset)
        self.places: dict[tuple[bytes, int], set[str]] = {}  # a picture as frame k -> clips
        self.num_frames: dict[str, int] = {}
        self.twins: dict[str, str] = {}  # names of requests that cannot be told apart -> the first of them
        self.told = {  # clips of the same representative frames differ in what happens between
            line.record.key: {event.description for event in line.record.story.events}
            for shard in finished_shards(dataset / FRAMES_FOLDER)
            for line in read_captions(dataset, "truth", shard)
        }
        frames = dataset / FRAMES_FOLDER
        for shard in finished_shards(frames):
            for key, members in read_clips(frames, read_marker(frames, shard)):
                self.num_frames[key] = len(members) - 1
                for number in range(1, len(members)):
                    place = sha256(members[frame_member(number)]).digest(), number
                    self.places.setdefault(place, set()).add(key)

    def name(self, parts: Parts) -> str:
        """The name of the request, with /repair for a repair turn."""
        [stage] = [stage for stage, (prompt, _) in STAGES.items() if prompt.text == parts[0]]
        shown = [
            (int(_FRAME.search(text)[1]), picture)
            for text, picture in pairwise(parts)
            if isinstance(picture, bytes)
        ]
        keys = set.intersection(*(self.places[sha256(picture).digest(), number] for number, picture in shown))
        num_frames = int(_NUM_FRAMES.search(parts[1])[1])
        told = {text for text in parts[3::3] if stage == "story" and isinstance(text, str)}
        keys = {key for key in keys if self.num_frames[key] == num_frames}
        keys = {key for key in keys if told <= self.told[key]} or keys
        first, last = (shown[0][0], shown[-1][0]) if stage == "events" else (1, num_frames)
        repair = "/repair" if str(parts[-1]).startswith("You answered this before.") else ""
        rest = f"{stage}/{first}-{last}{repair}"
        if len(keys) > 1:  # two stories that look the same in these frames are one question
            self.twins |= {f"{key}/{rest}": f"{min(keys)}/{rest}" for key in keys}
        return f"{min(keys)}/{rest}"

    def answer(self, parts: Parts) -> str:
        name = self.name(parts)
        return self.script(VlmRequest(name, parts, STAGES[name.split("/")[1]][1]))


class RecordingServer:
    """A server of one protocol, and the name of every request that it charged for, in order."""

    def __init__(
        self,
        stack: ExitStack,
        protocol: str,
        answering: Answering,
        rate: float,
        seed: int,
        timeout_s: float,
        is_fallback: bool,
    ):
        self.charged: list[str] = []
        self.timeout_s = timeout_s

        def answer(parts: Parts) -> str:
            self.charged.append(answering.name(parts))
            return answering.answer(parts)

        without = ENDING + BLOCKS if is_fallback else ENDING
        faults = {fault: rate for fault in FAULTS if fault not in without} if rate else {}
        self.server: VlmServer = stack.enter_context(
            serve(
                protocol,
                answer,
                faults=faults,
                seed=seed,
                latency_s=0.01,
                hang_s=HANG_S,
                retry_after_s=0.02,
                spoil_once=True,
            )
        )

    def config(self) -> VlmConfig:
        return VlmConfig(
            backend=self.server.protocol,
            model="m",
            base_url=self.server.url,
            api_key_env=KEY_NAME,
            timeout_s=self.timeout_s,
            input_usd_per_million=INPUT_USD_PER_MILLION,
            output_usd_per_million=OUTPUT_USD_PER_MILLION,
            price_date="2026-11-21",
        )


def label_all(
    dataset: Path,
    run: str,
    *,
    rate: float,
    num_kills: int,
    num_requests: dict[str, int],
    timeout_s: float = 1.0,
    seed: int = 0,
) -> list[Audit]:
    """All three stages with every fault at that rate and that many kills; ends when all clips have labels.

    num_requests: of each stage without faults, so that the kills are spread over the whole run.
    """
    os.environ[KEY_NAME] = KEY
    answering, chance, audits = Answering(dataset), random.Random(seed), []
    total = sum(num_requests.values())
    moments = sorted(chance.randrange(total) for _ in range(num_kills))
    with Labelers() as labelers:
        before = 0
        for number, (stage, expected) in enumerate(num_requests.items()):
            with ExitStack() as stack:
                protocols = sorted(("gemini", "openai"), key=lambda protocol: protocol != FIRST_MODEL[stage])
                servers = [
                    RecordingServer(
                        stack,
                        protocol,
                        answering,
                        rate,
                        seed + number,
                        timeout_s,
                        protocol != FIRST_MODEL[stage],
                    )
                    for protocol in protocols
                ]
                kills = [moment - before for moment in moments if before <= moment < before + expected]
                audits.append(_label_stage(labelers, dataset, run, stage, servers, kills, answering))
            before += expected
    return audits


def _label_stage(
    labelers: Labelers,
    dataset: Path,
    run: str,
    stage: str,
    servers: list[RecordingServer],
    kills: list[int],
    answering: Answering,
) -> Audit:
    first, *others = [server.config() for server in servers]
    config = LabelingConfig(
        dataset=str(dataset), run=run, vlm=first, fallback=others, in_flight=24, back_off_s=0.05, grace_s=5.0
    )
    audit, began = Audit(stage), time.monotonic()
    while True:
        pid = labelers.start(config, stage)
        audit.starts += 1
        while (status := labelers.wait(0.002)) is None:
            if kills and sum(server.server.num_requests for server in servers) > kills[0]:
                kills.pop(0)
                os.kill(pid, signal.SIGKILL)
                audit.kills += 1
                status = labelers.wait(30.0)
                break
        if status == 0:
            break
        if status not in (-signal.SIGKILL, STOPPED) or audit.starts > 200:
            raise AssertionError(f"{stage}: status {status}: {(dataset / 'log.txt').read_text()[-2000:]}")
    audit.seconds = time.monotonic() - began
    _compare(audit, dataset, run, servers, answering.twins)
    return audit


def _compare(
    audit: Audit, dataset: Path, run: str, servers: list[RecordingServer], twins: dict[str, str]
) -> None:
    """Every charge of a server must be a line of the ledger, or a request that the ledger calls in doubt."""
    folder = labels_folder(dataset, run)
    money = count_money(folder, audit.stage)
    lines, answered = [], Counter()
    for path in ledger_files(folder, audit.stage):
        for line in read_lines(path):
            lines.append(replace(line, request=twins.get(line.request, line.request)))
            answered[path.name.split(".")[0], line.key] += line.status in ANSWERED
    audit.repeated = sum(number - 1 for number in answered.values() if number > 1)
    written = Counter((line.request, line.usage) for line in lines if line.usage != VlmUsage())
    charged = Counter()
    for one in servers:
        served = [request for request in one.server.served if request.fault not in UNPAID]
        assert len(served) == len(one.charged)
        charged.update((name, VlmUsage(*request.tokens)) for name, request in zip(one.charged, served))
        audit.requests += one.server.num_requests
        audit.server_usd += one.server.usd
        audit.faults.update(request.fault for request in one.server.served if request.fault)
        successes = Counter(
            request.key
            for name, request in zip(one.charged, served)
            if request.fault in ("", "fenced") and name not in twins
        )
        audit.again += successes.total() - len(successes)
    invented, lost = written - charged, charged - written
    assert not invented, f"the ledger has what no server charged: {invented}"
    doubtful = Counter(twins.get(name, name) for name in money.in_doubt) + Counter(
        line.request for line in lines if line.finish == "timeout"
    )
    unknown: Counter[str] = Counter()
    for (name, _), number in lost.items():
        unknown[name] += number
    assert not unknown - doubtful, f"charged, not in the ledger and not in doubt: {unknown - doubtful}"
    assert audit.again <= lost.total()
    config = servers[0].config()
    audit.lost, audit.lost_usd = lost.total(), sum(config.usd(usage) * n for (_, usage), n in lost.items())
    audit.ledger_usd, audit.in_doubt = money.usd, len(money.in_doubt)
    for path in (folder / audit.stage).glob("*.jsonl"):
        audit.statuses.update(json.loads(line)["status"] for line in path.read_bytes().splitlines())


def labels_without_cost(dataset: Path, run: str) -> dict[str, list[dict]]:
    """Every label line, without what it cost to get it."""
    cost = ("usage", "usd", "num_requests")
    return {
        f"{path.parent.name}/{path.name}": [
            {name: value for name, value in json.loads(line).items() if name not in cost}
            for line in path.read_bytes().splitlines()
        ]
        for stage in STAGES
        for path in sorted((labels_folder(dataset, run) / stage).glob("*.jsonl"))
    }


def captions_bytes(dataset: Path, run: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((dataset / "captions" / run).glob("*.jsonl"))}


def files_with_key(folder: Path) -> list[Path]:
    """Files below the folder that hold the servers' key."""
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
