"""Runs a stage of labeling over a dataset: clips in, one line per clip out, every answer paid once.

A stage asks and never knows of money, retries or ledgers: `ask` looks into the ledger first, sends what is
not there under the policy, has the answer checked, and asks for one repair. Two shards at most are open at a
time, so memory does not grow with the dataset.
"""

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from omegaconf import MISSING
from tqdm import tqdm

from conf.command import Stopped
from data_pipeline.captions import write_captions, write_run
from data_pipeline.dataset import FRAMES_FOLDER, read_record, write_atomically
from data_pipeline.labeling.estimate import Sampled, describe_estimate
from data_pipeline.labeling.findings import ERROR, Finding
from data_pipeline.labeling.ledger import LedgerLine, ShardLedger, count_money, request_key
from data_pipeline.labeling.partition import (
    CAPTIONS_MADE_BY,
    STAGES,
    StageRecord,
    begin_stage,
    label_lines,
    labels_folder,
    locked,
    read_run,
    settled_shards,
    shards_of_task,
)
from data_pipeline.labeling.policy import Ended, Limits, Policy
from data_pipeline.labeling.turns import (
    REPAIR_ID,
    REPAIR_PROMPT,
    Ask,
    Check,
    Settled,
    ask_ledger,
    settle,
)
from data_pipeline.shard_reader import finished_shards, read_clips, read_marker
from storyanchors.clip import INFO_MEMBER, CaptionRecord, ClipInfo, frame_member
from storyanchors.story import Story
from storyanchors.vlm import Vlm, VlmConfig, VlmRequest, VlmUsage, open_vlm

log = logging.getLogger(__name__)

EARLIER_STAGE = {"story": "events"}  # whose lines a stage is given
NUM_OPEN_SHARDS = 2  # the next one begins while the last clips of one are still being answered
MAX_TRIES = 8  # of one question in one run, where nothing is wrong with it
MAX_FAILURES = 24  # over all runs: such a question is given up
REPORT_S = 30.0  # between two lines of progress where there is no terminal
NUM_SAMPLED = 50  # clips of a dry run
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SCRIPTS = ("story_world",)
Script = Callable[[VlmRequest], str]


@dataclass
class LabelingConfig:
    """What the labeling commands share. Limits are of the whole run; a task of an array gets its share."""

    dataset: str = MISSING
    run: str = MISSING  # the name of the labels, and of the captions that come of them
    vlm: VlmConfig = MISSING
    fallback: list[VlmConfig] = field(default_factory=list)  # asked in this order what vlm refuses to answer
    script: str = ""  # who answers for vlm=scripted: story_world
    in_flight: int = 32  # requests at a time, of this task
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # sent
    usd_per_10min: float | None = None
    max_usd: float | None = None  # for this stage of the run, in all
    max_failures: float = 0.3  # of the last 200 questions; more end the run
    back_off_s: float = 1.0  # before a repetition, at most; twice that before the next
    task: int | None = None  # None: SLURM_ARRAY_TASK_ID, or the only one
    num_tasks: int | None = None  # None: as the run was begun, else SLURM_ARRAY_TASK_COUNT, else 1
    grace_s: float = 90.0  # for requests in flight when the run is told to stop
    dry_run: bool = False

    def __post_init__(self):
        for name in ("in_flight", "num_tasks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or above")
        limits = (
            "requests_per_minute",
            "tokens_per_minute",
            "usd_per_10min",
            "max_usd",
            "max_failures",
            "back_off_s",
        )
        for name in limits:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s is {self.grace_s}, expected 0 or above")
        if self.script not in ("", *SCRIPTS):
            raise ValueError(f"script is {self.script!r}, expected one of {', '.join(SCRIPTS)}")


@dataclass(frozen=True)
class LabelClip:
    """What a stage sees of a clip."""

    key: str
    info: ClipInfo
    jpegs: list[bytes] = field(repr=False)  # as stored, frame 1 first
    earlier: dict | None  # this clip's line of the stage before: of events for story


class Stage(Protocol):
    """A kind of labels. label() may be called again for a clip, and asks through `ask` alone.

    Its line, without the key, has status, findings, usage, usd, num_requests and what the stage found.
    """

    name: str  # global | events | story
    prompts: dict[str, str]  # id -> text; their ids enter the keys of requests
    settings: dict[str, object]  # JSON values: what else decides its questions

    async def label(self, clip: LabelClip, ask: Ask) -> dict: ...


class Unsettled(Exception):
    """A clip stays without labels in this run: its server failed to answer, not the clip."""


def run_stage(
    config: LabelingConfig, stage: Stage, *, only_ledger: bool = False, script: Script | None = None
) -> None:
    """Labels all clips of this task that have no line yet, shard by shard.

    With only_ledger nothing is sent: shards that are settled are labelled again from the answers that are
    there, with today's checks, and replaced; a clip of which an answer is missing keeps the line that it has.
    `script` answers for vlm=scripted in place of the one that the config names.
    Stopped where a signal, max_usd, a daily quota or servers that do not answer end the run early; ValueError
    for a dataset, a run or a model that does not fit, and where too many questions fail.
    """
    dataset = Path(config.dataset)
    read_record(dataset)
    shards = finished_shards(dataset / FRAMES_FOLDER)
    if not shards:
        raise ValueError(f"{dataset / FRAMES_FOLDER} holds no finished shard")
    if stage.name not in STAGES:
        raise ValueError(f"the stage is named {stage.name!r}, expected one of {', '.join(STAGES)}")
    if only_ledger:
        identities = ledger_identities(dataset, config.run, stage.name)
        asyncio.run(_resettle(dataset, config.run, stage, identities, shards))
    elif config.dry_run:
        asyncio.run(_print_estimate(config, stage, shards, script))
    else:
        asyncio.run(_label(config, stage, shards, script))


def ledger_identities(dataset: Path, run: str, stage: str) -> list[str]:
    """Of the models that a stage of a run asked: the one, then those it fell back on."""
    stages = read_run(dataset, run)["stages"]
    if stage not in stages:
        raise ValueError(f"run {run!r} has no {stage} labels, found {', '.join(sorted(stages)) or 'none'}")
    return [stages[stage]["identity"], *stages[stage]["fallback"]]


def clips_of_shard(dataset: Path, run: str, stage: str, shard: str) -> Iterator[LabelClip]:
    """The clips of a shard as a stage sees them; ValueError where the stage before has not settled it."""
    earlier = None
    if before := EARLIER_STAGE.get(stage):
        earlier = {line["key"]: line for line in label_lines(dataset, run, before, shard)}
        if not earlier:
            raise ValueError(f"shard {shard} has no {before} labels in run {run!r}: label {before} first")
    frames = dataset / FRAMES_FOLDER
    for key, members in read_clips(frames, read_marker(frames, shard)):
        info = ClipInfo.from_json(members[INFO_MEMBER])
        jpegs = [members[frame_member(number)] for number in range(1, info.num_frames + 1)]
        yield LabelClip(key, info, jpegs, earlier[key] if earlier is not None else None)


def settled_content(lines: dict[str, dict]) -> bytes:
    """The stage file of a shard: one JSON line per clip, sorted by key."""
    content = [
        json.dumps({"key": key} | lines[key], ensure_ascii=False, sort_keys=True) for key in sorted(lines)
    ]
    return "".join(line + "\n" for line in content).encode()


def write_shard(dataset: Path, run: str, stage: str, shard: str, lines: dict[str, dict]) -> None:
    """The stage file, whole, and the captions that follow from it and from the other kind of labels."""
    folder = labels_folder(dataset, run)
    (folder / stage).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / stage / f"{shard}.jsonl", settled_content(lines))
    if stage == "events":
        return
    with locked(folder / "captions.lock", f"captions of {run!r} are being written by another process"):
        write_captions(dataset, run, shard, _caption_records(dataset, run, shard))
        if set(finished_shards(dataset / FRAMES_FOLDER)) <= settled_shards(dataset, run, stage):
            write_run(dataset, run, CAPTIONS_MADE_BY)


class _Labeling:
    """One run of one stage by one task."""

    def __init__(self, dataset: Path, run: str, stage: Stage, vlms: list[Vlm], policy: Policy, writer: str):
        self.dataset, self.run, self.stage = dataset, run, stage
        self.vlms, self.policy, self.writer = vlms, policy, writer
        self.counts: Counter[str] = Counter()  # of clips, by status
        self.unsettled: list[str] = []  # why clips stay without labels
        self.usd = 0.0  # of this run
        self.ledgers: set[ShardLedger] = set()
        self._clip_places = asyncio.Semaphore(policy.limits.in_flight)
        self._shard_places = asyncio.Semaphore(NUM_OPEN_SHARDS)

    async def label(self, shards: list[str]) -> None:
        async with asyncio.TaskGroup() as group:
            for shard in shards:
                await self._shard_places.acquire()
                if self.policy.ending is not None:
                    break
                group.create_task(self._label_shard(shard))

    async def keep_synced(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for ledger in list(self.ledgers):
                try:
                    await asyncio.to_thread(ledger.sync)
                except OSError as error:
                    self.policy.end(error)

    async def _label_shard(self, shard: str) -> None:
        ledger = ShardLedger(labels_folder(self.dataset, self.run), self.stage.name, shard, self.writer)
        self.ledgers.add(ledger)
        asking = _Asking(self, ledger)
        tasks: dict[str, asyncio.Task[dict | None]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                whole = await self._begin_clips(shard, asking, group, tasks)
            lines = {key: task.result() for key, task in tasks.items()}
            await asking.finish()
            if whole and None not in lines.values():
                ledger.sync()
                write_shard(self.dataset, self.run, self.stage.name, shard, lines)
        except (OSError, ValueError) as error:
            self.policy.end(error)
        except asyncio.CancelledError:
            await asking.abandon()
            raise
        finally:
            self.ledgers.discard(ledger)
            ledger.close()
            self._shard_places.release()

    async def _begin_clips(
        self, shard: str, asking: "_Asking", group: asyncio.TaskGroup, tasks: dict[str, asyncio.Task]
    ) -> bool:
        """Starts as many clips at a time as requests may be in flight; whether all of the shard were."""
        try:
            clips = clips_of_shard(self.dataset, self.run, self.stage.name, shard)
            while (clip := await asyncio.to_thread(next, clips, None)) is not None:
                await self._clip_places.acquire()
                if self.policy.ending is not None:
                    self._clip_places.release()
                    return False
                tasks[clip.key] = group.create_task(self._label_clip(clip, asking))
        except (OSError, ValueError) as error:  # a damaged shard; the clips that were begun come to their end
            self.policy.end(error)
            return False
        return True

    async def _label_clip(self, clip: LabelClip, asking: "_Asking") -> dict | None:
        """The clip's line; None where it has none yet."""
        settled: list[Settled] = []

        async def ask(request: VlmRequest, check: Check) -> Settled:
            settled.append(await asking(request, check))
            return settled[-1]

        try:
            line = await self.stage.label(clip, ask)
        except Ended:
            return None
        except Unsettled as error:
            self.unsettled.append(str(error))
            return None
        except OSError as error:  # a full disk, say: no fault of the clip
            self.policy.end(error)
            return None
        except Exception as error:  # whatever a clip makes a stage stumble over, the others go on
            log.exception("clip %s: the stage %s failed", clip.key, self.stage.name)
            self.policy.count("labeler_failed")
            line = _broken_line(error, settled)
        finally:
            self._clip_places.release()
        self.counts[line["status"]] += 1
        return line


class _Asking:
    """Questions of the clips of one shard. What was sent comes back into the ledger, whoever still waits."""

    def __init__(self, labeling: _Labeling, ledger: ShardLedger):
        self.labeling, self.ledger = labeling, ledger
        self._sending: set[asyncio.Task[LedgerLine]] = set()
        self._one_at_a_time: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __call__(self, request: VlmRequest, check: Check) -> Settled:
        settled = await settle(request, check, self._reply, len(self.labeling.vlms))
        errors = [finding.code for finding in settled.findings if finding.severity == ERROR]
        self.labeling.policy.count("" if settled.status == "ok" else errors[0])
        return settled

    async def finish(self) -> None:
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def abandon(self) -> None:
        for task in self._sending:
            task.cancel()
        await self.finish()

    async def _reply(self, number: int, request: VlmRequest) -> LedgerLine:
        vlm, stage = self.labeling.vlms[number], self.labeling.stage
        key = request_key(stage.name, stage.prompts, vlm.identity, request)
        async with self._one_at_a_time[key]:  # two clips of the same frames are one question
            if (line := self.ledger.answer(key)) is not None:
                return line
            task = asyncio.create_task(self._send(vlm, request, key))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
            return await asyncio.shield(task)

    async def _send(self, vlm: Vlm, request: VlmRequest, key: str) -> LedgerLine:
        """The reply that settles the request; Unsettled where none of several tries brings one."""
        policy, most = self.labeling.policy, vlm.estimate(request)
        for num_tries in range(1, MAX_TRIES + 1):
            failures = [line for line in self.ledger.failures(key) if line.status == "transient"]
            if len(failures) >= MAX_FAILURES:
                return failures[-1]
            async with policy.sending(most, vlm.usd(most)) as reservation:
                attempt = self.ledger.begin(key, request.name, reservation.usd)
                started, before = time.time(), time.perf_counter()
                reply = await vlm.ask(request)
                line = LedgerLine(
                    key=key,
                    request=request.name,
                    clip=request.name.split("/")[0],
                    stage=self.labeling.stage.name,
                    attempt=attempt,
                    status=reply.status,
                    finish=reply.finish,
                    text=reply.text,
                    usage=reply.usage,
                    usd=vlm.usd(reply.usage),
                    model_version=reply.model_version,
                    started=round(started, 3),
                    seconds=round(time.perf_counter() - before, 3),
                    writer=self.labeling.writer,
                    detail=reply.detail,
                )
                self.ledger.end(line)
                reservation.settle(reply, line.usd)
            self.labeling.usd += line.usd
            if policy.ending is not None and line.status in ("transient", "fatal"):
                raise Ended
            if line.status != "transient":
                return line
            await policy.back_off(num_tries, reply.retry_after_s)
        policy.count("transient")
        raise Unsettled(f"{request.name}: {line.finish}, {line.detail}")


async def _label(config: LabelingConfig, stage: Stage, shards: list[str], script: Script | None) -> None:
    dataset, folder = Path(config.dataset), labels_folder(Path(config.dataset), config.run)
    vlms = _open(config, script)
    try:
        num_tasks = begin_stage(
            dataset, config.run, stage.name, _record(config, stage, vlms), _num_tasks(config)
        )
        task = _task(config, num_tasks)
        own = shards_of_task(shards, task, num_tasks)
        settled = settled_shards(dataset, config.run, stage.name)
        missing = [shard for shard in own if shard not in settled]
        _check_earlier(dataset, config.run, stage.name, missing)
        if not missing:
            print(f"nothing to do: {len(own)} shards are of task {task}, all with {stage.name} labels")
        busy = f"task {task} of run {config.run!r} is running already"
        with locked(folder / "tasks" / f"{stage.name}.{task}.lock", busy):
            spent = count_money(folder, stage.name, own) if config.max_usd is not None else None
            policy = Policy(
                _limits(config, num_tasks), spent_usd=spent.usd + spent.in_doubt_usd if spent else 0.0
            )
            writer = f"t{task:04d}-{secrets.token_hex(4)}"
            labeling = _Labeling(dataset, config.run, stage, vlms, policy, writer)
            await _run_until_ended(labeling, missing, len(own), config.grace_s)
    finally:
        for vlm in vlms:
            await vlm.close()
    if policy.ending is not None:
        raise policy.ending
    if labeling.unsettled:
        raise Stopped(
            f"{len(labeling.unsettled)} clips got no answer within {MAX_TRIES} tries: start again, what was "
            f"answered is kept ({labeling.unsettled[0]})"
        )


async def _run_until_ended(labeling: _Labeling, shards: list[str], num_own: int, grace_s: float) -> None:
    """Labels until all is done, or until the policy ends the run and what was in flight has come back."""
    loop, policy = asyncio.get_running_loop(), labeling.policy
    with ExitStack() as stack:
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, policy.end, Stopped(f"{number.name}: what was answered is kept"))
            stack.callback(loop.remove_signal_handler, number)
        helpers = [
            asyncio.create_task(labeling.keep_synced()),
            asyncio.create_task(_report(labeling, shards, num_own)),
        ]
        work, ended = asyncio.create_task(labeling.label(shards)), asyncio.create_task(policy.ended())
        await asyncio.wait((work, ended), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await asyncio.wait((work,), timeout=grace_s)
        for task in (work, ended, *helpers):
            task.cancel()
        await asyncio.gather(work, ended, *helpers, return_exceptions=True)
    if not work.cancelled() and work.exception() is not None and policy.ending is None:
        raise work.exception()


async def _report(labeling: _Labeling, shards: list[str], num_own: int) -> None:
    """A bar on a terminal; elsewhere one JSON line now and then."""
    frames = labeling.dataset / FRAMES_FOLDER
    total = sum(read_marker(frames, shard).num_clips for shard in shards)
    done = num_own - len(shards)
    if done:
        log.info("%s: %d of %d shards are settled already", labeling.stage.name, done, num_own)
    with tqdm(total=total, desc=labeling.stage.name, unit="clip", disable=None) as bar:
        reported, begun = time.monotonic(), time.monotonic()
        try:
            while True:
                await asyncio.sleep(0.5)
                bar.set_postfix_str(_progress(labeling), refresh=False)
                bar.update(labeling.counts.total() - bar.n)
                if bar.disable and time.monotonic() - reported >= REPORT_S:
                    reported = time.monotonic()
                    _print_progress(labeling, total, reported - begun)
        finally:
            bar.update(labeling.counts.total() - bar.n)
            if bar.disable and total:
                _print_progress(labeling, total, time.monotonic() - begun)


def _progress(labeling: _Labeling) -> str:
    others = {name: number for name, number in sorted(labeling.counts.items()) if name != "ok"}
    words = [f"{number} {name}" for name, number in others.items()]
    concurrency = labeling.policy.concurrency
    return ", ".join([f"{labeling.usd:.2f} USD", *words, f"{concurrency.in_flight} in flight"])


def _print_progress(labeling: _Labeling, total: int, seconds: float) -> None:
    done = labeling.counts.total()
    record = {
        "stage": labeling.stage.name,
        "clips": done,
        "of": total,
        **dict(sorted(labeling.counts.items())),
        "unsettled": len(labeling.unsettled),
        "usd": round(labeling.usd, 4),
        "in_flight": labeling.policy.concurrency.in_flight,
        "seconds": round(seconds),
        "seconds_left": round(seconds * (total - done) / done) if done else None,
        **({"last_failure": labeling.policy.last_failure} if labeling.policy.last_failure else {}),
    }
    print(json.dumps(record), file=sys.stderr, flush=True)


async def _resettle(dataset: Path, run: str, stage: Stage, identities: list[str], shards: list[str]) -> None:
    settled = settled_shards(dataset, run, stage.name)
    for shard in tqdm(
        [shard for shard in shards if shard in settled], desc=stage.name, unit="shard", disable=None
    ):
        ledger = ShardLedger(labels_folder(dataset, run), stage.name, shard, "none")  # nothing is written
        ask = ask_ledger(ledger, stage.name, stage.prompts, identities)
        before = {line.pop("key"): line for line in label_lines(dataset, run, stage.name, shard)}
        lines = {}
        for clip in clips_of_shard(dataset, run, stage.name, shard):
            line = await stage.label(clip, ask)
            lines[clip.key] = before[clip.key] if _was_not_asked(line) else line
        write_shard(dataset, run, stage.name, shard, lines)


async def _print_estimate(
    config: LabelingConfig, stage: Stage, shards: list[str], script: Script | None
) -> None:
    """What the whole dataset would take at most, from the first clips of shards spread over it."""
    names = {one.api_key_env for one in (config.vlm, *config.fallback) if one.api_key_env}
    absent = names - os.environ.keys()
    os.environ |= dict.fromkeys(absent, "dry-run")  # nothing is sent, so any key will do
    try:
        vlms = _open(config, script)
    finally:
        for name in absent:
            del os.environ[name]
    sampled = Sampled(vlms[0])
    dataset, frames = Path(config.dataset), Path(config.dataset) / FRAMES_FOLDER
    chosen = shards[:: max(1, len(shards) // NUM_SAMPLED)][:NUM_SAMPLED]
    _check_earlier(dataset, config.run, stage.name, chosen)
    num_clips = 0
    for shard in chosen:
        per_shard = -(-NUM_SAMPLED // len(chosen))
        for clip in islice(clips_of_shard(dataset, config.run, stage.name, shard), per_shard):
            await stage.label(clip, sampled.ask)
            num_clips += 1
    for vlm in vlms:
        await vlm.close()
    total = sum(read_marker(frames, shard).num_clips for shard in shards)
    in_flight = config.in_flight * (_num_tasks(config) or 1)
    print(f"{stage.name}: {total} clips, estimated from {num_clips}; nothing was sent")
    print("\n".join(describe_estimate(sampled, total / num_clips, config.vlm, _limits(config, 1), in_flight)))


def _open(config: LabelingConfig, script: Script | None) -> list[Vlm]:
    if script is None and config.script == "story_world":
        from data_pipeline.labeling.exact_labeler import (
            exact_script,
        )  # it draws its truth from a whole dataset

        script = exact_script(Path(config.dataset))
    return [open_vlm(one, script=script) for one in (config.vlm, *config.fallback)]


def _record(config: LabelingConfig, stage: Stage, vlms: list[Vlm]) -> StageRecord:
    names = (
        "in_flight",
        "requests_per_minute",
        "tokens_per_minute",
        "usd_per_10min",
        "max_usd",
        "max_failures",
    )
    return StageRecord(
        identity=vlms[0].identity,
        fallback=[vlm.identity for vlm in vlms[1:]],
        prompts=stage.prompts | {REPAIR_ID: REPAIR_PROMPT},
        asked_with=stage.settings,
        prices=[
            {
                "model": one.model,
                "input_usd_per_million": one.input_usd_per_million,
                "output_usd_per_million": one.output_usd_per_million,
                "price_date": one.price_date,
            }
            for one in (config.vlm, *config.fallback)
        ],
        settings={name: getattr(config, name) for name in names},
    )


def _num_tasks(config: LabelingConfig) -> int | None:
    """What the command says; an array's own count is only taken where the run is new."""
    if config.num_tasks is not None:
        return config.num_tasks
    if (labels_folder(Path(config.dataset), config.run) / "run.json").exists():
        return read_run(Path(config.dataset), config.run)["num_tasks"]
    return int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))


def _task(config: LabelingConfig, num_tasks: int) -> int:
    given = os.environ.get("SLURM_ARRAY_TASK_ID") if config.task is None else config.task
    if given is None and num_tasks > 1:
        raise ValueError(
            f"run {config.run!r} is divided among {num_tasks} tasks: say which with task=0..{num_tasks - 1}"
        )
    task = int(given or 0)
    if not 0 <= task < num_tasks:
        raise ValueError(
            f"task is {task}, expected 0 to {num_tasks - 1} (run {config.run!r}; arrays begin at 0)"
        )
    return task


def _limits(config: LabelingConfig, num_tasks: int) -> Limits:
    def share(limit: float | None) -> float | None:
        return None if limit is None else limit / num_tasks

    return Limits(
        in_flight=config.in_flight,
        requests_per_minute=share(config.requests_per_minute),
        tokens_per_minute=share(config.tokens_per_minute),
        usd_per_10min=share(config.usd_per_10min),
        max_usd=share(config.max_usd),
        max_failures=config.max_failures,
        back_off_s=config.back_off_s,
    )


def _check_earlier(dataset: Path, run: str, stage: str, shards: list[str]) -> None:
    before = EARLIER_STAGE.get(stage)
    if before and (unsettled := sorted(set(shards) - settled_shards(dataset, run, before))):
        raise ValueError(
            f"{len(unsettled)} shards have no {before} labels in run {run!r}, first {unsettled[0]}: "
            f"label {before} first"
        )


def _was_not_asked(line: dict) -> bool:
    return any(finding["code"] == "not_asked" for finding in line["findings"])


def _broken_line(error: Exception, settled: list[Settled]) -> dict:
    usage, usd, num_requests = VlmUsage(), 0.0, 0
    for one in settled:
        usage, usd, num_requests = usage + one.usage, usd + one.usd, num_requests + one.num_requests
    finding = Finding("labeler_failed", ERROR, f"{type(error).__name__}: {str(error)[:200]}")
    return {
        "status": "quarantined",
        "findings": [vars(finding)],
        "usage": vars(usage),
        "usd": usd,
        "num_requests": num_requests,
    }


def _caption_records(dataset: Path, run: str, shard: str) -> list[CaptionRecord]:
    """Captions of both kinds, of the clips that are good enough to have them."""
    captions = {line["key"]: line["global_caption"] for line in _good_lines(dataset, run, "global", shard)}
    stories = {
        line["key"]: Story.from_dict(line["story"]) for line in _good_lines(dataset, run, "story", shard)
    }
    return [
        CaptionRecord(key, captions.get(key, ""), stories.get(key))
        for key in sorted(captions.keys() | stories.keys())
    ]


def _good_lines(dataset: Path, run: str, stage: str, shard: str) -> list[dict]:
    return [line for line in label_lines(dataset, run, stage, shard) if line["status"] in ("ok", "warned")]
