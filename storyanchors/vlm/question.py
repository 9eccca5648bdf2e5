"""The one typed question to a vision-language model: texts and images in, a checked answer or a failure out.

A backend never retries and never raises for what a server does; policy (waiting, repeating, giving up, money)
belongs to who asks.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from pydantic import BaseModel, ValidationError

STATUSES = ("ok", "blocked", "truncated", "invalid", "transient", "fatal")
DENIED = "denied"  # finish of a fatal reply that all requests would get: a bad key, no such model, an account
BYTES_PER_TOKEN = 3  # of text, at most: English has 4 and more, a Chinese character is 3 bytes
MAX_DETAIL = 400  # characters
FENCE = "```"


@dataclass(frozen=True)
class VlmRequest:
    """A question, and its answer's schema: flat, bounded, without defaults and extra="forbid" (Gemini)."""

    name: str  # <clip key>/<stage>/<first>-<last>: for logs, ledger and replay, never sent
    # texts and JPEG images in order: "Frame 13", b"\xff\xd8...", ...
    parts: tuple[str | bytes, ...] = field(repr=False)
    answer: type[BaseModel]
    max_tokens: int = 4096  # of the answer, the model's thoughts included


@dataclass(frozen=True)
class VlmUsage:
    """Tokens that are paid for; thoughts cost as much as output and are not part of it."""

    input_tokens: int = 0
    output_tokens: int = 0
    thought_tokens: int = 0

    def __add__(self, other: "VlmUsage") -> "VlmUsage":
        return VlmUsage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.thought_tokens + other.thought_tokens,
        )


@dataclass(frozen=True)
class VlmReply:
    """What became of a request.

    ok         answer holds the checked answer
    blocked    a filter refused the question or the answer; the same request would be refused again
    truncated  the answer reached max_tokens
    invalid    there is an answer, but it is not of the schema
    transient  nothing is wrong with the request: limits, server errors, time-outs, broken connections
    fatal      the request cannot succeed; with finish == DENIED no other request of the run can either
    """

    status: str
    answer: BaseModel | None
    text: str  # the raw answer, kept whatever became of it
    usage: VlmUsage
    finish: str  # the server's word for how it ended, "http 429" or the like where it sent no answer
    model_version: str
    detail: str = ""  # one line: why it is not ok; never holds a key
    retry_after_s: float | None = None  # the server's word: Retry-After, or RetryInfo.retryDelay
    quota: str = ""  # Gemini's quotaId of a 429: a limit per minute, or per day


class Vlm(Protocol):
    """A vision-language model that answers typed questions; open_vlm gives one."""

    identity: str  # what decides an answer besides the request; prices, time-outs and addresses do not

    async def ask(self, request: VlmRequest) -> VlmReply:
        """Sends the request once; raises nothing for what a server does."""

    def usd(self, usage: VlmUsage) -> float: ...

    def estimate(self, request: VlmRequest) -> VlmUsage:
        """At most what the request will use, before it is sent: all of max_tokens as output."""

    async def close(self) -> None: ...


def parse_answer(text: str, schema: type[BaseModel]) -> BaseModel:
    """The answer in a model's text, be it fenced as ```json; ValueError, in one line, for anything else."""
    text = text.strip()
    if not text.startswith("{") and text.count(FENCE) > 1:
        text = text[text.index(FENCE) : text.rindex(FENCE)].partition("\n")[2]
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole answer"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        problem = one_line(f"{where}: {first['msg']}{more}, found {str(first['input'])[:80]!r}")
        raise ValueError(f"not a {schema.__name__}: {problem}") from None


def read_reply(
    text: str, request: VlmRequest, usage: VlmUsage, *, finish: str, model_version: str
) -> VlmReply:
    """The reply to a text that its server calls finished: ok or invalid, transient where it is empty."""
    if not text.strip():
        return VlmReply("transient", None, text, usage, finish, model_version, "the answer is empty")
    try:
        answer = parse_answer(text, request.answer)
    except ValueError as error:
        return VlmReply("invalid", None, text, usage, finish, model_version, str(error))
    return VlmReply("ok", answer, text, usage, finish, model_version)


def failed(
    status: str, finish: str, detail: str, *, retry_after_s: float | None = None, quota: str = ""
) -> VlmReply:
    """The reply to a request that brought no answer and is not charged."""
    return VlmReply(status, None, "", VlmUsage(), finish, "", one_line(detail), retry_after_s, quota)


def too_many_images(request: VlmRequest, max_images: int) -> VlmReply | None:
    """The reply to a request that the model would not take, so that it need not be sent."""
    num_images = sum(isinstance(part, bytes) for part in request.parts)
    if num_images <= max_images:
        return None
    return failed("fatal", "images", f"found {num_images} images, at most {max_images} (vlm.max_images)")


def estimate_usage(request: VlmRequest, *, image_tokens: int, max_tokens: int) -> VlmUsage:
    num_bytes = sum(len(part.encode()) for part in request.parts if isinstance(part, str))
    num_bytes += len(schema_json(request.answer))
    num_images = sum(isinstance(part, bytes) for part in request.parts)
    input_tokens = -(-num_bytes // BYTES_PER_TOKEN) + image_tokens * num_images
    return VlmUsage(input_tokens, min(request.max_tokens, max_tokens))


@lru_cache(maxsize=64)
def schema_json(schema: type[BaseModel]) -> str:
    """The answer's JSON schema; its properties stay in order, in which guided decoding writes them."""
    return json.dumps(schema.model_json_schema())


def schema_words(schema: type[BaseModel]) -> str:
    """The schema for a model whose server cannot be told it."""
    return f"Answer with one JSON object and nothing else. Its JSON schema: {schema_json(schema)}"


def one_line(text: str) -> str:
    """A server's words as a detail: short, on one line, and such that a file takes them."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 3] + "..."
