import hashlib
import json
import re
import shutil
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline.build_index import build_index
from data_pipeline.captions import read_captions, write_captions, write_run
from data_pipeline.shard_reader import finished_shards, read_clips, read_marker
from data_pipeline.shard_writer import ShardWriter
from storyanchors.caption_cache import PrecomputedCaptions
from storyanchors.caption_encoder import WordEncoder
from storyanchors.clip import CaptionRecord, ClipInfo, StoryClip, encode_jpeg
from storyanchors.story import Event, Story

KEY = "film-0123-{:05d}"


def clip_members(number: int, num_frames: int = 3, **changes) -> dict[str, bytes]:
    facts = dict(
        key=KEY.format(number),
        source=f"film {number}.mp4",
        fps=24.0,
        frame_interval=69,
        frame_numbers=tuple(range(0, 70 * num_frames, 70)),
        seconds=tuple(float(k) for k in range(num_frames)),
        height=32,
        width=48,
    )
    frames = [Image.fromarray(np.full((32, 48, 3), 10 * number + k, np.uint8)) for k in range(num_frames)]
    return StoryClip(ClipInfo(**facts | changes), frames).to_members()


def write_shard(frames, name: str, numbers, members=clip_members) -> None:
    frames.mkdir(parents=True, exist_ok=True)
    with ShardWriter(frames, name) as shard:
        for number in numbers:
            shard.add(KEY.format(number), members(number))
        shard.finish()


def story(num_frames: int) -> Story:
    return Story([Event(1, num_frames, "She waits.")], ["she"], "drawn", "A woman waits.")


@pytest.fixture
def dataset(tmp_path):
    """Two shards of two clips, captions for three of them."""
    folder = tmp_path / "ds"
    write_shard(folder / "frames", "000000", [0, 1])
    write_shard(folder / "frames", "000001", [2, 3])
    record = {"schema_version": 1, "made_by": "a test", "config": {}, "tool": {}, "license_note": ""}
    (folder / "dataset.json").write_text(json.dumps(record | {"finished": True, "counts": {"shards": 2}}))
    write_captions(folder, "run-1", "000000", [CaptionRecord(KEY.format(k), "Hi.", story(3)) for k in (1, 0)])
    write_captions(folder, "run-1", "000001", [CaptionRecord(KEY.format(2), "She waits at night.")])
    write_run(folder, "run-1", "a test")
    return folder


def rows(dataset) -> list[dict]:
    return pq.read_table(dataset / "index.parquet").to_pylist()


def test_the_index_leads_to_every_byte(dataset):
    summary = build_index(dataset, "run-1")
    assert (summary.num_clips, summary.num_frames, summary.num_shards) == (4, 12, 2)
    assert (summary.num_global_captions, summary.num_stories) == (3, 2)
    found = rows(dataset)
    assert [row["key"] for row in found] == [KEY.format(k) for k in range(4)]
    for number, row in enumerate(found):
        tar = (dataset / "frames" / f"{row['shard']}.tar").read_bytes()
        jpegs = [tar[a : a + n] for a, n in zip(row["frame_offsets"], row["frame_sizes"])]
        members = clip_members(number)
        assert jpegs == [members[f"00{k}.jpg"] for k in (1, 2, 3)]
        assert row["frame_crc32"] == [zlib.crc32(jpeg) for jpeg in jpegs]
        assert (row["height"], row["width"], row["num_frames"], row["fps"]) == (32, 48, 3, 24.0)
    for row in found[:3]:
        lines = (dataset / "captions" / row["caption_run"] / f"{row['shard']}.jsonl").read_bytes()
        line = lines[row["caption_offset"] : row["caption_offset"] + row["caption_size"]]
        assert CaptionRecord.from_json(line).key == row["key"]
    assert [row["global_caption_words"] for row in found] == [1, 1, 4, None]
    words = len(story(3).prompt().split())
    assert [row["story_words"] for row in found] == [words, words, None, None]
    assert found[3]["caption_run"] is None


def test_an_index_needs_no_captions(dataset):
    assert build_index(dataset).num_stories == 0
    assert all(row["caption_run"] is None for row in rows(dataset))


def test_the_same_dataset_gives_the_same_index(dataset):
    build_index(dataset, "run-1")
    first = (dataset / "index.parquet").read_bytes()
    build_index(dataset, "run-1")
    assert (dataset / "index.parquet").read_bytes() == first


def test_tokens_are_counted_on_request(command, dataset):
    build_index(dataset, "run-1")
    assert all(row["global_caption_tokens"] is row["story_tokens"] is None for row in rows(dataset))
    status, printed, _ = command(
        "build_index", f"dataset={dataset}", "captions=run-1", "caption_encoder=words"
    )
    assert status == 0
    encoder, found = WordEncoder(), rows(dataset)
    of_story = encoder.count_tokens(story(3).prompt())
    assert [row["global_caption_tokens"] for row in found] == [2, 2, 5, None]  # with the full stop
    assert [row["story_tokens"] for row in found] == [of_story, of_story, None, None]
    assert "tokens of words: at most 4096 per caption\n" in printed
    assert "  global caption: p50 2, p95 5, max 5; 0 of 3 too long\n" in printed
    assert f"  story: p50 {of_story}, p95 {of_story}, max {of_story}; 0 of 2 too long\n" in printed


def test_captions_that_are_too_long_are_named_with_what_they_would_lose(dataset):
    styled = Story([Event(1, 2, "She waits."), Event(3, 3, "x " * 40)], ["she", "he"], "drawn " * 4090)
    eventful = Story([Event(1, 3, "She waits."), Event(2, 3, "x " * 2000), Event(3, 3, "y " * 3000)], ["she"])
    records = [
        CaptionRecord(KEY.format(0), "One. Two. " + "Three " * 4096, styled),
        CaptionRecord(KEY.format(1), "word " * 4097, eventful),
    ]
    write_captions(dataset, "run-1", "000000", records)
    summary = build_index(dataset, "run-1", caption_encoder="words", workers=1)
    short, long = sorted(WordEncoder().count_tokens(one.prompt()) for one in (styled, eventful))
    assert summary.token_report[0] == "tokens of words: at most 4096 per caption"
    assert summary.token_report[1:] == [
        "  global caption: p50 4097, p95 4100, max 4100; 2 of 3 too long",
        f"  story: p50 {short}, p95 {long}, max {long}; 2 of 2 too long",
        f"  {KEY.format(0)}: global caption of 4100 tokens loses 1 sentence",
        f"  {KEY.format(0)}: story of {short} tokens loses its style",
        f"  {KEY.format(1)}: global caption of 4097 tokens cannot be cut to fit: its first event or sentence "
        "alone is too long",
        f"  {KEY.format(1)}: story of {long} tokens loses 1 subject, 1 event",
    ]


def test_a_caption_without_an_embedding_is_named(refused, dataset, tmp_path):
    made = PrecomputedCaptions.create(tmp_path / "made", encoder="a test", text_dim=4)
    made.write("Hi.", torch.ones(7, 4))
    arguments = [f"dataset={dataset}", "captions=run-1", f"caption_encoder={tmp_path / 'made'}"]
    error = refused("build_index", *arguments)
    assert f"story of clip {KEY.format(0)}: {tmp_path / 'made'} holds no embedding of the caption" in error
    for text in (story(3).prompt(), "She waits at night."):
        made.write(text, torch.ones(9, 4))
    summary = build_index(dataset, "run-1", caption_encoder=str(tmp_path / "made"))
    assert summary.token_report[:2] == [
        f"tokens of {tmp_path / 'made'}: no limit",
        "  global caption: p50 7, p95 9, max 9; 0 of 3 too long",
    ]


def test_counting_tokens_needs_captions(refused, dataset):
    assert "name it with captions=NAME" in refused(
        "build_index", f"dataset={dataset}", "caption_encoder=words"
    )
    arguments = [f"dataset={dataset}", "captions=run-1", f"caption_encoder={dataset}"]
    shutil.rmtree(dataset / "frames")  # which is not looked at before the encoder
    assert "found no tokenizer.json or spiece.model" in refused("build_index", *arguments)


def test_webdataset_decodes_the_shards(dataset):
    shards = [str(path) for path in sorted((dataset / "frames").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [KEY.format(k) for k in range(4)]
    assert samples[2]["001.jpg"].size == (48, 32)
    assert samples[2]["clip.json"]["source"] == "film 2.mp4"


def test_a_tar_without_its_marker_does_not_exist(dataset):
    (dataset / "frames" / "000001.json").unlink()
    assert finished_shards(dataset / "frames") == ["000000"]
    with pytest.raises(ValueError, match="found 1 shards with a marker, expected 2"):
        build_index(dataset)


def test_stories_by_hand_become_a_captions_run(command, dataset, tmp_path):
    story(3).to_file(tmp_path / "film 1.story.yaml")
    story(3).to_file(tmp_path / "film 3.story.yaml")
    arguments = (f"dataset={dataset}", "captions=by_hand", f"stories={tmp_path}")
    status, printed, _ = command("build_index", *arguments)
    assert status == 0 and "captions by_hand: 2 global, 2 stories" in printed
    assert [row["story_words"] is not None for row in rows(dataset)] == [False, True, False, True]
    [line] = read_captions(dataset, "by_hand", "000001")
    assert line.record == CaptionRecord(KEY.format(3), "A woman waits.", story(3))
    assert command("build_index", *arguments)[0] == 0  # a story may be mended and imported again


def test_stories_that_do_not_fit_are_refused(refused, dataset, tmp_path):
    arguments = [f"dataset={dataset}", "captions=by_hand", f"stories={tmp_path}"]
    assert "no story file for any of 4 videos, expected e.g. film 0.story.yaml" in refused(
        "build_index", *arguments
    )
    story(4).to_file(tmp_path / "film 1.story.yaml")
    assert "film 1.story.yaml tells 4 frames, its clip has 3" in refused("build_index", *arguments)
    gap = "events: [{frames: [1, 1], description: a}, {frames: [3, 3], description: b}]"
    (tmp_path / "film 1.story.yaml").write_text(gap)
    assert "film 1.story.yaml: no event covers frame 2" in refused("build_index", *arguments)
    assert "is not a folder" in refused("build_index", *arguments[:2], f"stories={tmp_path}/nowhere")
    arguments[1] = "captions=run-1"
    assert "'run-1' was made by a test: choose another name" in refused("build_index", *arguments)
    assert "name it with captions=NAME" in refused("build_index", arguments[0], arguments[2])


def rewrite(path, change) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def spoil_marker(dataset, name: str = "000000") -> None:
    """Makes the marker agree with whatever the tar and the index are now, as one might who means harm."""
    frames = dataset / "frames"
    marker = json.loads((frames / f"{name}.json").read_bytes())
    tar, index = ((frames / f"{name}.{kind}").read_bytes() for kind in ("tar", "idx"))
    marker |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
    marker |= {"index_sha256": hashlib.sha256(index).hexdigest(), "num_clips": len(index.splitlines())}
    (frames / f"{name}.json").write_text(json.dumps(marker))


def evil_names(dataset) -> None:
    """../../x instead of a clip's key, everywhere and consistently."""
    for kind in ("tar", "idx"):
        rewrite(
            dataset / "frames" / f"000000.{kind}",
            lambda content: bytes(content).replace(b"film-0123-00000", b"../../../../etc"),
        )
    tar = bytearray((dataset / "frames" / "000000.tar").read_bytes())
    for line in (dataset / "frames" / "000000.idx").read_text().splitlines():
        for member in json.loads(line)["members"]:
            header = tar[member["offset"] - 512 : member["offset"]]
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            tar[member["offset"] - 512 : member["offset"]] = header
    (dataset / "frames" / "000000.tar").write_bytes(tar)
    spoil_marker(dataset)


def jpeg_bomb(width: int, height: int) -> bytes:
    content = bytearray(encode_jpeg(Image.new("RGB", (16, 16))))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def with_a_bomb(number: int) -> dict[str, bytes]:
    members = clip_members(number)
    members["002.jpg"] = jpeg_bomb(50_000, 50_000)
    info = json.loads(members["clip.json"])
    info["checksums"][1] = hashlib.sha256(members["002.jpg"]).hexdigest()
    return members | {"clip.json": json.dumps(info).encode()}


SPOILED_SHARDS = {
    "has .* bytes, its marker says": lambda ds: rewrite(
        ds / "frames" / "000000.tar", lambda c: c[: len(c) // 2]
    ),
    "000000.tar has 0 bytes": lambda ds: (ds / "frames" / "000000.tar").unlink(),
    "002.jpg is damaged": lambda ds: rewrite(
        ds / "frames" / "000000.tar", lambda c: c[:2600] + bytes([c[2600] ^ 1]) + c[2601:]
    ),
    "000000.tar is damaged: its SHA-256": lambda ds: rewrite(
        ds / "frames" / "000000.json", lambda c: c.replace(b'"sha256": "', b'"sha256": "0')
    ),
    "000000.idx is damaged": lambda ds: rewrite(ds / "frames" / "000000.idx", lambda c: c[:-200]),
    "000000.json is not a ShardMarker": lambda ds: rewrite(ds / "frames" / "000000.json", lambda c: c[:50]),
    "is the marker of shard 000001": lambda ds: shutil.copy(
        ds / "frames" / "000001.json", ds / "frames" / "000000.json"
    ),
    "found '../../../../etc'": evil_names,
    "more pixels than any story frame": lambda ds: write_shard(ds / "frames", "000000", [0, 1], with_a_bomb),
    "has the members .'clip.json', 'run.sh'": lambda ds: write_shard(
        ds / "frames", "000000", [0], lambda n: {"clip.json": b"{}", "run.sh": b"rm"}
    ),
    "not a clip.json: key: Field required": lambda ds: write_shard(
        ds / "frames", "000000", [0], lambda n: clip_members(n) | {"clip.json": b'{"height": "tall"}'}
    ),
    "has the clip.json of": lambda ds: write_shard(
        ds / "frames", "000000", [0], lambda n: clip_members(n, key="another-clip")
    ),
    "is in shard 000000 and again in 000001": lambda ds: write_shard(ds / "frames", "000001", [1, 2]),
    "is not finished": lambda ds: rewrite(ds / "dataset.json", lambda c: c.replace(b"true", b"false")),
    "is not the record of a dataset": lambda ds: (ds / "dataset.json").write_text("{}"),
    "is not a dataset: found no dataset.json": lambda ds: (ds / "dataset.json").unlink(),
    "found 0 shards with a marker, expected 2": lambda ds: shutil.rmtree(ds / "frames"),
    "holds no clip": lambda ds: [write_shard(ds / "frames", name, []) for name in ("000000", "000001")],
    "000009.jsonl has captions of shard 000009, which is not there": lambda ds: write_captions(
        ds, "run-1", "000009", [CaptionRecord(KEY.format(9), "Hi.")]
    ),
}


@pytest.mark.parametrize("message", SPOILED_SHARDS)
def test_a_spoiled_dataset_is_refused_and_gets_no_index(refused, dataset, message):
    SPOILED_SHARDS[message](dataset)
    found = refused("build_index", f"dataset={dataset}", "captions=run-1")
    assert re.search(message, found), found
    assert not (dataset / "index.parquet").exists()


SPOILED_CAPTIONS = {
    "no finished captions run 'run-2', found run-1": ("run-2", None),
    "named with letters, digits": ("../x", None),
    "which is no clip of shard 000001": ("run-1", CaptionRecord("film-unknown", "Hi.")),
    "the story of film-0123-00003 has 2 frames, the clip 3": (
        "run-1",
        CaptionRecord(KEY.format(3), "", story(2)),
    ),
    "two captions of film-0123-00002": ("run-1", CaptionRecord(KEY.format(2), "Again.")),
    "000001.jsonl, line 2: a caption record has the fields": ("run-1", '{"key": "film"}'),
    "000001.jsonl, line 2: event 1": (
        "run-1",
        CaptionRecord(KEY.format(3), "", story(3)).to_json().replace("[1, 3]", "[3, 1]"),
    ),
}


@pytest.mark.parametrize("message", SPOILED_CAPTIONS)
def test_captions_that_do_not_fit_are_refused(refused, dataset, message):
    run, record = SPOILED_CAPTIONS[message]
    if record:
        line = record if isinstance(record, str) else record.to_json()
        with open(dataset / "captions" / "run-1" / "000001.jsonl", "a") as file:
            file.write(line + "\n")
    assert message in refused("build_index", f"dataset={dataset}", f"captions={run}")
    assert not (dataset / "index.parquet").exists()


def test_reading_a_shard_compares_checksums(dataset):
    frames = dataset / "frames"
    marker = read_marker(frames, "000001")
    assert [key for key, _ in read_clips(frames, marker)] == [KEY.format(2), KEY.format(3)]
    rewrite(
        frames / "000001.tar", lambda content: content[:2600] + bytes([content[2600] ^ 1]) + content[2601:]
    )
    with pytest.raises(ValueError, match=r"002\.jpg is damaged"):
        list(read_clips(frames, marker))
