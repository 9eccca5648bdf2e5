import asyncio
import json

import pytest
from pydantic import BaseModel

from storyanchors.vlm import VlmConfig, VlmReply, VlmRequest, VlmUsage, open_vlm


class Caption(BaseModel):
    caption: str


def ask(vlm, name="clip/global/1-3") -> VlmReply:
    return asyncio.run(vlm.ask(VlmRequest(name, ("Caption these.", b"jpeg"), Caption, max_tokens=100)))


def test_a_script_answers_and_is_charged_by_length():
    prices = dict(input_usd_per_million=1.0, output_usd_per_million=2.0, price_date="2026-11-01")
    vlm = open_vlm(
        VlmConfig("scripted", "echo", **prices), script=lambda request: json.dumps({"caption": request.name})
    )
    reply = ask(vlm)
    assert (reply.status, reply.answer.caption) == ("ok", "clip/global/1-3")
    assert vlm.usd(reply.usage) == pytest.approx(
        (reply.usage.input_tokens + 2 * reply.usage.output_tokens) / 1e6
    )
    assert reply.usage.output_tokens < vlm.estimate(VlmRequest("n", (), Caption)).output_tokens


def test_a_script_has_to_be_there():
    with pytest.raises(ValueError, match="script=story_world"):
        open_vlm(VlmConfig("scripted", "other"))


def test_identity_is_what_decides_answers_and_not_what_they_cost():
    script = str
    one = open_vlm(VlmConfig("scripted", "a"), script=script)
    assert one.identity != open_vlm(VlmConfig("scripted", "b"), script=script).identity
    dear = VlmConfig("scripted", "a", timeout_s=5, input_usd_per_million=9, price_date="2026-11-01")
    assert one.identity == open_vlm(dear, script=script).identity


def line(request, caption, **more) -> str:
    return json.dumps({"request": request, "text": json.dumps({"caption": caption}), **more})


def test_a_ledger_is_replayed(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            [
                line("clip/global/1-3", "first", status="ok"),
                line("clip/global/1-3", "last", status="ok"),
                line("clip/global/1-3", "failed", status="truncated"),
                '{"request": "torn", "te',
            ]
        )
    )
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl").write_text(line("other/global/1-2", "of another shard") + "\n")
    vlm = open_vlm(VlmConfig("replay", replay=str(tmp_path)))
    assert ask(vlm).answer.caption == "last"
    assert ask(vlm, "other/global/1-2").answer.caption == "of another shard"
    missing = ask(vlm, "third/global/1-2")
    assert missing.status == "fatal" and "third/global/1-2" in missing.detail
    assert missing.usage == VlmUsage() and vlm.usd(VlmUsage(10**6, 10**6)) == 0


def test_other_answers_have_another_identity(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line("n", "one"))
    before = open_vlm(VlmConfig("replay", replay=str(path))).identity
    path.write_text(line("n", "two"))
    assert open_vlm(VlmConfig("replay", replay=str(path))).identity != before


def test_answers_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad in ("[]", "{", '{"request": "n"}', '{"request": "n", "text": {"caption": "an object"}}'):
        path.write_text(line("n", "one") + f"\n{bad}\n" + line("m", "two") + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl:2"):
            open_vlm(VlmConfig("replay", replay=str(path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl file"):
        open_vlm(VlmConfig("replay", replay=str(tmp_path / "empty")))
