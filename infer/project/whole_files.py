"""Files that are whole or not there, whoever is killed and however full the disk is; and a folder's lock."""

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

LOCK_FILE = ".lock"
LOCK_PATIENCE_S = 1.0

_held = threading.local()  # folders that this thread holds


class Busy(ValueError):
    """Another process or thread holds the folder."""


def sha256(content: bytes) -> str:
    """The hexadecimal SHA-256 of content."""
    return hashlib.sha256(content).hexdigest()


def temporary_of(path: Path) -> Path:
    """What a process that was killed while it wrote the file may have left behind."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file in one step, on disk when this returns; OSError names the file."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb", buffering=0) as file:
            _write_all(file, content)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: bytes, end: int) -> None:
    """Adds a line that is on disk when this returns; where it fails, the file is as long as it was before.

    end is where the complete lines end, as read_lines says: a torn one behind it is dropped.
    """
    whole = False
    with path.open("a+b", buffering=0) as file:
        file.truncate(end)
        unended = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        try:
            _write_all(file, b"\n" * unended + line + b"\n")
            whole = True
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        finally:
            if not whole:
                file.truncate(end)


def read_lines(path: Path) -> tuple[list[bytes], int]:
    """The complete lines of JSON in a file, and the bytes they take: less than all where its end is torn.

    A last line that is JSON is complete; an editor took away the end of it.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if _is_json(content[end:]):
        end = len(content)
    return content[:end].splitlines(), end


def end_last_line(path: Path, end: int) -> None:
    """Makes a file end where its complete lines do, as read_lines says, and the last one as lines end."""
    with path.open("r+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END) > end:
            file.truncate(end)
        elif end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n":
            _write_all(file, b"\n")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Holds the folder for this thread; may be nested. The lock of a process that dies is free at once.

    Busy where another one holds it, with what it said that it does.
    """
    key = folder.resolve()
    if key in vars(_held):
        yield
        return
    with (folder / LOCK_FILE).open("a+b", buffering=0) as file:
        _wait_for_lock(file, folder)
        with suppress(OSError):  # on a full disk nobody hears who holds it
            file.truncate(0)
            file.write(f"process {os.getpid()} ({what})".encode())
        vars(_held)[key] = what
        try:
            yield
        finally:
            del vars(_held)[key]


def _wait_for_lock(file: FileIO, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while not _try_lock(file):
        if time.monotonic() > deadline:
            holder = os.pread(file.fileno(), 200, 0).decode(errors="replace").strip()
            raise Busy(f"{folder} is being changed by {holder or 'another process'}: wait for it, or stop it")
        time.sleep(0.02)


def _try_lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_all(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A renamed file is sure to be found after a power cut only when its folder is on disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot, e.g. some network ones
            raise
    finally:
        os.close(handle)
