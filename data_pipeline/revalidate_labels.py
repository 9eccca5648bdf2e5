"""Runs today's checks over the answers in the ledger of a labeling run; nothing is sent, nothing is paid.

python data_pipeline/revalidate_labels.py dataset=DATASET run=NAME

Labels and captions of settled shards are replaced by what the checks now make of the raw answers, and what
has changed is printed. A clip keeps its labels where the ledger has no answer to what would now be asked: a
story of events that the checks have changed, or a ledger that was deleted.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from data_pipeline.labeling.partition import STAGES, label_lines, read_run, settled_shards
from data_pipeline.labeling.runner import Ask, LabelClip, LabelingConfig, Stage, run_stage
from data_pipeline.labeling.stages import reopen_stage


@dataclass
class RevalidateLabelsConfig:
    dataset: str = MISSING
    run: str = MISSING


def main(config: RevalidateLabelsConfig) -> None:
    dataset = Path(config.dataset)
    begun = read_run(dataset, config.run)["stages"]
    for name in (name for name in STAGES if name in begun):  # events before the story that is made of them
        watched = WatchedStage(reopen_stage(dataset, config.run, name))
        before = tally(dataset, config.run, name)
        run_stage(LabelingConfig(config.dataset, config.run), watched, only_ledger=True)
        print("\n".join(describe(name, before, tally(dataset, config.run, name))))
        if watched.num_not_asked:
            print(f"  {watched.num_not_asked} clips keep their labels: what is asked now was never answered")


class WatchedStage:
    """The stage, and the number of clips with a question that the ledger has no answer to."""

    def __init__(self, stage: Stage):
        self.stage, self.name, self.prompts, self.settings = stage, stage.name, stage.prompts, stage.settings
        self.num_not_asked = 0

    async def label(self, clip: LabelClip, ask: Ask) -> dict:
        line = await self.stage.label(clip, ask)
        self.num_not_asked += any(finding["code"] == "not_asked" for finding in line["findings"])
        return line


def tally(dataset: Path, run: str, stage: str) -> Counter[str]:
    """Clips by status, and findings by code."""
    counts: Counter[str] = Counter()
    for shard in sorted(settled_shards(dataset, run, stage)):
        for line in label_lines(dataset, run, stage, shard):
            counts[f"clips {line['status']}"] += 1
            counts.update(f"findings {finding['code']}" for finding in line["findings"])
    return counts


def describe(stage: str, before: Counter[str], after: Counter[str]) -> list[str]:
    """Lines for a person: every count that there is, and from what it changed."""
    lines = [f"{stage}: {sum(count for name, count in after.items() if name.startswith('clips '))} clips"]
    for name in sorted(set(before) | set(after)):
        change = "" if before[name] == after[name] else f", before {before[name]}"
        lines.append(f"  {name}: {after[name]}{change}")
    return lines


if __name__ == "__main__":
    run(main, RevalidateLabelsConfig, "revalidate_labels")
