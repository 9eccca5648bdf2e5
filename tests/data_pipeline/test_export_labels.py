import json
import shutil

import pytest
from PIL import Image

from data_pipeline.export_labels import export
from data_pipeline.labeling.partition import labels_folder
from data_pipeline.labeling.prompts import EVENTS
from data_pipeline.labeling.schemas import EventsAnswer, GlobalCaptionAnswer, StoryAnswer
from data_pipeline.shard_reader import read_clips, read_marker
from tests.data_pipeline.labeled_world import RUN, write_labeled_world

ANSWERS = {"global": GlobalCaptionAnswer, "events": EventsAnswer, "story": StoryAnswer}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_labeled_world(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "chats"
    export(world[0], RUN, folder)
    return folder


def read(out, stage):
    return [json.loads(line) for line in (out / f"{stage}.jsonl").open()]


def test_a_line_is_the_question_as_it_was_sent_and_an_answer_of_its_schema(out):
    line = next(line for line in read(out, "events") if "/events/1-" not in line["id"])  # later frames
    user, assistant = line["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert user["content"][0] == {"type": "text", "text": EVENTS.text}
    shown = [part["image"] for part in user["content"] if part["type"] == "image"]
    labels = [part["text"] for part in user["content"] if part["type"] == "text"][2:]
    first_frame, last_frame = map(int, line["id"].split("/")[2].split("-"))
    assert first_frame > 1
    assert labels == [f"Frame {number}" for number in range(first_frame, last_frame + 1)]
    assert shown == line["images"] and len(shown) == len(labels)
    for stage, schema in ANSWERS.items():
        for line in read(out, stage):
            schema.model_validate_json(line["messages"][1]["content"][0]["text"])


def test_images_are_the_stored_frames_and_lie_there_once(world, out):
    frames = world[0] / "frames"
    stored = {
        content
        for shard in ("000000", "000001", "000002")
        for _, members in read_clips(frames, read_marker(frames, shard))
        for name, content in members.items()
        if name.endswith(".jpg")
    }
    paths = sorted((out / "images").rglob("*.jpg"))
    assert {path.read_bytes() for path in paths} == stored and len(paths) == len(stored)
    named = {name for stage in ANSWERS for line in read(out, stage) for name in line["images"]}
    assert {path.relative_to(out).as_posix() for path in paths} == named
    assert Image.open(paths[0]).size == (64, 64)


def test_refused_clips_are_left_out_and_repaired_ones_have_the_repaired_answer(world, out):
    refused, repaired = world[1][:2]
    clips = {stage: {line["id"].split("/")[0] for line in read(out, stage)} for stage in ANSWERS}
    assert refused in clips["global"] and refused not in clips["events"] | clips["story"]
    [line] = [line for line in read(out, "global") if line["id"].startswith(repaired)]
    assert "I would say" not in json.dumps(line)
    assert len(line["messages"]) == 2  # the repair turn taught the answer, it is no part of the question


def test_clips_with_warnings_can_be_left_out(world, tmp_path, command):
    arguments = f"dataset={world[0]}", f"run={RUN}", f"out={tmp_path / 'clean'}", "warned=false"
    status, printed, errors = command("export_labels", *arguments)
    assert status == 0, errors
    assert "11 questions about 11 clips" in printed
    assert world[1][3] not in (tmp_path / "clean" / "global.jsonl").read_text()
    assert command("export_labels", *arguments)[0] == 0  # an earlier export is replaced


def test_an_answer_that_the_ledger_has_lost_is_told_and_none_at_all_is_an_error(
    world, tmp_path, command, refused
):
    dataset = shutil.copytree(world[0], tmp_path / "world")
    ledger = labels_folder(dataset, RUN) / "ledger"
    arguments = f"dataset={dataset}", f"run={RUN}", f"out={tmp_path / 'out'}"
    for path in (ledger / "global").glob("000002.*"):
        path.unlink()
    _, printed, _ = command("export_labels", *arguments)
    assert "2 clips left out: no accepted answer in the ledger" in printed
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(ledger)
    assert "nothing to export" in refused("export_labels", *arguments)
    assert not (tmp_path / "out").exists()
