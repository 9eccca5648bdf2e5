"""Draws a run's metrics.jsonl: losses, held-out losses, speed. Also while it trains.

python train/plot_metrics.py run_dir=runs/s1 out=s1.png
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image, ImageDraw, ImageFont

from conf.command import run

WIDTH_PX, PANEL_PX, LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 1320, 300, 80, 220, 44, 40
PAPER, INK, GRID, FAINT = (252, 251, 248), (28, 28, 32), (228, 226, 220), (196, 206, 218)
COLOURS = [
    (31, 95, 168), (214, 90, 20), (44, 140, 80), (150, 60, 150), (120, 110, 30), (190, 40, 60), (70, 150, 170)
]  # fmt: skip
SMOOTHED = 0.02  # of all points make one of the thick line

Curve = list[tuple[float, float]]  # (step, value)


@dataclass
class PlotMetricsConfig:
    run_dir: str = MISSING
    out: str = MISSING  # a PNG


@dataclass(frozen=True)
class Panel:
    title: str
    curves: dict[str, Curve]
    is_log: bool = False  # else the axis begins at 0
    smooth: bool = False  # the points faintly, their running mean over them


def main(config: PlotMetricsConfig) -> None:
    path = Path(config.run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run_dir is no run folder, or its first line is to come")
    draw_panels(f"{config.run_dir}", panels_of(read_curves(path))).save(config.out)
    print(f"wrote {config.out}")


def read_curves(path: Path) -> dict[str, Curve]:
    """Every number's values by step; ValueError for a line that is no JSON."""
    curves: dict[str, Curve] = {}
    whole_lines = path.read_text().split("\n")[:-1]  # the last one may be half written
    for number, line in enumerate(whole_lines, start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        step = values.pop("step")
        for name, value in values.items():
            if value is not None:
                curves.setdefault(name, []).append((step, value))
    if not any(curves.values()):
        raise ValueError(f"{path} has no numbers yet")
    return curves


def panels_of(curves: dict[str, Curve]) -> list[Panel]:
    def some(prefix: str, *names: str) -> dict[str, Curve]:
        chosen = names or [name for name in curves if name.startswith(prefix)]
        return {name.removeprefix(prefix): curves[name] for name in chosen if name in curves}

    speed = "train/mfu" if "train/mfu" in curves else "train/tokens_per_s"
    panels = [
        Panel("training loss", some("train/", "train/loss"), is_log=True, smooth=True),
        Panel("held-out loss by noise level (quantile of sigma)", some("held_out/quantile_"), is_log=True),
        Panel("held-out loss by given frames", some("held_out/mask_"), is_log=True),
        Panel("gradient norm", some("train/", "train/grad_norm"), is_log=True, smooth=True),
        Panel("MFU" if speed == "train/mfu" else "tokens / s", some("train/", speed), smooth=True),
        Panel("share of time spent waiting for data", some("train/", "train/data_wait_share"), smooth=True),
    ]
    return [panel for panel in panels if panel.curves]


def draw_panels(title: str, panels: Sequence[Panel]) -> Image.Image:
    page = Image.new("RGB", (WIDTH_PX, TOP_PX + PANEL_PX * len(panels)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((LEFT_PX, 12), title, INK, ImageFont.load_default(20))
    last_step = max(step for panel in panels for curve in panel.curves.values() for step, _ in curve)
    first_step = min(step for panel in panels for curve in panel.curves.values() for step, _ in curve)
    for row, panel in enumerate(panels):
        _draw_panel(draw, panel, TOP_PX + row * PANEL_PX, first_step, max(last_step, first_step + 1))
    return page


def _draw_panel(
    draw: ImageDraw.ImageDraw, panel: Panel, top: int, first_step: float, last_step: float
) -> None:
    small, heading = ImageFont.load_default(13), ImageFont.load_default(16)
    height, right = PANEL_PX - BOTTOM_PX - 34, WIDTH_PX - RIGHT_PX
    bottom = top + 30 + height
    values = [value for curve in panel.curves.values() for _, value in curve]
    is_log = panel.is_log and min(values) > 0
    ticks = axis_ticks(min(values) if is_log else min(0, *values), max(values), is_log)
    scale = math.log if is_log else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT_PX + (step - first_step) / (last_step - first_step) * (right - LEFT_PX)
        return x, bottom - (scale(value) - low) / (high - low) * height

    draw.text((LEFT_PX, top + 4), panel.title, INK, heading)
    for tick in ticks:
        y = place(first_step, tick)[1]
        draw.line((LEFT_PX, y, right, y), GRID)
        draw.text((LEFT_PX - 8, y), f"{tick:g}", INK, small, anchor="rm")
    for tick in axis_ticks(first_step, last_step, False):
        x = place(tick, values[0])[0]
        if LEFT_PX <= x <= right:
            draw.line((x, bottom, x, bottom + 4), INK)
            draw.text((x, bottom + 6), f"{tick:g}", INK, small, anchor="ma")
    draw.text((right + 10, bottom), "steps", INK, small, anchor="lm")
    labels = []
    for number, (name, curve) in enumerate(panel.curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        if panel.smooth:
            draw.line([place(*point) for point in curve], FAINT)
        shown = smoothed(curve) if panel.smooth else curve
        points = [place(*point) for point in shown]
        draw.line(points, colour, 2)
        if len(points) < 30:
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        labels.append((points[-1][1], f"{name}  {_number(shown[-1][1])}", colour))
    _draw_labels(draw, labels, right + 10, small)


def _draw_labels(draw: ImageDraw.ImageDraw, labels: list, x: float, font: ImageFont.FreeTypeFont) -> None:
    """Beside the ends of their curves, one below the other where these are close."""
    free = -math.inf
    for y, text, colour in sorted(labels):
        free = max(y, free + 16)
        draw.text((x, free), text, colour, font, anchor="lm")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"


def smoothed(curve: Curve) -> Curve:
    """Means of neighbouring points."""
    size = max(1, round(len(curve) * SMOOTHED))
    groups = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group)) for group in groups]


def axis_ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers from at most low to at least high."""
    if is_log:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        first = max(tick for tick in ticks if tick <= low)
        last = min(tick for tick in ticks if tick >= high)
        return [tick for tick in ticks if first <= tick <= last] if last > first else [first / 2, first * 2]
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    unit *= next(factor for factor in (1, 2, 5, 10) if span / (factor * unit) <= 5)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(number * unit, 12) for number in range(first, max(last, first + 1) + 1)]


if __name__ == "__main__":
    run(main, PlotMetricsConfig, "plot_metrics")
