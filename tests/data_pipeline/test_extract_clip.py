import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build_index import build_index
from data_pipeline.captions import write_captions, write_run
from data_pipeline.shard_writer import ShardWriter
from storyanchors.clip import CaptionRecord, ClipInfo, StoryClip
from storyanchors.story import Event, Story

STORY = Story([Event(1, 2, "She waits."), Event(3, 3, "She goes.")], ["she"], "drawn", "A woman waits.")


def members(key: str) -> dict[str, bytes]:
    rng = np.random.default_rng(len(key))
    frames = [Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)) for _ in range(3)]
    times = {"frame_numbers": (0, 70, 140), "seconds": (0.0, 2.9, 5.8)}
    return StoryClip(
        ClipInfo(
            key=key, source="a.mp4", fps=24.0, frame_interval=69, motion=1.25, height=16, width=32, **times
        ),
        frames,
    ).to_members()


def write_dataset(folder, keys, captions=()):
    """One shard; the clips that captions names have the story."""
    (folder / "frames").mkdir(parents=True)
    with ShardWriter(folder / "frames", "000000") as shard:
        for key in keys:
            shard.add(key, members(key))
        shard.finish()
    record = {"schema_version": 1, "made_by": "a test", "config": {}, "tool": {}, "license_note": ""}
    (folder / "dataset.json").write_text(json.dumps(record | {"finished": True, "counts": {"shards": 1}}))
    write_captions(folder, "hand", "000000", [CaptionRecord(key, "Hi.", STORY) for key in captions])
    write_run(folder, "hand", "a test")
    build_index(folder, "hand", workers=1)
    return folder


@pytest.fixture
def many(tmp_path):
    return write_dataset(tmp_path / "many", [f"film-{n}" for n in range(7)], ["film-2"])


def test_a_clip_becomes_its_decoded_frames_its_facts_and_its_story(many, tmp_path, command):
    out = tmp_path / "clip"
    status, printed, errors = command("extract_clip", f"dataset={many}", "key=film-2", f"out={out}")
    assert status == 0, errors
    clip = StoryClip.from_members(members("film-2"))
    names = ["001.png", "002.png", "003.png", "clip.json", "story.yaml"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name, frame in zip(names, clip.frames):
        np.testing.assert_array_equal(Image.open(out / name), frame)
    assert ClipInfo.from_json((out / "clip.json").read_bytes()) == clip.info
    assert Story.from_file(out / "story.yaml") == STORY
    assert "fps=24.0 frame_interval=69 motion=1.25" in printed


def test_a_clip_without_captions_replaces_an_earlier_one_whole(many, tmp_path, command):
    out = tmp_path / "clip"
    for key in ("film-2", "film-3"):
        assert command("extract_clip", f"dataset={many}", f"key={key}", f"out={out}")[0] == 0
    assert not (out / "story.yaml").exists()
    assert json.loads((out / "clip.json").read_text())["key"] == "film-3"


def test_the_only_clip_needs_no_key(tmp_path, command):
    one = write_dataset(tmp_path / "one", ["film-1"])
    assert command("extract_clip", f"dataset={one}", f"out={tmp_path / 'clip'}")[0] == 0
    assert (tmp_path / "clip" / "003.png").is_file()


def test_a_wrong_key_is_answered_with_some_that_are_there(many, tmp_path, refused):
    some = "has 7 clips, film-0, film-1, film-2, film-3, film-4, ..."
    missing = refused("extract_clip", f"dataset={many}", f"out={tmp_path / 'clip'}")
    unknown = refused("extract_clip", f"dataset={many}", "key=film-9", f"out={tmp_path / 'clip'}")
    assert "key=... is missing" in missing and some in missing
    assert "no clip film-9" in unknown and some in unknown
    assert not (tmp_path / "clip").exists()


def test_what_cannot_be_read_or_written_is_one_line(many, tmp_path, refused):
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "diary.txt").write_text("mine")
    assert "not empty" in refused("extract_clip", f"dataset={many}", "key=film-2", f"out={tmp_path / 'busy'}")
    assert "no dataset.json" in refused("extract_clip", f"dataset={tmp_path}", f"out={tmp_path / 'clip'}")
    (many / "captions" / "hand" / "000000.jsonl").write_text("")
    stale = refused("extract_clip", f"dataset={many}", "key=film-2", f"out={tmp_path / 'clip'}")
    assert "that run has none" in stale
    (many / "index.parquet").unlink()
    assert "build_index.py" in refused("extract_clip", f"dataset={many}", f"out={tmp_path / 'clip'}")
