import logging
import os
import pickle
import signal
from pathlib import Path

import pytest

from conf.command import Stopped
from data_pipeline.captions import read_captions, read_run_maker, write_run
from data_pipeline.labeling import partition
from data_pipeline.labeling.findings import Finding
from data_pipeline.labeling.ledger import count_money, ledger_files
from data_pipeline.labeling.partition import label_lines, labels_folder, read_run
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from storyanchors.vlm import VlmConfig, VlmRequest
from tests.data_pipeline.labeling.stages_for_tests import (
    Caption,
    Captions,
    CountingScript,
    answer,
    write_dataset,
)
from tests.vlm_servers import KEY, serve

SCRIPTED = dict(
    backend="scripted", input_usd_per_million=1.0, output_usd_per_million=4.0, price_date="2026-11-21"
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("labels") / "dataset")


@pytest.fixture
def dataset(frames, tmp_path) -> Path:
    """A dataset of its own with the same frames."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for path in frames.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def config(dataset: Path, **settings) -> LabelingConfig:
    return LabelingConfig(
        dataset=str(dataset), run="first", vlm=VlmConfig(**SCRIPTED), back_off_s=1e-3, **settings
    )


def content(dataset: Path, folder: str = "labels/first/global") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (dataset / folder).glob("*.jsonl")}


def test_every_clip_is_labelled_once_and_gets_its_caption(dataset):
    script = CountingScript()
    run_stage(config(dataset), Captions(), script=script)
    assert set(script.asked.values()) == {1} and len(script.asked) == 12
    captions = [line.record for shard in range(3) for line in read_captions(dataset, "first", f"{shard:06d}")]
    assert len({record.global_caption for record in captions}) == 12
    assert read_run_maker(dataset, "first") == "labels"
    lines = [line for shard in range(3) for line in label_lines(dataset, "first", "global", f"{shard:06d}")]
    assert [line["key"] for line in lines] == [record.key for record in captions]
    money = count_money(labels_folder(dataset, "first"), "global")
    assert money.usd == pytest.approx(sum(line["usd"] for line in lines)) and money.usd > 0
    assert (money.num_requests, money.in_doubt) == (12, [])
    run_stage(config(dataset), Captions(), script=script)  # nothing is left to do
    assert set(script.asked.values()) == {1}


def test_an_answer_is_never_asked_for_again_whatever_ended_the_run(dataset):
    """The end comes after a few answers, again and again; questions of unfinished shards are not repeated."""
    script = CountingScript()
    for cents in range(1, 40):
        try:
            run_stage(config(dataset, max_usd=cents * 1e-3, in_flight=2), Captions(), script=script)
            break
        except Stopped as stopped:
            assert "max_usd" in str(stopped)
            assert count_money(labels_folder(dataset, "first"), "global").usd <= cents * 1e-3
    else:
        pytest.fail("never finished")
    assert cents > 3 and set(script.asked.values()) == {1} and len(script.asked) == 12


def test_bytes_do_not_depend_on_workers_tasks_or_interruptions(dataset, tmp_path, monkeypatch):
    run_stage(config(dataset, in_flight=1), Captions(), script=CountingScript())
    expected = content(dataset), content(dataset, "captions/first")
    for number, (num_tasks, in_flight) in enumerate([(1, 64), (7, 3)]):
        other = tmp_path / f"other{number}"
        other.mkdir()
        (other / "frames").symlink_to(dataset / "frames")
        (other / "dataset.json").symlink_to(dataset / "dataset.json")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(num_tasks))
        for task in reversed(range(num_tasks)):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            run_stage(config(other, in_flight=in_flight), Captions(), script=CountingScript())
        assert (content(other), content(other, "captions/first")) == expected
        assert read_run(other, "first")["num_tasks"] == num_tasks
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")  # an array of the one task that is missing
    (other / "labels/first/global/000001.jsonl").unlink()
    for task in range(7):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        run_stage(config(other), Captions(), script=lambda request: pytest.fail("asked again"))
    assert content(other) == expected[0]


def test_a_signal_lets_what_is_in_flight_come_back_and_the_next_run_continues(dataset):
    script = CountingScript(
        lambda request, times: os.kill(os.getpid(), signal.SIGTERM) if len(script.asked) == 5 else None
    )
    with pytest.raises(Stopped, match="SIGTERM"):
        run_stage(config(dataset, in_flight=2), Captions(), script=script)
    money = count_money(labels_folder(dataset, "first"), "global")
    assert money.in_doubt == [] and money.num_requests == len(script.asked) < 12
    run_stage(config(dataset), Captions(), script=script)
    assert set(script.asked.values()) == {1} and len(content(dataset)) == 3


def test_an_error_is_worth_one_repair_that_names_it(dataset):
    def instead(request, times):
        return '{"caption": "I refuse."}' if request.name == "clip-001-00002/global/1-2" else None

    repairs = []
    script = CountingScript(
        lambda request, times: (
            repairs.append(request) if "repair" in request.name else instead(request, times)
        )
    )
    run_stage(config(dataset), Captions(), script=script)
    [repair] = repairs
    assert repair.name == "clip-001-00002/global/1-2/repair"
    assert "I refuse." in repair.parts[-1] and "it refuses" in repair.parts[-1]
    line = label_lines(dataset, "first", "global", "000001")[2]
    assert (line["status"], line["num_requests"], line["findings"]) == ("ok", 2, [])


@pytest.mark.parametrize("bad", ['{"caption": "I refuse."}', '{"caption": 7}', "no JSON"])
def test_what_repair_does_not_mend_is_quarantined_and_gets_no_caption(dataset, bad):
    script = CountingScript(
        lambda request, times: bad if request.name.startswith("clip-001-00002/") else None
    )
    run_stage(config(dataset), Captions(), script=script)
    assert script.asked["clip-001-00002/global/1-2"] == script.asked["clip-001-00002/global/1-2/repair"] == 1
    line = label_lines(dataset, "first", "global", "000001")[2]
    assert line["status"] == "quarantined" and line["findings"][0]["severity"] == "error"
    assert [one.record.key[-1] for one in read_captions(dataset, "first", "000001")] == ["0", "1", "3"]


def test_two_clips_of_the_same_frames_are_one_question(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", num_shards=1, same=True)
    script = CountingScript()
    run_stage(config(dataset), Captions(), script=script)
    assert script.asked.total() == 1 and len(label_lines(dataset, "first", "global", "000000")) == 4


def test_a_stage_that_stumbles_over_a_clip_does_not_stop_the_others(dataset, caplog):
    class Stumbling(Captions):
        async def label(self, clip, ask):
            line = await super().label(clip, ask)
            return line | {"x": 1 / (not clip.key.endswith("2"))}

    run_stage(config(dataset), Stumbling(), script=CountingScript())
    lines = label_lines(dataset, "first", "global", "000001")
    assert [line["status"] for line in lines] == ["ok", "ok", "quarantined", "ok"]
    [finding] = lines[2]["findings"]
    assert finding["code"] == "labeler_failed" and "ZeroDivisionError" in finding["detail"]
    assert lines[2]["usd"] == lines[1]["usd"] and "clip-001-00002" in caplog.text


def test_checks_of_today_over_answers_of_yesterday_cost_nothing(dataset):
    run_stage(config(dataset), Captions(), script=CountingScript())

    class Stricter(Captions):
        async def label(self, clip, ask):
            async def stricter(request, check):
                def both(caption):
                    caption, findings = check(caption)
                    return caption, [*findings, Finding("too_short_text", "warning", "it is short")]

                return await ask(request, both)

            return await super().label(clip, stricter)

    (dataset / "labels/first/global/000002.jsonl").unlink()
    run_stage(config(dataset), Stricter(), only_ledger=True)
    assert set(content(dataset)) == {"000000.jsonl", "000001.jsonl"}  # what is not settled stays so
    lines = label_lines(dataset, "first", "global", "000001")
    assert [line["findings"][0]["code"] for line in lines] == ["too_short_text"] * 4
    [*ledgers] = ledger_files(labels_folder(dataset, "first"), "global", "000000")
    for path in ledgers:
        path.unlink()
    before = content(dataset)
    run_stage(config(dataset), Captions(), only_ledger=True)
    assert content(dataset)["000000.jsonl"] == before["000000.jsonl"]  # the answers are gone, the labels stay
    assert content(dataset)["000001.jsonl"] != before["000001.jsonl"]


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(dataset, capsys):
    run_stage(
        config(dataset, dry_run=True, requests_per_minute=1.0),
        Captions(),
        script=lambda request: pytest.fail(),
    )
    printed = capsys.readouterr().out
    assert "12 clips" in printed and "requests  12" in printed and "hours     0.20" in printed
    assert "dollars   at most 0.02" in printed
    assert not (dataset / "labels").exists()


def test_a_run_continues_only_what_was_begun(dataset):
    run_stage(config(dataset, num_tasks=2, task=0), Captions(), script=CountingScript())
    for settings, stage, words in (
        ({"num_tasks": 3, "task": 0}, Captions(), "num_tasks=2, found num_tasks=3"),
        ({}, Captions(), "divided among 2 tasks: say which"),
        ({"task": 2}, Captions(), "task is 2, expected 0 to 1"),
        ({"task": 0}, Captions("Describe it."), "another prompt caption-v1"),
    ):
        with pytest.raises(ValueError, match=words):
            run_stage(config(dataset, **settings), stage, script=CountingScript())
    other = config(dataset, task=0)
    other.vlm = VlmConfig(**SCRIPTED, model="another")
    with pytest.raises(ValueError, match="begun with the model"):
        run_stage(other, Captions(), script=CountingScript())


def test_captions_of_another_making_are_not_overwritten(dataset):
    write_run(dataset_captions(dataset), "first", "write_story_world")
    with pytest.raises(ValueError, match="was made by write_story_world: choose another run"):
        run_stage(config(dataset), Captions(), script=CountingScript())


def dataset_captions(dataset: Path) -> Path:
    (dataset / "captions/first").mkdir(parents=True)
    return dataset


def test_a_damaged_shard_is_named_and_the_answers_before_it_are_kept(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", num_shards=2)
    path = dataset / "frames/000001.tar"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.rindex(b"\xff\xd8") + 40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"000001.tar: .* is damaged"):
        run_stage(config(dataset, in_flight=1), Captions(), script=CountingScript())
    script = CountingScript()
    with pytest.raises(ValueError, match="is damaged"):
        run_stage(config(dataset, in_flight=1), Captions(), script=script)
    assert script.asked.total() < 8


def test_a_task_runs_once_at_a_time(dataset, monkeypatch):
    monkeypatch.setattr(partition, "LOCK_PATIENCE_S", 0.1)
    with partition.locked(labels_folder(dataset, "first") / "tasks/global.0.lock", "busy"):
        with pytest.raises(ValueError, match="task 0 of run 'first' is running already"):
            run_stage(config(dataset), Captions(), script=CountingScript())


def test_the_key_is_in_no_file_log_or_error(dataset, monkeypatch, caplog, capfd):
    """The server shows the key in its error pages and in its refusal of a wrong one."""
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    caplog.set_level(logging.DEBUG)
    with serve(
        "openai", lambda parts: answer(VlmRequest("", parts, Caption)), faults={"html": 0.3}
    ) as server:
        vlm = VlmConfig("openai", "m", base_url=server.url, api_key_env="KEY_OF_TEST")
        settings = LabelingConfig(str(dataset), "first", vlm, back_off_s=1e-3)
        run_stage(settings, Captions())
        assert server.count("html") > 0 and len(content(dataset)) == 3
        (dataset / "labels/first/global/000001.jsonl").unlink()
        for path in ledger_files(labels_folder(dataset, "first"), "global"):
            path.unlink()
        monkeypatch.setenv("KEY_OF_TEST", wrong := KEY + "-wrong")
        with pytest.raises(ValueError, match="no request can succeed") as caught:
            run_stage(settings, Captions())
    assert wrong not in str(caught.value) and KEY.encode() not in pickle.dumps(caught.value)
    assert KEY not in caplog.text and KEY not in "".join(capfd.readouterr())
    for path in (dataset / "labels").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert b"KEY_OF_TEST" not in (dataset / "labels/first/run.json").read_bytes()
