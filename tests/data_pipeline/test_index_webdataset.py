"""Tars written by the webdataset library and by an enemy: what is indexed in place, cut, and refused."""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from conf.command import Stopped
from data_pipeline.index_webdataset import IndexWebdatasetConfig, find_tars, index_webdataset
from tests.range_server import serve

STORY = {"events": [{"frames": [1, 3], "description": "A fox runs."}], "subjects": ["a fox"], "style": "ink"}


def image(number: int = 0, form: str = "JPEG", size: tuple[int, int] = (90, 70)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 20 * (number % 8) + 40, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def images(form: str, suffix: str, count: int) -> dict[str, bytes]:
    return {f"{number}.{suffix}": image(number, form) for number in range(1, count + 1)}


def write_tar(path: Path, samples: dict[str, dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
    return path


def write_raw_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(tmp_path, command) -> Callable[..., tuple[list[dict], list[dict]]]:
    """index(tars, *overrides) -> (rows of the index, lines of rejected.jsonl)."""

    def call(tars: Path, *overrides: str) -> tuple[list[dict], list[dict]]:
        out = tmp_path / "out"
        status, _, printed = command(
            "index_webdataset", f"tars={tars}", f"out={out}", "workers=1", *overrides
        )
        assert status == 0, printed
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        return pq.read_table(out / "index.parquet").to_pylist(), rejected

    return call


def test_images_are_indexed_where_they_lie(tmp_path, index):
    tar = write_tar(
        tmp_path / "tars/a-00.tar",
        {
            "x/Clip_1": {**images("JPEG", "jpg", 11), "json": {"caption": "A fox.", "film": "f1"}},
            "x/clip_2": {**images("PNG", "png", 3), "txt": "A hen."},
            "x/clip_3": {**images("WEBP", "webp", 3), "json": {"story": STORY, "film": "f1"}},
        },
    )
    rows, rejected = index(tmp_path / "tars", "source_key=film")
    assert rejected == []
    content, out = tar.read_bytes(), tmp_path / "out"
    names = [row["key"].rsplit("-", 1)[0] for row in rows]
    assert names == ["clip-1", "clip-2", "clip-3"]
    for row, (count, form) in zip(rows, [(11, "JPEG"), (3, "PNG"), (3, "WEBP")], strict=True):
        assert row["location"] == str(tar) and (row["num_frames"], row["height"], row["width"]) == (
            count,
            64,
            80,
        )
        ranges = zip(row["frame_offsets"], row["frame_sizes"], row["frame_crc32"], strict=True)
        for number, (offset, size, crc32) in enumerate(ranges, start=1):  # 2 before 10
            data = content[offset : offset + size]
            assert data == image(number, form) and zlib.crc32(data) == crc32
    assert [row["source"] for row in rows] == ["f1", "a-00.tar/x/clip_2", "f1"]
    assert [row["global_caption_words"] for row in rows] == [2, 2, 0]
    assert [bool(row["story_words"]) for row in rows] == [False, False, True]
    assert not list((out / "frames").iterdir())  # no pixel was copied


def test_keys_differ_from_tar_to_tar(tmp_path, index):
    for number in range(2):
        write_tar(tmp_path / f"tars/{number}/same.tar", {"0": {"jpg": image(), "txt": "A fox."}})
    rows, _ = index(tmp_path / "tars")
    assert len({row["key"] for row in rows}) == 2


def test_videos_are_cut_and_a_caption_of_the_whole_tells_no_part(tmp_path, index, film):
    clips = {
        "short": {"mp4": film.write(tmp_path / "s.mp4", 60).read_bytes(), "json": {"caption": "All of it."}},
        "long": {"mp4": film.write(tmp_path / "l.mp4", 215).read_bytes(), "txt": "Too much for one clip."},
        "bad": {"mp4": b"no film", "txt": "x"},
        "still": {"jpg": image(), "txt": "A fox."},
    }
    write_tar(tmp_path / "tars/v.tar", clips)
    rows, rejected = index(tmp_path / "tars", "frame_interval=9", "max_frames=8", "min_frames=1")
    found = {
        name: [row for row in rows if row["key"].startswith(name)] for name in ("short", "long", "still")
    }
    assert [row["num_frames"] for row in found["short"]] == [6] and found["short"][0]["location"] is None
    assert [row["num_frames"] for row in found["long"]] == [8, 8, 6]
    assert [row["caption_run"] for row in found["short"]] == ["original"]
    assert {row["caption_run"] for row in found["long"]} == {None}
    assert found["still"][0]["location"]
    assert [line["sample"] for line in rejected] == ["bad"]


JPEG = image()
HOSTILE = {
    "a pickle": [
        ("a.jpg", JPEG),
        ("a.pickle", b"cos\nsystem\n(S'touch /tmp/owned'\ntR."),
        ("a.txt", b"A fox."),
    ],
    "../up": [("../up.jpg", JPEG), ("../up.txt", b"x")],
    "twice": [("t.jpg", JPEG), ("t.jpg", JPEG)],
    "again": [("k.jpg", JPEG), ("other.jpg", JPEG), ("k.txt", b"x")],
    "sizes": [("s.1.jpg", JPEG), ("s.2.jpg", image(size=(64, 64)))],
    "json": [("j.jpg", JPEG), ("j.json", b"[" * 100_000)],
    "list": [("j.jpg", JPEG), ("j.json", b"[1]")],
    "caption": [("c.jpg", JPEG), ("c.json", b'{"caption": 7}')],
    "half a letter": [("c.jpg", JPEG), ("c.json", b'{"caption": "\\ud800"}')],
    "story": [("c.jpg", JPEG), ("c.json", json.dumps({"story": STORY}).encode())],
    "long text": [("c.jpg", JPEG), ("c.txt", b"x" * (2**20 + 1))],
    "too much to say": [("c.jpg", JPEG), ("c.txt", b"x" * 2**20)],
    "latin": [("c.jpg", JPEG), ("c.txt", b"\xe9t\xe9")],
    "no image": [("n.txt", b"x")],
    "both": [("b.jpg", JPEG), ("b.mp4", b"x")],
    "empty": [("e.jpg", b"")],
    "noise": [("e.jpg", bytes(range(256)))],
    "many": [(f"m.{number}.jpg", JPEG) for number in range(25)],
    "hidden": [("._mac.jpg", JPEG), ("README", b"x")],
}
STILL_USED = {"a pickle": 1, "again": 2}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_trusted_is_left_out_and_said(tmp_path, index, kind):
    (tmp_path / "tars").mkdir()
    write_raw_tar(
        tmp_path / "tars/h.tar", [*HOSTILE[kind], ("zz-good.jpg", JPEG), ("zz-good.txt", b"A fox.")]
    )
    rows, rejected = index(tmp_path / "tars")
    assert len(rows) == 1 + STILL_USED.get(kind, 0)
    assert rejected and all(line["tar"].endswith("h.tar") and line["reason"] for line in rejected)


def test_names_beyond_ascii_are_used_and_their_keys_are_plain(tmp_path, index):
    write_tar(
        tmp_path / "tars/\u753b.tar", {"m\u00e4rchen/\u72d0": {"jpg": JPEG, "txt": "Ein Fuchs l\u00e4uft."}}
    )
    [row], rejected = index(tmp_path / "tars")
    assert row["key"].isascii() and row["source"] == "\u753b.tar/m\u00e4rchen/\u72d0" and rejected == []


def test_a_tar_that_is_cut_gives_all_but_its_last_sample(tmp_path, index):
    tar = write_tar(
        tmp_path / "tars/c.tar", {f"{k}": {**images("JPEG", "jpg", 2), "txt": "x"} for k in range(4)}
    )
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    rows, rejected = index(tmp_path / "tars")
    assert 1 <= len(rows) < 4 and "cut" in rejected[0]["reason"] and rejected[1]["sample"] == str(len(rows))


def test_a_tar_that_is_cut_in_the_zeros_at_its_end_is_used_and_stops_no_other(tmp_path, index):
    for name in "ab":
        write_tar(tmp_path / f"tars/{name}.tar", {"0": {**images("JPEG", "jpg", 2)}, "1": {"txt": "x"}})
    tar = tmp_path / "tars/a.tar"
    tar.write_bytes(tar.read_bytes().rstrip(b"\0") + b"\0")
    rows, rejected = index(tmp_path / "tars")
    assert len(rows) == 2
    assert [line["sample"] for line in rejected if line["tar"] == str(tar)] == [None, "1"]
    assert "cut" in rejected[0]["reason"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x1f\x8b" + bytes(2000), "compressed with gzip"),
        (b"", "cut: it ends at byte 0"),
        (bytes(10240), "there is no file in it"),
        (b"garbage" * 300, "no tar header at byte 0"),
    ],
)
def test_tars_without_any_clip_end_with_the_reason_and_where_the_others_are(
    tmp_path, refused, content, reason
):
    (tmp_path / "t.tar").write_bytes(content)
    error = refused("index_webdataset", f"tars={tmp_path}", f"out={tmp_path / 'out'}")
    assert f"{tmp_path / 't.tar'}: {reason}" in error and str(tmp_path / "out/rejected.jsonl") in error


def test_a_folder_of_compressed_tars_is_refused_by_their_name(tmp_path, refused):
    (tmp_path / "t.tar.gz").write_bytes(b"x")
    assert "such as" in (error := refused("index_webdataset", f"tars={tmp_path}", "out=x"))
    assert "t.tar.gz" in error and "unpack" in error


def test_stopped_and_started_again_gives_the_same_files(tmp_path, tree, film):
    movie = film.write(tmp_path / "m.mp4", 60).read_bytes()
    for number in range(3):
        samples = {"v": {"mp4": movie, "txt": "x"}, "i": {**images("JPEG", "jpg", 2), "txt": "y"}}
        write_tar(tmp_path / f"tars/{number}.tar", samples)
    tars = find_tars(str(tmp_path / "tars"))
    outs = {name: tmp_path / name for name in ("whole", "stopped")}
    settings = {
        name: IndexWebdatasetConfig("", str(out), workers=1, frame_interval=9) for name, out in outs.items()
    }
    index_webdataset(tars, outs["whole"], settings["whole"])
    num_stops, patience = 0, [0]
    while True:
        patience[0] = num_stops + 1  # ticks, one more each time

        def stop_requested() -> bool:
            patience[0] -= 1
            return patience[0] < 0

        try:
            index_webdataset(tars, outs["stopped"], settings["stopped"], stop_requested)
            break
        except Stopped:
            num_stops += 1
    assert num_stops > 1
    assert tree(outs["stopped"]) == tree(outs["whole"])


def test_tars_behind_a_url_are_indexed_without_a_copy(tmp_path, index, refused):
    write_tar(tmp_path / "far/a.tar", {"0": {**images("JPEG", "jpg", 3), "txt": "A fox."}})
    with serve(tmp_path / "far") as server:
        (tmp_path / "list.txt").write_text(f"{server.url}/a.tar\n")
        [row], rejected = index(tmp_path / "list.txt")
        assert row["location"] == f"{server.url}/a.tar" and row["num_frames"] == 3 and rejected == []
        (tmp_path / "list.txt").write_text(f"{server.url}/a.tar?signature=secret\n")
        error = refused("index_webdataset", f"tars={tmp_path / 'list.txt'}", f"out={tmp_path / 'other'}")
        assert "query" in error and "secret" not in error


def test_other_tars_than_at_the_beginning_are_refused(tmp_path, index, refused):
    write_tar(tmp_path / "tars/a.tar", {"0": {"jpg": JPEG, "txt": "A fox."}})
    index(tmp_path / "tars")
    write_tar(tmp_path / "tars/b.tar", {"0": {"jpg": JPEG, "txt": "A fox."}})
    where = (f"tars={tmp_path / 'tars'}", f"out={tmp_path / 'out'}")
    error = refused("index_webdataset", *where)
    assert "b.tar was not there then" in error and "new out=FOLDER (data.mix" in error
    assert "caption_key=caption, now caption_key=text" in refused(
        "index_webdataset", *where, "caption_key=text"
    )
    assert "no such folder" in refused("index_webdataset", f"tars={tmp_path / 'none'}", "out=x")
    assert "not read" in refused("index_webdataset", "tars='pipe:echo'", "out=x")


def test_tars_that_moved_or_were_written_again_are_refused(tmp_path, index, refused):
    tar = write_tar(tmp_path / "tars/a.tar", {"0": {"jpg": JPEG, "txt": "A fox."}})
    index(tmp_path / "tars")
    written = tar.stat()
    where = (f"tars={tmp_path / 'tars'}", f"out={tmp_path / 'out'}")
    os.utime(tar, ns=(0, written.st_mtime_ns + 1))
    assert "a.tar was written again since then" in refused("index_webdataset", *where)
    os.utime(tar, ns=(0, written.st_mtime_ns))
    index(tmp_path / "tars")
    (tmp_path / "tars").rename(tmp_path / "moved")
    moved = refused("index_webdataset", f"tars={tmp_path / 'moved'}", where[1])
    assert f"a.tar was at {tar} then, is at {tmp_path / 'moved' / 'a.tar'} now" in moved
