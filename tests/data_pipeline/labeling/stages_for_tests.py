"""A dataset of tiny clips, and stages that ask about them what a script can answer."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import ClassVar

from PIL import Image
from pydantic import BaseModel, Field

from data_pipeline.dataset import FRAMES_FOLDER, DatasetRecord, finish, tool_versions, writing
from data_pipeline.labeling.findings import Finding
from data_pipeline.labeling.runner import Ask, LabelClip
from data_pipeline.shard_writer import ShardWriter
from storyanchors.clip import INFO_MEMBER, ClipInfo, frame_member
from storyanchors.vlm import VlmRequest


def write_dataset(
    folder: Path, *, num_shards: int = 3, clips_per_shard: int = 4, num_frames: int = 2, same: bool = False
) -> Path:
    """Every frame is an image of its own, or all clips have the same ones."""
    record = DatasetRecord("tests", {"num_shards": num_shards}, tool_versions())
    with writing(folder, record):
        for shard in range(num_shards):
            with ShardWriter(folder / FRAMES_FOLDER, f"{shard:06d}") as writer:
                for number in range(clips_per_shard):
                    key = f"clip-{shard:03d}-{number:05d}"
                    writer.add(key, clip_members(key, num_frames, "" if same else key))
                writer.finish()
        finish(folder, record, {"shards": num_shards, "clips": num_shards * clips_per_shard})
    return folder


def clip_members(key: str, num_frames: int, shown: str) -> dict[str, bytes]:
    jpegs = [_jpeg(f"{shown} {number}") for number in range(num_frames)]
    info = ClipInfo(
        key=key,
        source="tests",
        frame_numbers=tuple(range(num_frames)),
        seconds=tuple(map(float, range(num_frames))),
        height=16,
        width=16,
        checksums=tuple(hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs),
    )
    members = {frame_member(number): jpeg for number, jpeg in enumerate(jpegs, start=1)}
    return members | {INFO_MEMBER: info.to_json()}


def _jpeg(text: str) -> bytes:
    colours = hashlib.sha256(text.encode()).digest()[:12]
    buffer = io.BytesIO()
    Image.frombytes("RGB", (2, 2), colours).resize((16, 16), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


class Caption(BaseModel):
    caption: str = Field(min_length=1, max_length=200)


def what_is_shown(images: list[bytes]) -> str:
    """The one right answer to a question about images."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image)
    return f"a pattern called {digest.hexdigest()[:12]}"


def answer(request: VlmRequest) -> str:
    """The script of an exact labeler."""
    return json.dumps({"caption": what_is_shown([part for part in request.parts if isinstance(part, bytes)])})


class Captions:
    """One question about all frames of a clip."""

    name = "global"
    settings: ClassVar[dict[str, object]] = {"side_px": 16}

    def __init__(self, prompt: str = "What is shown?"):
        self.prompts = {"caption-v1": prompt}

    async def label(self, clip: LabelClip, ask: Ask) -> dict:
        parts = (self.prompts["caption-v1"], *clip.jpegs)
        settled = await ask(
            VlmRequest(f"{clip.key}/global/1-{clip.info.num_frames}", parts, Caption, 256), check
        )
        return {
            "status": settled.status,
            "findings": [vars(finding) for finding in settled.findings],
            "usage": vars(settled.usage),
            "usd": settled.usd,
            "num_requests": settled.num_requests,
            "global_caption": settled.answer.caption if settled.status == "ok" else "",
        }


def check(caption: Caption) -> tuple[Caption, list[Finding]]:
    if "refuse" in caption.caption:
        return caption, [Finding("refusal_text", "error", f"it refuses: {caption.caption}")]
    return caption, []


class CountingScript:
    """Answers like `answer`, and counts how often each question came; `instead` may answer otherwise."""

    def __init__(self, instead=lambda request, times: None):
        self.asked: Counter[str] = Counter()
        self.instead = instead

    def __call__(self, request: VlmRequest) -> str:
        self.asked[request.name] += 1
        return self.instead(request, self.asked[request.name]) or answer(request)
