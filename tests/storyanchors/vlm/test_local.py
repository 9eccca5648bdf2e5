"""A tiny LLaVA with random weights, taught one answer in a second: the path of every transformers model."""

import asyncio
import io

import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from storyanchors.vlm import VlmConfig, VlmReply, VlmRequest, open_vlm
from storyanchors.vlm.question import schema_words

TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}>"
)
ANSWER = '{"caption": "Ada"}'


class Caption(BaseModel):
    caption: str


def jpeg(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 24), color).save(file, "JPEG")
    return file.getvalue()


QUESTION = VlmRequest("clip/global/1-2", ("Frame 1", jpeg("red"), "Frame 2", jpeg("blue")), Caption, 64)


def make_processor() -> LlavaProcessor:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models: a random one in bfloat16, and one that was taught to give ANSWER to QUESTION."""
    processor = make_processor()
    model = make_model(processor.tokenizer)
    random, taught = (tmp_path_factory.mktemp(name) for name in ("random", "taught"))
    texts = [part if isinstance(part, str) else "<image>" for part in QUESTION.parts]
    prompt = "".join([*texts, schema_words(Caption), ">"])
    images = [Image.open(io.BytesIO(part)) for part in QUESTION.parts if isinstance(part, bytes)]
    batch = processor(text=f"{prompt}{ANSWER}<end>", images=images, return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[:, : -len(ANSWER) - 1] = -100
    for folder, num_steps, dtype in ((random, 0, torch.bfloat16), (taught, 100, torch.float32)):
        model.to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(random), str(taught)


def ask(folder: str, question: VlmRequest = QUESTION, **settings) -> VlmReply:
    return asyncio.run(open_vlm(VlmConfig("local", folder, **settings)).ask(question))


def test_a_model_answers_what_it_was_taught(folders):
    reply = ask(folders[1], temperature=0.0)
    assert (reply.status, reply.finish, reply.text) == ("ok", "stop", ANSWER)
    assert reply.answer == Caption(caption="Ada")
    assert reply.usage.output_tokens == len(ANSWER) + 1
    assert reply.usage.input_tokens > len(schema_words(Caption)) + 2 * 4


def test_an_answer_that_does_not_end_is_truncated(folders):
    shorter = VlmRequest("n", QUESTION.parts, Caption, max_tokens=5)
    reply = ask(folders[1], shorter, temperature=0.0)
    assert (reply.status, reply.text, reply.answer) == ("truncated", ANSWER[:5], None)


def test_sampling_repeats_with_its_seed_and_leaves_torch_s_alone(folders):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    texts = [ask(folders[0], seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"vlm\.model={tmp_path}"):
        open_vlm(VlmConfig("local", str(tmp_path)))
