"""Prompt -> embeddings. Encoders are plain frozen objects; trained is the network's own text projection.

Legend: L tokens of one text, T text_dim.
"""

import hashlib
import html
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import ftfy
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from storyanchors.caption_cache import PrecomputedCaptions
from storyanchors.story import CutPart, shorter_captions
from storyanchors.weights import part_folder, read_json

# what decides UMT5's numbers besides its tensors
UMT5_SETTINGS = (
    "num_heads", "feed_forward_proj", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
WORDS = "words"  # instead of a folder or reference: the WordEncoder, which needs no files


class TokenCounter(Protocol):
    max_tokens: int | None  # of one text; None: no limit

    def count_tokens(self, text: str) -> int: ...


@dataclass(frozen=True)
class FittedCaption:
    """A caption that an encoder takes whole, and what it has lost for that, in the order of losing it."""

    text: str
    dropped: list[CutPart]

    @property
    def loss(self) -> str:
        """What was dropped, for a warning."""
        parts = [
            f"the {part.kind} {part.text if len(part.text) <= 48 else part.text[:45] + '...'!r}"
            for part in self.dropped
        ]
        return f"the caption is too long for its text encoder and loses {', '.join(parts)}"


def fit_caption(text: str, encoder: TokenCounter) -> FittedCaption:
    """The caption, or as much of it as fits into the encoder's max_tokens, cut along its structure.

    A prompt loses first its style, then its subjects from the least important on, then whole events from the
    end of the story; any other text whole sentences from its end. ValueError where one event or one sentence
    alone is too long.
    """
    if encoder.max_tokens is None or encoder.count_tokens(text) <= encoder.max_tokens:
        return FittedCaption(text, [])
    dropped = []
    for shorter, part in shorter_captions(text):
        dropped.append(part)
        if encoder.count_tokens(shorter) <= encoder.max_tokens:
            return FittedCaption(shorter, dropped)
    raise ValueError(
        f"the caption has {encoder.count_tokens(text)} tokens, at most {encoder.max_tokens} can be encoded, "
        f"and its first event or sentence alone has more: {text[:60]!r}..."
    )


class WordEncoder:
    """A caption encoder without weights, for tiny models: every word has its own fixed random vector.

    A token's embedding is [its word | the words before it, fading by half each | the frames its line speaks
    of], 64 numbers each: what a pre-trained text encoder knows of a word's surroundings, in its plainest
    form. The frames of a line "[3-5] ..." are the sum of the vectors of frames 3, 4 and 5; lines without a
    range have zeros there.
    """

    part_dim = 64
    text_dim = 3 * part_dim
    clip_text_dim = None
    max_tokens = 4096

    def encode(self, texts: list[str]) -> list[Tensor]:
        """One (L_i, 192) tensor per text; "" is one token of zeros. ValueError above max_tokens words."""
        return [self._encode_one(text) for text in texts]

    def count_tokens(self, text: str) -> int:
        return max(1, sum(len(_words(line)) for line in text.split("\n")))

    def fingerprint(self) -> str:
        """The same for encoders that give the same embeddings."""
        return hashlib.sha256(f"WordEncoder {self.part_dim}".encode()).hexdigest()

    def _encode_one(self, text: str) -> Tensor:
        if self.count_tokens(text) > self.max_tokens:
            raise ValueError(
                f"the caption has {self.count_tokens(text)} words, at most {self.max_tokens} can be encoded: "
                f"{text[:60]!r}..."
            )
        lines = [self._encode_line(line) for line in text.split("\n") if _words(line)]
        return torch.from_numpy(np.concatenate(lines)) if lines else torch.zeros(1, self.text_dim)

    def _encode_line(self, line: str) -> np.ndarray:
        words = _words(line)
        own = np.stack([_vector(word, self.part_dim) for word in words])
        before = np.zeros_like(own)
        for position in range(1, len(words)):
            before[position] = 0.5 * before[position - 1] + own[position - 1]
        frames = np.zeros(self.part_dim, np.float32)
        if header := re.match(r"\[(\d+)(?:-(\d+))?\]", line):
            first, last = int(header[1]), int(header[2] or header[1])
            frames = sum(_vector(f"frame {frame}", self.part_dim) for frame in range(first, last + 1))
        return np.concatenate([own, before, np.broadcast_to(frames, own.shape)], axis=1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "WordEncoder":
        """Stays on the CPU: embeddings are looked up, not computed."""
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": "WordEncoder"}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "WordEncoder":
        return cls()


def _words(line: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", line.lower())


@lru_cache(maxsize=65536)
def _vector(word: str, dim: int) -> np.ndarray:
    """A normal vector that depends on the word alone, the same on every machine (SHA-256, not hash())."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return np.random.Generator(np.random.Philox(seed)).standard_normal(dim, dtype=np.float32)


class Umt5Tokens:
    """A text in the tokens of Wan's caption encoder: UMT5's tokenizer after Wan's cleaning."""

    max_tokens = 512

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def ids(self, text: str) -> Tensor:
        """(L,) with the end mark."""
        # verbose: the tokenizer warns of texts above a limit of its own; ours is reported by fit_caption
        return torch.tensor(self.tokenizer(_cleaned(text), verbose=False).input_ids)

    def count_tokens(self, text: str) -> int:
        """Tokens of the cleaned text with its end mark; 1 for ""."""
        return len(self.ids(text))

    @classmethod
    def from_pretrained(cls, reference: str | Path) -> "Umt5Tokens":
        """Reads tokenizer/ of a pipeline's folder or of a Hub id."""
        folder = part_folder(reference, "tokenizer")
        if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            # transformers would make up a vocabulary of a few words
            raise ValueError(f"found no tokenizer.json or spiece.model in {folder}")
        return cls(AutoTokenizer.from_pretrained(folder))


class Umt5Encoder(Umt5Tokens):
    """Wan's caption encoder: UMT5 (XXL in the published models) and its tokenizer, run as Wan runs them.

    Wan's cross-attention has no mask: it was trained on 512 rows, of which those behind the last token are
    zeros, and attends to the zeros as well. They are therefore part of the embedding.
    """

    clip_text_dim = None

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.model = model.eval().requires_grad_(False)

    @property
    def text_dim(self) -> int:
        return self.model.config.d_model

    def encode(self, texts: list[str]) -> list[Tensor]:
        """-> one (512, text_dim) tensor per text in the model's dtype, zeros behind the last token.

        ValueError for a text of more than 512 tokens: it would lose its last events.
        """
        return [self._encode_one(text) for text in texts]

    @torch.no_grad()
    def _encode_one(self, text: str) -> Tensor:
        """One by one: no padding is computed, and no text changes a bit of another's embedding."""
        ids = self.ids(text)
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"the caption has {len(ids)} tokens, at most {self.max_tokens} can be encoded: "
                f"{text[:60]!r}..."
            )
        device = self.model.device
        with torch.autocast(device.type, enabled=False):  # the same numbers in a training step and outside
            rows_LT = self.model(ids[None].to(device)).last_hidden_state[0]
        return F.pad(rows_LT, (0, 0, 0, self.max_tokens - len(ids)))

    def fingerprint(self) -> str:
        """The same for encoders that give the same embeddings: tokenizer, sizes, weights and their dtype."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        config = self.model.config
        digest.update(f"{self.max_tokens} {[getattr(config, name) for name in UMT5_SETTINGS]}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Umt5Encoder":
        self.model.to(device=device, dtype=dtype)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes text_encoder/ and tokenizer/, as in a pipeline of diffusers."""
        self.model.save_pretrained(Path(folder) / "text_encoder")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    @classmethod
    def from_pretrained(cls, reference: str | Path) -> "Umt5Encoder":
        """Reads text_encoder/ and tokenizer/ of a pipeline's folder or of a Hub id, in the stored dtype."""
        tokenizer = Umt5Tokens.from_pretrained(reference).tokenizer
        model = UMT5EncoderModel.from_pretrained(
            part_folder(reference, "text_encoder"), dtype="auto", use_safetensors=True
        )
        return cls(model, tokenizer)


def _cleaned(text: str) -> str:
    """What Wan does to a prompt: repairs encodings, resolves HTML entities (twice), joins white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def load_caption_encoder(reference: str | Path) -> WordEncoder | Umt5Encoder | PrecomputedCaptions:
    """The encoder "words", or that of a folder, a pipeline's folder or a Hub id, by its config.json."""
    if reference == WORDS:
        return WordEncoder()
    config_file = part_folder(reference, "text_encoder") / "config.json"
    config = read_json(config_file)
    if config.get("_class_name") == "WordEncoder":
        return WordEncoder.from_pretrained(reference)
    if config.get("_class_name") == "PrecomputedCaptions":
        return PrecomputedCaptions(reference)
    if config.get("model_type") == "umt5":
        return Umt5Encoder.from_pretrained(reference)
    raise ValueError(
        f"{config_file} names neither a WordEncoder, PrecomputedCaptions nor a umt5 model: "
        f"{config.get('_class_name')!r}, model_type {config.get('model_type')!r}"
    )


def load_token_counter(reference: str | Path) -> TokenCounter:
    """Counts tokens as load_caption_encoder(reference) does; of a pipeline only the tokenizer is read."""
    if reference == WORDS or (Path(reference) / "config.json").is_file():
        return load_caption_encoder(reference)
    return Umt5Tokens.from_pretrained(reference)
