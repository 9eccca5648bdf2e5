"""A stop signal sets a flag, whenever it comes, and nothing else happens to the process."""

import os
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from train.processes.stop_signals import STOP_SIGNALS, StopFlag, ignore_stop_signals, keep_handlers


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_only_a_second_ctrl_c_ends_the_process_past_all_that_catch_interrupts(tmp_path):
    code = """if True:
        import os, signal, sys
        from train.processes.stop_signals import StopFlag
        with StopFlag() as stop:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
            print(stop.received.name, flush=True)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:  # Lightning's Trainer.fit: it would be status 1
                sys.exit(1)
    """
    environment = os.environ | {"STORYANCHORS_VERDICTS": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (75, "SIGTERM\n")
    assert "\nstopped: a second Ctrl-C; the same command goes on" in ended.stderr
    [verdict] = tmp_path.iterdir()
    assert verdict.read_text().startswith("75 stopped: a second Ctrl-C")


def test_what_came_while_the_command_was_importing_is_not_forgotten():
    with StopFlag():
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopFlag() as stop:
            assert stop.received == signal.SIGUSR1
    with StopFlag() as stop:
        assert stop.received is None


def test_run_stage_survives_a_signal_before_torch_is_there():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "train/run_stage.py", "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    imported = []
    for line in process.stderr:
        imported.append(line.rpartition("|")[2].strip())
        if imported[-1] == "train.processes.stop_signals":
            time.sleep(0.2)  # from the import to the handlers
            process.send_signal(signal.SIGUSR1)
        if line.startswith("SIGUSR1: stopping"):
            break
    assert "train.processes.stop_signals" in imported and "torch" not in imported
    assert process.poll() is None
    process.kill()
    process.communicate()


class Listener(L.LightningModule):
    def training_step(self, batch):
        self.seen = signal.getsignal(signal.SIGTERM)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_puts_no_handler_of_its_own_over_ours():
    module = Listener()
    module.layer = torch.nn.Linear(1, 1)
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    keep_handlers(trainer)
    with StopFlag() as stop:
        trainer.fit(module, DataLoader(torch.zeros(1, 1)))
    assert module.seen == stop._receive


def test_workers_ignore_stop_signals():
    code = "from train.processes.stop_signals import *; import os; ignore_stop_signals(); "
    code += "[os.kill(os.getpid(), number) for number in STOP_SIGNALS]; print('alive')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "alive\n"
    assert ignore_stop_signals.__module__ == "train.processes.stop_signals"
