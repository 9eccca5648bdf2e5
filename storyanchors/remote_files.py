"""File systems behind URLs (fsspec), and what their errors mean: a failure that passes, or one that stays.

No error shows a URL; callers name the file as it may be shown.
"""

import errno
import os
from typing import Any

BUSY_STATUS = (408, 425, 429, 500, 502, 503, 504)
PASSING_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
    errno.EREMOTEIO, errno.ENOTCONN,
}  # fmt: skip
PASSING_BOTOCORE = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError"}


class Passing(Exception):
    """A failure that another attempt may not meet; wait_s is how long the server wants to be left alone."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


class OutOfRange(Exception):
    """The range begins behind the end of the file."""


def open_http() -> Any:
    from aiohttp import ClientTimeout
    from fsspec.implementations.http import HTTPFileSystem

    return HTTPFileSystem(
        skip_instance_cache=True,
        encoded=True,  # a URL is sent as it is written: a signature covers its very letters
        headers={"Accept-Encoding": "identity"},
        # with the proxies of the environment, and the passwords of ~/.netrc
        client_kwargs={
            "timeout": ClientTimeout(total=None, sock_connect=20, sock_read=30),
            "trust_env": True,
        },
    )


def open_s3() -> Any:
    """Credentials, region and endpoint come from AWS's own environment variables and files."""
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise ValueError("s3:// needs s3fs: pip install 'storyanchors[s3]'") from error
    timeouts = {"connect_timeout": 20, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
    system = S3FileSystem(skip_instance_cache=True, config_kwargs=timeouts)
    system.retries = 1  # the attempts are counted in one place: here
    return system


def translated(error: Exception, where: str) -> Exception:
    """Passing for what may go away, else an error that names the file."""
    from aiohttp import ClientError, ClientResponseError

    cause = error.__cause__ or error
    if isinstance(error, FileNotFoundError) and isinstance(cause, ClientError | OSError):
        error = cause  # fsspec calls every failed request for a size a missing file
    if isinstance(error, ClientResponseError):
        return _of_status(error.status, where, (error.headers or {}).get("Retry-After"))
    if isinstance(response := getattr(cause, "response", None), dict):  # of botocore
        return _of_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), where, None)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "not found", where)
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, "access is denied", where)
    if isinstance(error, TimeoutError):
        return Passing("no answer in time")
    is_connection = isinstance(error, ClientError | ConnectionError)
    if is_connection or {base.__name__ for base in type(error).__mro__} & PASSING_BOTOCORE:
        return Passing(f"the connection failed ({type(error).__name__})")
    if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
        return Passing(f"{type(error).__name__} ({os.strerror(error.errno)})")
    return OSError(f"{where}: {type(error).__name__}")


def _of_status(status: int, where: str, retry_after: str | None) -> Exception:
    if status in BUSY_STATUS:
        wait_s = float(retry_after) if (retry_after or "").isdigit() else 0.0
        return Passing(f"HTTP status {status}", wait_s)
    if status == 416:
        return OutOfRange()
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "not found", where)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"access is denied (HTTP status {status})", where)
    return OSError(f"{where}: HTTP status {status}")
