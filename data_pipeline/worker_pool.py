"""Processes for the tasks of a job: one each where a task may kill its process, else a pool of them."""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
TICK_S = 0.2  # how often a progress bar may move
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_fork = get_context("fork")


def num_workers(asked: int | None) -> int:
    """What a command's workers=... means: None is one per core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


def map_in_order(work: Callable[[Task], Result], tasks: list[Task], *, workers: int) -> Iterator[Result]:
    """Results of trusted work, in the order of the tasks; ChildProcessError where a process was killed."""
    with ProcessPoolExecutor(workers, _fork) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool as error:
            raise ChildProcessError("a worker was killed, perhaps for memory: try fewer workers") from error


@dataclass
class _Running:
    task: object
    process: BaseProcess
    messages: Connection
    deadline: float


def run_isolated(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    *,
    workers: int,
    timeout_s: float,
    tick: Callable[[], None],
) -> Iterator[tuple[Task, str | None]]:
    """A process per task; yields (task, None) as each is done, or (task, why it was not) in words.

    Whatever a task does to its process, the others go on. But an OSError of a task (a full disk, say) ends
    the job: it is raised here. tick() is called every TICK_S.
    """
    waiting = list(reversed(tasks))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_start(work, waiting.pop(), timeout_s))
            wait([one.process.sentinel for one in running], TICK_S)
            tick()
            for one in list(running):
                if one.process.is_alive() and time.monotonic() > one.deadline:
                    one.process.kill()
                    one.process.join()
                    running.remove(one)
                    yield one.task, f"not done after {timeout_s:g} s (timeout_s)"
                elif not one.process.is_alive():
                    running.remove(one)
                    yield one.task, _verdict(one)
    finally:
        for one in running:
            one.process.kill()
            one.process.join()


def _start(work: Callable[[Task], None], task: Task, timeout_s: float) -> _Running:
    messages, theirs = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_run, args=(work, task, theirs, os.getpid()))
    process.start()
    theirs.close()
    return _Running(task, process, messages, time.monotonic() + timeout_s)


def _run(work: Callable[[Task], None], task: Task, messages: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    try:
        work(task)
    except OSError as error:
        messages.send(error)
    except Exception as error:  # whatever one task stumbles over, it is named and the others go on
        log.exception("task %s failed", task)
        messages.send(f"unexpected {type(error).__name__}: {str(error)[:200]}")


def _die_with(parent: int) -> None:
    """A killed job leaves no process behind that would go on writing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _verdict(one: _Running) -> str | None:
    one.process.join()
    try:
        message = one.messages.recv() if one.messages.poll() else None
    except EOFError:
        message = None
    if isinstance(message, OSError):
        raise message
    if message:
        return message
    code = one.process.exitcode
    if code == 0:
        return None
    if code < 0:
        return f"its decoder was ended by {signal.Signals(-code).name}"
    return f"its decoder ended with status {code}"
