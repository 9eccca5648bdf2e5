"""Byte ranges of dataset files, from a local disk, NFS, https:// or s3://.

What fails for a moment (a busy server, a reset connection, a stale NFS handle) is read again a bounded number
of times, with full jitter. No error and no log line shows a URL's query string or user: they may hold a key.
Nothing is opened before the first read, and every process opens its own: fsspec's event loop and the
connections of its asynchronous file systems do not survive a fork.
"""

import errno
import fcntl
import hashlib
import logging
import os
import random
import re
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from storyanchors.remote_files import PASSING_ERRNOS, OutOfRange, Passing, open_http, open_s3, translated

log = logging.getLogger(__name__)

REMOTE = ("https", "http", "s3")
MAX_OPEN_FILES = 64
MAX_RETRY_AFTER_S = 60.0
NUM_ATTEMPTS = 6
ATTEMPT_TIMEOUT_S = 60.0  # of one request, to its last byte
BACKOFF_S = 0.5  # the longest wait before the second attempt; it doubles with each one
DOWNLOAD_BYTES = 2**24  # asked for at once where a whole file is read
Result = TypeVar("Result")


class TruncatedFile(ValueError):
    """A file that ends before the bytes that were asked for."""


def scheme_of(path: str) -> str:
    """ "https", "http" or "s3"; "" for a local path. ValueError for everything else, file:// too."""
    if "::" in path or path.lower().startswith("pipe:") or "|" in path or "\0" in path:
        raise ValueError(f"{printable(path)!r} is not read: a path or a https:// or s3:// URL is expected")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", path)
    if found is None:
        return ""
    scheme = found[1]
    if scheme not in REMOTE or not path.startswith(f"{scheme}://"):
        raise ValueError(f"{printable(path)!r} is not read: known are paths, https://, http:// and s3://")
    return scheme


def printable(path: str) -> str:
    """The path or URL without what may be a secret: query, fragment, user and password."""
    if "://" not in path:
        return path
    parts = urlsplit(path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_setting(path: str) -> str:
    """The path; ValueError for one that is not read, and for a URL with a secret in it.

    Settings are copied to run folders and dashboards.
    """
    if scheme_of(path) and printable(path) != path:
        raise ValueError(
            f"{printable(path)} was given with a user, a query or a fragment; settings are copied to run "
            "folders and dashboards: give the plain URL, and who may read it in ~/.netrc or AWS's variables"
        )
    return path


def join(folder: str, *names: str) -> str:
    """A file below a folder; the query of a URL (a signature for all of the folder) stays at its end."""
    if not scheme_of(folder):
        return os.path.join(folder, *names)
    parts = urlsplit(folder)
    path = "/".join((parts.path.rstrip("/"), *names))
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


class ShardStore:
    """Reads byte ranges; safe to carry into another process, where it opens everything anew."""

    def __init__(
        self,
        *,
        num_attempts: int = NUM_ATTEMPTS,
        backoff_s: float = BACKOFF_S,
        timeout_s: float = ATTEMPT_TIMEOUT_S,
    ):
        self.num_attempts = num_attempts
        self.backoff_s = backoff_s
        self.timeout_s = timeout_s
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._files: dict[str, int] = {}
        self._systems: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_attempts", "backoff_s", "timeout_s")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """size bytes from an offset on, in one request.

        TruncatedFile where the file is shorter; FileNotFoundError, PermissionError or OSError, with the path.
        """
        if not scheme_of(path):
            return self._retry(path, lambda: self._read_local(path, offset, size))
        return self._retry(path, lambda: self._read_remote(path, offset, size))

    def size(self, path: str) -> int:
        """The file's bytes; FileNotFoundError, PermissionError or OSError, with the path."""
        return self.state(path)[0]

    def state(self, path: str) -> tuple[int, str]:
        """The file's bytes, and what differs once it was written again: its time, or what a server tells."""
        if not scheme_of(path):
            found = self._retry(path, lambda: os.stat(path))
            return found.st_size, str(found.st_mtime_ns)
        info = self._retry(path, lambda: self._remote_info(path))
        return info["size"], str(info.get("ETag") or info.get("Last-Modified") or info.get("LastModified"))

    def check_ranges(self, path: str) -> None:
        """ValueError where a server answers the request for one byte with the whole file."""
        try:
            self.read(path, 0, 1)
        except TruncatedFile:  # an empty file: the reader of its clips says so
            return

    def _read_local(self, path: str, offset: int, size: int) -> bytes:
        file = self._open(path)
        parts, missing = [], size
        try:
            while missing and (part := os.pread(file, missing, offset + size - missing)):
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            os.close(self._files.pop(path))  # a stale handle stays stale
            error.filename = path
            raise
        if missing:
            raise TruncatedFile(
                f"{path}: {size - missing} bytes at offset {offset}, the index expects {size}"
            )
        return b"".join(parts)

    def _open(self, path: str) -> int:
        if self._pid != os.getpid():
            self._forget()
        if path not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def _read_remote(self, path: str, offset: int, size: int) -> bytes:
        try:
            data = self._call(path, "_cat_file", start=offset, end=offset + size)
        except OutOfRange:
            data = b""
        if len(data) > size:
            raise ValueError(f"{printable(path)}: the server does not answer requests for a range of bytes")
        if len(data) < size:
            if (whole := self._remote_info(path)["size"]) >= offset + size:
                raise Passing(f"{len(data)} of {size} bytes")
            raise TruncatedFile(
                f"{printable(path)}: {len(data)} bytes at offset {offset}, the index expects {size} "
                f"(the file has {whole})"
            )
        return data

    def _remote_info(self, path: str) -> dict[str, Any]:
        info = self._call(path, "_info")
        if info.get("size") is None:
            raise OSError(f"{printable(path)}: the server does not say how large the file is")
        return info

    def _call(self, path: str, method: str, **arguments: int) -> Any:
        """Calls a coroutine of the file system with a bound on its time; errors say nothing of the URL."""
        from fsspec.asyn import sync

        system = self._system(scheme_of(path))
        try:
            return sync(system.loop, getattr(system, method), path, timeout=self.timeout_s, **arguments)
        except Exception as error:
            raise translated(error, printable(path)) from None

    def _system(self, scheme: str) -> Any:
        if self._pid != os.getpid():
            self._forget()
        if scheme not in self._systems:
            self._systems[scheme] = open_s3() if scheme == "s3" else open_http()
        return self._systems[scheme]

    def _retry(self, path: str, attempt: Callable[[], Result]) -> Result:
        for number in range(1, self.num_attempts + 1):
            try:
                return attempt()
            except Passing as error:
                reason, wait_s = str(error), error.wait_s
            except OSError as error:
                if error.errno not in PASSING_ERRNOS:
                    raise
                reason, wait_s = f"{type(error).__name__} ({error.strerror})", 0.0
            if number < self.num_attempts:
                jitter = random.SystemRandom().uniform(0, self.backoff_s * 2 ** (number - 1))
                wait_s = min(wait_s, MAX_RETRY_AFTER_S) + jitter
                log.info("%s: %s; reading again in %.1f s", printable(path), reason, wait_s)
                time.sleep(wait_s)
        failed = f"{printable(path)} cannot be read after {self.num_attempts} attempts: {reason}"
        raise OSError(errno.EIO, failed)  # the machine's fault, or its network's: not for a person to mend


def local_copy(path: str) -> Path:
    """A local path itself; of a URL a copy, which one process of this machine downloads for all.

    Copies lie in the folder for temporary files (TMPDIR), named by the URL without its query, the size and
    the version that the server tells: a file that changes there is copied again.
    """
    if not scheme_of(path):
        return Path(path)
    store, folder = ShardStore(), _copies_folder()
    size, version = store.state(path)
    name = hashlib.sha256(repr((printable(path), size, version)).encode()).hexdigest()[:32]
    copy = folder / f"{name}{Path(urlsplit(path).path).suffix}"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            log.info("copying %s (%.1f MB) to %s", printable(path), size / 1e6, copy)
            with open(copy.with_suffix(".tmp"), "wb") as file:
                for offset in range(0, size, DOWNLOAD_BYTES):
                    file.write(store.read(path, offset, min(DOWNLOAD_BYTES, size - offset)))
            copy.with_suffix(".tmp").replace(copy)
    return copy


def _copies_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"storyanchors-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or state.st_mode & 0o77 or not stat.S_ISDIR(state.st_mode):
        raise ValueError(f"{folder} must be a folder that is yours alone (mode 0700): remove it")
    return folder
