"""Steering records -> a table as text, JSON and Markdown, and where the repository keeps them."""

import json
import math
from pathlib import Path

from benchmarks.steering_figure import draw_figure
from benchmarks.steering_tasks import SECTIONS, TASKS

Records = dict[str, dict[str, dict | None]]  # model -> task -> what steering.py wrote
ROOT = Path(__file__).parents[1]
RESULTS, PAGE, FIGURE = "benchmarks/results/steering", "docs/steering.md", "docs/steering.png"
BEGIN, END = "<!-- table: benchmarks/steering.py -->", "<!-- end of table -->"
BASELINES = {"guess": "guessed", "copy": "copied"}
LABELS = {
    "pfa_f1": "F1 of facts",
    "subject_consistency": "subject consistency",
    "scene_accuracy": "scene",
    "event_completeness": "events told",
    "scene_sequence": "stories with all scenes in order",
    "scene_order_tau": "order of scenes, tau",
    "event_order_tau": "order of events, tau",
    "whole_order_tau": "order of the whole story, tau",
    "identity": "identity",
    "identity_shown": "identity with the somebody shown",
    "identity_last_window": "identity in the last window",
    "consistency_within": "consistency within a window",
    "consistency_across": "consistency across windows",
    "locked": "kept frames the same pixels",
    "locked_png": "kept frames the same PNG bytes",
}
GOALS = [  # (what, its score, its tasks, at least); the worst of the tasks counts
    ("edited frame, F1", "pfa_f1", ["edit"], 0.8),
    ("identity seen in a later frame alone", "identity", ["infill"], 0.7),
    ("subject consistency, k = 1 to 5", "subject_consistency", [f"continue_{k}" for k in range(1, 6)], 0.8),
]


def mean_and_error(sums: list[tuple[float, int]]) -> tuple[float, float]:
    """Of a score with this sum and count in every story: the mean, and its standard error between stories."""
    count = sum(number for _, number in sums)
    mean = sum(total for total, _ in sums) / count
    return mean, math.sqrt(sum((total - mean * number) ** 2 for total, number in sums)) / count


def text_table(records: Records) -> str:
    """Every task and score with its standard error, a column per model, those that guess and copy last."""
    models = list(records)
    lines = [" " * 86 + "".join(f"{BASELINES.get(model, model):>17}" for model in models)]
    for section, tasks in SECTIONS.items():
        rows = [row for task in tasks for row in _rows(records, task.name)]
        if rows:
            lines += ["", section]
        for what, label, values in rows:
            cells = "".join(f"{_with_error(value):>17}" for value in values)
            lines.append(f"  {what:<52}{label:<32.32}{cells}")
    return "\n".join(lines)


def _rows(records: Records, task: str) -> list[tuple[str, str, list[tuple[float, float] | None]]]:
    """(what is asked, in the first row alone; a score's name; its mean and error for every model)."""
    rows = []
    for score in TASKS[task].scores:
        values = [
            mean_and_error(record["sums"][score]) if record and score in record["sums"] else None
            for record in (tasks.get(task) for tasks in records.values())
        ]
        if any(value for value in values):
            rows.append(("" if rows else TASKS[task].what, LABELS[score], values))
    return rows


def _with_error(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} +-{value[1]:.3f}"


def markdown_table(records: Records) -> str:
    """The same for docs/, without errors, and which goals were reached."""
    titles = ["", "score", *(BASELINES.get(model, model) for model in records)]
    lines = [_summary(records), "", _line(titles), _line(["---"] * len(titles))]
    for section, tasks in SECTIONS.items():
        rows = [row for task in tasks for row in _rows(records, task.name)]
        if rows:
            lines.append(_line([f"**{section}**", *[""] * (len(titles) - 1)]))
        for what, label, values in rows:
            lines.append(
                _line([what, label, *("-" if value is None else f"{value[0]:.3f}" for value in values)])
            )
    return "\n".join([*lines, "", *_goals(records)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _summary(records: Records) -> str:
    known = [record for tasks in records.values() for record in tasks.values() if record]
    fewest = min(record["num_stories"] for record in known)
    errors = [
        value[1]
        for task in TASKS
        for _, _, values in _rows(records, task)
        for value in values
        if value is not None
    ]
    return (
        f"{fewest} held-out stories per task, drawn frames only; standard errors, between stories, are at "
        f"most {max(errors):.3f} (all of them: [steering.txt](../{RESULTS}.txt))."
    )


def _goals(records: Records) -> list[str]:
    """A line per goal and model that draws: reached or missed, by the worst of its tasks."""
    lines = ["| goal | at least | " + " | ".join(model for model in records if model not in BASELINES) + " |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for what, score, tasks, least in GOALS:
        cells = []
        for model in records:
            found = [records[model].get(task) for task in tasks]
            if model not in BASELINES and all(found):
                worst = min(mean_and_error(record["sums"][score])[0] for record in found)
                cells.append(f"{worst:.3f} {'reached' if worst >= least else '**missed**'}")
            elif model not in BASELINES:
                cells.append("-")
        lines.append(_line([what, f"{least}", *cells]))
    return lines


def as_json(records: Records) -> dict:
    """All scores of all tasks, also those that the tables leave out."""
    content: dict = {"models": {}, "tasks": {}}
    for model, tasks in records.items():
        for task, record in tasks.items():
            if record:
                made = {
                    "num_stories": record["num_stories"],
                    "machine": record["machine"],
                    **record["made_from"],
                }
                made.pop("cases_sha256")
                content["models"].setdefault(model, made)
                scores = content["tasks"].setdefault(task, {"what": TASKS[task].what, "scores": {}})["scores"]
                for score, sums in record["sums"].items():
                    mean, error = mean_and_error(sums)
                    counted = {
                        "mean": round(mean, 4),
                        "error": round(error, 4),
                        "count": sum(n for _, n in sums),
                    }
                    scores.setdefault(score, {})[model] = counted
    return content


def publish(records: Records, out: Path) -> None:
    """Writes results/steering.txt and .json, the table in docs/steering.md between its marks, the picture."""
    (ROOT / f"{RESULTS}.txt").write_text(f"# python benchmarks/steering.py\n{text_table(records)}\n")
    (ROOT / f"{RESULTS}.json").write_text(json.dumps(as_json(records), indent=1) + "\n")
    page = ROOT / PAGE
    page.write_text(with_table(page.read_text(encoding="utf-8"), markdown_table(records)), encoding="utf-8")
    drawing = [model for model in records if model not in BASELINES]
    draw_figure(out, drawing).save(ROOT / FIGURE, optimize=True)


def with_table(page: str, table: str) -> str:
    """A page with the table between its two marks; ValueError where it lacks them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE} lacks {BEGIN!r} or {END!r}")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
