import hashlib
import json
import tarfile

import pytest
import webdataset

from data_pipeline.shard_writer import ShardWriter, VideoReport


def members(text: str) -> dict[str, bytes]:
    return {"002.jpg": b"second " + text.encode(), "001.jpg": b"first", "clip.json": b"{}"}


def write(folder, name="000000", num_clips=3):
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, name) as shard:
        for number in range(num_clips):
            shard.add(f"clip-{number}", members(str(number)))
        return shard.finish([VideoReport(video="a.mp4", num_clips=num_clips)])


def test_a_shard_is_a_plain_tar_with_nothing_of_this_machine(tmp_path):
    write(tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        found = tar.getmembers()
    assert [member.name for member in found[:4]] == [
        "clip-0.001.jpg",
        "clip-0.002.jpg",
        "clip-0.clip.json",
        "clip-1.001.jpg",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in found} == {(0, 0, 0, "", "", 0o644)}


def test_the_index_says_where_each_member_lies(tmp_path):
    write(tmp_path)
    tar = (tmp_path / "000000.tar").read_bytes()
    for line in (tmp_path / "000000.idx").read_text().splitlines():
        entry = json.loads(line)
        expected = members(entry["key"].removeprefix("clip-"))
        assert {m["name"]: tar[m["offset"] : m["offset"] + m["size"]] for m in entry["members"]} == expected


def test_the_marker_knows_the_bytes(tmp_path):
    marker = write(tmp_path)
    tar = (tmp_path / "000000.tar").read_bytes()
    assert (marker.bytes, marker.sha256) == (len(tar), hashlib.sha256(tar).hexdigest())
    assert (marker.num_clips, marker.num_frames) == (3, 6)
    assert json.loads((tmp_path / "000000.json").read_bytes())["videos"][0]["video"] == "a.mp4"


def test_the_same_clips_give_the_same_bytes(tmp_path, tree):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "000000") as shard:
        shard.add("clip-0", members("0"))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_keys_must_rise_and_be_plain(tmp_path):
    with ShardWriter(tmp_path, "000000") as shard:
        shard.add("clip-1", members("1"))
        for key in ("clip-0", "clip-1"):
            with pytest.raises(ValueError, match="in the order of their keys"):
                shard.add(key, members(key))
        with pytest.raises(ValueError, match="dashes"):
            shard.add("dir/clip-2", members("2"))


def test_webdataset_reads_it(tmp_path):
    write(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["clip-0", "clip-1", "clip-2"]
    assert samples[1]["002.jpg"] == b"second 1" and samples[1]["clip.json"] == b"{}"
