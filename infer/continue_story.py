"""Draws frames of a story around those that stay: continue, edit, insert, extend, fill in, delete.

In a story project, as its next version; every frame that is not named stays the same file:
python infer/continue_story.py project=PROJECT infill=[2,4] seed=1
python infer/continue_story.py project=PROJECT edit=4 text="in the cave, he sleeps"
python infer/continue_story.py project=PROJECT insert=3 text="the king leaves" num_frames=2
python infer/continue_story.py project=PROJECT extend_right=4 text="they walk home"
python infer/continue_story.py project=PROJECT extend_left=1 text="a road at night"
python infer/continue_story.py project=PROJECT delete=[3]
python infer/continue_story.py project=PROJECT story=STORY.yaml keep=[1,2]
out=OTHER begins a new project with the result and this one's locks, and leaves this one as it is. weights
(with their lora), dtype, fps, frame_interval and motion that are not given are those that the project was
drawn with last; all others are as below.

From a folder of frames 001.png, 002.png, ... (or .jpg), or from a project, into a new project:
python infer/continue_story.py weights=MODEL story=STORY.yaml frames=FOLDER keep=[1,2,3] out=PROJECT seed=0
The story says how many frames there are in the end: with six of them, keep=[1] continues, keep=[1,2,4,5,6]
draws frame 3, keep=[1,6] fills in and keep=[5,6] finds a beginning. Without keep, all frames there are stay.

PNG files that stay are the same byte for byte. Ctrl-C, SIGTERM or a kill lose nothing; the same command goes
on, and draws the same frames.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conf.command import run
from infer.frame_folder import find_frames
from infer.story_project import StoryProject, check_new_project, is_project
from infer.story_run import DrawConfig, draw_edit, last_recorded
from storyanchors.story import Story
from storyanchors.story_edit import (
    StoryEdit,
    delete_frames,
    edit_frames,
    extend_left,
    extend_right,
    insert_event,
    keep_frames,
    redraw_frames,
    replace_story,
)


@dataclass
class ContinueStoryConfig(DrawConfig):
    weights: str | None = None  # a model folder; null = what drew the project last
    dtype: str | None = None  # or bfloat16; null = as the project was drawn last, else float32
    project: str | None = None  # a story project to change
    infill: list[int] | None = None  # frames to draw anew
    edit: list[int] | None = None  # frames that get another text=
    insert: int | None = None  # new frames behind this one; 0 = before the first
    extend_right: int | None = None  # so many new frames at the end
    extend_left: int | None = None  # so many new frames at the beginning
    delete: list[int] | None = None  # frames to take out
    story: str | None = None  # a story file, YAML or JSON: another story around the frames that stay
    text: str | None = None  # what happens in frames that are edited or new
    num_frames: int | None = None  # how many to insert; null = 1
    keep: list[int] | None = None  # frames that stay, with story=; null = all
    frames: str | None = None  # without project=: a folder with 001.png, 002.png, ..., or a project
    out: str | None = None  # a folder for a new project


OPERATIONS = ("infill", "edit", "insert", "extend_right", "extend_left", "delete", "story")
WITH_TEXT = ("edit", "insert", "extend_right", "extend_left")


def main(config: ContinueStoryConfig) -> None:
    if config.project is None:
        return _from_folder(config)
    project = StoryProject.open(config.project)
    edit, out = requested_edit(config, project.story), None
    if config.out is not None:
        out = Path(config.out)
        check_new_project(out)
    if config.weights is None:
        config.weights, lora = _model_of(project)
        config.lora = config.lora or lora
    config.dtype = config.dtype or last_recorded(project.history, "dtype", "float32")
    draw_edit(config, project, edit, out=out)


def _model_of(project: StoryProject) -> tuple[str, str | None]:
    """The model folder that drew the project last, and its LoRA adapter."""
    for version in reversed(project.history):
        if "weights" in version.record:
            return version.record["weights"], version.record.get("lora")
    raise ValueError(f"weights=... is missing, and no model has drawn any version of {project.folder}")


def requested_edit(config: ContinueStoryConfig, story: Story) -> StoryEdit:
    """The one operation that the configuration asks for; ValueError for none, two, and what it lacks."""
    asked = [name for name in OPERATIONS if getattr(config, name) is not None]
    if len(asked) != 1:
        found = " and ".join(f"{name}=" for name in asked) or "none"
        raise ValueError(f"found {found}, expected one of {', '.join(f'{name}=' for name in OPERATIONS)}")
    [name] = asked
    _check_belongs(config.text, "text", name, WITH_TEXT, needed=True)
    _check_belongs(config.num_frames, "num_frames", name, ("insert",))
    _check_belongs(config.keep, "keep", name, ("story",))
    _check_belongs(config.frames, "frames", name, ())
    value, text = getattr(config, name), config.text
    operations: dict[str, Callable[[], StoryEdit]] = {
        "infill": lambda: redraw_frames(story, value),
        "edit": lambda: edit_frames(story, dict.fromkeys(value, text)),
        "insert": lambda: insert_event(
            story, value, text, 1 if config.num_frames is None else config.num_frames
        ),
        "extend_right": lambda: extend_right(story, [(text, value)]),
        "extend_left": lambda: extend_left(story, [(text, value)]),
        "delete": lambda: delete_frames(story, value),
        "story": lambda: _replaced(story, Story.from_file(value), config.keep),
    }
    return operations[name]()


def _check_belongs(value: object, key: str, operation: str, owners: tuple[str, ...], *, needed=False) -> None:
    if operation in owners and value is None and needed:
        raise ValueError(f"{operation}= needs {key}=, found none")
    if operation not in owners and value is not None:
        belongs = (
            f"it belongs to {', '.join(f'{name}=' for name in owners)}" if owners else "it needs no project="
        )
        raise ValueError(f"{key}= says nothing to {operation}=: {belongs}")


def _replaced(story: Story, new: Story, keep: list[int] | None) -> StoryEdit:
    """Another story around the frames to keep, by default all that both stories have."""
    both = range(1, min(story.num_frames, new.num_frames) + 1)
    return replace_story(story, new, both if keep is None else keep)


def _from_folder(config: ContinueStoryConfig) -> None:
    for name in ("weights", "story", "frames", "out"):
        if getattr(config, name) is None:
            raise ValueError(f"{name}=... is missing, expected it where there is no project=")
    for name in (*OPERATIONS[:-1], "text", "num_frames"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}= needs project=, the story project to change")
    story, folder, out = Story.from_file(config.story), Path(config.frames), Path(config.out)
    if is_project(folder):
        found = StoryProject.open(folder).frame_paths()
    else:
        found = find_frames(folder)
    keep = sorted(found) if config.keep is None else config.keep
    if missing := sorted(set(keep) - set(found)):
        raise ValueError(f"keep names frames {missing}, but {folder} has {sorted(found)}")
    what = f"{keep_frames(story, keep).what} from {folder}"  # refuses numbers outside the story
    if len(set(keep)) == story.num_frames:
        raise ValueError(f"all {story.num_frames} frames are given: there is none to generate")
    target, edit, given = out, StoryEdit(story, {}, what), {number: found[number] for number in keep}
    if is_project(out):
        target = StoryProject.open(out)
        if out.resolve() == folder.resolve():
            edit, given = replace_story(target.story, story, keep), {}
    else:
        check_new_project(out)
    if config.dtype is None:
        config.dtype = last_recorded([] if target is out else target.history, "dtype", "float32")
    draw_edit(config, target, edit, given=given)


if __name__ == "__main__":
    run(main, ContinueStoryConfig, "continue_story")
