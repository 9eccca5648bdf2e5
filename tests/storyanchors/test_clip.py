import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from storyanchors.clip import (
    CaptionRecord,
    ClipInfo,
    StoryClip,
    decode_jpeg,
    encode_jpeg,
    frames_to_tensor,
    tensor_to_frames,
)
from storyanchors.story import Event, Story


def info(num_frames: int = 3, **changes) -> ClipInfo:
    facts = dict(
        key="a-film-0001-00000",
        source="a_film.mp4",
        fps=24.0,
        frame_interval=69,
        frame_numbers=tuple(range(0, 70 * num_frames, 70)),
        seconds=tuple(70 * i / 24 for i in range(num_frames)),
        height=32,
        width=48,
        motion=1.5,
    )
    return ClipInfo(**facts | changes)


def smooth_frames(num_frames: int = 3, height: int = 32, width: int = 48) -> list[Image.Image]:
    ramp = np.linspace(0, 200, height * width).reshape(height, width, 1)
    return [Image.fromarray((ramp + np.array([0, 20, 10 * i])).astype(np.uint8)) for i in range(num_frames)]


def jpeg_that_claims(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is huge."""
    content = bytearray(encode_jpeg(Image.new("RGB", (16, 16))))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def test_a_clip_comes_back_from_its_members():
    story = Story([Event(1, 3, "A ramp.")], global_caption="Ramps.")
    clip = StoryClip(info(), smooth_frames())
    members = clip.to_members()
    assert list(members) == ["001.jpg", "002.jpg", "003.jpg", "clip.json"]
    back = StoryClip.from_members(members, CaptionRecord(clip.info.key, "Ramps.", story))
    assert back.info.model_copy(update={"checksums": ()}) == clip.info
    assert back.story == story and back.global_caption == "Ramps."
    for ours, theirs in zip(clip.frames, back.frames):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 6
    assert StoryClip(back.info, smooth_frames()).to_members() == members  # the same clip gives the same bytes


def test_the_conditions_are_the_facts_of_the_clip():
    conditions = StoryClip(info(), smooth_frames()).conditions
    assert (conditions.fps, conditions.frame_interval, conditions.motion) == (24.0, 69, 1.5)
    assert (conditions.height, conditions.width, conditions.num_frames) == (32, 48, 3)


def test_frames_to_tensor_is_undone_exactly():
    frames = [Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))] * 2
    pixels = frames_to_tensor(frames)
    assert pixels.shape == (2, 3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1
    for frame, back in zip(frames, tensor_to_frames(pixels)):
        assert frame.tobytes() == back.tobytes()


def test_frames_of_two_sizes_are_not_one_tensor():
    with pytest.raises(ValueError, match="one size"):
        frames_to_tensor(smooth_frames(1) + smooth_frames(1, 16, 16))


def test_a_caption_record_comes_back_from_its_line():
    record = CaptionRecord("k-1", "All.", Story([Event(1, 2, "Something.")], ["she"], "flat"))
    assert CaptionRecord.from_json(record.to_json()) == record
    assert "\n" not in record.to_json()
    assert CaptionRecord.from_json(CaptionRecord("k-1", "All.").to_json()).story is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key="../../x"), "found '../../x'"),
        (dict(key="Ab.c"), "dashes"),
        (dict(schema_version=2), "version 2 is not known"),
        (dict(height=50_000, width=50_000), "50000 x 50000"),
        (dict(seconds=(0.0,)), "1 times in seconds for 3"),
        (dict(frame_numbers=()), "frame_numbers"),
        (dict(genre="drama"), "genre"),
    ],
)
def test_a_clip_json_that_is_not_one_is_refused_in_one_line(change, message):
    content = json.dumps(json.loads(info().to_json()) | change).encode()
    with pytest.raises(ValueError, match=message) as caught:
        ClipInfo.from_json(content)
    assert "\n" not in str(caught.value)


def test_members_that_do_not_fit_are_refused():
    members = StoryClip(info(), smooth_frames()).to_members()
    with pytest.raises(ValueError, match=r"without clip\.json"):
        StoryClip.from_members({name: members[name] for name in members if name != "clip.json"})
    with pytest.raises(ValueError, match=r"expected 001\.jpg.*found"):
        StoryClip.from_members({name: members[name] for name in members if name != "002.jpg"})
    with pytest.raises(ValueError, match=r"002\.jpg is damaged"):
        StoryClip.from_members(members | {"002.jpg": members["001.jpg"]})
    with pytest.raises(ValueError, match="captions of clip other"):
        StoryClip.from_members(members, CaptionRecord("other"))
    with pytest.raises(ValueError, match="has 3 frames, its story 2"):
        StoryClip.from_members(members, CaptionRecord(info().key, "", Story([Event(1, 2, "Short.")])))


def test_a_jpeg_bomb_is_refused_by_its_header():
    for size in [(50_000, 50_000), (5_000, 5_000)]:
        with pytest.raises(ValueError, match="pixels"):
            decode_jpeg(jpeg_that_claims(*size), size)
    with pytest.raises(ValueError, match="not decoded"):
        decode_jpeg(jpeg_that_claims(4_000, 4_000), (48, 32))


def test_what_is_not_a_whole_jpeg_is_refused():
    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    for content in [b"", b"text", png.getvalue()]:
        with pytest.raises(ValueError, match="not a JPEG"):
            decode_jpeg(content, (16, 16))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = encode_jpeg(noise)
    with pytest.raises(ValueError, match="damaged JPEG"):
        decode_jpeg(content[: len(content) // 2], (64, 64))


def test_a_frame_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"frame 2 has 16 x 16 pixels, expected 48 x 32"):
        StoryClip(info(2), [*smooth_frames(1), *smooth_frames(1, 16, 16)])
