import pytest
from pydantic import BaseModel, Field

from storyanchors.vlm import VlmRequest, VlmUsage, parse_answer
from storyanchors.vlm.question import estimate_usage, read_reply


class Caption(BaseModel):
    caption: str = Field(max_length=40)
    frames: list[int] = Field(max_length=3)


GOOD = '{"caption": "Ada runs.", "frames": [1, 2]}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\n",
        f"Here it is:\n```json\n{GOOD}\n```\nAnything else?",
    ],
)
def test_an_answer_is_read_with_and_without_fences(text):
    assert parse_answer(text, Caption) == Caption(caption="Ada runs.", frames=[1, 2])


def test_fences_inside_an_answer_are_its_own():
    assert parse_answer('{"caption": "```json\\n{}\\n```", "frames": []}', Caption).caption.startswith("```")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD[:20], "the whole answer: Invalid JSON"),
        (f"```json\n{GOOD[:20]}", "the whole answer: Invalid JSON"),
        ('{"caption": "Ada"}', "frames: Field required"),
        ('{"caption": "Ada", "frames": [1, "x", "y"]}', r"frames.1: .*\(and 1 more\), found 'x'"),
        ("I cannot help with that.", "the whole answer: Invalid JSON"),
    ],
)
def test_other_answers_are_errors_in_one_short_line(text, problem):
    with pytest.raises(ValueError, match=problem) as error:
        parse_answer(text, Caption)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_empty_answer_is_worth_asking_again_and_a_wrong_one_is_kept():
    request = VlmRequest("clip/events/1-3", ("Frame 1", b"jpeg"), Caption)
    empty = read_reply(" ", request, VlmUsage(3), finish="stop", model_version="m")
    assert (empty.status, empty.usage) == ("transient", VlmUsage(3))
    wrong = read_reply("{}", request, VlmUsage(3), finish="stop", model_version="m")
    assert (wrong.status, wrong.text, wrong.answer) == ("invalid", "{}", None)


def test_usage_adds_up_and_an_estimate_is_never_below_english():
    assert VlmUsage(1, 2, 3) + VlmUsage(10, 20, 30) == VlmUsage(11, 22, 33)
    request = VlmRequest("n", ("word " * 300, b"jpeg", b"jpeg"), Caption, max_tokens=500)
    estimate = estimate_usage(request, image_tokens=280, max_tokens=400)
    assert 300 + 2 * 280 < estimate.input_tokens < 800 + 2 * 280
    assert estimate.output_tokens == 400


def test_pictures_are_not_in_a_request_s_repr():
    assert "jpeg" not in repr(VlmRequest("n", (b"jpeg",), Caption))
