"""Where people watch a run: TensorBoard or Weights & Biases. The truth is metrics.jsonl; these may lag.

wandb runs in a thread of its own: however its servers answer, if at all, no step waits for them.
"""

import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

DASHBOARDS = ("none", "tensorboard", "wandb")
INIT_S, FINISH_S = 60, 30  # how long wandb may take to begin, and at the end to send what is left


class Dashboard(Protocol):
    def log(self, numbers: dict[str, float], step: int) -> None: ...
    def show(self, name: str, pictures: Sequence[Image.Image], texts: Sequence[str], step: int) -> None: ...
    def close(self) -> None: ...


def open_dashboard(name: str, run_dir: Path, settings: dict[str, Any], first_step: int) -> Dashboard | None:
    """first_step: what the run goes on from; what an earlier start showed of later steps is replaced."""
    if name == "tensorboard":
        return TensorBoard(run_dir, first_step)
    return Wandb(run_dir, settings) if name == "wandb" else None


class TensorBoard:
    """Event files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow, and only for those who ask for it

        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def show(self, name: str, pictures: Sequence[Image.Image], texts: Sequence[str], step: int) -> None:
        for number, (picture, text) in enumerate(zip(pictures, texts, strict=True), start=1):
            self.writer.add_image(f"{name}/{number}", np.asarray(picture), step, dataformats="HWC")
            self.writer.add_text(f"{name}/{number}", text.replace("\n", "  \n"), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One wandb run for the life of a run folder; offline without WANDB_API_KEY, and it never asks for one.

    When wandb cannot be reached within init_s, the run is kept in run_dir/wandb for `wandb sync`.
    """

    def __init__(
        self, run_dir: Path, settings: dict[str, Any], *, init_s: float = INIT_S, finish_s: float = FINISH_S
    ):
        self.run_dir, self.settings = run_dir, settings
        self.init_s, self.finish_s = init_s, finish_s
        self.calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.calls.put(lambda run: run.log(numbers, step=step))

    def show(self, name: str, pictures: Sequence[Image.Image], texts: Sequence[str], step: int) -> None:
        def send(run: Any) -> None:
            import wandb

            pairs = zip(pictures, texts, strict=True)
            images = [wandb.Image(picture, caption=text) for picture, text in pairs]
            run.log({name: images}, step=step)

        self.calls.put(send)

    def close(self) -> None:
        self.calls.put(None)
        self.thread.join(self.init_s + 2 * self.finish_s)
        if self.thread.is_alive():
            log.warning("wandb has not finished; what it has is in %s", self.run_dir / "wandb")

    def _work(self) -> None:
        # wandb's reports on itself would hold the process at its end where the network hangs
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            run = self._begin()
            while call := self.calls.get():
                call(run)
            run.finish()
        except Exception as error:  # whatever wandb raises, training goes on
            log.warning("wandb stopped: %s: %s; metrics.jsonl goes on", type(error).__name__, error)

    def _begin(self) -> Any:
        import wandb

        arguments = dict(
            id=self._run_id(), name=self.run_dir.resolve().name, project="storyanchors", dir=self.run_dir,
            config=self.settings, resume="allow",
            settings=wandb.Settings(
                init_timeout=self.init_s, finish_timeout=self.finish_s, silent=True, console="off"
            ),
        )  # fmt: skip
        has_key = bool(os.environ.get("WANDB_API_KEY"))
        mode = os.environ.get("WANDB_MODE", "online" if has_key else "offline")
        try:
            return wandb.init(mode=mode, **arguments)
        except wandb.Error as error:
            log.warning("wandb cannot be reached (%s): this run is kept offline", str(error).split("\n")[0])
            wandb.teardown()  # its service still holds the id of the run that did not begin
            return wandb.init(mode="offline", **arguments)

    def _run_id(self) -> str:
        path = self.run_dir / "wandb" / "run_id"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(8))
        return path.read_text()
