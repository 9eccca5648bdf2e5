"""Shows how far a labeling run is, what it has cost and which tasks are left; from any shell, at any time.

python data_pipeline/show_label_status.py dataset=DATASET run=NAME
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from data_pipeline.dataset import FRAMES_FOLDER
from data_pipeline.labeling.ledger import Money, count_money
from data_pipeline.labeling.partition import (
    STAGES,
    label_lines,
    labels_folder,
    missing_tasks,
    read_run,
    settled_shards,
    task_ranges,
)
from data_pipeline.shard_reader import finished_shards, read_marker

RECENT_S = 600.0


@dataclass
class ShowLabelStatusConfig:
    dataset: str = MISSING
    run: str = MISSING


def main(config: ShowLabelStatusConfig) -> None:
    for line in describe_run(Path(config.dataset), config.run, now=time.time()):
        print(line)


def describe_run(dataset: Path, run_name: str, *, now: float) -> list[str]:
    """Lines for a person; every ledger is read once, as a stream. ValueError where there is no such run."""
    record, frames = read_run(dataset, run_name), dataset / FRAMES_FOLDER
    shards = finished_shards(frames)
    num_clips = sum(read_marker(frames, shard).num_clips for shard in shards)
    lines = [f"run {run_name}: {num_clips} clips in {len(shards)} shards, {record['num_tasks']} tasks"]
    for stage in (name for name in STAGES if name in record["stages"]):
        lines += _describe_stage(dataset, run_name, stage, shards, num_clips, now)
        if missing := missing_tasks(dataset, run_name, stage):
            lines.append(f"  not done: {len(missing)} tasks, {task_ranges(missing)}")
    return lines


def _describe_stage(
    dataset: Path, run_name: str, stage: str, shards: list[str], num_clips: int, now: float
) -> list[str]:
    settled = settled_shards(dataset, run_name, stage) & set(shards)
    statuses, num_requests = Counter(), 0
    for shard in sorted(settled):
        for line in label_lines(dataset, run_name, stage, shard):
            statuses[line["status"]] += 1
            num_requests += line["num_requests"]
    money = count_money(labels_folder(dataset, run_name), stage, since=now - RECENT_S)
    usage = money.usage
    lines = [
        f"{stage}: {len(settled)} of {len(shards)} shards, {statuses.total()} clips: {_counted(statuses)}",
        f"  requests {money.num_requests}: {_counted(money.statuses)}",
        f"  tokens {usage.input_tokens} in, {usage.output_tokens} out, {usage.thought_tokens} thoughts; "
        f"{money.usd:.4f} USD",
    ]
    if money.in_doubt:
        lines.append(
            f"  without a reply: {len(money.in_doubt)} requests, at most {money.in_doubt_usd:.4f} USD; "
            "in flight, or in doubt since their writer was killed"
        )
    if money.num_recent and len(settled) < len(shards):
        lines.append(_describe_speed(money, statuses.total(), num_requests, num_clips, now))
    return lines


def _describe_speed(money: Money, settled: int, num_requests: int, num_clips: int, now: float) -> str:
    """Hours are told once a shard has shown how many requests a clip takes."""
    begun = max(money.earliest, now - RECENT_S)
    per_second = money.num_recent / max(1.0, money.latest - begun)
    speed = (
        f"  last 10 minutes: {per_second:.2f} answers per second, the last one {now - money.latest:.0f} s ago"
    )
    if not settled:
        return speed
    answered = money.num_requests - money.statuses["transient"] - money.statuses["fatal"]
    left = max(0.0, num_clips * num_requests / settled - answered)
    return f"{speed}; about {left / per_second / 3600:.1f} h left"


def _counted(statuses: Counter[str]) -> str:
    return ", ".join(f"{number} {status}" for status, number in statuses.most_common()) or "none"


if __name__ == "__main__":
    run(main, ShowLabelStatusConfig, "show_label_status")
