"""The Gemini SDK and our OpenAI client against servers that speak their HTTP: one law, both protocols."""

import asyncio
import json
import logging
import pickle
import sys
import time
from collections.abc import Iterable

import pytest
from pydantic import BaseModel, Field

from storyanchors.vlm import DENIED, VlmConfig, VlmReply, VlmRequest, VlmUsage, open_vlm
from tests.vlm_servers import (
    INPUT_USD_PER_MILLION,
    KEY,
    OUTPUT_USD_PER_MILLION,
    PAID,
    UNPAID,
    VlmServer,
    serve,
)

pytestmark = pytest.mark.filterwarnings("ignore:PONDERED is not a valid FinishReason")


class Event(BaseModel):
    first_frame: int = Field(ge=1, le=999)
    description: str = Field(max_length=300)


class Events(BaseModel):
    events: list[Event] = Field(max_length=20)


ANSWER = json.dumps({"events": [{"first_frame": 3, "description": "Ada runs \u2014 to the hangar."}]})
PARTS = ("List the events.", "Frame 3", b"\xff\xd8 three", "Frame 4", b"\xff\xd8 four \x00\xff")


@pytest.fixture(params=("gemini", "openai"))
def server(request):
    with serve(request.param, lambda parts: ANSWER, hang_s=5) as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLM_TEST_KEY", KEY)


def config_of(server: VlmServer, **settings) -> VlmConfig:
    known = {
        "model": "m",
        "base_url": server.url,
        "api_key_env": "VLM_TEST_KEY",
        "timeout_s": 5.0,
        "input_usd_per_million": INPUT_USD_PER_MILLION,
        "output_usd_per_million": OUTPUT_USD_PER_MILLION,
        "price_date": "2026-11-20",
    }
    return VlmConfig(backend=server.protocol, **(known | settings))


QUESTION = VlmRequest("clip/events/3-4", PARTS, Events, max_tokens=500)


def ask_all(server: VlmServer, faults: Iterable[str | None], question=QUESTION, **settings) -> list[VlmReply]:
    """The replies to one question asked again and again, each time with one of these faults."""

    async def one_after_the_other() -> list[VlmReply]:
        vlm, replies = open_vlm(config_of(server, **settings)), []
        for fault in faults:
            if fault is not None:
                server.queue.append(fault)
            replies.append(await vlm.ask(question))
        await vlm.close()
        return replies

    return asyncio.run(one_after_the_other())


def ask(server: VlmServer, fault: str | None = None, question=QUESTION, **settings) -> VlmReply:
    [reply] = ask_all(server, [fault], question, **settings)
    return reply


def test_a_question_arrives_as_it_is_and_its_answer_is_checked(server):
    asked = []
    server.answer = lambda parts: asked.append(parts) or ANSWER
    reply = ask(server)
    assert asked == [PARTS]
    assert reply.status == "ok" and reply.answer == Events.model_validate_json(ANSWER)
    assert reply.text == ANSWER and reply.finish.lower() == "stop" and "local" in reply.model_version


def test_what_the_ledger_counts_is_what_the_server_charges(server):
    faults = ("", "truncated", "schema", "blocked_question", "unknown_finish", "server_error", "fenced")
    replies = ask_all(server, faults)
    vlm = open_vlm(config_of(server))
    assert sum(vlm.usd(reply.usage) for reply in replies) == pytest.approx(server.usd, rel=1e-12)
    assert replies[0].usage.thought_tokens > 0
    estimate = vlm.estimate(QUESTION)
    assert estimate.input_tokens >= replies[0].usage.input_tokens and estimate.output_tokens == 500


STATUS = {
    "rate_limit": "transient",
    "server_error": "transient",
    "garbage": "transient",
    "html": "transient",
    "hang": "transient",
    "drop": "transient",
    "drop_midway": "transient",
    "redirect": "fatal",
    "truncated": "truncated",
    "cut": "invalid",
    "fenced": "ok",
    "schema": "invalid",
    "empty": "transient",
    "blocked_question": "blocked",
    "blocked_answer": "blocked",
    "unknown_finish": "transient",
}


def test_every_fault_has_its_name_and_is_sent_once(server):
    assert set(STATUS) | {"rate_limit_per_day"} == {*UNPAID, *PAID}
    replies = ask_all(server, STATUS, timeout_s=0.4)
    assert {fault: reply.status for fault, reply in zip(STATUS, replies)} == STATUS
    assert [request.fault for request in server.served] == list(STATUS)
    for fault, reply in zip(STATUS, replies):
        assert (reply.answer is not None) == (reply.status == "ok") == (not reply.detail), fault
        assert "\n" not in reply.detail
        assert (reply.usage == VlmUsage()) == (fault in UNPAID), fault
        assert bool(reply.text) == (fault in {"truncated", "cut", "fenced", "schema", "unknown_finish"}), (
            fault
        )


def test_a_server_that_says_when_is_heard(server):
    server.retry_after_s = 7.5
    assert ask(server, "rate_limit").retry_after_s == 7.5
    assert ask(server, "server_error").retry_after_s is None


def test_a_limit_per_day_is_told_from_one_per_minute():
    with serve("gemini", lambda parts: ANSWER) as server:
        assert "PerMinute" in ask(server, "rate_limit").quota
        reply = ask(server, "rate_limit_per_day")
        assert reply.status == "transient" and "PerDay" in reply.quota
    with serve("openai", lambda parts: ANSWER) as server:
        reply = ask(server, "rate_limit_per_day")  # insufficient_quota: an account without money
        assert (reply.status, reply.finish) == ("fatal", DENIED)


def test_a_time_out_is_for_the_whole_request(server):
    began = time.monotonic()
    reply = ask(server, "hang", timeout_s=0.2)
    assert (reply.status, reply.finish) == ("transient", "timeout") and time.monotonic() - began < 2


def test_a_server_that_is_not_there_is_a_reply_too(server):
    assert ask(server, base_url="http://127.0.0.1:9/v1").finish == "connection"


def test_a_bad_key_and_an_absent_model_end_the_run(server, monkeypatch):
    monkeypatch.setenv("VLM_TEST_KEY", "sk-OTHER-MARKED")
    reply = ask(server)
    assert (reply.status, reply.finish) == ("fatal", DENIED) and "MARKED" not in repr(reply)
    monkeypatch.setenv("VLM_TEST_KEY", KEY)
    if server.protocol == "gemini":
        assert ask(server, model="absent").finish == DENIED


def test_too_many_images_are_not_even_sent(server):
    reply = ask(server, max_images=1)
    assert reply.status == "fatal" and "found 2 images, at most 1" in reply.detail
    assert server.num_requests == 0


def test_tokens_end_at_the_model_s_most(server):
    for max_tokens, expected in ((999, 300), (200, 200)):
        with_limit = VlmRequest("clip/events/3-4", PARTS, Events, max_tokens)
        assert ask(server, question=with_limit, max_tokens=300).status == "ok"
        body = server.bodies[-1]
        assert body.get("max_tokens", body.get("generationConfig", {}).get("maxOutputTokens")) == expected


def test_a_hundred_requests_are_in_flight_on_one_client(server):
    server.latency_s = 0.5

    async def all_at_once() -> list[VlmReply]:
        vlm = open_vlm(config_of(server, timeout_s=30.0))
        try:
            return await asyncio.gather(*(vlm.ask(QUESTION) for _ in range(120)))
        finally:
            await vlm.close()

    assert {reply.status for reply in asyncio.run(all_at_once())} == {"ok"}
    assert server.most_in_flight >= 100


def test_the_key_is_in_no_reply_log_exception_or_pickle(server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    replies = ask_all(server, ["", *UNPAID, *PAID], timeout_s=0.3)
    vlm = open_vlm(config_of(server))
    with pytest.raises(TypeError) as refused:
        pickle.dumps(vlm)
    shown = [caplog.text, *capfd.readouterr(), repr(vlm), repr(vlm.config), vlm.identity, str(refused.value)]
    shown += [repr(reply) + json.dumps(reply.text) for reply in replies]
    assert not any("MARKED" in text for text in shown)
    for record in caplog.records:
        assert "MARKED" not in repr(record.__dict__)
    for held in (replies, vlm.config):
        assert b"MARKED" not in pickle.dumps(held)


def test_identity_is_what_decides_answers(server):
    def identity(**settings) -> str:
        return open_vlm(config_of(server, **settings)).identity

    same = identity()
    for settings in ({"model": "other"}, {"temperature": 0.5}, {"seed": 1}, {"max_tokens": 100}):
        assert identity(**settings) != same
    assert identity(timeout_s=9.0, base_url="http://127.0.0.1:9/v1", output_usd_per_million=1.0) == same
    decides = {"gemini": {"media_resolution": "high"}, "openai": {"json_mode": "none"}}[server.protocol]
    assert identity(**decides) != same


def test_gemini_is_asked_with_its_settings_said_and_its_schema():
    with serve("gemini", lambda parts: ANSWER) as server:
        ask(server, media_resolution="medium", thinking_level="low", service_tier="flex", seed=5)
        body, settings = server.bodies[-1], server.bodies[-1]["generationConfig"]
        assert server.path == "/v1beta/models/m:generateContent"
        assert settings["mediaResolution"] == "MEDIA_RESOLUTION_MEDIUM" and settings["seed"] == 5
        assert list(settings["thinkingConfig"].values()) == ["LOW"] and body["serviceTier"] == "flex"
        assert settings["responseMimeType"] == "application/json"
        schema = settings["responseSchema"]["properties"]["events"]
        assert schema["max_items"] == 20 and "max_length" in str(schema)
        ask(server, api_version="v1")
        assert server.path.startswith("/v1/")


def test_an_openai_server_is_told_the_schema_in_its_own_way():
    with serve("openai", lambda parts: ANSWER) as server:
        for mode in ("json_schema", "structured_outputs", "json_object", "none"):
            assert ask(server, json_mode=mode, seed=5).status == "ok"
        schema, structured, any_object, nothing = server.bodies
        strict = schema["response_format"]["json_schema"]["schema"]
        assert strict == structured["structured_outputs"]["json"]
        assert strict["additionalProperties"] is False
        assert list(strict["$defs"]["Event"]["properties"]) == ["first_frame", "description"]
        assert strict["$defs"]["Event"]["additionalProperties"] is False
        assert any_object["response_format"] == {"type": "json_object"} and "response_format" not in nothing
        assert schema["seed"] == 5
        for body, num_parts in ((schema, 5), (structured, 5), (any_object, 6), (nothing, 6)):
            assert len(body["messages"][0]["content"]) == num_parts
        assert '"maxItems": 20' in nothing["messages"][0]["content"][-1]["text"]


def test_a_server_without_keys_gets_none():
    with serve("openai", lambda parts: ANSWER) as server:
        reply = ask(server, api_key_env=None)
        assert reply.finish == DENIED and "authorization" not in server.headers


def test_gemini_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "storyanchors.vlm.gemini", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[gemini\]'"):
        open_vlm(VlmConfig("gemini", "m", api_key_env="VLM_TEST_KEY"))


@pytest.mark.parametrize("status", [200, 400])
def test_no_body_of_a_response_raises(server, status):
    bodies = [b"", b"[1]", b"5", b'{"candidates": 5, "choices": 5}', b"\xff\xfe", b'{"a":' * 100_000]
    bodies += [b'{"candidates": [{"content": "x"}], "choices": [{"message": null}]}', b'{"error": "x"}']
    bodies += [b'{"error": {"details": [{"violations": [1], "retryDelay": []}, 7], "message": "\\ud83d"}}']
    waiting = iter(bodies)
    server._error = lambda fault, headers: (status, next(waiting), {})
    replies = ask_all(server, ["html"] * len(bodies))
    assert [reply.detail.encode() for reply in replies]  # a file takes them
    assert {reply.status for reply in replies} <= {"transient", "fatal"}
    assert all(reply.detail and reply.usage == VlmUsage() for reply in replies)


def test_a_server_can_spoil_the_questions_about_the_same_pictures_only_once():
    with serve("openai", lambda parts: ANSWER, faults={"schema": 1.0}, spoil_once=True) as server:
        about_the_same = VlmRequest("n", ("Repair this.", *PARTS), Events, 500)
        about_others = VlmRequest("n", ("Frame 3", b"\xff\xd8 other"), Events, 500)
        questions = (QUESTION, QUESTION, about_the_same, about_others)
        statuses = [ask(server, question=question).status for question in questions]
        assert statuses == ["invalid", "ok", "ok", "invalid"]


def test_what_a_server_does_not_count_is_charged_at_most(server):
    server._settle = lambda *settled: None
    replies = {"gemini": {"candidates": [{"finishReason": "STOP", "content": {"parts": [{"text": ANSWER}]}}]}}
    replies["openai"] = {"choices": [{"message": {"content": ANSWER}, "finish_reason": "stop"}]}
    server._error = lambda fault, headers: (200, json.dumps(replies[server.protocol]).encode(), {})
    reply = ask(server, "html")
    assert reply.status == "ok" and reply.usage == open_vlm(config_of(server)).estimate(QUESTION)


def test_refusals_of_openai_servers_are_blocked():
    message = {"content": None, "refusal": "I cannot\nlook at this."}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "model": "m"}
    filtered = {"error": {"code": "content_filter", "message": "The prompt was filtered."}}
    with serve("openai", lambda parts: ANSWER) as server:
        waiting = iter([(200, json.dumps(body).encode(), {}), (400, json.dumps(filtered).encode(), {})])
        server._error = lambda fault, headers: next(waiting)
        refused, blocked = ask_all(server, ["html", "html"])
    assert (refused.status, refused.detail) == ("blocked", "I cannot look at this.")
    assert (blocked.status, blocked.usage) == ("blocked", VlmUsage())


def test_a_model_that_is_closed_leaves_no_connection(server):
    vlm = open_vlm(config_of(server))

    async def ask_and_close() -> None:
        assert (await vlm.ask(QUESTION)).status == "ok"
        await vlm.close()
        with pytest.raises(RuntimeError, match="closed"):
            await vlm.ask(QUESTION)

    asyncio.run(ask_and_close())


def test_half_an_emoji_can_be_written_to_a_file():
    with serve("gemini", lambda parts: ANSWER[:-8] + "\ud83d") as server:
        reply = ask(server)
    assert reply.status == "invalid" and reply.text.encode().endswith(b"?")
