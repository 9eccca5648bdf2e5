"""Two stages of a small ZeRO-2 run on two processes, killed with SIGKILL at random moments; then audited.

The same command is started again and again: first stage, then the second one from its weights. What the
disturbed run has logged, line by line and before every restart, is compared with an undisturbed one.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train.saving.checkpoints import MANIFEST

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
STEPS, CLIPS_PER_BATCH = 40, 4  # of each stage; with 20 clips these are 8 whole epochs in 10 whole windows
SETTINGS = [
    "model.num_layers=1", "model.num_attention_heads=2", "model.attention_head_dim=16", "model.ffn_dim=64",
    "model.pca_frames=32", f"data.clips_per_batch={CLIPS_PER_BATCH}", "data.num_workers=0",
    "data.holdout=0.0", "data.log_keys=true", "samples.every_n_steps=0", "log_every_n_steps=1",
    f"stage.steps={STEPS}", "optimizer.warmup_steps=5", "checkpoint.every_n_steps=5", "strategy=zero2",
    "trainer.accelerator=cpu", "trainer.devices=2", "trainer.enable_progress_bar=false",
    "collective_timeout_s=120",
]  # fmt: skip
STAGES = ("multi_event", "continuation")
PHASES = ("start", "step", "save", "hand-over")
VICTIMS = ("rank 0", "rank 1", "both ranks", "rank 0, then the rest", "rank 1, then the rest")
THE_REST_AFTER_S = 1  # as a scheduler ends a job that has lost a process
MUST_END_S = 60  # what a survivor may take to notice


@dataclass
class Kill:
    phase: str
    victim: str
    stage: str
    step: int  # the last one that was logged
    survivor_s: float  # until no process was left, where the survivor was left alone


@dataclass
class Audit:
    """What was seen of all rounds; faults are what must not be, in words."""

    kills: list[Kill] = field(default_factory=list)
    rounds: int = 0
    starts: int = 0
    replayed: int = 0  # lines of steps that were trained again from a checkpoint
    compared: int = 0  # lines of keys and losses
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def counts(self, name: str) -> Counter:
        return Counter(getattr(kill, name) for kill in self.kills)


class TwoStages:
    """The folders and the command of one pair of stages."""

    def __init__(self, folder: Path, dataset: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        run = f"{sys.executable} train/run_stage.py data.dataset={dataset} {' '.join(SETTINGS)}"
        first, second = (f"{run} stage={stage} run_dir={folder / stage}" for stage in STAGES)
        self.command = f"{first} && {second} init_from={folder / STAGES[0]}"

    def start(self) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                ["bash", "-c", self.command],
                cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def stage(self) -> str:
        """The one that is in progress."""
        return STAGES[(self.folder / STAGES[0] / "checkpoints" / f"step_{STEPS:08d}").exists()]

    def step(self) -> int:
        """The last one of the present stage that is in metrics.jsonl."""
        steps = self.losses(self.stage())
        return max(steps, default=0)

    def is_done(self) -> bool:
        return (self.folder / STAGES[1] / "checkpoints" / f"step_{STEPS:08d}").exists()

    def is_saving(self) -> bool:
        return any((self.folder / self.stage() / "checkpoints").glob(".step_*.tmp"))

    def losses(self, stage: str) -> dict[int, tuple]:
        lines = _lines(self.folder / stage / "metrics.jsonl")
        numbers = ("train/loss", "train/grad_norm", "train/lr")
        return {line["step"]: tuple(line.get(name) for name in numbers) for line in lines}

    def keys(self, stage: str) -> dict[tuple[int, int], list]:
        """The clips by (rank, step)."""
        paths = sorted((self.folder / stage / "keys").glob("rank_*.jsonl"))
        return {
            (rank, line["step"]): line["clips"] for rank, path in enumerate(paths) for line in _lines(path)
        }

    def files(self, stage: str) -> dict:
        """Size and hash of everything in the last checkpoint."""
        folder = self.folder / stage / "checkpoints" / f"step_{STEPS:08d}"
        return json.loads((folder / MANIFEST).read_text())["files"]


def run_undisturbed(folder: Path, dataset: Path) -> TwoStages:
    stages = TwoStages(folder, dataset)
    status = stages.start().wait(timeout=600)
    assert status == 0, (folder / "log.txt").read_text()[-2000:]
    return stages


def kill_often(folder: Path, dataset: Path, num_kills: int, seed: int) -> Audit:
    """Rounds of the two stages until there were so many kills; each round is compared at its end."""
    chance, audit, begin = random.Random(seed), Audit(), time.monotonic()
    whole = run_undisturbed(folder / "undisturbed", dataset)
    audit.faults += _epoch_faults(whole)
    startup_s = (time.monotonic() - begin) / 3
    while len(audit.kills) < num_kills:
        audit.rounds += 1
        stages = TwoStages(folder / f"round_{audit.rounds}", dataset)
        while not stages.is_done():
            audit.starts += 1
            process = stages.start()
            if len(audit.kills) < num_kills and _wait_for_a_moment(stages, process, chance, startup_s, audit):
                _compare_lines(stages, whole, audit)
            elif (status := process.wait(timeout=600)) != 0:
                audit.faults.append(f"round {audit.rounds}: status {status} without a kill")
                audit.seconds = time.monotonic() - begin
                return audit
        _compare_ends(stages, whole, audit)
    audit.seconds = time.monotonic() - begin
    return audit


def _wait_for_a_moment(
    stages: TwoStages, process: subprocess.Popen, chance: random.Random, startup_s: float, audit: Audit
) -> bool:
    """Kills at a random moment of a random phase; False when the command ended before."""
    victim = chance.choice(VICTIMS)
    begun, first = stages.stage(), stages.step()
    if begun == STAGES[1] and first == 0:
        phase = "hand-over"
        moments = _at_time(chance.uniform(0, 2 * startup_s))
    else:
        phase = chance.choice(PHASES[: 4 if begun == STAGES[0] and first > STEPS // 2 else 3])
        moments = {
            "start": lambda: _at_time(chance.uniform(0, startup_s)),
            "step": lambda: _at_step(stages, begun, first + chance.randint(1, 12)),
            "save": lambda: _at_save(stages, chance.randint(1, 2)),
            "hand-over": lambda: _after_stage(stages, begun),
        }[phase]()
    for _ in moments:
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    delay = {"start": 0, "step": 0.1, "save": 0.03, "hand-over": 1.5 * startup_s if begun == STAGES[0] else 0}
    time.sleep(chance.uniform(0, delay[phase]))
    pids = _ranks(process.pid)
    rank = victim.partition(",")[0]
    chosen = [pid for number, pid in pids.items() if rank in (f"rank {number}", "both ranks")]
    chosen = chosen or list(pids.values())
    if not chosen:  # between two commands, or before the first: the shell itself
        victim, chosen = "the command", [process.pid]
    stage, step, begin = stages.stage(), stages.step(), time.monotonic()
    for pid in chosen:
        _signal(pid)
    left_alone = victim in ("rank 0", "rank 1")
    patience_s = MUST_END_S if left_alone else THE_REST_AFTER_S
    while (left := _session(process.pid)) and time.monotonic() - begin < patience_s:
        process.poll()
        time.sleep(0.01)
    survivor_s = time.monotonic() - begin if left_alone else 0.0
    if left and left_alone:
        audit.faults.append(f"{phase}, {victim}: {len(left)} processes were left after {MUST_END_S} s")
    for pid in left:
        _signal(pid)
    process.wait()
    audit.kills.append(Kill(phase, victim, stage, step, survivor_s))
    log.info("kill %d: %s during %s, %s after step %d", len(audit.kills), victim, phase, stage, step)
    return True


def _at_time(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        yield


def _at_step(stages: TwoStages, stage: str, step: int) -> Iterator[None]:
    while stages.stage() == stage and stages.step() < min(step, STEPS):
        yield


def _at_save(stages: TwoStages, count: int) -> Iterator[None]:
    """Until the save has begun that is the count-th from now on."""
    was_saving = True  # what an earlier kill has left is not ours
    while count:
        is_saving = stages.is_saving()
        count -= is_saving and not was_saving
        was_saving = is_saving
        yield


def _after_stage(stages: TwoStages, stage: str) -> Iterator[None]:
    while stages.stage() == stage:
        yield


def _compare_lines(stages: TwoStages, whole: TwoStages, audit: Audit) -> None:
    """What a killed run has logged, also of steps beyond its newest checkpoint."""
    for stage in STAGES:
        for name in ("keys", "losses"):
            found, expected = getattr(stages, name)(stage), getattr(whole, name)(stage)
            audit.compared += len(found)
            wrong = [at for at, line in found.items() if line != expected.get(at)]
            if wrong:
                audit.faults.append(f"round {audit.rounds}, {stage}: other {name} at {wrong[:3]}")
    saved = max(
        (int(p.name[5:]) for p in stages.folder.glob(f"{stages.stage()}/checkpoints/step_*")), default=0
    )
    audit.replayed += max(0, stages.step() - saved)


def _compare_ends(stages: TwoStages, whole: TwoStages, audit: Audit) -> None:
    for stage in STAGES:
        for name in ("keys", "losses", "files"):
            found, expected = getattr(stages, name)(stage), getattr(whole, name)(stage)
            audit.compared += len(found) if name != "files" else 0
            if found != expected:
                wrong = [at for at in expected if found.get(at) != expected[at]]
                audit.faults.append(f"round {audit.rounds}, {stage}: {name} differ at the end: {wrong[:3]}")
        stray = [path.name for path in (stages.folder / stage / "checkpoints").glob(".*")]
        if stray:
            audit.faults.append(f"round {audit.rounds}, {stage}: stray files {stray}")
    audit.faults += _epoch_faults(stages)


def _epoch_faults(stages: TwoStages) -> list[str]:
    """Every clip exactly once in every epoch."""
    faults = []
    for stage in STAGES:
        seen = Counter(tuple(clip) for clips in stages.keys(stage).values() for clip in clips)
        twice = [clip for clip, count in seen.items() if count > 1]
        epochs = Counter(epoch for epoch, _ in seen)
        if twice or len(set(epochs.values())) != 1:
            faults.append(
                f"{stages.folder.name}, {stage}: clips twice {twice[:3]}, clips by epoch {dict(epochs)}"
            )
        if sum(seen.values()) != STEPS * CLIPS_PER_BATCH:
            faults.append(f"{stages.folder.name}, {stage}: {sum(seen.values())} clips")
    return faults


def _lines(path: Path) -> list[dict]:
    """The whole lines of a JSON lines file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _session(leader: int) -> list[int]:
    """The processes of a session that are not yet dead."""
    alive = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                alive += [int(entry.name)] if state not in "ZX" else []
        except (OSError, ProcessLookupError):
            continue
    return alive


def _ranks(leader: int) -> dict[int, int]:
    """The process of each rank."""
    ranks = {}
    for pid in sorted(_session(leader)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[1:2] and command[1].endswith(b"train/run_stage.py"):
            ranks.setdefault(int(b"LOCAL_RANK=1" in variables), pid)  # a fork of it has a higher number
    return ranks


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
