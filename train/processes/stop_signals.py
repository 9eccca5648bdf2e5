"""Stopping on purpose: SIGTERM, SIGUSR1 and Ctrl-C set a flag; the step in flight ends, the run saves.

A handler does nothing else: a checkpoint saved inside of one hung, or mixed steps, in 10 of 36 trials.
It is in place before torch is imported, seconds in which a signal would end the process.
"""

import os
import signal
from typing import Any, NoReturn

from conf.verdict import STOPPED, write_verdict

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """As a context: holds the first stop signal received inside; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopFlag":
        self._earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for handler in self._earlier.values():  # one installed while the command was still importing
            if isinstance(flag := getattr(handler, "__self__", None), StopFlag) and flag.received:
                self.received = flag.received
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            # no KeyboardInterrupt: Lightning makes status 1 of it, and kills the other ranks
            _leave("a second Ctrl-C; the same command goes on from the newest checkpoint")
        self.received = signal.Signals(number)
        os.write(2, f"\n{self.received.name}: stopping after this step and its checkpoint\n".encode())


def keep_handlers(trainer: Any) -> None:
    """Lightning's own SIGTERM handler waits for the other ranks inside the handler: it is not registered."""
    trainer._signal_connector.register_signal_handlers = lambda: None


def ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_on_stop_signals() -> None:
    """For a command that has nothing to save: a stop signal ends it at once, to be started again."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave_before)


def _leave_before(number: int, frame: object) -> None:
    _leave(f"{signal.Signals(number).name}, before anything had begun")


def _leave(why: str) -> NoReturn:
    os.write(2, f"\nstopped: {why}\n".encode())  # print may be what the signal has interrupted
    write_verdict(STOPPED, f"stopped: {why}")
    os._exit(STOPPED)
