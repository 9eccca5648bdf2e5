import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from storyanchors.caption_encoder import (
    Umt5Encoder,
    Umt5Tokens,
    WordEncoder,
    _cleaned,
    fit_caption,
    load_caption_encoder,
    load_token_counter,
)
from storyanchors.story import Event, Story, shorter_captions

# Umt5Encoder

TEXTS = [
    "[1-2] the square stands in the forest.\nthe square waits",
    "",
    "  the\u00a0square &amp;amp; the\t\tforest ",
    "the forest " * 100,
]


@pytest.fixture(scope="module")
def encoder() -> Umt5Encoder:
    """Random weights of UMT5's shape and a tokenizer of its kind: unigrams, </s> at the end of a text."""
    words = [
        "\u2581the",
        "\u2581square",
        "\u2581in",
        "\u2581forest",
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz[].-12&",
    ]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, -len(words) / len(word)) for word in words),
    ]
    sizes = dict(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2)
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **sizes))
    return Umt5Encoder(model, T5Tokenizer(vocab=vocabulary, extra_ids=0))


@pytest.fixture(scope="module")
def pipeline(encoder, vae) -> WanPipeline:
    """diffusers' whole text-to-video pipeline around the same text encoder, all of it tiny."""
    sizes = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=1, freq_dim=16)
    transformer = WanTransformer3DModel(text_dim=encoder.text_dim, in_channels=16, out_channels=16, **sizes)
    pipeline = WanPipeline(
        encoder.tokenizer, encoder.model, vae, FlowMatchEulerDiscreteScheduler(), transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_embeddings_are_those_that_diffusers_feeds_to_wans_transformer(encoder, pipeline):
    fed = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, inputs: fed.append(inputs["encoder_hidden_states"]), with_kwargs=True
    )
    sizes = dict(height=16, width=16, num_frames=1, num_inference_steps=1, output_type="latent")
    pipeline(TEXTS, negative_prompt="", guidance_scale=5.0, max_sequence_length=512, **sizes)
    captions, no_captions = fed
    torch.testing.assert_close(torch.stack(encoder.encode(TEXTS)), captions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode([""])[0], no_captions[0], atol=1e-5, rtol=1e-5)


def test_embeddings_are_those_of_encode_prompt(encoder, pipeline):
    expected, _ = pipeline.encode_prompt(TEXTS, max_sequence_length=512, do_classifier_free_guidance=False)
    torch.testing.assert_close(torch.stack(encoder.encode(TEXTS)), expected, atol=1e-5, rtol=1e-5)


def test_rows_behind_the_last_token_are_zero_and_the_others_are_not(encoder):
    for text, embedding in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        num_tokens = encoder.count_tokens(text)
        assert embedding.shape == (512, encoder.text_dim) == (encoder.max_tokens, 32)
        assert embedding[:num_tokens].any(dim=1).all()
        assert not embedding[num_tokens:].any()
    assert encoder.count_tokens("") == 1


def test_an_embedding_does_not_depend_on_its_neighbours(encoder):
    together = encoder.encode(TEXTS)
    for text, embedding in zip(TEXTS, together, strict=True):
        assert torch.equal(encoder.encode([text])[0], embedding)


@pytest.mark.parametrize(
    "text",
    [
        "a  b\n\n c",
        "&amp;lt; &quot;x&quot;",
        "<i> &amp;lt;",  # ftfy leaves entities alone beside a tag
        "sch\u00c3\u00b6n",
        "\u2018a\u2019\u2026",
        "\ufb01ne \x07bell",
        "",
    ],
)
def test_texts_are_cleaned_as_wan_cleans_them(text):
    assert _cleaned(text) == prompt_clean(text)


def test_a_caption_that_does_not_fit_is_never_cut_in_silence(encoder):
    longest, too_long = "the " * 511, "the " * 512
    assert encoder.count_tokens(longest) == 512
    assert encoder.encode([longest])[0].any(dim=1).all()
    with pytest.raises(ValueError, match="the caption has 513 tokens, at most 512 can be encoded: 'the the"):
        encoder.encode(["", too_long])


def test_the_encoder_is_frozen_and_the_same_under_autocast(encoder):
    (embedding,) = encoder.encode(TEXTS[:1])
    assert not embedding.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(TEXTS[:1])[0], embedding)


def test_a_saved_encoder_comes_back_in_its_dtype(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = load_caption_encoder(tmp_path)
    assert isinstance(again, Umt5Encoder)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(TEXTS), encoder.encode(TEXTS), strict=True))
    again.to(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_caption_encoder(tmp_path / "half").encode([""])[0].dtype == torch.bfloat16


def test_the_folder_names_the_class(tmp_path):
    WordEncoder().save_pretrained(tmp_path)
    assert isinstance(load_caption_encoder(tmp_path), WordEncoder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match="WordEncoder, PrecomputedCaptions nor a umt5 model: None, model_type 'bert'"
    ):
        load_caption_encoder(tmp_path)


def test_a_vocabulary_is_never_made_up(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"found no tokenizer\.json or spiece\.model in .*tokenizer"):
        load_caption_encoder(tmp_path)


def test_pickled_weights_are_not_read(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    torch.save(encoder.model.state_dict(), tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_caption_encoder(tmp_path)


def test_tokens_are_counted_without_the_weights(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    counter = load_token_counter(tmp_path)
    assert isinstance(counter, Umt5Tokens) and not isinstance(counter, Umt5Encoder)
    assert [counter.count_tokens(text) for text in TEXTS] == [encoder.count_tokens(text) for text in TEXTS]
    assert counter.max_tokens == encoder.max_tokens
    assert isinstance(load_token_counter("words"), WordEncoder)


def test_a_fingerprint_is_that_of_weights_dtype_and_tokenizer(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    fingerprint = encoder.fingerprint()
    assert load_caption_encoder(tmp_path).fingerprint() == fingerprint
    changed, half = load_caption_encoder(tmp_path), load_caption_encoder(tmp_path).to(dtype=torch.bfloat16)
    with torch.no_grad():
        changed.model.encoder.block[0].layer[0].SelfAttention.q.weight[3, 4] += 1e-3
    other_words = Umt5Encoder(
        encoder.model, T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)])
    )
    others = [one.fingerprint() for one in (changed, half, other_words, WordEncoder())]
    assert len({fingerprint, *others}) == 5


# fit_caption


class Words:
    """Counts words."""

    def __init__(self, max_tokens: int | None):
        self.max_tokens = max_tokens

    def count_tokens(self, text: str) -> int:
        return len(text.split())


STORY = Story(
    [Event(1, 2, "The fox sleeps."), Event(3, 4, "It wakes up."), Event(4, 5, "Snow falls on it.")],
    ["a red fox", "the snow"],
    "ink on paper",
)


def test_a_caption_that_fits_stays_as_it_is():
    for text in (STORY.prompt(), "Any text.  As it is. ", ""):
        fitted = fit_caption(text, Words(Words(None).count_tokens(text)))
        assert (fitted.text, fitted.dropped) == (text, [])
    assert fit_caption(STORY.prompt() * 9, Words(None)).dropped == []


def test_style_goes_first_then_subjects_then_events_from_the_end():
    whole = Words(None).count_tokens(STORY.prompt())
    lost = [[part.kind for part in fit_caption(STORY.prompt(), Words(whole - n)).dropped] for n in range(23)]
    kinds = ["style", "subject", "subject", "event", "event"]
    assert all(one == kinds[: len(one)] for one in lost)
    assert {len(one) for one in lost} == {0, 1, 2, 3, 4, 5}
    assert [len(one) for one in lost] == sorted(len(one) for one in lost)
    fitted = fit_caption(STORY.prompt(), Words(15))
    assert fitted.text == Story(STORY.events[:2]).prompt()
    assert [part.text for part in fitted.dropped] == [
        "ink on paper", "the snow", "a red fox", "[4-5] Snow falls on it."
    ]  # fmt: skip


def test_no_more_is_lost_than_must_be():
    versions = [STORY.prompt(), *(text for text, _ in shorter_captions(STORY.prompt()))]
    for max_tokens in range(7, 29):
        fitted = fit_caption(STORY.prompt(), Words(max_tokens))
        assert fitted.text == versions[len(fitted.dropped)]
        assert Words(None).count_tokens(fitted.text) <= max_tokens
        assert Words(None).count_tokens(versions[len(fitted.dropped) - 1]) > max_tokens


def test_a_global_caption_loses_whole_sentences():
    text = "Mr. Fox sleeps. He wakes at 3.5 km! Does it snow? It does"
    fitted = fit_caption(text, Words(8))
    assert fitted.text == "Mr. Fox sleeps. He wakes at 3.5 km!"
    assert [part.text for part in fitted.dropped] == ["It does", "Does it snow?"]


@pytest.mark.parametrize("text", [Story([Event(1, 1, "word " * 9)]).prompt(), "word " * 9])
def test_an_event_or_a_sentence_is_never_cut(text):
    with pytest.raises(
        ValueError, match=r"the caption has \d+ tokens, at most 8 can be encoded, and its first"
    ):
        fit_caption(text, Words(8))


def test_what_is_lost_is_named():
    loss = fit_caption(STORY.prompt(), Words(15)).loss
    assert loss == (
        "the caption is too long for its text encoder and loses the style 'ink on paper', "
        "the subject 'the snow', the subject 'a red fox', the event '[4-5] Snow falls on it.'"
    )
    assert len(fit_caption("One fox. " + "Long " * 99, Words(3)).loss) < 130


# WordEncoder: [word | words before it | frames of its line], 64 numbers each


def test_words_keep_their_vectors_wherever_they_stand():
    encoder = WordEncoder()
    one, other = encoder.encode(["the red square", "Square of red"])
    assert torch.equal(one[1, :64], other[2, :64]) and torch.equal(one[2, :64], other[0, :64])
    assert not torch.equal(one[1, :64], one[2, :64])


def test_the_words_before_fade_by_half():
    (rows,) = WordEncoder().encode(["a red square"])
    torch.testing.assert_close(rows[2, 64:128], rows[1, :64] + 0.5 * rows[0, :64])
    assert not rows[0, 64:128].any()


def test_a_range_is_the_sum_of_its_frames_and_only_on_its_line():
    encoder = WordEncoder()
    span, *frames = encoder.encode(["[3-5] runs", "[3] runs", "[4] runs", "[5] runs"])
    torch.testing.assert_close(span[-1, 128:], sum(rows[-1, 128:] for rows in frames))
    (rows,) = encoder.encode(["Subjects:\n[2] runs"])
    assert not rows[:2, 128:].any() and rows[2:, 128:].any()


def test_words_are_counted_as_they_are_encoded():
    encoder = WordEncoder()
    for text in ["", "\n", "Video Style: flat.\n\n[1-2] a cat, 3 dogs", "\u5728\u68ee\u6797\u91cc"]:
        assert encoder.encode([text])[0].shape == (encoder.count_tokens(text), encoder.text_dim)
    with pytest.raises(ValueError, match="has 4097 words, at most 4096"):
        encoder.encode(["word " * 4097])
