"""Draws the table of benchmarks/data_plan.py; needs matplotlib, which nothing else here does.

python benchmarks/plot_data_plan.py benchmarks/results/data_plan.txt docs/data_plan.png
"""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

RANKS, CLIPS_PER_RANK = (8, 64, 512), (2, 4, 8)
COLORS = {
    "padded": ("#c4c4c4", "#9a9a9a"),
    "buckets": ("#d9a441",),
    "ours": ("#a9cbe8", "#2f79b9", "#174a7c", "#7a5ea8"),
    "the same": ("#b79ad8",),
}
GOALS = {64: 0.93, 512: 0.92}


def read_table(path: str) -> dict[str, list[float]]:
    """Way of making batches -> nine useful shares, ranks by clips per rank."""
    table = {}
    for line in Path(path).read_text().splitlines():
        if found := re.fullmatch(r"((?:padded|buckets|ours|the same).*?)((?:\s+[01]\.\d{3}){9})", line):
            table[found[1].strip()] = [float(share) for share in found[2].split()]
    return table


def main(table_file: str, picture: str) -> None:
    table = read_table(table_file)
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    for number, (panel, ranks) in enumerate(zip(panels, RANKS, strict=True)):
        for kind, colors in COLORS.items():
            ways = [way for way in table if way.startswith(kind)]
            for way, color in zip(ways, colors, strict=True):
                dashes = ":" if "packs <=" in way or kind == "the same" else "-"
                shares = table[way][3 * number : 3 * number + 3]
                panel.plot(range(3), shares, dashes, marker="o", color=color, linewidth=2, label=way)
        if ranks in GOALS:
            panel.plot([1, 2], [GOALS[ranks]] * 2, color="#b03030", linewidth=1)
        goal = f" (red: the goal, {GOALS[ranks]})" if ranks in GOALS else ""
        panel.set_title(f"{ranks} ranks{goal}", fontsize=11)
        panel.set_xticks(range(3), CLIPS_PER_RANK)
        panel.set_xlabel("clips per rank and step")
        panel.set_ylim(0, 1.03)
        panel.grid(axis="y", color="#e5e5e5")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("useful share (simulated)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
