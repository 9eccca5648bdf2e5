"""One thing at a time: jobs wait in a line, run in one thread, can be watched and cancelled."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from storyanchors.generator import SamplingStopped
from storyanchors.story import Story

log = logging.getLogger(__name__)

AT_ONCE_S = 0.5  # a job that takes no longer is answered by its result, not by its progress


@dataclass(frozen=True)
class Sketch:
    """A story while it is drawn at: its frames are numbered as they will be."""

    story: Story
    pictures: dict[int, str]  # URLs of the frames that stay
    locked: set[int]


@dataclass(eq=False)
class Job:
    """Something that changes the project or draws; what it shows of itself while it runs."""

    what: str
    work: Callable[["Job"], str]  # does it; returns what to say of it
    renumbers: bool = False  # frames may have other numbers afterwards
    share: float = 0.0  # done, 0 to 1
    sketch: Sketch | None = None  # the story as it will be, once the job draws at it
    previews: dict[int, str] = field(default_factory=dict)  # URLs, by frame number or by variant
    cancelled: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Worker:
    """The line of jobs. say(text, is_error) hears how each of them ended."""

    def __init__(self, say: Callable[[str, bool], None]):
        self.say = say
        self.current: Job | None = None
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="storyboard").start()

    def jobs(self) -> list[Job]:
        """The one that runs, then those that wait."""
        with self._change:
            return [*([self.current] if self.current else []), *self._waiting]

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the line; waits for one that is quick.

        ValueError behind one that may move the frames that it names.
        """
        with self._change:
            if moving := [other.what for other in self.jobs() if other.renumbers]:
                raise ValueError(f"frames may move: wait for '{moving[0]}', or cancel it")
            self._waiting.append(job)
            self._change.notify()
        job.done.wait(AT_ONCE_S)

    def cancel(self) -> None:
        """Ends the job that runs after its present step, and drops those that wait."""
        with self._change:
            for job in [self.current, *self._waiting]:
                if job:
                    job.cancelled = True
            for job in self._waiting:
                job.done.set()
            self._waiting.clear()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting)
                self.current = job = self._waiting.popleft()
            try:
                self.say(job.work(job), False)
            except SamplingStopped:
                self.say(f"cancelled: {job.what}", False)
            except (ValueError, OSError) as error:
                self.say(str(error), True)
            except Exception as error:  # a fault of ours: the person gets a line, the log the rest
                log.exception(job.what)
                self.say(f"a fault of the storyboard: {type(error).__name__}: {error}", True)
            with self._change:
                self.current = None
            job.done.set()
