"""Embeddings on disk are what the encoder computed, bit for bit, whoever wrote them."""

import json
import logging
import shutil
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from storyanchors.caption_cache import CachedCaptions, PrecomputedCaptions, embedding_to
from storyanchors.caption_encoder import WordEncoder, load_caption_encoder

TEXTS = ["[1-2] a red fox runs", "", "[3] snow\nSubjects:\n1. fox \u96ea", "a red  fox"]


class CountingEncoder(WordEncoder):
    """Remembers what it was asked, and pads its embeddings with zeros as Wan's encoder does."""

    num_rows = 32

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked.append(list(texts))
        rows = super().encode(texts)
        return [torch.nn.functional.pad(row, (0, 0, 0, self.num_rows - len(row))) for row in rows]


class OtherEncoder(CountingEncoder):
    def fingerprint(self):
        return "f" * 64


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_a_text_is_encoded_once_and_comes_back_bit_for_bit(tmp_path):
    cached = CachedCaptions(CountingEncoder(), tmp_path)
    expected = CountingEncoder().encode(TEXTS)
    for _ in range(2):
        assert all(map(torch.equal, cached.encode(TEXTS), expected))
    assert cached.encoder.asked == [[text] for text in TEXTS]
    other_run = CachedCaptions(CountingEncoder(), tmp_path)
    assert all(map(torch.equal, other_run.encode(TEXTS), expected))
    assert other_run.encoder.asked == []


def test_only_the_exact_text_is_a_hit(tmp_path):
    cached = CachedCaptions(CountingEncoder(), tmp_path)
    for text in ("a fox", "a fox ", "A fox", "a  fox"):
        cached.encode([text])
    assert len(cached.encoder.asked) == len(entries(tmp_path)) == 4


def test_another_encoder_never_gets_these_embeddings(tmp_path):
    CachedCaptions(CountingEncoder(), tmp_path).encode(TEXTS)
    other = CachedCaptions(OtherEncoder(), tmp_path)
    other.encode(TEXTS[:1])
    assert other.encoder.asked == [TEXTS[:1]]
    assert len({path.parents[1] for path in entries(tmp_path)}) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_valid_rows_are_stored(tmp_path, dtype):
    store = PrecomputedCaptions.create(tmp_path, encoder="a test", text_dim=4)
    rows = torch.cat([torch.randn(3, 4), torch.zeros(1, 4), torch.randn(1, 4), torch.zeros(507, 4)]).to(dtype)
    for text, embedding in {"five": rows, "none": torch.zeros(1, 4, dtype=dtype)}.items():
        store.write(text, embedding)
        found = store.encode([text])[0]
        assert torch.equal(found, embedding) and found.dtype == dtype
    with safe_open(store.path("five"), framework="pt") as file:
        assert file.get_tensor("text").shape == (5, 4)
    assert store.path("five").stat().st_size < 512


def spoil_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def spoil_the_number_of_rows(path):
    path.write_bytes(path.read_bytes().replace(b'"num_rows":"32"', b'"num_rows":"12"'))


SPOILED = {
    "another number of rows": spoil_the_number_of_rows,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_text("not a tensor" * 9),
    "a flipped bit": spoil_a_byte,
    "another text's": lambda path: shutil.copy(
        next(one for one in entries(path.parents[1]) if one != path), path
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_entry_is_computed_again_with_a_warning(tmp_path, caplog, how):
    cached = CachedCaptions(CountingEncoder(), tmp_path)
    expected = cached.encode(TEXTS)
    path = cached.stored.path(TEXTS[0])
    SPOILED[how](path)
    cached.encoder.asked.clear()
    with caplog.at_level(logging.WARNING):
        assert all(map(torch.equal, cached.encode(TEXTS), expected))
    assert cached.encoder.asked == [TEXTS[:1]]
    [record] = caplog.records
    assert f"{path} is damaged" in record.message and "computed again" in record.message
    assert torch.equal(cached.stored.read(TEXTS[0]), expected[0])


def _encode_all(folder):
    encoder = CountingEncoder()
    return [row.tolist() for row in CachedCaptions(encoder, folder).encode([f"fox {n}" for n in range(40)])]


def test_processes_may_share_a_folder(tmp_path):
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        first, *others = pool.map(_encode_all, [tmp_path] * 4)
    assert all(other == first for other in others)
    assert len(entries(tmp_path)) == 40
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_is_a_folder_of_precomputed_captions(tmp_path):
    cached = CachedCaptions(CountingEncoder(), tmp_path)
    expected = cached.encode(TEXTS)
    [folder] = tmp_path.iterdir()
    for one in (folder, tmp_path / "copy"):
        encoder = load_caption_encoder(one) if one.exists() else _copy(load_caption_encoder(folder), one)
        assert isinstance(encoder, PrecomputedCaptions)
        assert (encoder.text_dim, encoder.clip_text_dim, encoder.max_tokens) == (192, None, None)
        assert all(map(torch.equal, encoder.encode(TEXTS), expected))
    assert encoder.count_tokens(TEXTS[0]) == 32


def _copy(encoder, folder):
    encoder.save_pretrained(folder)
    return load_caption_encoder(folder)


def test_the_dtype_that_an_encoder_runs_in_is_part_of_its_name(tmp_path):
    class Half(CountingEncoder):
        dtype = None

        def to(self, device=None, dtype=None):
            self.dtype = dtype

        def fingerprint(self):
            return f"{self.dtype!s:-<64}"

    cached = CachedCaptions(Half(), tmp_path)
    cached.encode(["a"])
    cached.to("cpu", torch.bfloat16).encode(["a"])
    assert len(entries(tmp_path)) == 2


def test_pairs_are_kept_as_pairs(tmp_path):
    store = PrecomputedCaptions.create(tmp_path, encoder="CLIP and StepLLM", text_dim=6, clip_text_dim=3)
    clip, text = torch.randn(77, 3), torch.randn(11, 6)
    store.write("a fox", (clip, text))
    [pair] = load_caption_encoder(tmp_path).encode(["a fox"])
    assert torch.equal(pair[0], clip) and torch.equal(pair[1], text)
    assert store.count_tokens("a fox") == 11
    moved = embedding_to(pair, torch.device("meta"))
    assert isinstance(moved, tuple) and all(part.is_meta for part in moved)


def test_a_file_may_do_without_a_number_of_rows(tmp_path):
    """As docs/data_format.md has it, for those who write files of their own."""
    store = PrecomputedCaptions.create(tmp_path, encoder="a test", text_dim=6, clip_text_dim=3)
    tensors = {"clip": torch.randn(77, 3), "text": torch.randn(5, 6)}
    crc32 = zlib.crc32(tensors["clip"].numpy().tobytes() + tensors["text"].numpy().tobytes())
    store.path("a fox").parent.mkdir()
    save_file(tensors, store.path("a fox"), {"text": "a fox", "crc32": f"{crc32:08x}"})
    clip, text = store.read("a fox")
    assert torch.equal(clip, tensors["clip"]) and torch.equal(text, tensors["text"])


def test_a_text_that_is_not_there_is_named_with_its_file(tmp_path):
    store = PrecomputedCaptions.create(tmp_path, encoder="a test", text_dim=4)
    key = store.path("a fox").stem
    with pytest.raises(ValueError, match=f"{tmp_path} holds no embedding of the caption 'a fox': .*{key}"):
        store.encode(["a fox"])
    with pytest.raises(ValueError, match="no embedding of the empty caption, which stands for no caption"):
        store.encode([""])


def test_a_damaged_embedding_that_cannot_be_computed_is_an_error(tmp_path):
    store = PrecomputedCaptions.create(tmp_path, encoder="a test", text_dim=4)
    store.write("a fox", torch.randn(3, 4))
    spoil_a_byte(store.path("a fox"))
    with pytest.raises(ValueError, match=r"\.safetensors is damaged"):
        store.encode(["a fox"])


@pytest.mark.parametrize("embedding", [torch.ones(2, 5), (torch.ones(3, 3), torch.ones(2, 4))])
def test_an_embedding_of_another_width_is_refused(tmp_path, embedding):
    store = PrecomputedCaptions.create(tmp_path, encoder="a test", text_dim=4)
    with pytest.raises(ValueError, match=r"expected tensors of width {'text': 4}"):
        store.write("a fox", embedding)
    assert not entries(tmp_path)


def test_a_folder_is_for_one_encoder(tmp_path):
    PrecomputedCaptions.create(tmp_path, encoder="one", text_dim=4)
    PrecomputedCaptions.create(tmp_path, encoder="one", text_dim=4)
    with pytest.raises(ValueError, match=r"holds other embeddings: .*'one'.*'two'"):
        PrecomputedCaptions.create(tmp_path, encoder="two", text_dim=4)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PrecomputedCaptions"}))
    with pytest.raises(ValueError, match="is not that of caption embeddings"):
        PrecomputedCaptions(tmp_path)
