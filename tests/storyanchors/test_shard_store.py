"""Byte ranges from disk, HTTP and S3: faults that pass are waited out, others named without secrets."""

import errno
import importlib.util
import logging
import multiprocessing
import os
import pickle
import re
import time

import pytest

from storyanchors import shard_store
from storyanchors.shard_store import (
    ShardStore,
    TruncatedFile,
    check_setting,
    join,
    local_copy,
    printable,
    scheme_of,
)
from tests.range_server import serve

CONTENT = bytes(range(256)) * 64
SECRET = "sig=s3cr3t"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket").mkdir()
    (folder / "bucket" / "a.tar").write_bytes(CONTENT)
    (folder / "bucket" / "empty.tar").write_bytes(b"")
    with serve(folder) as server:
        yield server


@pytest.fixture
def server(served):
    served.faults, served.always, served.requests, served.slow_s = [], "", [], 3.0
    return served


@pytest.fixture(params=["disk", "http", "s3"])
def place(request, server, monkeypatch):
    """The folder of a.tar, as a path and as a URL."""
    if request.param == "disk":
        return str(server.folder / "bucket")
    if request.param == "http":
        return f"{server.url}/bucket?{SECRET}"
    if not importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is not installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return "s3://bucket"


@pytest.fixture
def store():
    return ShardStore(num_attempts=4, backoff_s=0.01, timeout_s=20)


def test_a_range_is_the_bytes_of_the_file_in_one_request(place, store, server):
    path = join(place, "a.tar")
    assert store.read(path, 300, 500) == CONTENT[300:800]
    assert len(server.requests) == (0 if place.startswith("/") else 1)
    assert store.size(path) == len(CONTENT)


def test_a_store_goes_to_other_processes_and_opens_anew(place, store):
    path = join(place, "a.tar")
    assert store.read(path, 0, 4) == CONTENT[:4]
    assert pickle.loads(pickle.dumps(store)).read(path, 1, 4) == CONTENT[1:5]
    with multiprocessing.get_context("fork").Pool(1) as pool:  # one that has inherited open connections
        assert pool.apply_async(store.read, (path, 2, 4)).get(timeout=60) == CONTENT[2:6]


@pytest.mark.parametrize(("offset", "size"), [(len(CONTENT) - 10, 20), (len(CONTENT) + 5, 20)])
def test_a_file_that_ends_too_early_is_truncated_and_not_read_again(place, store, server, offset, size):
    with pytest.raises(TruncatedFile, match=r"a\.tar: \d+ bytes at offset \d+, the index expects 20"):
        store.read(join(place, "a.tar"), offset, size)
    assert len([request for request in server.requests if request.startswith("GET")]) <= 1


def test_a_local_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        ShardStore().read(str(tmp_path), 0, 4)


def test_a_missing_file_is_named_at_once(place, store, server):
    with pytest.raises(FileNotFoundError, match=r"gone\.tar") as raised:
        store.read(join(place, "gone.tar"), 0, 4)
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        store.size(join(place, "gone.tar"))
    assert "s3cr3t" not in str(raised.value)
    assert len([request for request in server.requests if request.startswith("GET")]) <= 2


@pytest.mark.parametrize("fault", ["503", "500", "reset", "cut", "short"])
def test_faults_that_pass_are_waited_out(place, store, server, fault):
    if place.startswith("/"):
        pytest.skip("a server's fault")
    server.faults = [fault, fault] if fault != "short" else [fault, ""]  # after a short body: its size
    assert store.read(join(place, "a.tar"), 10, 100) == CONTENT[10:110]


@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_faults_that_stay_are_an_error_after_a_bounded_number_of_attempts(place, store, server, fault):
    if place.startswith("/"):
        pytest.skip("a server's fault")
    server.always = fault
    with pytest.raises(OSError, match=r"a\.tar cannot be read after 4 attempts: ") as raised:
        store.read(join(place, "a.tar"), 10, 100)
    assert "s3cr3t" not in str(raised.value) and raised.value.__cause__ is None
    # aiohttp itself asks once more where a connection that it kept was reset
    assert len(server.requests) in ((4, 5, 6, 7, 8) if fault == "reset" else (4,))


def test_access_denied_is_no_passing_fault(place, store, server):
    if place.startswith("/"):
        pytest.skip("a server's fault")
    server.always = "403"
    with pytest.raises(PermissionError, match=r"a\.tar"):
        store.read(join(place, "a.tar"), 10, 100)
    assert len(server.requests) == 1


def test_a_slow_server_has_its_time_and_no_more(place, server):
    if place.startswith("/"):
        pytest.skip("a server's fault")
    server.faults, server.slow_s = ["slow"], 30.0
    store = ShardStore(num_attempts=2, backoff_s=0.01, timeout_s=1.0)
    start = time.perf_counter()
    assert store.read(join(place, "a.tar"), 10, 100) == CONTENT[10:110]
    assert 0.9 < time.perf_counter() - start < 25


def test_retry_after_is_obeyed_within_bounds(server, store, monkeypatch):
    server.faults = ["429"]
    start = time.perf_counter()
    store.read(f"{server.url}/bucket/a.tar", 0, 4)
    assert time.perf_counter() - start > 1
    waits = []
    monkeypatch.setattr(shard_store.time, "sleep", waits.append)
    server.faults = ["huge-wait"]
    store.read(f"{server.url}/bucket/a.tar", 0, 4)
    assert waits[0] < 61


def test_a_server_without_ranges_is_refused(server, store):
    server.always = "whole"
    with pytest.raises(ValueError, match="does not answer requests for a range"):
        store.check_ranges(f"{server.url}/bucket/a.tar?{SECRET}")


def test_no_line_of_the_log_shows_the_query(server, store, caplog):
    server.faults = ["503"]
    with caplog.at_level(logging.INFO, "storyanchors"):
        store.read(f"{server.url}/bucket/a.tar?{SECRET}", 0, 4)
    assert "HTTP status 503" in caplog.text and "s3cr3t" not in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_stale_handle_is_opened_again(server, store, monkeypatch, code):
    path, pread, fail = str(server.folder / "bucket" / "a.tar"), os.pread, [True]

    def once_stale(*arguments):
        if fail:
            fail.pop()
            raise OSError(code, os.strerror(code))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", once_stale)
    assert store.read(path, 5, 5) == CONTENT[5:10]


@pytest.mark.parametrize(
    "path",
    [
        "pipe:cat /etc/passwd", "file:///etc/passwd", "ftp://host/a.tar", "gs://b/a.tar", "s3:a.tar",
        "zip://x::http://host/a", "http://host/a|b", "HTTP://host/a.tar", "data:,x", "memory://a",
    ],
)  # fmt: skip
def test_no_other_scheme_is_read(path, store):
    for read in (scheme_of, store.size, lambda path: store.read(path, 0, 1), local_copy):
        with pytest.raises(ValueError, match="is not read"):
            read(path)


def test_a_folders_query_stays_at_the_end_of_its_files():
    url = "https://user:pass@host:1/a%20b/?sv=1&sig=x%2Fy"
    assert join(url, "frames", "000000.tar") == (
        "https://user:pass@host:1/a%20b/frames/000000.tar?sv=1&sig=x%2Fy"
    )
    assert printable(join(url, "c.tar")) == "https://host:1/a%20b/c.tar"
    assert join("/data/x", "frames", "c.tar") == "/data/x/frames/c.tar"


@pytest.mark.parametrize("url", ["https://h/a?sig=s3cr3t", "https://me:s3cr3t@h/a", "http://h/a#s3cr3t"])
def test_a_setting_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match="give the plain URL") as raised:
        check_setting(url)
    assert "s3cr3t" not in str(raised.value)
    for plain in ("https://h/a", "s3://bucket/a", "/data/a b?c"):
        assert check_setting(plain) == plain


def test_a_remote_file_is_copied_once_and_again_when_it_changes(place, server, tmp_path, monkeypatch):
    if place.startswith("/"):
        pytest.skip("a path is its own copy")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shard_store, "DOWNLOAD_BYTES", 1000)
    index = server.folder / "bucket" / "index.parquet"
    index.write_bytes(CONTENT)
    copy = local_copy(join(place, "index.parquet"))
    assert copy.read_bytes() == CONTENT and copy.suffix == ".parquet"
    num_requests = len(server.requests)
    assert local_copy(join(place, "index.parquet")) == copy
    assert len(server.requests) == num_requests + 1  # the question for its version
    index.write_bytes(CONTENT[:100])
    assert local_copy(join(place, "index.parquet")).read_bytes() == CONTENT[:100]


def test_copies_are_not_put_into_somebody_elses_folder(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / f"storyanchors-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"storyanchors-{os.getuid()}").chmod(0o777)
    with pytest.raises(ValueError, match="yours alone"):
        local_copy(f"{server.url}/bucket/a.tar")
