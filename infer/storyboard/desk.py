"""The project, and the line of jobs that change it: one by one, each on the project as it is by then."""

from collections.abc import Callable
from pathlib import Path

from infer.story_project import StoryProject, is_project
from infer.storyboard.worker import Job, Sketch, Worker
from storyanchors.story_edit import StoryEdit


class Desk:
    """project is None before the first frame is drawn. say(text, is_error) hears how each job ended."""

    def __init__(self, folder: Path, say: Callable[[str, bool], None], first_seed: int):
        self.folder, self.first_seed = folder, first_seed
        self.project: StoryProject | None = None
        self.worker = Worker(say)
        self.refresh()

    def submit(self, job: Job) -> None:
        """Puts a job in the line, see Worker.submit."""
        work = job.work

        def work_on_what_is_there(job: Job) -> str:
            self.refresh()
            try:
                return work(job)
            finally:
                self.refresh()

        job.work = work_on_what_is_there
        self.worker.submit(job)

    def look_again(self) -> None:
        """For a page that is opened: another command may have changed the project."""
        if not self.worker.jobs():
            self.refresh()

    def refresh(self) -> None:
        """Reads the project again."""
        if is_project(self.folder):
            self.project = StoryProject.open(self.folder)

    def new_seeds(self, count: int) -> range:
        """Seeds that drew nothing of this project yet."""
        used = [version.seed for version in self.project.history] if self.project else []
        first = max([self.first_seed, *(seed + 1 for seed in used if seed is not None)])
        self.first_seed = first + count
        return range(first, first + count)

    def pictures(self) -> dict[int, str]:
        """URLs of the project's frames by number, see server.py."""
        paths = self.project.frame_paths() if self.project else {}
        return {number: f"picture/{path.name}" for number, path in paths.items()}

    def sketch(self, edit: StoryEdit) -> Sketch:
        """The story of an edit that is about to be drawn."""
        pictures, locked = self.pictures(), self.project.locked if self.project else set()
        return Sketch(
            edit.story,
            {after: pictures[before] for after, before in edit.kept.items()},
            {after for after, before in edit.kept.items() if before in locked},
        )
