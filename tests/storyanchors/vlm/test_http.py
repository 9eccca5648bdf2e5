import asyncio
from datetime import UTC, datetime

import httpx2
import pytest

from storyanchors.vlm import DENIED
from storyanchors.vlm.http import NoResponse, one_exchange, seconds_to_wait, status_of

NOW = datetime(2026, 11, 21, 13, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Sat, 21 Nov 2026 13:00:30 GMT"}, 30.0),
        ({"retry-after": "Sat, 21 Nov 2026 12:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
    ],
)
def test_a_server_s_wish_to_wait_is_read(headers, seconds):
    assert seconds_to_wait(httpx2.Headers(headers), NOW) == seconds


def test_codes_that_pass_those_that_do_not_and_those_that_end_the_run():
    for code in (408, 429, 500, 502, 503, 504, 529):
        assert status_of(code) == ("transient", f"http {code}")
    for code in (400, 413, 422):
        assert status_of(code) == ("fatal", f"http {code}")
    for code in (307, 401, 403, 404):
        assert status_of(code) == ("fatal", DENIED)


def test_an_exchange_that_is_cancelled_is_no_time_out():
    async def cancelled() -> None:
        async def exchange() -> None:
            async with one_exchange(10):
                await asyncio.sleep(10)

        task = asyncio.create_task(exchange())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_a_broken_connection_s_error_does_not_hold_the_request():
    async def broken() -> None:
        async with one_exchange(10):
            request = httpx2.Request("POST", "http://x", headers={"Authorization": "Bearer sk-MARKED"})
            raise httpx2.ReadError("it broke", request=request)

    with pytest.raises(NoResponse) as error:
        asyncio.run(broken())
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert error.value.reply.detail == "ReadError: it broke"
