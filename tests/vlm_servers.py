"""Local servers that speak Gemini's and OpenAI's HTTP, with faults on request; they count requests and money.

    with serve("gemini", answer, faults={"rate_limit": 0.05}) as server:
        VlmConfig("gemini", "m", base_url=server.url, api_key_env="KEY_OF_TEST")  # os.environ: KEY

answer(parts) gives the right answer as JSON text; parts are the texts and JPEG images in order.
"""

import asyncio
import base64
import hashlib
import json
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KEY = "sk-MARKED-0123456789"  # what the servers want; no file, log or error may hold it
IMAGE_TOKENS, BYTES_PER_TOKEN, THOUGHT_TOKENS = 258, 4, 7
INPUT_USD_PER_MILLION, OUTPUT_USD_PER_MILLION = 0.75, 3.75

# not charged: nothing or no answer is delivered
UNPAID = (
    "rate_limit",
    "rate_limit_per_day",
    "server_error",
    "html",
    "garbage",
    "hang",
    "drop",
    "drop_midway",
    "redirect",
)
# charged: these come as answers
PAID = (
    "truncated",
    "cut",
    "fenced",
    "schema",
    "empty",
    "blocked_question",
    "blocked_answer",
    "unknown_finish",
)
FAULTS = UNPAID + PAID

Parts = tuple[str | bytes, ...]


@dataclass(frozen=True)
class Served:
    """One request as the server saw it; it is settled when the answer is handed to the network."""

    key: str  # sha256 of the body: the same question has the same key
    fault: str  # "" for none
    tokens: tuple[int, int, int]  # input, output, thoughts
    usd: float


@dataclass
class VlmServer:
    protocol: str  # gemini | openai
    answer: Callable[[Parts], str]
    rates: dict[str, float] = field(default_factory=dict)  # fault -> share of requests
    seed: int = 0
    spoil_once: bool = (
        False  # of the questions with the same pictures, repairs too, only one gets a PAID fault
    )
    latency_s: float = 0.0
    hang_s: float = 30.0
    retry_after_s: float = 0.05
    url: str = ""
    queue: deque[str] = field(default_factory=deque)  # faults of the next requests, "" for none, before rates
    served: list[Served] = field(default_factory=list)
    bodies: deque[dict] = field(default_factory=lambda: deque(maxlen=4))  # the latest, decoded
    headers: dict[str, str] = field(default_factory=dict)  # of the latest request
    path: str = ""  # of the latest request
    in_flight: int = 0
    most_in_flight: int = 0
    attempts: Counter[str] = field(default_factory=Counter)  # of each key
    spoiled: set[str] = field(default_factory=set)  # sha256 of pictures

    @property
    def usd(self) -> float:
        return sum(request.usd for request in self.served)

    @property
    def num_requests(self) -> int:
        return sum(self.attempts.values())

    def count(self, fault: str) -> int:
        return sum(request.fault == fault for request in self.served)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests one after the other until either side closes."""
        try:
            while request := await _read_request(reader):
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    await self._respond(*request, writer)
                finally:
                    self.in_flight -= 1
                if writer.is_closing():
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _respond(
        self, path: str, headers: dict[str, str], content: bytes, writer: asyncio.StreamWriter
    ) -> None:
        body = json.loads(content)
        self.path, self.headers = path, headers
        self.bodies.append(body)
        if (refused := self._refuse(path, headers)) is not None:
            await _send(writer, *refused)
            return
        key = hashlib.sha256(content).hexdigest()
        self.attempts[key] += 1
        parts, limit = (_gemini_parts if self.protocol == "gemini" else _openai_parts)(body)
        fault = self.queue.popleft() if self.queue else self._draw(key)
        if self.spoil_once and fault in PAID:
            pictures = hashlib.sha256(
                b"|".join(part for part in parts if isinstance(part, bytes))
            ).hexdigest()
            fault = "" if pictures in self.spoiled else fault
            self.spoiled.add(pictures)
        await asyncio.sleep(self.latency_s)
        if fault in ("hang", "drop", "drop_midway"):
            self._settle(key, fault, (0, 0, 0))
            await self._break_off(fault, writer)
        elif fault in UNPAID:
            self._settle(key, fault, (0, 0, 0))
            await _send(writer, *self._error(fault, headers))
        else:
            text = self.answer(parts)
            if len(text.encode(errors="replace")) > limit * BYTES_PER_TOKEN:
                fault = "truncated"
            text = _spoil(fault, text)
            tokens = (
                _count(parts),
                -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN),
                THOUGHT_TOKENS if text else 0,
            )
            reply = (_gemini_reply if self.protocol == "gemini" else _openai_reply)(fault, text, tokens)
            self._settle(key, fault, tokens)
            await _send(writer, 200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _draw(self, key: str) -> str:
        """The fault of this attempt at this question: the same in every run, in whatever order they come."""
        share = random.Random(f"{self.seed}/{key}/{self.attempts[key]}").random()
        for fault, rate in self.rates.items():
            if share < rate:
                return fault
            share -= rate
        return ""

    def _settle(self, key: str, fault: str, tokens: tuple[int, int, int]) -> None:
        num_input, num_output, num_thoughts = tokens
        dollars = num_input * INPUT_USD_PER_MILLION + (num_output + num_thoughts) * OUTPUT_USD_PER_MILLION
        self.served.append(Served(key, fault, tokens, dollars / 1e6))

    def _refuse(self, path: str, headers: dict[str, str]) -> tuple[int, bytes, dict] | None:
        """What a server says to a bad key or a model that it does not have."""
        if self.protocol == "gemini":
            if headers.get("x-goog-api-key") != KEY:
                reason = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
                return _gemini_error(400, "INVALID_ARGUMENT", "API key not valid.", [reason])
            if "/models/absent:" in path:
                return _gemini_error(404, "NOT_FOUND", "models/absent is not found", [])
            return None
        if headers.get("authorization") != f"Bearer {KEY}":
            shown = headers.get("authorization", "")  # some gateways show the whole key
            return _openai_error(401, "invalid_api_key", f"Incorrect API key provided: {shown}")
        return None

    def _error(self, fault: str, headers: dict[str, str]) -> tuple[int, bytes, dict]:
        if fault == "garbage":
            return 200, b"<html>Your session has expired.</html>", {"Content-Type": "text/html"}
        if fault == "redirect":
            return 307, b"", {"Location": f"{self.url}/elsewhere"}
        if fault == "html":
            shown = "\n".join(f"{name}: {value}" for name, value in headers.items())
            page = f"<html><title>502 Bad Gateway</title><pre>{shown}</pre></html>"
            return 502, page.encode(), {"Content-Type": "text/html"}
        make_error = _gemini_error if self.protocol == "gemini" else _openai_error
        if fault == "server_error":
            return make_error(500, "INTERNAL", "An internal error has occurred.")
        if self.protocol == "openai":
            code = "insufficient_quota" if fault == "rate_limit_per_day" else "rate_limit_exceeded"
            status, body, more = make_error(429, code, "Too many requests.")
            return status, body, more | {"Retry-After": f"{self.retry_after_s:g}"}
        limit = "PerDay" if fault == "rate_limit_per_day" else "PerMinute"
        quota = f"GenerateRequests{limit}PerProjectPerModel"
        details = [
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{self.retry_after_s:g}s"},
        ]
        return make_error(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota.", details)

    async def _break_off(self, fault: str, writer: asyncio.StreamWriter) -> None:
        if fault == "hang":
            await asyncio.sleep(self.hang_s)
        if fault == "drop_midway":
            writer.write(
                b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"c'
            )
            await writer.drain()
        writer.transport.abort()


@contextmanager
def serve(
    protocol: str, answer: Callable[[Parts], str], *, faults: dict[str, float] | None = None, **settings
) -> Iterator[VlmServer]:
    """A server on a free port of 127.0.0.1, in a thread of its own; settings are VlmServer's."""
    unknown = set(faults or {}) - set(FAULTS)
    if protocol not in ("gemini", "openai") or unknown:
        raise ValueError(f"protocol {protocol!r}, unknown faults {sorted(unknown)}, known: {FAULTS}")
    server = VlmServer(protocol, answer, faults or {}, **settings)
    started, stop = threading.Event(), []

    async def run() -> None:
        listener = await asyncio.start_server(server.connected, "127.0.0.1", 0, backlog=512)
        port = listener.sockets[0].getsockname()[1]
        server.url = f"http://127.0.0.1:{port}" + ("/v1" if protocol == "openai" else "")
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
        started.set()
        await stopped.wait()
        listener.close()  # its connections end with the loop

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        stop[0]()
        thread.join()


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    """Path, headers in lower case, body; None where the client has closed."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first.split()[1], headers, await reader.readexactly(int(headers["content-length"]))


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str]) -> None:
    lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Failed'}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await writer.drain()


def _count(parts: Parts) -> int:
    num_bytes = sum(len(part.encode()) for part in parts if isinstance(part, str))
    return -(-num_bytes // BYTES_PER_TOKEN) + IMAGE_TOKENS * sum(isinstance(part, bytes) for part in parts)


def _spoil(fault: str, text: str) -> str:
    """The answer as this fault delivers it."""
    if fault in ("truncated", "cut"):
        return text[: len(text) // 2]
    if fault == "fenced":
        return f"```json\n{text}\n```"
    if fault == "schema":
        return json.dumps({"answer": json.loads(text)})
    if fault in ("empty", "blocked_question", "blocked_answer"):
        return ""
    return text


def _gemini_parts(body: dict) -> tuple[Parts, int]:
    parts = tuple(
        part["text"] if "text" in part else base64.b64decode(part["inlineData"]["data"], altchars=b"-_")
        for content in body["contents"]
        for part in content["parts"]
    )
    return parts, body["generationConfig"]["maxOutputTokens"]


def _gemini_reply(fault: str, text: str, tokens: tuple[int, int, int]) -> dict:
    num_input, num_output, num_thoughts = tokens
    usage = {"promptTokenCount": num_input, "totalTokenCount": sum(tokens)}
    reply = {"usageMetadata": usage, "modelVersion": "gemini-local-001", "responseId": "r"}
    if fault == "blocked_question":
        return reply | {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}
    usage |= {"candidatesTokenCount": num_output, "thoughtsTokenCount": num_thoughts}
    reasons = {"truncated": "MAX_TOKENS", "blocked_answer": "SAFETY", "unknown_finish": "PONDERED"}
    candidate = {"finishReason": reasons.get(fault, "STOP"), "index": 0}
    if text:
        candidate["content"] = {"role": "model", "parts": [{"text": text}]}
    return reply | {"candidates": [candidate]}


def _gemini_error(
    status: int, name: str, message: str, details: list[dict] | None = None
) -> tuple[int, bytes, dict]:
    error = {"code": status, "message": message, "status": name, "details": details or []}
    return status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"}


def _openai_parts(body: dict) -> tuple[Parts, int]:
    content = [part for message in body["messages"] for part in message["content"]]
    parts = tuple(
        part["text"]
        if part["type"] == "text"
        else base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"), validate=True)
        for part in content
    )
    return parts, body["max_tokens"]


def _openai_reply(fault: str, text: str, tokens: tuple[int, int, int]) -> dict:
    num_input, num_output, num_thoughts = tokens
    reasons = {
        "truncated": "length",
        "blocked_question": "content_filter",
        "blocked_answer": "content_filter",
        "unknown_finish": "pondered",
    }
    message = {"role": "assistant", "content": text or None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "local-vlm-001",
        "choices": [{"index": 0, "message": message, "finish_reason": reasons.get(fault, "stop")}],
        "usage": {
            "prompt_tokens": num_input,
            "completion_tokens": num_output + num_thoughts,
            "total_tokens": sum(tokens),
            "completion_tokens_details": {"reasoning_tokens": num_thoughts},
        },
    }


def _openai_error(status: int, code: str, message: str) -> tuple[int, bytes, dict]:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"}
