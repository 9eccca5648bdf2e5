"""Typed answers of a vision-language model: Gemini, an OpenAI-compatible server, a local model, a script."""

from collections.abc import Callable

from storyanchors.vlm.config import VlmConfig
from storyanchors.vlm.question import (
    DENIED,
    STATUSES,
    Vlm,
    VlmReply,
    VlmRequest,
    VlmUsage,
    parse_answer,
)
from storyanchors.vlm.scripted import ReplayVlm, ScriptedVlm

__all__ = [
    "DENIED",
    "STATUSES",
    "Vlm",
    "VlmConfig",
    "VlmReply",
    "VlmRequest",
    "VlmUsage",
    "open_vlm",
    "parse_answer",
]


def open_vlm(config: VlmConfig, *, script: Callable[[VlmRequest], str] | None = None) -> Vlm:
    """The model of a config; script answers for backend scripted.

    ValueError for a key that is not in the environment, a package that is not installed, and answers or
    weights that cannot be read. One event loop may use it, in the process that opened it.
    """
    if config.backend == "scripted":
        if script is None:
            raise ValueError(
                "vlm.backend=scripted needs a script; the labeling commands have script=story_world"
            )
        return ScriptedVlm(config, script)
    if config.backend == "replay":
        return ReplayVlm(config)
    if config.backend == "openai":
        from storyanchors.vlm.openai import OpenAIVlm

        return OpenAIVlm(config)
    if config.backend == "local":
        from storyanchors.vlm.local import LocalVlm  # here: transformers takes seconds to import

        return LocalVlm(config)
    try:
        from storyanchors.vlm.gemini import GeminiVlm
    except ModuleNotFoundError as error:
        raise ValueError(
            "vlm.backend=gemini needs google-genai, which is not installed: pip install -e '.[gemini]'"
        ) from error
    return GeminiVlm(config)
