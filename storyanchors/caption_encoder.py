"""Prompt -> embeddings. Encoders are plain frozen objects; what is trained is the network's own text projection.

Legend: L tokens of one text, T text_dim.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


class WordEncoder:
    """A caption encoder without weights, for tiny models: every word of any language has its own fixed random vector.

    A token's embedding is [its word | the words before it, fading by half each | the frames its line speaks of], 64 numbers
    each: what a pre-trained text encoder knows of a word's surroundings, in its plainest form. The frames of a line
    "[3-5] ..." are the sum of the vectors of frames 3, 4 and 5; lines without a range have zeros there.
    """

    part_dim = 64
    text_dim = 3 * part_dim
    max_tokens = 4096

    def encode(self, texts: list[str]) -> list[Tensor]:
        """-> one (L_i, 192) tensor per text; "" is one token of zeros. ValueError for more than max_tokens words."""
        return [self._encode_one(text) for text in texts]

    def count_tokens(self, text: str) -> int:
        return max(1, sum(len(_words(line)) for line in text.split("\n")))

    def _encode_one(self, text: str) -> Tensor:
        if self.count_tokens(text) > self.max_tokens:
            raise ValueError(
                f"the caption has {self.count_tokens(text)} words, at most {self.max_tokens} can be encoded: "
                f"{text[:60]!r}..."
            )
        rows = []
        for line in text.split("\n"):
            header = re.match(r"\[(\d+)(?:-(\d+))?\]", line)
            frames = torch.zeros(self.part_dim)
            if header:
                first, last = int(header[1]), int(header[2] or header[1])
                for frame in range(first, last + 1):
                    frames = frames + _vector(f"frame {frame}", self.part_dim)
            before = torch.zeros(self.part_dim)
            for word in _words(line):
                vector = _vector(word, self.part_dim)
                rows.append(torch.cat([vector, before, frames]))
                before = 0.5 * before + vector
        return torch.stack(rows) if rows else torch.zeros(1, self.text_dim)

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
def _vector(word: str, dim: int) -> Tensor:
    """A unit-variance normal vector that depends on the word alone; the same on every machine (SHA-256, not hash())."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))
