"""Caption embeddings on disk: a cache of what an encoder computes, and embeddings that were made elsewhere.

A folder holds the embeddings of one encoder: config.json says which and how wide they are, and
<two digits>/<SHA-256 of the exact text>.safetensors holds those of one text; docs/data_format.md has it all.

Legend: L tokens of one text, T text_dim, J tokens of CLIP (77 in Step-Video), U clip_text_dim.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from storyanchors.embedders import CaptionEmbedding
from storyanchors.weights import read_json

log = logging.getLogger(__name__)


def embedding_to(embedding: CaptionEmbedding, device: torch.device) -> CaptionEmbedding:
    """The embedding on a device."""
    return (
        tuple(part.to(device) for part in embedding) if isinstance(embedding, tuple) else embedding.to(device)
    )


class PrecomputedCaptions:
    """A caption encoder that looks its embeddings up; ValueError for a text that the folder does not hold."""

    max_tokens = None  # whoever made the embeddings has seen to that

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        config = read_json(self.folder / "config.json")
        if config.get("_class_name") != "PrecomputedCaptions" or not isinstance(config.get("text_dim"), int):
            raise ValueError(f"{self.folder}/config.json is not that of caption embeddings: found {config}")
        self.text_dim: int = config["text_dim"]
        self.clip_text_dim: int | None = config.get("clip_text_dim")

    @classmethod
    def create(
        cls, folder: str | Path, *, encoder: str, text_dim: int, clip_text_dim: int | None = None
    ) -> "PrecomputedCaptions":
        """The folder, begun where it is not there; encoder is what makes the embeddings, in words."""
        config = {
            "_class_name": "PrecomputedCaptions",
            "encoder": encoder,
            "text_dim": text_dim,
            "clip_text_dim": clip_text_dim,
        }
        file = Path(folder) / "config.json"
        if not file.is_file():
            _write_atomically(file, (json.dumps(config, indent=2) + "\n").encode())
        if (found := read_json(file)) != config:
            raise ValueError(f"{folder} holds other embeddings: found {found}, expected {config}")
        return cls(folder)

    def path(self, text: str) -> Path:
        key = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def write(self, text: str, embedding: CaptionEmbedding) -> None:
        """Stores the embedding of a text, without the zero rows at its end; whole or not at all."""
        clip, rows_LT = embedding if isinstance(embedding, tuple) else (None, embedding)
        num_valid = int(rows_LT.any(dim=1).nonzero().max()) + 1 if rows_LT.any() else 0
        tensors = {"text": rows_LT[:num_valid]} | ({} if clip is None else {"clip": clip})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._check_widths(tensors, f"the embedding of {text[:60]!r}")
        num_rows = str(len(rows_LT))
        metadata = {"text": text, "num_rows": num_rows, "crc32": _crc32(tensors, num_rows)}
        _write_atomically(self.path(text), save(tensors, metadata))

    def read(self, text: str) -> CaptionEmbedding:
        """The embedding as it was written, on the CPU; ValueError names a file that is missing or damaged."""
        path = self.path(text)
        if not path.is_file():
            what = f"the caption {text[:120]!r}" if text else "the empty caption, which stands for no caption"
            raise ValueError(
                f"{self.folder} holds no embedding of {what}: expected {path.relative_to(self.folder)}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        num_rows = metadata.get("num_rows", "")
        if metadata.get("text") != text or metadata.get("crc32") != _crc32(tensors, num_rows):
            raise ValueError(f"{path} is damaged: its text or its crc32 is not the one in its header")
        self._check_widths(tensors, path)
        rows_LT = tensors["text"]
        if num_rows:
            rows_LT = F.pad(rows_LT, (0, 0, 0, int(num_rows) - len(rows_LT)))
        return (tensors["clip"], rows_LT) if self.clip_text_dim else rows_LT

    def encode(self, texts: list[str]) -> list[CaptionEmbedding]:
        return [self.read(text) for text in texts]

    def count_tokens(self, text: str) -> int:
        """Rows of the text's embedding, without CLIP's."""
        embedding = self.read(text)
        return len(embedding[1] if isinstance(embedding, tuple) else embedding)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "PrecomputedCaptions":
        """Stays on the CPU: embeddings are looked up, not computed."""
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def _check_widths(self, tensors: dict[str, Tensor], where: str | Path) -> None:
        widths = {"text": self.text_dim} | ({"clip": self.clip_text_dim} if self.clip_text_dim else {})
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found.keys() != widths.keys() or any(
            found[name][1:] != (width,) for name, width in widths.items()
        ):
            raise ValueError(f"{where} holds {found}, expected tensors of width {widths}")


class ComputingEncoder(Protocol):
    text_dim: int
    clip_text_dim: int | None
    max_tokens: int

    def encode(self, texts: list[str]) -> list[Tensor]: ...
    def count_tokens(self, text: str) -> int: ...
    def fingerprint(self) -> str: ...
    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> "ComputingEncoder": ...
    def save_pretrained(self, folder: str | Path) -> None: ...


class CachedCaptions:
    """An encoder that computes every text once: the rest comes from a folder, which any number of runs share.

    The encoder's embeddings lie in a folder of their own, named by its fingerprint (weights, tokenizer and
    dtype); that folder is one of PrecomputedCaptions. Texts are encoded one by one, so that an embedding
    depends on its text alone. An entry that is damaged is computed again, with a warning.
    """

    def __init__(self, encoder: ComputingEncoder, folder: str | Path):
        self.encoder = encoder
        self.folder = Path(folder)
        self.text_dim, self.clip_text_dim = encoder.text_dim, encoder.clip_text_dim
        self.max_tokens = encoder.max_tokens
        self._stored: PrecomputedCaptions | None = None

    @property
    def stored(self) -> PrecomputedCaptions:
        """Opened late: the fingerprint is that of the weights in the dtype that they are run in."""
        if self._stored is None:
            fingerprint = self.encoder.fingerprint()
            self._stored = PrecomputedCaptions.create(
                self.folder / fingerprint[:16],
                encoder=fingerprint,
                text_dim=self.text_dim,
                clip_text_dim=self.clip_text_dim,
            )
        return self._stored

    def encode(self, texts: list[str]) -> list[CaptionEmbedding]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> CaptionEmbedding:
        if self.stored.path(text).is_file():
            try:
                return self.stored.read(text)
            except ValueError as error:
                log.warning("%s; computed again", error)
        [embedding] = self.encoder.encode([text])
        self.stored.write(text, embedding)
        return embedding

    def count_tokens(self, text: str) -> int:
        return self.encoder.count_tokens(text)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "CachedCaptions":
        self.encoder.to(device, dtype)
        self._stored = None
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        self.encoder.save_pretrained(folder)


def _crc32(tensors: dict[str, Tensor], num_rows: str) -> str:
    """Of the bytes of all tensors, by name, and of the digits of num_rows."""
    crc32 = 0
    for _, tensor in sorted(tensors.items()):
        crc32 = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), crc32)
    return f"{zlib.crc32(num_rows.encode(), crc32):08x}"


def _write_atomically(file: Path, content: bytes) -> None:
    """Under a name of its own first: processes that write the same file leave one whole version of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)
