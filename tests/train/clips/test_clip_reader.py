"""Clips are read by offset, in one request each; a byte that is not what the index says is named."""

import dataclasses
import io
import json
import pickle
import random
import shutil
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.build_index import build_index
from storyanchors.clip import frames_to_levels, frames_to_tensor, levels_to_pixels
from storyanchors.shard_store import ShardStore
from storyanchors.story_world import from_story, render_frame
from tests.range_server import serve
from train.clips.clip_index import ClipIndex, tar_path
from train.clips.clip_reader import BrokenSample, ClipReader, check_files

SECRET = "sig=s3cr3t"


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture
def reader():
    return ClipReader(ShardStore(num_attempts=2, backoff_s=0.01, timeout_s=20))


def damage(path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def replace_caption(dataset, number: int, **changes) -> None:
    """Changes a record in place and keeps its length, as the index has it."""
    row = ClipIndex.open(dataset).row(number)
    path = dataset / "captions" / row.caption_run / f"{row.shard}.jsonl"
    content = path.read_bytes()
    line = content[row.caption_offset : row.caption_offset + row.caption_size]
    record = json.loads(line) | {"global_caption": ""} | changes
    text = json.dumps(record, ensure_ascii=False, sort_keys=True).encode().ljust(len(line))
    assert len(text) == len(line)
    path.write_bytes(content[: row.caption_offset] + text + content[row.caption_offset + row.caption_size :])


def test_a_clip_is_what_was_rendered(dataset, reader):
    row = ClipIndex.open(dataset).row(3)
    clip = reader.load(row, epoch=5)
    record = reader.caption(row)
    story = from_story(record.story)
    rendered = [Image.fromarray(render_frame(story, number)) for number in range(1, story.num_frames + 1)]
    assert (clip.key, clip.epoch, clip.captions["multi_event"]) == (row.key, 5, record.story.prompt())
    assert clip.captions["global"] == record.global_caption
    assert clip.conditions.num_frames == len(clip.frames) == story.num_frames
    assert clip.frames.dtype == torch.uint8
    difference = (levels_to_pixels(clip.frames) - frames_to_tensor(rendered)).abs()  # of JPEG at quality 95
    assert difference.mean() < 0.02


def test_a_dataset_behind_a_url_gives_the_same_clips_in_two_requests_each(
    dataset, reader, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with serve(dataset.parent) as server:
        remote = ClipIndex.open(f"{server.url}/{dataset.name}?{SECRET}")
        here = ClipIndex.open(dataset)
        assert len(remote) == len(here)
        server.requests.clear()
        for number in range(len(here)):
            one, other = reader.load(here.row(number), 0), reader.load(remote.row(number), 0)
            assert torch.equal(one.frames, other.frames) and one.captions == other.captions
        assert len(server.requests) == 2 * len(here)  # all frames, and the caption
        assert all("bytes=" in request and SECRET in request for request in server.requests)
        server.faults = ["wrong"]
        with pytest.raises(BrokenSample, match=r"000000.tar: member .*001.jpg: crc32") as raised:
            reader.frames(remote.row(0))
        assert SECRET not in str(raised.value)
        server.always = "503"
        with pytest.raises(OSError, match=r"cannot be read after 2 attempts: HTTP status 503") as raised:
            reader.frames(remote.row(0))
        assert SECRET not in str(raised.value)


def test_a_dataset_in_s3_gives_the_same_clips(dataset, reader, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    with serve(dataset.parent) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        there, here = ClipIndex.open(f"s3://{dataset.name}"), ClipIndex.open(dataset)
        check_files(there.files())
        server.requests.clear()
        for number in range(len(here)):
            one, other = reader.load(here.row(number), 0), reader.load(there.row(number), 0)
            assert torch.equal(one.frames, other.frames) and one.captions == other.captions
        assert len(server.requests) == 2 * len(here)
        with pytest.raises(ValueError, match=r"1 of 1 files .* such as s3://.*000009\.tar"):
            check_files([there.files()[1].replace("000000", "000009")])


def test_a_changed_byte_of_a_frame_is_found_and_named(copy, reader):
    row = ClipIndex.open(copy).row(2)
    damage(copy / "frames" / "000000.tar", row.frame_offsets[1] + 40)
    with pytest.raises(BrokenSample, match=rf"000000\.tar: member {row.key}\.002\.jpg: crc32 is"):
        reader.load(row, 0)


def test_a_changed_byte_of_a_caption_is_found_and_named(copy, reader):
    row = ClipIndex.open(copy).row(2)
    damage(copy / "captions" / "truth" / "000000.jsonl", row.caption_offset)
    with pytest.raises(BrokenSample, match=rf"000000\.jsonl: caption of clip {row.key}: "):
        reader.load(row, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 2}, "caption schema version 2 is not known, expected 1"),
        ({"key": "another-clip"}, "the line belongs to another-clip; write the index again"),
        ({"story": {"events": [], "global_caption": ""}}, "caption of clip"),
        ({"more": 1}, "a caption record has the fields"),
    ],
)
def test_a_caption_of_another_schema_or_clip_is_named(copy, reader, changes, reason):
    replace_caption(copy, 2, **changes)
    with pytest.raises(BrokenSample, match=reason):
        reader.load(ClipIndex.open(copy).row(2), 0)


def test_captions_that_were_written_after_the_index_are_told_so(copy, reader):
    path = copy / "captions" / "truth" / "000000.jsonl"
    path.write_bytes(b"\n" + path.read_bytes())
    with pytest.raises(BrokenSample, match="written after the index, write the index again"):
        reader.caption(ClipIndex.open(copy).row(2))


def test_a_caption_nested_without_end_is_broken_and_no_crash(copy, reader):
    path = copy / "captions" / "truth" / "000000.jsonl"
    path.write_bytes(b"[" * 200_000)
    row = dataclasses.replace(ClipIndex.open(copy).row(2), caption_offset=0, caption_size=200_000)
    with pytest.raises(BrokenSample, match="caption of clip"):
        reader.caption(row)
    with pytest.raises(BrokenSample, match="at most 1048576 are read"):
        reader.caption(dataclasses.replace(row, caption_size=2**21))


def test_of_a_shard_cut_in_half_the_first_half_is_served(copy, reader):
    path = copy / "frames" / "000000.tar"
    index = ClipIndex.open(copy)
    whole = [reader.load(index.row(number), 0).frames for number in range(len(index))]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader, served = ClipReader(), 0
    for number, frames in enumerate(whole):
        try:
            assert torch.equal(reader.load(index.row(number), 0).frames, frames)
            served += 1
        except BrokenSample as error:
            assert "000000.tar: clip " in str(error) and "the tar is cut short" in str(error)
    assert 0.2 * len(whole) < served < 0.8 * len(whole)


def test_no_damage_passes_in_silence(copy, reader):
    """200 copies with a byte, a block or the end damaged: a clip is whole or named, nothing else happens."""
    path, chance = copy / "frames" / "000000.tar", random.Random(0)
    index, content = ClipIndex.open(copy), path.read_bytes()
    whole = [reader.load(index.row(number), 0).frames for number in range(len(index))]
    num_named = 0
    for case in range(200):
        damaged, place = bytearray(content), chance.randrange(len(content))
        if case % 3 == 0:
            damaged[place] ^= 1 << chance.randrange(8)
        elif case % 3 == 1:
            damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        reader = ClipReader()
        for number in chance.sample(range(len(index)), 3):
            try:
                assert torch.equal(reader.load(index.row(number), 0).frames, whole[number])
            except BrokenSample:
                num_named += 1
    assert num_named > 50


def in_a_tar_of_others(tmp_path, row, contents: list[bytes]):
    """The row of a clip whose frames have these contents, with other members between them."""
    path = tmp_path / "others.tar"
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            for name, data in ((f"x{number}.json", b"{}" * 300), (f"x{number}.img", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        images = [member for member in tar.getmembers() if member.name.endswith(".img")]
    return dataclasses.replace(
        row,
        location=str(path),
        frame_offsets=[member.offset_data for member in images],
        frame_sizes=[member.size for member in images],
        frame_crc32=list(map(zlib.crc32, contents)),
        conditions=dataclasses.replace(row.conditions, height=64, width=80, num_frames=len(contents)),
        caption_run=None,
    )


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_frames_of_others_are_cut_to_the_middle_whatever_their_format(dataset, tmp_path, reader):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exact = [encode(image, "PNG"), encode(image, "WEBP", lossless=True), encode(image.convert("RGBA"), "PNG")]
    gray = encode(image.convert("L"), "PNG")
    jpeg = encode(image, "JPEG", quality=100, subsampling=0)
    row = in_a_tar_of_others(tmp_path, ClipIndex.open(dataset).row(0), [*exact, gray, jpeg])
    frames = reader.frames(row)
    middle = pixels[3:67, 5:85]
    assert all((np.asarray(frame) == middle).all() for frame in frames[:3])
    assert (np.asarray(frames[3])[..., 0] == np.asarray(image.convert("L"))[3:67, 5:85]).all()
    assert np.abs(np.asarray(frames[4], int) - middle).mean() < 3
    backwards = {name: getattr(row, name)[::-1] for name in ("frame_offsets", "frame_sizes", "frame_crc32")}
    again = reader.frames(dataclasses.replace(row, **backwards))
    assert torch.equal(frames_to_levels(again), frames_to_levels(frames).flip(0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode(Image.new("RGB", (64, 64)), "PNG"), "expected 80 x 64"),
        (encode(Image.new("RGB", (96, 64)), "PNG"), "expected 80 x 64 and at most 15 more"),
        (encode(Image.new("I;16", (80, 64)), "PNG"), "in mode I;16"),
        (encode(Image.new("RGB", (80, 64)), "BMP"), "not a JPEG or PNG or WEBP"),
        (encode(Image.new("RGB", (80, 64)), "GIF"), "not a JPEG or PNG or WEBP"),
        (encode(Image.new("1", (2**14, 2**14)), "PNG"), "at most 16777216 are decoded|more pixels than any"),
        (pickle.dumps({"a": 1}), "not a JPEG or PNG or WEBP"),
        (encode(Image.new("RGB", (80, 64)), "PNG")[:-40], "a damaged PNG|not a"),
        (encode(Image.effect_noise((80, 64), 99).convert("RGB"), "JPEG")[:-900], "a damaged JPEG"),
        (b"", "not a JPEG or PNG or WEBP"),
    ],
)
def test_what_is_no_frame_is_never_decoded(dataset, tmp_path, reader, content, reason):
    row = in_a_tar_of_others(tmp_path, ClipIndex.open(dataset).row(0), [content])
    with pytest.raises(
        BrokenSample, match=rf"others\.tar: frame 1 of clip {row.key} at byte \d+: .*({reason})"
    ):
        reader.frames(row)


def test_a_row_cannot_ask_for_a_whole_disk(dataset, reader):
    row = ClipIndex.open(dataset).row(0)
    for changes in (
        {"frame_offsets": [row.frame_offsets[0], *[2**40] * (len(row.frame_offsets) - 1)]},
        {"frame_sizes": [2**40] * len(row.frame_sizes)},
    ):
        with pytest.raises(BrokenSample, match="too large or too far apart"):
            reader.frames(dataclasses.replace(row, **changes))


def test_a_missing_shard_is_found_before_anything_starts(copy):
    tars = [str(copy / "frames" / f"{number:06d}.tar") for number in range(3)]
    check_files(tars[:1])
    with pytest.raises(
        ValueError, match=r"2 of 3 files of the dataset are missing or empty, such as .*000001"
    ):
        check_files(tars)
    (copy / "frames" / "000000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 1 files of the dataset are missing or empty"):
        check_files(tars[:1])
    with pytest.raises(ValueError, match="is not read"):
        check_files(["pipe:cat /etc/passwd"])


def test_the_files_of_a_server_are_found_too(dataset):
    with serve(dataset.parent) as server:
        there = f"{server.url}/{dataset.name}/frames/000000.tar?{SECRET}"
        check_files([there])
        with pytest.raises(ValueError, match=r"1 of 2 files .* such as http://[^?]*000009.tar$"):
            check_files([there, there.replace("000000", "000009")])
        server.always = "403"
        with pytest.raises(PermissionError, match=r"access is denied.*000000.tar"):
            check_files([there])


def test_a_tar_is_a_shard_of_its_dataset_or_anywhere(dataset):
    assert tar_path("/data/a", "000000", None) == "/data/a/frames/000000.tar"
    assert tar_path("/data/a", "000000", "s3://b/x.tar") == "s3://b/x.tar"
    assert tar_path("https://host/d?a=b", "000000", None) == "https://host/d/frames/000000.tar?a=b"
    names = ["captions/truth/000000.jsonl", "frames/000000.tar"]
    assert ClipIndex.open(dataset).files() == [str(dataset / name) for name in names]


def test_an_index_is_mapped_anew_by_another_process_and_must_be_the_same(copy):
    index = ClipIndex.open(copy).with_caption("multi_event").split(0.3)[0]
    carried = pickle.dumps(index)
    assert [pickle.loads(carried).row(n) for n in range(len(index))] == [
        index.row(n) for n in range(len(index))
    ]
    assert len(carried) < 1000 + 8 * len(index)  # numbers of rows, not rows
    (copy / "captions" / "truth").rename(copy / "captions" / "other")
    build_index(copy, None)
    with pytest.raises(ValueError, match="was written again while the run started"):
        pickle.loads(carried)
