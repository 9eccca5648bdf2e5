"""Which model to ask, and how: an in-house server is a config, not a class."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from storyanchors.vlm.question import VlmUsage

BACKENDS = ("gemini", "openai", "local", "scripted", "replay")
JSON_MODES = ("json_schema", "structured_outputs", "json_object", "none")
MEDIA_RESOLUTIONS = ("low", "medium", "high", "ultra_high")
THINKING_LEVELS = ("minimal", "low", "medium", "high")
SERVICE_TIERS = ("standard", "flex", "priority")


@dataclass
class VlmConfig:
    """Settings of one model. Everything above the line decides answers and enters the keys of requests."""

    backend: str  # gemini | openai | local | scripted | replay
    model: str | None = None  # as its server calls it; local: a folder or Hub id; scripted: the script's name
    media_resolution: str = "low"  # gemini: 280, 560, 1120 or 2240 tokens for a picture, whatever its size
    thinking_level: str | None = (
        None  # gemini: minimal | low | medium | high; None: what the model does unasked
    )
    json_mode: str = "json_schema"  # openai: how the server is told the schema; see openai.py
    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int = 32_768  # the most the model can write; requests for more ask for this
    # ---
    base_url: str | None = None  # openai: up to and with /v1
    api_key_env: str | None = None  # the environment variable that holds the key; None: the server takes none
    api_version: str = "v1beta"  # gemini: v1 | v1beta
    service_tier: str | None = None  # gemini: standard | flex (half the price, slower) | priority
    timeout_s: float = 180.0  # of one request, as a whole
    max_images: int = 64  # in one request
    image_tokens: int = 336  # of one picture, for estimates; gemini knows its own
    input_usd_per_million: float = 0.0
    output_usd_per_million: float = 0.0  # thoughts too
    price_date: str | None = None  # when the prices were read, YYYY-MM-DD
    replay: str | None = None  # replay: a file or a folder of JSONL

    def __post_init__(self):
        _one_of("backend", self.backend, BACKENDS)
        _one_of("media_resolution", self.media_resolution, MEDIA_RESOLUTIONS)
        _one_of("json_mode", self.json_mode, JSON_MODES)
        _one_of("thinking_level", self.thinking_level, (None, *THINKING_LEVELS))
        _one_of("service_tier", self.service_tier, (None, *SERVICE_TIERS))
        for name in ("max_tokens", "max_images", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"vlm.{name} is {getattr(self, name)}, expected above 0")
        for name in ("temperature", "image_tokens", "input_usd_per_million", "output_usd_per_million"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"vlm.{name} is {getattr(self, name)}, expected 0 or above")
        if (self.input_usd_per_million or self.output_usd_per_million) and not self.price_date:
            raise ValueError("vlm.price_date=YYYY-MM-DD is missing: prices change, say when these were read")
        if self.backend in ("gemini", "openai", "local") and not self.model:
            raise ValueError(f"vlm.model=... is missing, which model shall {self.backend} ask?")
        for name, backend in (("api_key_env", "gemini"), ("base_url", "openai"), ("replay", "replay")):
            if self.backend == backend and not getattr(self, name):
                raise ValueError(f"vlm.{name}=... is missing for vlm.backend={backend}")
        if self.base_url is not None:
            _check_url(self.base_url)

    def usd(self, usage: VlmUsage) -> float:
        paid_as_output = usage.output_tokens + usage.thought_tokens
        dollars = (
            usage.input_tokens * self.input_usd_per_million + paid_as_output * self.output_usd_per_million
        )
        return dollars / 1e6

    def identity(self, adapter: int, names: tuple[str, ...]) -> str:
        """The backend, the version of our adapter to it, and the settings that decide what it answers."""
        settings = " ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{self.backend}/{adapter} {settings}"


def read_key(config: VlmConfig) -> str | None:
    """The key in the environment variable that the config names; ValueError that never shows the key."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ValueError(f"the environment variable {config.api_key_env} is not set, it holds the API key")
    if not (key.isascii() and key.isprintable()) or " " in key:  # a client's error would print such a header
        raise ValueError(f"the environment variable {config.api_key_env} holds characters that no key has")
    return key


def _one_of(name: str, found: str | None, expected: tuple[str | None, ...]) -> None:
    if found not in expected:
        raise ValueError(f"vlm.{name} is {found!r}, expected one of {', '.join(map(str, expected))}")


def _check_url(url: str) -> None:
    """ValueError that does not show the address where a secret may be in it."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError("vlm.base_url holds a user, a password or a query: keys go into vlm.api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"vlm.base_url is {url!r}, expected http://... or https://...")
