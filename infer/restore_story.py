"""Shows what was done to a story project, goes back to any version of it, locks frames. Draws nothing.

python infer/restore_story.py project=PROJECT                  lists its versions, the present one marked
python infer/restore_story.py project=PROJECT --undo           back to what was shown before; also --redo
python infer/restore_story.py project=PROJECT version=3        shows version 3 again; --undo takes it back
python infer/restore_story.py project=PROJECT lock=[1,2]       no command draws or deletes them; also unlock=
python infer/restore_story.py project=PROJECT by_hand=adopt    files changed by hand become a version;
                                                               by_hand=discard throws the changes away

No version is ever lost. A lock holds a picture: it goes along wherever the picture stands.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from conf.command import run
from infer.project.history import Version
from infer.project.views import SHEET
from infer.story_project import RESTORE, StoryProject

BY_HAND = ("refuse", "adopt", "discard")


@dataclass
class RestoreStoryConfig:
    project: str = MISSING  # a story project
    version: int | None = None  # to show again
    undo: bool = False
    redo: bool = False
    lock: list[int] | None = None  # frames to lock
    unlock: list[int] | None = None  # frames to unlock
    by_hand: str = "refuse"  # what to do with files that were changed by hand: or adopt, discard


def main(config: RestoreStoryConfig) -> None:
    if config.by_hand not in BY_HAND:
        raise ValueError(f"by_hand is {config.by_hand!r}, expected one of {', '.join(BY_HAND)}")
    asked = [name for name in ("version", "undo", "redo", "lock", "unlock") if getattr(config, name)]
    if config.version == 0 or len(asked) > 1:
        raise ValueError(f"found {' and '.join(asked) or 'version=0'}, expected one thing to do")
    by_hand = config.by_hand
    if by_hand == "refuse" and asked in (
        [],
        ["lock"],
        ["unlock"],
    ):  # looks and locks touch no file of a person
        by_hand = "leave"
    project = StoryProject.open(config.project, by_hand=by_hand)
    if config.undo:
        project.undo()
    elif config.redo:
        project.redo()
    elif config.version:
        project.restore(config.version)
    elif config.lock:
        project.lock(config.lock)
    elif config.unlock:
        project.unlock(config.unlock)
    _print_history(project)


def _print_history(project: StoryProject) -> None:
    for version in project.history:
        mark = ">" if version.number == project.version else " "
        print(f"{mark} {version.number:3d}  {version.time}  {_described(version)}")
    if project.locked:
        print(f"locked: {', '.join(map(str, sorted(project.locked)))}")
    print(f"{project.folder} shows version {project.version}: {project.folder / SHEET}")
    if changed := project.changed_by_hand():
        print(f"changed by hand: {', '.join(changed)}; {RESTORE} project={project.folder} by_hand=adopt")


def _described(version: Version) -> str:
    seed = "" if version.seed is None else f", seed {version.seed}"
    parent = "" if version.parent in (None, version.number - 1) else f", from version {version.parent}"
    return f"{version.what}{seed}{parent}"


if __name__ == "__main__":
    run(main, RestoreStoryConfig, "restore_story")
