"""A local server of one folder: it knows byte ranges and as much S3 as s3fs reads with, and can misbehave.

`server.faults` is a list that GET and HEAD requests use up, one each; `server.always` holds for all of them.
"""

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = ("403", "429", "500", "503", "reset", "cut", "short", "wrong", "slow", "whole", "huge-wait")
EMPTY_LIST = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"


class RangeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.always = ""
        self.requests: list[str] = []  # "GET /path bytes=0-9"
        self.slow_s = 3.0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self) -> str:
        with self._lock:
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if "list-type=2" in parts.query:
            return self._answer(200, EMPTY_LIST, with_body)
        fault = self.server.next_fault()
        if fault == "reset":
            # closing with data unsent sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault in ("403", "429", "500", "503", "huge-wait"):
            status = 503 if fault == "huge-wait" else int(fault)
            wait = {"429": "1", "huge-wait": "999999"}.get(fault, "0")
            code = "SlowDown" if status == 503 else "InternalError" if status == 500 else "AccessDenied"
            return self._answer(status, _s3_error(code), with_body, {"Retry-After": wait})
        path = self.server.folder / unquote(parts.path).lstrip("/")
        if not path.is_file():
            return self._answer(404, _s3_error("NoSuchKey"), with_body)
        self._answer_file(path, fault, with_body)

    def _answer_file(self, path: Path, fault: str, with_body: bool) -> None:
        size = path.stat().st_size
        headers = {"ETag": f'"{size}-{path.stat().st_mtime_ns}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        status, first, last = 200, 0, size - 1
        if asked and fault != "whole":
            status, first, last = 206, int(asked[1]), min(int(asked[2]), size - 1)
            if first >= size:
                return self._answer(416, _s3_error("InvalidRange"), with_body)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with open(path, "rb") as file:
            file.seek(first)
            body = file.read(last - first + 1) if with_body else b""
        if fault == "wrong":
            body = bytes(255 - byte for byte in body)
        if fault == "short":  # a body that ends early and says so
            body = body[: len(body) // 2]
        if fault == "slow":
            time.sleep(self.server.slow_s)
        length = last - first + 1 if not with_body else len(body)
        self._answer(status, body, with_body, headers, length=length, cut=fault == "cut")

    def _answer(
        self,
        status: int,
        body: bytes,
        with_body: bool,
        headers: dict[str, str] | None = None,
        *,
        length: int | None = None,
        cut: bool = False,
    ) -> None:
        """cut: the connection ends in the middle of the body that was promised."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:
        """Tests look at server.requests."""


def _s3_error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """The folder at server.url; a bucket of S3 is a folder in it."""
    with RangeServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
