"""A vision-language model of transformers in this process, a request at a time: for small runs and tests.

Nothing forces its answers into the schema, which is told as text. Weights are safetensors, and no code of a
repository is run.
"""

import asyncio
import io

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from storyanchors.vlm.config import VlmConfig
from storyanchors.vlm.question import (
    VlmReply,
    VlmRequest,
    VlmUsage,
    estimate_usage,
    read_reply,
    schema_words,
    too_many_images,
)

ADAPTER = 1  # another number whenever other tokens are read for the same request
SETTINGS = ("model", "temperature", "seed", "max_tokens")


class LocalVlm:
    """config.model is a folder or a Hub id, of any model with a chat template that takes several images."""

    def __init__(self, config: VlmConfig):
        self.config, self.identity = config, config.identity(ADAPTER, SETTINGS)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._processor = AutoProcessor.from_pretrained(config.model)
            model = AutoModelForImageTextToText.from_pretrained(
                config.model, dtype="auto", use_safetensors=True
            )
        except (OSError, ImportError, KeyError, ValueError) as error:
            raise ValueError(f"vlm.model={config.model} cannot be opened: {error}") from error
        self._model = model.to(self._device).eval()
        ends = self._model.generation_config.eos_token_id  # one, several or none
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        self._lock = asyncio.Lock()

    async def ask(self, request: VlmRequest) -> VlmReply:
        if refused := too_many_images(request, self.config.max_images):
            return refused
        async with self._lock:
            return await asyncio.to_thread(self._answer, request)

    def _answer(self, request: VlmRequest) -> VlmReply:
        content = [_part(part) for part in (*request.parts, schema_words(request.answer))]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device, dtype=self._model.dtype)
        sampling = {"do_sample": False}
        if self.config.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.config.temperature}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(self.config.seed or 0)
            sequence = self._model.generate(
                **inputs, max_new_tokens=min(request.max_tokens, self.config.max_tokens), **sampling
            )[0]
        num_input = inputs["input_ids"].shape[1]
        text = self._processor.decode(sequence[num_input:], skip_special_tokens=True)
        usage = VlmUsage(num_input, len(sequence) - num_input)
        if int(sequence[-1]) not in self._ends:
            detail = "the answer reached max_tokens"
            return VlmReply("truncated", None, text, usage, "length", self.config.model, detail)
        return read_reply(text, request, usage, finish="stop", model_version=self.config.model)

    def usd(self, usage: VlmUsage) -> float:
        return self.config.usd(usage)

    def estimate(self, request: VlmRequest) -> VlmUsage:
        return estimate_usage(
            request, image_tokens=self.config.image_tokens, max_tokens=self.config.max_tokens
        )

    async def close(self) -> None: ...


def _part(part: str | bytes) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.open(io.BytesIO(part), formats=["JPEG"]).convert("RGB")}
