import json
import logging
import math

import pytest
import torch

from storyanchors.caption_cache import PrecomputedCaptions
from storyanchors.caption_encoder import WordEncoder
from storyanchors.conditioning import MaskPolicy
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.story import Event, Story
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import ClipReader
from train.ema import EmaConfig
from train.optimizer import OptimizerConfig
from train.stage import StageConfig
from train.story_module import NonFiniteGradients, StoryModule

SIZES = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=32, text_dim=192)


class FakeCodec:
    latent_channels, spatial_stride = 16, 4


@pytest.fixture
def module() -> StoryModule:
    return StoryModule(
        StoryDiT(StoryDiTConfig(**SIZES)),
        FakeCodec(),
        WordEncoder(),
        stage=StageConfig(name="s", caption="global", steps=1, mask_policies=[MaskPolicy()]),
        optimizer=OptimizerConfig(lr=0.1, max_skipped=2),
        ema=EmaConfig(),
        sigma_shift=1.0,
        seed=0,
    )


STORY = Story([Event(1, 1, "The fox sleeps."), Event(2, 2, "It wakes.")], ["a fox"], "ink")


@pytest.mark.parametrize(
    ("caption", "left", "lost"),
    [
        (STORY.prompt(), Story(STORY.events).prompt(), "the style 'ink', the subject 'a fox'"),
        ("The fox sleeps. " + "It wakes up. " * 8, "The fox sleeps. " + "It wakes up. " * 4, "It wakes up."),
    ],
)
def test_a_caption_that_is_too_long_is_cut_and_named_once_per_clip(module, caplog, caption, left, lost):
    module.caption_encoder.max_tokens = WordEncoder().count_tokens(left)
    with caplog.at_level(logging.WARNING):
        embeddings = [module.embed(key, caption) for key in ("clip-1", "clip-2", "clip-1")]
    assert all(torch.equal(one, WordEncoder().encode([left])[0]) for one in embeddings)
    messages = [record.message for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == ["clip clip-1", "clip clip-2"]
    assert all("too long for its text encoder" in message and lost in message for message in messages)


def test_a_caption_within_the_budget_is_what_the_encoder_gives(module, caplog):
    for caption in (STORY.prompt(), "A fox.", ""):
        assert torch.equal(module.embed("clip-1", caption), WordEncoder().encode([caption])[0])
    assert not caplog.records


def test_a_caption_that_cannot_be_encoded_names_its_clip(module, tmp_path):
    module.caption_encoder.max_tokens = 3
    with pytest.raises(ValueError, match=r"clip clip-7: the caption has .* at most 3 can be encoded"):
        module.embed("clip-7", STORY.prompt())
    module.caption_encoder = PrecomputedCaptions.create(tmp_path, encoder="a test", text_dim=192)
    with pytest.raises(ValueError, match=r"clip clip-7: .* holds no embedding of the caption 'A fox.'"):
        module.embed("clip-7", "A fox.")


def test_a_cache_of_captions_does_not_change_a_bit(train, three_steps, tmp_path):
    settings = ["stage=continuation", f"model.caption_cache={tmp_path / 'cache'}"]
    losses = lambda run_dir: [line["train/loss"] for line in read_metrics(run_dir)]  # noqa: E731
    for name in ("cold", "warm"):
        assert losses(train(tmp_path / name, *settings)) == losses(three_steps)
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_precomputed_pairs_train_and_draw_a_step_video_network(train, dataset, tmp_path):
    pairs = PrecomputedCaptions.create(
        tmp_path / "pairs", encoder="random numbers", text_dim=6144, clip_text_dim=1024
    )
    index, generator = ClipIndex.open(dataset), torch.Generator().manual_seed(0)
    records = [ClipReader().caption(index.row(number)) for number in range(len(index))]
    for text in {"", *(record.story.prompt() for record in records)}:
        rows = [torch.randn(*size, generator=generator) for size in ((77, 1024), (1 + len(text) // 9, 6144))]
        pairs.write(text, tuple(part.bfloat16() for part in rows))
    run_dir = train(
        tmp_path / "run", "stage=multi_event", "stage.other_caption_share=0", "model.preset=step-4b",
        "model.num_attention_heads=1", "model.attention_head_dim=128", "stage.caption_dropout=0.5",
        f"model.caption_encoder={tmp_path / 'pairs'}", "samples.every_n_steps=3", "samples.num_stories=1",
        "samples.num_steps=1",
    )  # fmt: skip
    assert all(math.isfinite(line["train/loss"]) for line in read_metrics(run_dir) if "train/loss" in line)
    assert (run_dir / "samples" / "step_00000003_prompt.png").is_file()
    with pytest.raises(ValueError, match="is on disk already"):
        train(
            tmp_path / "cached",
            f"model.caption_encoder={tmp_path / 'pairs'}",
            f"model.caption_cache={tmp_path}",
        )
    with pytest.raises(ValueError, match=r"text_dim=6144, the network expects 192"):
        train(tmp_path / "tiny", f"model.caption_encoder={tmp_path / 'pairs'}")


def read_metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def backward(module: StoryModule, factor: float) -> None:
    sum(parameter.sum() for parameter in module.dit.parameters()).mul(factor).backward()


def test_only_the_network_is_a_submodule(module):
    assert {name for name, _ in module.named_children()} == {"dit"}


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(module):
    optimizer = module.configure_optimizers()
    before = [parameter.detach().clone() for parameter in module.dit.parameters()]
    backward(module, float("nan"))
    module.configure_gradient_clipping(optimizer, None, None)
    optimizer.step()
    assert all(map(torch.equal, before, module.dit.parameters()))
    assert (module.num_skipped, module.skipped_in_a_row) == (1, 1)
    backward(module, 1.0)
    module.configure_gradient_clipping(optimizer, None, None)
    optimizer.step()
    assert (module.num_skipped, module.skipped_in_a_row) == (1, 0)
    assert not any(map(torch.equal, before, module.dit.parameters()))


def test_too_many_in_a_row_stop_the_run_and_name_the_clips(module):
    optimizer = module.configure_optimizers()
    module.batch_keys = ["clip-7", "clip-9"]
    for _ in range(2):
        backward(module, float("inf"))
        module.configure_gradient_clipping(optimizer, None, None)
    backward(module, float("inf"))
    with pytest.raises(NonFiniteGradients, match="clip-7, clip-9"):
        module.configure_gradient_clipping(optimizer, None, None)
