import json
from pathlib import Path

import pytest

from train.processes.heartbeat import Heartbeat
from train.watching.callbacks import MetricsLog, _lines_up_to


@pytest.fixture
def metrics(tmp_path) -> MetricsLog:
    return MetricsLog(tmp_path, 1, heartbeat=Heartbeat(tmp_path, print))


def test_lines_beyond_the_checkpoint_and_damaged_ones_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\x00\x00\xff\n{"step": 3}\n{"step": 2')
    assert list(_lines_up_to(path, 2)) == ['{"step": 1}\n', '{"step": 2}\n']


def test_a_full_disk_costs_no_line(metrics, tmp_path):
    real, metrics.path = metrics.path, Path("/dev/full")
    metrics.add({"train/loss": 1.0})
    metrics._write(1)
    metrics.path = real
    metrics.added = {"train/loss": float("nan")}
    metrics._write(2)
    lines = [json.loads(line) for line in real.read_text().splitlines()]
    assert lines == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": None}]


def test_a_step_is_measured_whole_and_against_the_peak_that_was_given(train, tmp_path):
    more = ["data.clips_per_batch=4", "data.packs_per_batch=2", "stage.steps=4", "log_every_n_steps=2"]
    run_dir = train(tmp_path / "run", *more, "peak_tflops=1e-3")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/clips"]) for line in lines] == [(2, 8), (4, 16)]
    for line in lines:
        assert line["train/clips_per_s"] * line["train/step_s"] == pytest.approx(4)
        assert 0 < line["train/data_wait_share"] < 1 and 0 < line["train/peak_memory_gib"] < 100
        assert line["train/lr"] == line["train/lr_new_parts"] > 0
        assert line["train/skipped_steps"] == line["train/broken_clips"] == 0
    per_token = [line["train/mfu"] * 1e9 / line["train/tokens_per_s"] for line in lines]
    assert per_token[0] == pytest.approx(per_token[1], rel=0.2)  # captions differ in length
