"""Stopping on purpose: SIGTERM, SIGUSR1 and Ctrl-C set a flag; the step in flight ends, the run saves."""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """As a context: holds the first stop signal received inside; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopFlag":
        self._earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS}
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
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        os.write(2, f"\n{self.received.name}: stopping after this step and its checkpoint\n".encode())


def ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
