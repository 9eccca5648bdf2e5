"""Prints the tasks of a labeling run that have shards left, as the list of a Slurm array; else nothing.

python data_pipeline/plan_label_retry.py dataset=DATASET run=NAME labels=events

sbatch --array=$(python data_pipeline/plan_label_retry.py dataset=DATASET run=NAME labels=events) \\
    slurm/label_shards.sbatch label_events dataset=DATASET run=NAME vlm=gemini
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from data_pipeline.labeling.partition import STAGES, missing_tasks, read_run, task_ranges


@dataclass
class PlanLabelRetryConfig:
    dataset: str = MISSING
    run: str = MISSING
    labels: str = MISSING  # global | events | story

    def __post_init__(self):
        if self.labels not in STAGES:
            raise ValueError(f"labels is {self.labels!r}, expected one of {', '.join(STAGES)}")


def main(config: PlanLabelRetryConfig) -> None:
    dataset = Path(config.dataset)
    read_run(dataset, config.run)
    missing = missing_tasks(dataset, config.run, config.labels)
    if missing:
        print(task_ranges(missing))
    else:
        print(f"every shard of {dataset} has its {config.labels} labels in run {config.run}", file=sys.stderr)


if __name__ == "__main__":
    run(main, PlanLabelRetryConfig, "plan_label_retry")
