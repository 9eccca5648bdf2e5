"""Any server that speaks OpenAI's chat completions: vLLM, SGLang, LMDeploy, a gateway, an in-house model.

How the server is told the schema (json_mode) is what differs between them:
json_schema response_format of that type (vLLM, SGLang, OpenAI); structured_outputs vLLM's own, since 0.12;
json_object any JSON; none nothing. With the last two the schema is told as text.
"""

import base64
import json
from datetime import UTC, datetime
from functools import lru_cache

from pydantic import BaseModel, Field, ValidationError

from storyanchors.vlm.config import VlmConfig, read_key
from storyanchors.vlm.http import NoResponse, one_exchange, open_client, seconds_to_wait, status_of
from storyanchors.vlm.question import (
    DENIED,
    VlmReply,
    VlmRequest,
    VlmUsage,
    estimate_usage,
    failed,
    one_line,
    read_reply,
    schema_json,
    schema_words,
    too_many_images,
)

ADAPTER = 1  # another number whenever other bytes are sent for the same request
HIDDEN = b"***"


class OpenAIVlm:
    """One client for all requests; the key is in its headers and nowhere else."""

    def __init__(self, config: VlmConfig):
        self.config, self._key = config, read_key(config)
        self.identity = config.identity(ADAPTER, ("model", "json_mode", "temperature", "seed", "max_tokens"))
        self._client = open_client({"Authorization": f"Bearer {self._key}"} if self._key else None)
        self._url = config.base_url.rstrip("/") + "/chat/completions"

    def __reduce__(self):
        raise TypeError("a model that holds a key is opened in the process that asks it, never pickled")

    async def ask(self, request: VlmRequest) -> VlmReply:
        if refused := too_many_images(request, self.config.max_images):
            return refused
        try:
            async with one_exchange(self.config.timeout_s):
                response = await self._client.post(self._url, json=self._body(request))
        except NoResponse as error:
            return error.reply
        content = response.content
        if self._key:  # some gateways show it in their errors
            content = content.replace(self._key.encode(), HIDDEN)
        if response.status_code != 200:
            wait_s = seconds_to_wait(response.headers, datetime.now(UTC))
            return _read_error(response.status_code, content, wait_s)
        try:
            completion = _Completion.model_validate_json(content)
        except ValidationError:
            return failed("transient", "http 200", f"not a completion: {_shown(content)}")
        return self._read_completion(completion, request)

    def _body(self, request: VlmRequest) -> dict:
        content = [_part(part) for part in request.parts]
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": min(request.max_tokens, self.config.max_tokens),
            "temperature": self.config.temperature,
        }
        if self.config.seed is not None:
            body["seed"] = self.config.seed
        match self.config.json_mode:
            case "json_schema":
                schema = {
                    "name": request.answer.__name__,
                    "strict": True,
                    "schema": strict_schema(request.answer),
                }
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            case "structured_outputs":
                body["structured_outputs"] = {"json": strict_schema(request.answer)}
            case mode:
                content.append(_part(schema_words(request.answer)))
                if mode == "json_object":
                    body["response_format"] = {"type": "json_object"}
        return body

    def _read_completion(self, completion: "_Completion", request: VlmRequest) -> VlmReply:
        choice = completion.choices[0]
        text, finish, model = choice.message.content or "", choice.finish_reason or "none", completion.model
        # a server that does not count is charged at most, so that max_usd holds
        usage = completion.usage.as_usage() if completion.usage else self.estimate(request)
        if finish == "stop" and not choice.message.refusal:
            return read_reply(text, request, usage, finish=finish, model_version=model)
        if finish == "length":
            return VlmReply("truncated", None, text, usage, finish, model, "the answer reached max_tokens")
        if finish == "content_filter" or choice.message.refusal:
            detail = one_line(choice.message.refusal or "the server's filter refused it")
            return VlmReply("blocked", None, text, usage, finish, model, detail)
        return VlmReply("transient", None, text, usage, finish, model, f"finish_reason is {finish!r}")

    def usd(self, usage: VlmUsage) -> float:
        return self.config.usd(usage)

    def estimate(self, request: VlmRequest) -> VlmUsage:
        return estimate_usage(
            request, image_tokens=self.config.image_tokens, max_tokens=self.config.max_tokens
        )

    async def close(self) -> None:
        await self._client.aclose()


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Details(BaseModel):
    reasoning_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(default=0, ge=0)  # reasoning included
    completion_tokens_details: _Details | None = None

    def as_usage(self) -> VlmUsage:
        details = self.completion_tokens_details
        num_thoughts = min((details and details.reasoning_tokens) or 0, self.completion_tokens)
        return VlmUsage(self.prompt_tokens, self.completion_tokens - num_thoughts, num_thoughts)


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    model: str = ""
    usage: _Usage | None = None


def _read_error(code: int, content: bytes, wait_s: float | None) -> VlmReply:
    """The reply to an error; its body may be JSON of several forms, or a page."""
    try:
        body = json.loads(content)
        error = body.get("error", body)
        message, kind = str(error.get("message") or error.get("detail") or body), error.get("code")
    except (ValueError, AttributeError, RecursionError):
        message, kind = _shown(content), None
    status, finish = status_of(code)
    if kind == "insufficient_quota":  # a 429 that no waiting mends
        status, finish = "fatal", DENIED
    if kind == "content_filter":
        status, finish = "blocked", kind
    return failed(status, finish, f"http {code}: {message}", retry_after_s=wait_s)


def _shown(content: bytes) -> str:
    return content[:300].decode(errors="replace")


def _part(part: str | bytes) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:image/jpeg;base64,{base64.b64encode(part).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@lru_cache(maxsize=64)
def strict_schema(schema: type[BaseModel]) -> dict:
    """The answer's JSON schema without room for other properties, which OpenAI's strict mode wants said."""
    tree = json.loads(schema_json(schema))
    for node in _nodes(tree):
        if node.get("type") == "object":
            node["additionalProperties"] = False
    return tree


def _nodes(tree: object) -> list[dict]:
    """All mappings of a JSON tree."""
    if isinstance(tree, list):
        return [node for item in tree for node in _nodes(item)]
    if isinstance(tree, dict):
        return [tree, *(node for item in tree.values() for node in _nodes(item))]
    return []
