"""What HTTP says about a request: which failures pass, which never will, and how long to wait."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx2

from storyanchors.vlm.question import DENIED, VlmReply, failed

PASSING = (408, 409, 425, 429)  # and every 5xx
REFUSING = (401, 402, 403, 404)  # key, account, permission, model or address: no request will do better


def open_client(headers: Mapping[str, str] | None = None) -> httpx2.AsyncClient:
    """A client without limits of its own; it follows no redirect, which could carry the key elsewhere."""
    return httpx2.AsyncClient(
        headers=headers,
        timeout=None,
        follow_redirects=False,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30),
    )


class NoResponse(Exception):
    """Nothing came back, or not all of it; reply says why."""

    def __init__(self, reply: VlmReply):
        super().__init__(reply.detail)
        self.reply = reply


@asynccontextmanager
async def one_exchange(timeout_s: float) -> AsyncIterator[None]:
    """A request and its response within timeout_s; NoResponse for time-outs and broken connections."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise NoResponse(failed("transient", "timeout", f"no answer within {timeout_s:g} s")) from None
    except httpx2.HTTPError as error:  # it has the request, and so the key: only its words go on
        problem = f"{type(error).__name__}: {error}"
        raise NoResponse(failed("transient", "connection", problem)) from None


def status_of(code: int) -> tuple[str, str]:
    """Status and finish of a reply whose server answered with this HTTP code instead of an answer."""
    if code in PASSING or code >= 500:
        return "transient", f"http {code}"
    return "fatal", DENIED if code in REFUSING or 300 <= code < 400 else f"http {code}"


def seconds_to_wait(headers: Mapping[str, str], now: datetime) -> float | None:
    """Of retry-after-ms or Retry-After (seconds, or a date); None where the server does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
            except (ValueError, TypeError):  # TypeError: a date without a time zone
                continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None
