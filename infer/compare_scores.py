"""Prints score files of score_story_world.py side by side, one column each, the true frames' scores last.

python infer/compare_scores.py scores=[runs/demo/untrained.json,runs/demo/stage1.json]
"""

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from infer.score_story_world import format_table


@dataclass
class CompareScoresConfig:
    scores: list[str] = MISSING


def main(config: CompareScoresConfig) -> None:
    if not config.scores:
        raise ValueError("scores is empty, expected score files of score_story_world.py")
    columns = {}
    for path in map(Path, config.scores):
        scores = _read_scores(path)
        columns[path.stem] = scores["model"]
        columns["truth"] = scores["truth"]
    columns["truth"] = columns.pop("truth")  # last
    shared = [name for name in columns["truth"] if all(name in column for column in columns.values())]
    print(format_table({title: {name: column[name] for name in shared} for title, column in columns.items()}))


def _read_scores(path: Path) -> dict[str, dict[str, float]]:
    try:
        scores = json.loads(path.read_text())["scores"]
        return {"model": scores["model"], "truth": scores["truth"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no score file of score_story_world.py: {error!r}") from error


if __name__ == "__main__":
    run(main, CompareScoresConfig, "compare_scores")
