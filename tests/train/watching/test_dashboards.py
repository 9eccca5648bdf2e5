import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.watching.dashboards import TensorBoard

ROOT = Path(__file__).parents[3]

WANDB = """
import sys, time
from pathlib import Path
from PIL import Image
from train.watching.dashboards import Wandb

start = time.monotonic()
wandb = Wandb(Path(sys.argv[1]), {}, init_s=2, finish_s=2)
wandb.log({"train/loss": 1.0}, 1)
wandb.show("sample", [Image.new("RGB", (9, 9))], ["a story"], 2)
print(time.monotonic() - start)
wandb.close()
"""


def log_with_wandb(folder: Path, **environ: str) -> subprocess.CompletedProcess:
    """In a process of its own, whose end waits for what wandb leaves running."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", WANDB, str(folder)],
        cwd=ROOT, env=clean | environ, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_wandb_whose_server_never_answers_holds_no_step_and_is_kept_offline(tmp_path):
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(64)
    held = []
    threading.Thread(target=lambda: [held.append(server.accept()) for _ in range(64)], daemon=True).start()
    start = time.monotonic()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = log_with_wandb(tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    assert float(done.stdout) < 1
    assert time.monotonic() - start < 40
    assert "this run is kept offline" in done.stderr and held
    assert [path.stat().st_size > 500 for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [True]


@pytest.mark.slow
def test_wandb_without_a_key_asks_nobody_and_goes_on_under_the_same_id(tmp_path):
    for _ in range(2):
        log_with_wandb(tmp_path)
    names = {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert names == {f"run-{(tmp_path / 'wandb' / 'run_id').read_text()}.wandb"}


def test_tensorboard_shows_no_step_twice_when_a_run_goes_on(tmp_path):
    for first_step, loss in ((0, 1.0), (3, 2.0)):
        board = TensorBoard(tmp_path, first_step)
        for step in range(first_step + 1, 6):
            board.log({"train/loss": loss}, step)
        board.show("sample", [Image.new("RGB", (9, 9))], ["a story"], 5)
        board.close()
        time.sleep(1.1)  # event files are sorted by the second in their names
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert events.Tags()["images"] == ["sample/1"]
