"""Answers without a network: from a function, or from what was answered before."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from storyanchors.vlm.config import VlmConfig
from storyanchors.vlm.question import (
    BYTES_PER_TOKEN,
    VlmReply,
    VlmRequest,
    VlmUsage,
    estimate_usage,
    failed,
    read_reply,
)


class ScriptedVlm:
    """Asks a function, which gets the request and gives the answer as JSON text."""

    def __init__(self, config: VlmConfig, script: Callable[[VlmRequest], str]):
        self.config, self.script = config, script
        self.identity = config.identity(1, ("model",))

    async def ask(self, request: VlmRequest) -> VlmReply:
        text = self.script(request)
        num_output = -(-len(text.encode()) // BYTES_PER_TOKEN)
        usage = VlmUsage(self.estimate(request).input_tokens, num_output)
        return read_reply(text, request, usage, finish="stop", model_version=f"script {self.config.model}")

    def usd(self, usage: VlmUsage) -> float:
        return self.config.usd(usage)

    def estimate(self, request: VlmRequest) -> VlmUsage:
        return estimate_usage(
            request, image_tokens=self.config.image_tokens, max_tokens=self.config.max_tokens
        )

    async def close(self) -> None: ...


class ReplayVlm:
    """Gives the raw answers of JSONL lines {"request": name, "text": answer} again; a ledger is such a file.

    All answers are in memory. Lines with a "status" other than ok are passed over, and the last of several
    lines of one request counts. Nothing is charged.
    """

    def __init__(self, config: VlmConfig):
        self.config, self.answers = config, read_answers(Path(config.replay))
        digest = hashlib.sha256(json.dumps(sorted(self.answers.items())).encode()).hexdigest()
        self.identity = f"{config.identity(1, ())}answers={digest[:16]}"

    async def ask(self, request: VlmRequest) -> VlmReply:
        if request.name not in self.answers:
            found = f"{self.config.replay} has no answer to {request.name}, found {len(self.answers)} others"
            return failed("fatal", "missing", found)
        return read_reply(
            self.answers[request.name], request, VlmUsage(), finish="stop", model_version="replay"
        )

    def usd(self, usage: VlmUsage) -> float:
        return 0.0

    def estimate(self, request: VlmRequest) -> VlmUsage:
        return VlmUsage()

    async def close(self) -> None: ...


def read_answers(path: Path) -> dict[str, str]:
    """Name of a request -> raw answer, of a JSONL file or of all below a folder, in order of their paths.

    ValueError for a line that is none; a last line that a crash has torn is no line yet.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .jsonl file with answers")
    answers = {}
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    name, text, status = record["request"], record["text"], record.get("status", "ok")
                    if not isinstance(name, str) or not isinstance(text, str):
                        raise TypeError
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    if not line.endswith("\n"):
                        break
                    raise ValueError(
                        f'{file}:{number} is {line.strip()[:60]!r}, expected {{"request": ..., "text": ...}}'
                    ) from error
                if status == "ok":
                    answers[name] = text
    return answers
