import json
import os
from dataclasses import replace

import pytest
from pydantic import BaseModel

from data_pipeline.labeling.ledger import (
    LedgerLine,
    ShardLedger,
    count_money,
    ledger_files,
    read_lines,
    request_key,
)
from storyanchors.vlm import VlmRequest, VlmUsage


class Answer(BaseModel):
    caption: str


class Other(BaseModel):
    caption: int


REQUEST = VlmRequest("clip-1/global/1-2", ("Frame 1", b"\xff\xd8one", "Frame 2", b"\xff\xd8two"), Answer, 100)


def line(
    key: str = "k", *, attempt: int = 1, status: str = "ok", usd: float = 0.25, text: str = "{}"
) -> LedgerLine:
    usage = VlmUsage(10, 20, 3)
    return LedgerLine(
        key,
        "clip-1/global/1-2",
        "clip-1",
        "global",
        attempt,
        status,
        "stop",
        text,
        usage,
        usd,
        "m-1",
        1.5,
        0.1,
        "w",
        "",
    )


def test_lines_come_back_whatever_the_model_wrote():
    for text in ('{"caption": "\u201cna\u00efve\u201d\n\u2028\x00"}', "\ud800 half a pair", "x" * 100_000):
        assert LedgerLine.from_json(line(text=text).to_json()) == line(text=text)
    with pytest.raises(ValueError, match="no ledger line"):
        LedgerLine.from_json(b'{"key": 1}')


def test_a_key_changes_with_all_that_decides_the_answer_and_with_nothing_else():
    def key(stage="events", ids=("a", "b"), identity="gemini/1 m", **changes) -> str:
        return request_key(stage, ids, identity, replace(REQUEST, **changes))

    one, two = REQUEST.parts[1], REQUEST.parts[3]
    others = [
        key(stage="story"),
        key(ids=("a", "c")),
        key(identity="gemini/1 n"),
        key(answer=Other),
        key(max_tokens=101),
        key(parts=("Frame 1", one, "Frame 3", two)),
        key(parts=("Frame 1", two, "Frame 2", one)),
        key(parts=("Frame 1", one, "Frame 2", two, "")),
        key(parts=("Frame 1", one.decode("latin-1"), "Frame 2", two)),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(name="clip-2/global/1-2") == key(ids=("b", "a"))


def test_an_answer_is_found_by_the_next_writer_and_a_failure_is_not_one(tmp_path):
    first = ShardLedger(tmp_path, "global", "000001", "w1")
    assert first.begin("k", "clip-1/global/1-2", 0.5) == 1
    first.end(line(status="transient", usd=0.0))
    assert first.answer("k") is None and len(first.failures("k")) == 1
    assert first.begin("k", "clip-1/global/1-2", 0.5) == 2
    first.end(line(attempt=2))
    first.close()
    second = ShardLedger(tmp_path, "global", "000001", "w2")
    assert second.answer("k") == line(attempt=2) and len(second.failures("k")) == 1
    assert second.begin("k", "clip-1/global/1-2", 0.5) == 3
    assert ShardLedger(tmp_path, "global", "000002", "w3").answer("k") is None
    assert ShardLedger(tmp_path, "events", "000001", "w3").answer("k") is None


def test_nothing_is_written_before_something_is_sent(tmp_path):
    ShardLedger(tmp_path, "global", "000001", "w1").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail", [b'{"key": "to', b"\0" * 300, b""])
def test_what_a_crash_tore_is_no_line(tmp_path, tail):
    ledger = ShardLedger(tmp_path, "global", "000001", "w1")
    ledger.begin("k", "clip-1/global/1-2", 0.5)
    ledger.begin("l", "clip-2/global/1-2", 0.5)
    ledger.end(line())
    ledger.close()
    for path in (ledger.path, ledger.path.with_suffix(".sent")):
        path.write_bytes(path.read_bytes() + tail)
    assert list(read_lines(ledger.path)) == [line()]
    money = count_money(tmp_path, "global")
    assert (money.num_requests, money.usd, money.in_doubt, money.in_doubt_usd) == (
        1,
        0.25,
        ["clip-2/global/1-2"],
        0.5,
    )


def test_a_line_that_is_none_is_named(tmp_path):
    ledger = ShardLedger(tmp_path, "global", "000001", "w1")
    ledger.begin("k", "clip-1/global/1-2", 0.5)
    ledger.end(line())
    ledger.close()
    ledger.path.write_bytes(b"[]\n" + ledger.path.read_bytes())
    with pytest.raises(ValueError, match=rf"{ledger.path}, line 1: no ledger line"):
        ShardLedger(tmp_path, "global", "000001", "w2")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    ledger = ShardLedger(tmp_path, "global", "000001", "w1")
    ledger.begin("k", "clip-1/global/1-2", 0.5)
    write, room = os.write, [40]

    def full(file: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(file, content[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        ledger.end(line())
    room[0] = 10_000
    ledger.end(line(attempt=2))
    assert [one.attempt for one in read_lines(ledger.path)] == [2]


def test_money_is_counted_over_writers_and_only_of_the_shards_that_are_asked_for(tmp_path):
    for number in range(3):
        for writer in ("w1", "w2"):
            ledger = ShardLedger(tmp_path, "global", f"{number:06d}", writer)
            ledger.begin("k", "clip-1/global/1-2", 0.5)
            ledger.end(line(status="invalid"))
            ledger.close()
    money = count_money(tmp_path, "global")
    assert (money.num_requests, money.usd, money.usage) == (6, 1.5, VlmUsage(60, 120, 18))
    assert money.statuses == {"invalid": 6}
    assert count_money(tmp_path, "global", ["000001"]).usd == 0.5
    assert count_money(tmp_path, "story").usd == 0.0
    assert len(ledger_files(tmp_path, "global", "000002")) == 2


def test_a_ledger_is_what_replay_reads(tmp_path):
    ledger = ShardLedger(tmp_path, "global", "000001", "w1")
    ledger.begin("k", "clip-1/global/1-2", 0.5)
    ledger.end(line(text='{"caption": "a boat"}'))
    record = json.loads(ledger.path.read_text())
    assert (record["request"], record["text"], record["status"]) == (
        "clip-1/global/1-2",
        '{"caption": "a boat"}',
        "ok",
    )
