import json

import pytest

from conf.command import read_config
from train.plot_metrics import PlotMetricsConfig, axis_ticks, main, panels_of, read_curves, smoothed


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3, 3), (0, 0.0021), (10, 6000), (0.2, 7e9), (-3, 4), (0.001, 0.001)]
)
def test_ticks_are_few_and_round_and_hold_all_values(low, high):
    for is_log in (False, True) if low > 0 else (False,):
        ticks = axis_ticks(low, high, is_log)
        assert ticks[0] <= low <= high <= ticks[-1] and ticks[0] < ticks[-1]
        assert 2 <= len(ticks) <= (40 if is_log else 7)


def test_a_smoothed_curve_keeps_the_mean():
    curve = [(step, float(step % 7)) for step in range(700)]
    assert len(smoothed(curve)) == 50
    assert sum(y for _, y in smoothed(curve)) / 50 == pytest.approx(sum(y for _, y in curve) / 700)


@pytest.mark.parametrize("num_lines", [1, 2, 200])
def test_a_picture_of_whatever_a_run_has_logged(tmp_path, num_lines):
    lines = [
        {"step": step, "train/loss": 1.0, "held_out/mask_first": None} for step in range(1, num_lines + 1)
    ]
    lines[-1] |= {"held_out/quantile_0.5": 0.5, "held_out/mask_first": 0.3, "train/tokens_per_s": 1e5}
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 201, "tra'  # while it is written
    (tmp_path / "metrics.jsonl").write_text(text)
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves["held_out/mask_first"] == [(num_lines, 0.3)]
    assert len(panels_of(curves)) == 4
    out = tmp_path / "out.png"
    main(read_config(PlotMetricsConfig, "plot_metrics", [f"run_dir={tmp_path}", f"out={out}"]))
    assert out.stat().st_size > 1000


def test_no_metrics_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        main(PlotMetricsConfig(str(tmp_path), "out.png"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tr\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        main(PlotMetricsConfig(str(tmp_path), "out.png"))
