"""Google's Gemini through google-genai, the only file that imports it.

The SDK does one exchange and nothing else: its retries, its automatic continuation (every hop is charged) and
its function calling are off, and it gets our client, since with aiohttp installed it would repeat requests.
Its exceptions hold the key (in response.request.headers), so none of them leaves this file.
"""

from datetime import UTC, datetime

from google import genai
from google.genai import errors, types

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
    too_many_images,
)

ADAPTER = 1  # another number whenever other bytes are sent for the same request
IMAGE_TOKENS = {"low": 280, "medium": 560, "high": 1120, "ultra_high": 2240}  # of Gemini 3
HIDDEN = "***"
# what the SDK raises for a body that is no JSON, or JSON of another form
UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, RecursionError)
REASON = types.FinishReason
TRUNCATED = {REASON.MAX_TOKENS, REASON.CONTINUATION}
BLOCKED = {
    REASON.SAFETY, REASON.RECITATION, REASON.LANGUAGE, REASON.OTHER, REASON.BLOCKLIST, REASON.SPII,
    REASON.PROHIBITED_CONTENT, REASON.IMAGE_SAFETY, REASON.IMAGE_PROHIBITED_CONTENT, REASON.ESCALATION,
}  # fmt: skip
SETTINGS = ("model", "media_resolution", "thinking_level", "temperature", "seed", "max_tokens")


class GeminiVlm:
    """One client for all requests."""

    def __init__(self, config: VlmConfig):
        self.config, self._key = config, read_key(config)
        self.identity = config.identity(ADAPTER, SETTINGS)
        self._connections = open_client()
        self._client = genai.Client(
            vertexai=False,  # said, so that no environment variable sends the frames elsewhere
            api_key=self._key,
            http_options=types.HttpOptions(
                base_url=config.base_url or "https://generativelanguage.googleapis.com",
                api_version=config.api_version,
                timeout=int(1000 * config.timeout_s),
                httpx_async_client=self._connections,
            ),
        )

    def __reduce__(self):
        raise TypeError("a model that holds a key is opened in the process that asks it, never pickled")

    async def ask(self, request: VlmRequest) -> VlmReply:
        if refused := too_many_images(request, self.config.max_images):
            return refused
        try:
            async with one_exchange(self.config.timeout_s):
                response = await self._client.aio.models.generate_content(
                    model=self.config.model,
                    contents=types.Content(role="user", parts=[_part(part) for part in request.parts]),
                    config=self._settings(request),
                )
        except NoResponse as error:
            return error.reply
        except errors.APIError as error:
            return self._read_error(error)
        except UNREADABLE as error:
            problem = f"the SDK cannot read the answer, {type(error).__name__}: {error}"
            return failed("transient", "http 200", problem.replace(self._key, HIDDEN))
        return self._read_response(response, request)

    def _settings(self, request: VlmRequest) -> types.GenerateContentConfig:
        config = self.config
        thinking = (
            types.ThinkingConfig(thinking_level=config.thinking_level) if config.thinking_level else None
        )
        return types.GenerateContentConfig(
            temperature=config.temperature,
            seed=config.seed,
            max_output_tokens=min(request.max_tokens, config.max_tokens),
            response_mime_type="application/json",
            response_schema=request.answer,
            media_resolution=f"MEDIA_RESOLUTION_{config.media_resolution.upper()}",
            thinking_config=thinking,
            service_tier=config.service_tier,
            automatic_continuation=False,
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        )

    def _read_response(self, response: types.GenerateContentResponse, request: VlmRequest) -> VlmReply:
        usage, model = _usage(response.usage_metadata), response.model_version or ""
        if not response.candidates:
            usage = usage or VlmUsage()
            feedback = response.prompt_feedback
            if feedback is None or feedback.block_reason is None:
                return VlmReply("transient", None, "", usage, "none", model, "there is no answer")
            finish = feedback.block_reason.value
            return VlmReply("blocked", None, "", usage, finish, model, f"the question was blocked: {finish}")
        usage = usage or self.estimate(request)  # not counted: charged at most, so that max_usd holds
        candidate = response.candidates[0]
        reason, text = candidate.finish_reason, _text(candidate).replace(self._key, HIDDEN)
        finish = reason.value if reason else "none"
        if reason == REASON.STOP:
            return read_reply(text, request, usage, finish=finish, model_version=model)
        if reason in TRUNCATED:
            return VlmReply("truncated", None, text, usage, finish, model, "the answer reached max_tokens")
        if reason in BLOCKED:
            return VlmReply("blocked", None, text, usage, finish, model, f"the answer was blocked: {finish}")
        if reason == REASON.PUP_LIMITED_DISABLED:
            return VlmReply("fatal", None, text, usage, DENIED, model, f"the account is limited: {finish}")
        return VlmReply("transient", None, text, usage, finish, model, one_line(f"finish reason {finish}"))

    def _read_error(self, error: errors.APIError) -> VlmReply:
        status, finish = status_of(error.code)
        details = _details(error.details)
        if error.status == "FAILED_PRECONDITION" or any(
            detail.get("reason") == "API_KEY_INVALID" for detail in details
        ):
            status, finish = "fatal", DENIED
        headers, quota = dict(error.response.headers), ""
        for detail in details:
            if "retryDelay" in detail:  # protobuf's JSON for a duration, "7s" or "0.5s"
                headers["retry-after"] = str(detail["retryDelay"]).removesuffix("s")
            for violation in _mappings(detail.get("violations")):
                quota = one_line(str(violation.get("quotaId") or quota))
        wait_s = seconds_to_wait(headers, datetime.now(UTC))
        problem = f"http {error.code} {error.status or ''}: {error.message}".replace(self._key, HIDDEN)
        return failed(status, finish, problem, retry_after_s=wait_s, quota=quota)

    def usd(self, usage: VlmUsage) -> float:
        return self.config.usd(usage)

    def estimate(self, request: VlmRequest) -> VlmUsage:
        image_tokens = IMAGE_TOKENS[self.config.media_resolution]
        return estimate_usage(request, image_tokens=image_tokens, max_tokens=self.config.max_tokens)

    async def close(self) -> None:
        await self._client.aio.aclose()
        await self._connections.aclose()  # the SDK leaves a client that it was given open


def _part(part: str | bytes) -> types.Part:
    if isinstance(part, str):
        return types.Part(text=part)
    return types.Part(inline_data=types.Blob(data=part, mime_type="image/jpeg"))


def _text(candidate: types.Candidate) -> str:
    """The answer's parts in a row, without the model's thoughts."""
    parts = (candidate.content and candidate.content.parts) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    return text.encode(errors="replace").decode()  # half an emoji, where max_tokens cuts, is no UTF-8


def _usage(counted: types.GenerateContentResponseUsageMetadata | None) -> VlmUsage | None:
    if counted is None:
        return None
    return VlmUsage(
        counted.prompt_token_count or 0,
        counted.candidates_token_count or 0,
        counted.thoughts_token_count or 0,
    )


def _details(body: object) -> list[dict]:
    """error.details of an error's JSON; nothing where the body is something else."""
    error = body.get("error") if isinstance(body, dict) else None
    return _mappings(error.get("details")) if isinstance(error, dict) else []


def _mappings(found: object) -> list[dict]:
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
