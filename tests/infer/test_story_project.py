"""A story project: what is in it, what it refuses, and that kills and full disks leave it whole."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.project.drawing import _held
from infer.project.whole_files import Busy, sha256
from infer.story_project import StoryProject
from storyanchors.contact_sheet import GIVEN, LOCKED
from storyanchors.story import Event, Story
from storyanchors.story_edit import (
    StoryEdit,
    delete_frames,
    edit_frames,
    insert_event,
    keep_frames,
    redraw_frames,
    replace_story,
)

STORY = Story([Event(1, 2, "A fox sleeps."), Event(2, 3, "The fox runs.")], ["a fox"], "ink")
RECORD = {"seed": 3, "settings": {"num_steps": 2}, "weights_sha256": {"a.safetensors": "00"}}


def picture(seed: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def drawn(edit: StoryEdit, seed: int) -> dict[int, Image.Image]:
    return {number: picture(1000 * seed + number) for number in edit.drawn()}


def begin(folder: Path) -> StoryProject:
    return StoryProject.create(folder, STORY, {n: picture(n) for n in (1, 2, 3)}, RECORD)


@pytest.fixture
def project(tmp_path) -> StoryProject:
    return begin(tmp_path / "project")


def pixels(project: StoryProject) -> list[bytes]:
    return [frame.tobytes() for frame in project.frames().values()]


def check_whole(folder: Path) -> StoryProject:
    """Opens the project; history, pictures and views agree, and nothing lies about."""
    project = StoryProject.open(folder)
    for version in project.history:
        assert version.story.num_frames == len(version.frames) == len(project.frames(version.number))
    assert Story.from_file(folder / "story.yaml") == project.story
    frames = sorted((folder / "frames").iterdir())
    assert [path.name for path in frames] == [f"{n:03d}.png" for n in range(1, project.num_frames + 1)]
    stored = [path.read_bytes() for path in project.frame_paths().values()]
    assert [path.read_bytes() for path in frames] == stored
    Image.open(folder / "contact_sheet.png").load()
    known = {content for version in project.history for content in version.frames}
    assert {path.stem for path in (folder / "objects").iterdir()} == known
    assert not list(folder.rglob("*.tmp")) and (folder / "history.jsonl").read_bytes().endswith(b"\n")
    return project


# What it does


def test_a_project_is_read_as_it_was_written(project):
    again = check_whole(project.folder)
    assert again.history == project.history and again.story == STORY and again.version == 1
    assert pixels(again) == [picture(n).tobytes() for n in (1, 2, 3)]
    assert (again.present.seed, again.present.settings) == (3, {"num_steps": 2})
    assert again.present.weights_sha256 == {"a.safetensors": "00"} and again.present.drawn == [1, 2, 3]


def test_a_version_keeps_the_very_files_that_its_edit_keeps(project):
    before = project.frame_paths()
    edit = insert_event(project.story, 1, "A king comes.")
    assert project.commit(edit, drawn(edit, 1), RECORD) == 2
    after = check_whole(project.folder)
    assert [after.frame_paths()[n] for n in (1, 3, 4)] == [before[n] for n in (1, 2, 3)]
    assert after.story == edit.story and after.present.parent == 1 and after.present.kept == edit.kept
    assert after.present.drawn == [2] and after.present.what == edit.what


def test_undo_redo_restore_are_those_of_an_editor(project):
    shown, before, undone, rng = pixels(project), [], [], random.Random(0)
    versions = {1: shown}
    for step in range(40):
        move = rng.choice(["commit", "undo", "undo", "redo", "restore"])
        if move == "commit":
            edit = redraw_frames(project.story, [1 + step % 3])
            number = project.commit(edit, drawn(edit, step), RECORD)
            before, undone, versions[number] = [*before, shown], [], pixels(project)
            shown = versions[number]
        elif move == "restore":
            number = rng.choice(list(versions))
            project.restore(number)
            before, undone, shown = [*before, shown], [], versions[number]
        elif move == "undo" and before:
            project.undo()
            undone, shown = [*undone, shown], before.pop()
        elif move == "redo" and undone:
            project.redo()
            before, shown = [*before, shown], undone.pop()
        else:
            with pytest.raises(ValueError, match=f"nothing to {move}"):
                getattr(project, move)()
        assert pixels(project) == shown == pixels(StoryProject.open(project.folder))
    assert len(project.history) == len(versions) > 5
    check_whole(project.folder)


def test_a_lock_holds_a_picture_wherever_it_stands(project):
    project.lock([2])
    edit = insert_event(project.story, 0, "A road.", 2)
    project.commit(edit, drawn(edit, 1), RECORD)
    assert project.locked == {4} == StoryProject.open(project.folder).locked
    for refused in (redraw_frames(project.story, [1, 4]), delete_frames(project.story, [4])):
        with pytest.raises(ValueError, match=r"frames \[4\] of .* are locked"):
            project.commit(refused, drawn(refused, 2), RECORD)
    assert project.version == 2
    project.undo()
    assert project.locked == {2}
    project.redo()
    project.unlock([4])
    project.commit(delete_frames(project.story, [4]), {}, {})
    assert project.locked == set() and project.num_frames == 4
    with pytest.raises(ValueError, match=r"lock \[9\]: the story has frames 1 to 4"):
        project.lock([9])


def test_a_copy_begins_with_its_parent(project, tmp_path):
    before = (project.folder / "history.jsonl").read_bytes()
    edit = edit_frames(project.story, {2: "A fox eats."})
    other = project.copy(tmp_path / "other", edit, drawn(edit, 1), RECORD)
    assert (project.folder / "history.jsonl").read_bytes() == before
    assert other.present.parent == 1 and str(project.folder) in other.history[0].what
    assert pixels(other)[0] == pixels(project)[0] and pixels(other)[1] != pixels(project)[1]
    other.undo()
    assert pixels(check_whole(tmp_path / "other")) == pixels(project)


# What it refuses


def test_frames_that_do_not_fit_leave_nothing(project, tmp_path):
    folder = tmp_path / "new"
    wrong = {
        "frame 2 has 8 x 4 pixels, expected 6 x 4": {1: picture(1), 2: picture(2, (8, 4)), 3: picture(3)},
        "frame 3 is an image of mode RGBA": {1: picture(1), 2: picture(2), 3: picture(3).convert("RGBA")},
        r"found frames \[1, 2\], expected \[1, 2, 3\]": {1: picture(1), 2: picture(2)},
    }
    for message, frames in wrong.items():
        with pytest.raises(ValueError, match=message):
            StoryProject.create(folder, STORY, frames, {})
        assert not folder.exists()
    before = (project.folder / "history.jsonl").read_bytes()
    edit = redraw_frames(STORY, [2])
    for message, frames in {
        "frame 2 has 8 x 4 pixels, expected 6 x 4": {2: picture(2, (8, 4))},
        r"found frames \[3\], expected \[2\]": {3: picture(2)},
    }.items():
        with pytest.raises(ValueError, match=message):
            project.commit(edit, frames, {})
    assert (project.folder / "history.jsonl").read_bytes() == before
    check_whole(project.folder)


def test_an_empty_folder_of_a_person_stays(tmp_path):
    for folder in (tmp_path / "mine", tmp_path / "new"):
        if folder.name == "mine":
            folder.mkdir()
        with pytest.raises(ValueError, match="cannot begin"), _held(folder, folder, keep_frames(STORY, [])):
            raise ValueError("cannot begin")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_folder_that_holds_something_else_is_refused(project, tmp_path):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and has no history\.jsonl"):
        begin(tmp_path / "diary")
    with pytest.raises(ValueError, match="is a story project already"):
        begin(project.folder)
    with pytest.raises(ValueError, match=r"is no story project: it has no history\.jsonl"):
        StoryProject.open(tmp_path / "diary")
    assert [path.name for path in (tmp_path / "diary").iterdir()] == ["mine.txt"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "story.yaml": lambda folder: (folder / "story.yaml").write_text(
        (folder / "story.yaml").read_text().replace("runs", "swims")
    ),
    "frames/002.png": lambda folder: picture(77).save(folder / "frames" / "002.png"),
    "frames/003.png": lambda folder: shutil.copy(folder / "frames/001.png", folder / "frames/003.png"),
    "frames/004.png": lambda folder: shutil.copy(folder / "frames/001.png", folder / "frames/004.png"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_by_hand_is_named_and_stays(project, name):
    CHANGES[name](project.folder)
    changed = (project.folder / name).read_bytes()
    edit = redraw_frames(project.story, [1])
    for act in (
        lambda: StoryProject.open(project.folder),
        lambda: project.commit(edit, drawn(edit, 1), {}),
        project.undo if project.can_undo else lambda: project.restore(1),
    ):
        with pytest.raises(ValueError, match=f"{name} of .* changed by hand: .*by_hand=adopt"):
            act()
    assert (project.folder / name).read_bytes() == changed
    StoryProject.open(project.folder, by_hand="discard")
    assert pixels(check_whole(project.folder)) == [picture(n).tobytes() for n in (1, 2, 3)]


def test_what_was_changed_by_hand_can_be_adopted(project):
    longer = Story([Event(1, 4, "A fox swims.")])
    longer.to_file(project.folder / "story.yaml")
    picture(77).save(project.folder / "frames" / "002.png")
    (project.folder / "frames" / "003.png").unlink()
    picture(78).save(project.folder / "frames" / "004.png")
    adopted = StoryProject.open(project.folder, by_hand="adopt")
    assert adopted.version == 2 and adopted.story == longer and adopted.present.kept == {1: 1, 3: 3}
    assert pixels(adopted) == [picture(n).tobytes() for n in (1, 77, 3, 78)]
    assert adopted.present.what == "by hand: frames/002.png, frames/004.png, story.yaml"
    check_whole(project.folder)
    adopted.undo()
    assert adopted.story == STORY and StoryProject.open(project.folder, by_hand="adopt").version == 1


def test_adopting_refuses_locked_frames_by_name(project):
    project.lock([1, 2])
    picture(77).save(project.folder / "frames" / "002.png")
    with pytest.raises(ValueError, match=r"frames \[2\] of .* are locked.*restore_story.py .* unlock=\[2\]"):
        StoryProject.open(project.folder, by_hand="adopt")
    assert Image.open(project.folder / "frames" / "002.png").tobytes() == picture(77).tobytes()
    StoryProject.open(project.folder, by_hand="leave").unlock([2])
    adopted = StoryProject.open(project.folder, by_hand="adopt")
    assert adopted.version == 2 and adopted.locked == {1} and adopted.given == {2}
    Story([Event(1, 1, "A fox swims.")]).to_file(project.folder / "story.yaml")
    for number in (2, 3):
        (project.folder / "frames" / f"{number:03d}.png").unlink()
    adopted.lock([3])
    with pytest.raises(ValueError, match=r"frames \[3\] of .* are locked"):
        StoryProject.open(project.folder, by_hand="adopt")


def test_what_changes_nothing_makes_no_version(project):
    edit = replace_story(project.story, STORY, [1, 2, 3])
    assert project.commit(edit, {}, {}) == 1 and len(project.history) == 1
    story = project.folder / "story.yaml"
    story.write_text("# mine\n" + story.read_text())
    assert StoryProject.open(project.folder, by_hand="adopt").version == 1
    check_whole(project.folder)


def test_the_sheet_marks_what_came_from_outside_and_what_is_locked(project, tmp_path):
    sheet = project.folder / "contact_sheet.png"
    colours = lambda: {c for _, c in Image.open(sheet).getcolors(2**20)} & {GIVEN, LOCKED}  # noqa: E731
    edit = redraw_frames(project.story, [2])
    project.commit(edit, drawn(edit, 1), RECORD)
    assert colours() == set()
    project.lock([1])
    assert colours() == {LOCKED}
    picture(5).save(tmp_path / "mine.png")
    edit = redraw_frames(project.story, [3])
    project.commit(edit, {3: tmp_path / "mine.png"}, {})
    project.unlock([1])
    edit = redraw_frames(project.story, [2])
    project.commit(edit, drawn(edit, 2), RECORD)
    assert project.given == {3} and colours() == {GIVEN}
    assert project.copy(tmp_path / "copy", edit, drawn(edit, 3), RECORD).given == {3}


def test_locks_come_along_into_a_copy(project, tmp_path):
    project.lock([1, 2])
    edit = redraw_frames(project.story, [2])
    other = project.copy(tmp_path / "other", edit, drawn(edit, 1), RECORD)
    assert other.locked == {1}
    other.undo()
    assert check_whole(other.folder).locked == {1, 2}


def test_what_has_no_place_in_the_story_is_not_thrown_away_by_adopting(project):
    added = project.folder / "frames" / "004.png"
    picture(77).save(added)
    with pytest.raises(ValueError, match=r"frames/004\.png of .*: the story has frames 1 to 3"):
        StoryProject.open(project.folder, by_hand="adopt")
    assert added.exists() and project.version == 1
    (project.folder / "story.yaml").write_text("events: [{frames: [1, 2000000000], description: long}]")
    with pytest.raises(ValueError, match="a story of 2000000000 frames is too long"):
        StoryProject.open(project.folder, by_hand="adopt")


def test_half_written_files_of_others_are_left_alone(project):
    own = project.folder / "frames" / ".001.png.tmp"
    others = [project.folder / "film.parts" / ".000001.png.tmp", project.folder / ".film.mp4.tmp"]
    others[0].parent.mkdir()
    (project.folder / ".export.1234.tmp").mkdir()
    for path in (own, *others):
        path.write_bytes(b"half")
    StoryProject.open(project.folder)
    assert not own.exists() and all(path.exists() for path in others)


def test_files_of_other_names_are_left_alone_and_missing_views_come_back(project):
    (project.folder / "frames" / "notes.txt").write_text("mine")
    (project.folder / "mine.txt").write_text("mine")
    for name in ("frames/001.png", "story.yaml", "contact_sheet.png"):
        (project.folder / name).unlink()
    edit = delete_frames(project.story, [3])
    StoryProject.open(project.folder).commit(edit, {}, {})
    (project.folder / "frames" / "notes.txt").unlink()
    assert (project.folder / "mine.txt").read_text() == "mine"
    check_whole(project.folder)


def test_pictures_are_png_files_whatever_they_are_called(project, tmp_path):
    picture(5).save(tmp_path / "named_wrongly.png", "JPEG")
    edit = redraw_frames(project.story, [1])
    project.commit(edit, {1: tmp_path / "named_wrongly.png"}, {})
    assert project.frame_paths()[1].read_bytes().startswith(b"\x89PNG")
    picture(5).save(tmp_path / "other.png", "BMP")
    with pytest.raises(ValueError, match=r"cannot read the frame .*other\.png"):
        project.commit(edit, {1: tmp_path / "other.png"}, {})


def test_a_picture_of_another_kind_is_not_decoded(project, tmp_path):
    picture(5).save(tmp_path / "a.bmp")
    content = (tmp_path / "a.bmp").read_bytes()
    history, stranger = project.folder / "history.jsonl", sha256(content)
    history.write_text(history.read_text().replace(project.present.frames[0], stranger))
    (project.folder / "objects" / f"{stranger}.png").write_bytes(content)
    shutil.rmtree(project.folder / "frames")
    with pytest.raises(ValueError, match="cannot read the frame"):
        StoryProject.open(project.folder)


def test_a_folder_of_a_person_that_is_called_unfinished_stays(tmp_path):
    (tmp_path / "project" / "unfinished").mkdir(parents=True)
    (tmp_path / "project" / "unfinished" / "novel.txt").write_text("mine")
    begin(tmp_path / "project")
    assert (tmp_path / "project" / "unfinished" / "novel.txt").read_text() == "mine"


def test_damage_is_named(project):
    history = project.folder / "history.jsonl"
    lines = history.read_bytes()
    history.write_bytes(lines.replace(b'"version": 1', b'"version": 7', 1))
    with pytest.raises(ValueError, match=r"history\.jsonl: line 2 is damaged .*version 7 after 0"):
        StoryProject.open(project.folder)
    content = project.present.frames[0].encode()
    for found, damaged, message in (
        (content, b"../../secret", "'../../secret' is no SHA-256"),
        (b'"parent": null', b'"parent": 1', "version 1 has the parent 1"),
        (b'"%s", ' % content, b"", "2 frames of a story of 3"),
    ):
        history.write_bytes(lines.replace(found, damaged))
        with pytest.raises(ValueError, match=f"line 2 is damaged .*{message}"):
            StoryProject.open(project.folder)
    history.write_bytes(lines)
    path = project.frame_paths()[2]
    path.write_bytes(path.read_bytes()[:-1] + b"0")
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        project.frames()


# Two at once


def in_child(work: Callable[[], object]) -> int:
    """Process id of a fork of this process that does the work; its exit status is 0, or 1 after an error."""
    process = os.fork()
    if not process:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"in the child: {error!r}", file=sys.stderr)
        finally:
            os._exit(status)
    return process


def test_two_processes_exclude_each_other_and_the_lock_of_a_killed_one_is_free(project):
    def hold():
        with project.exclusive("drawing frame 2"):
            (project.folder / "held").touch()
            time.sleep(60)

    holder = in_child(hold)
    while not (project.folder / "held").exists():
        time.sleep(0.01)
    assert StoryProject.open(project.folder).version == 1  # reading is possible
    edit = redraw_frames(project.story, [1])
    with pytest.raises(Busy, match=rf"is being changed by process {holder} \(drawing frame 2\)"):
        project.commit(edit, drawn(edit, 1), RECORD)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert project.commit(edit, drawn(edit, 1), RECORD) == 2


def test_a_project_that_another_changed_meanwhile_is_not_changed_blindly(project):
    other = StoryProject.open(project.folder)
    other.commit(delete_frames(other.story, [1]), {}, {})
    edit = redraw_frames(project.story, [3])
    with pytest.raises(ValueError, match="was changed by another process meanwhile"):
        project.commit(edit, drawn(edit, 1), RECORD)
    assert check_whole(project.folder).num_frames == 2


# Kills


def work_on(folder: Path, seed: int, tell: Callable[[int], object]) -> None:
    """Changes the project again and again; tells the number of every version that is committed."""
    rng, project = random.Random(seed), StoryProject.open(folder)
    while True:
        match rng.choice(["insert", "redraw", "delete", "undo", "lock"]):
            case "insert" if project.num_frames < 5:
                edit = insert_event(project.story, rng.randint(0, project.num_frames), "A king.")
            case "redraw":
                edit = redraw_frames(project.story, [rng.randint(1, project.num_frames)])
            case "delete" if project.num_frames > 2:
                edit = delete_frames(project.story, [1])
            case "undo" if project.can_undo:
                project.undo()
                continue
            case _:
                project.lock([1])
                project.unlock([1])
                continue
        tell(project.commit(edit, drawn(edit, rng.randint(1, 10**6)), RECORD))


def test_killed_at_random_moments_a_project_stays_whole_and_no_version_is_lost(project):
    rng, there = random.Random(0), 1
    for seed in range(12):
        reader, writer = os.pipe()
        child = in_child(lambda: work_on(project.folder, seed, lambda n: os.write(writer, b"%d\n" % n)))  # noqa: B023
        os.close(writer)
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as pipe:
            told = max([there, *map(int, pipe.read().split())])
        there = len(check_whole(project.folder).history)
        assert told <= there <= told + 1
    assert there > 1


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def at_call(calls: int, act: Callable[[], None]) -> None:
    """Acts before this very process makes its calls-th call of a C function from now on."""
    left = calls

    def count(frame, event, argument):
        nonlocal left
        left -= event == "c_call"
        if left == 0 and event == "c_call":
            act()

    sys.setprofile(count)


@pytest.mark.parametrize("end", [kill, press_ctrl_c])
def test_ended_at_any_step_a_version_is_there_or_not(project, end):
    edit, counted = insert_event(project.story, 1, "A king."), []
    sys.setprofile(lambda frame, event, argument: counted.append(event == "c_call"))
    begin(project.folder.with_name("counted")).commit(edit, drawn(edit, 1), RECORD)
    sys.setprofile(None)
    before, outcomes = shutil.copytree(project.folder, project.folder.with_name("before")), set()
    for calls in range(1, sum(counted), sum(counted) // 16):
        shutil.rmtree(project.folder)
        shutil.copytree(before, project.folder)
        child = in_child(lambda: (at_call(calls, end), project.commit(edit, drawn(edit, 1), RECORD)))  # noqa: B023
        os.waitpid(child, 0)
        found = check_whole(project.folder)
        outcomes.add(found.version)
        assert pixels(found) == [
            picture(n).tobytes() for n in ((1, 2, 3), (1, 1002, 2, 3))[found.version - 1]
        ]
    assert outcomes == {1, 2}


def test_killed_while_it_begins_a_project_can_be_begun_again(tmp_path):
    outcomes = set()
    for calls in range(20, 1500, 90):
        folder = tmp_path / str(calls)
        child = in_child(lambda: (at_call(calls, kill), begin(folder)))  # noqa: B023
        os.waitpid(child, 0)
        outcomes.add((folder / "history.jsonl").exists())
        if not (folder / "history.jsonl").exists():
            begin(folder)
        assert check_whole(folder).version == 1
    assert outcomes == {True, False}


def test_a_line_that_was_not_finished_is_dropped(project):
    history = project.folder / "history.jsonl"
    whole = history.read_bytes()
    history.write_bytes(whole + whole.splitlines()[1][:99])
    assert check_whole(project.folder).version == 1 and history.read_bytes() == whole
    with history.open("ab") as file:  # another process was killed while this one has the project open
        file.write(b'{"version": 2, "par')
    project.lock([1])
    assert check_whole(project.folder).locked == {1}


def test_a_last_line_whose_end_an_editor_took_is_whole(project):
    edit = redraw_frames(project.story, [2])
    project.commit(edit, drawn(edit, 1), RECORD)
    history = project.folder / "history.jsonl"
    whole = history.read_bytes()
    history.write_bytes(whole[:-1])
    assert check_whole(project.folder).version == 2 and history.read_bytes() == whole
    opened = StoryProject.open(project.folder)
    history.write_bytes(whole[:-1])
    StoryProject(project.folder).lock([1])
    assert check_whole(project.folder).locked == {1} and opened.version == 2


def test_nothing_is_removed_where_hands_changed_something(project):
    edit = redraw_frames(project.story, [2])
    project.commit(edit, drawn(edit, 1), RECORD)
    history, path = project.folder / "history.jsonl", project.frame_paths()[2]
    history.write_bytes(history.read_bytes()[:-9])  # damaged: the line is torn, but frames/ shows it
    damaged = history.read_bytes()
    with pytest.raises(ValueError, match=r"frames/002\.png of .* changed by hand"):
        StoryProject.open(project.folder)
    assert path.exists() and history.read_bytes() == damaged


# A full disk


def test_a_file_that_may_not_grow_leaves_the_version_out_or_whole(project):
    """RLIMIT_FSIZE stops every write behind so many bytes: in a picture, in the history, in the views."""
    edit = insert_event(project.story, 1, "A king. " * 40)
    size, outcomes = (project.folder / "history.jsonl").stat().st_size, set()
    before = shutil.copytree(project.folder, project.folder.with_name("before"))
    for limit in (0, 50, size - 5, size, size + 40, 3 * size, 10**6):
        shutil.rmtree(project.folder)
        shutil.copytree(before, project.folder)

        def commit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: B023
            try:
                project.commit(edit, drawn(edit, 1), RECORD)
            except OSError as error:
                assert "File too large" in str(error) and str(project.folder) in str(error), error
                os._exit(7)

        _, status = os.waitpid(in_child(commit), 0)
        found = check_whole(project.folder)
        outcomes.add((os.waitstatus_to_exitcode(status), found.version))
        if found.version == 1:
            assert (project.folder / "history.jsonl").read_bytes() == (before / "history.jsonl").read_bytes()
    assert {(7, 1), (0, 2)} <= outcomes <= {(7, 1), (7, 2), (0, 2)}


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a disk of its own needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_the_version_out_or_whole(small_disk):
    project, outcomes = begin(small_disk / "project"), set()
    for num_free in range(0, 14):  # pages of 4 KiB
        edit = redraw_frames(project.story, [2])
        filler, before = small_disk / "filler", project.version
        filler.touch()
        free = os.statvfs(small_disk).f_bavail - num_free
        filler.write_bytes(bytes(max(0, free) * os.statvfs(small_disk).f_bsize))
        try:
            project.commit(edit, drawn(edit, num_free + 1), RECORD)
            outcomes.add("committed")
        except OSError as error:
            assert "No space left on device" in str(error)
            outcomes.add("kept" if "is kept, but not shown yet" in str(error) else "refused")
        filler.unlink()
        project = check_whole(small_disk / "project")
        assert project.version - before in (0, 1)
    assert {"refused", "committed"} <= outcomes


def test_a_story_can_be_replaced_with_one_of_other_frames(project):
    new = Story([Event(1, 2, "A king.")])
    edit = replace_story(project.story, new, [])
    project.commit(edit, {1: picture(1, (8, 8)), 2: picture(2, (8, 8))}, RECORD)
    assert [frame.size for frame in check_whole(project.folder).frames().values()] == [(8, 8)] * 2
    assert json.loads((project.folder / "history.jsonl").read_text().splitlines()[2])["kept"] == {}
