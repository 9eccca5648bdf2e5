import asyncio
import random

import pytest

from conf.command import Stopped
from data_pipeline.labeling.policy import MAX_UNANSWERED, Clock, Ended, Limits, Policy, TokenBucket
from storyanchors.vlm import DENIED, VlmReply, VlmUsage


class FakeTime:
    """Seconds pass only where someone sleeps."""

    def __init__(self):
        self.now_s, self.slept = 1000.0, []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now_s, sleep=self.sleep)


def reply(status: str = "ok", *, usage: VlmUsage = VlmUsage(), finish: str = "stop", **more) -> VlmReply:  # noqa: B008
    return VlmReply(status, None, "", usage, finish, "", **more)


def policy(time: FakeTime, *, spent_usd: float = 0.0, in_flight: int = 8, **limits) -> Policy:
    return Policy(Limits(in_flight, **limits), spent_usd=spent_usd, rng=random.Random(0), clock=time.clock)


async def send(rules: Policy, times: list, time: FakeTime, most: VlmUsage, used: VlmUsage, usd=(0.0, 0.0)):
    async with rules.sending(most, usd[0]) as reservation:
        times.append((time.now_s, used.input_tokens, usd[1]))
        await asyncio.sleep(0)
        reservation.settle(reply(usage=used), usd[1])


def most_in_a_window(times: list, window_s: float, column: int) -> float:
    amounts = [(entry[0], 1.0 if column == 0 else entry[column]) for entry in times]
    return max(sum(a for when, a in amounts if start <= when < start + window_s) for start, _ in amounts)


def test_no_minute_holds_more_requests_or_tokens_and_no_ten_minutes_more_dollars_than_allowed():
    time, chance = FakeTime(), random.Random(1)
    rules = policy(time, requests_per_minute=60, tokens_per_minute=90_000, usd_per_10min=6.0)
    times: list = []

    async def main():
        async with asyncio.TaskGroup() as group:
            for _ in range(400):
                tokens, usd = chance.randrange(1, 3000), chance.uniform(0, 0.02)
                group.create_task(send(rules, times, time, VlmUsage(tokens), VlmUsage(tokens), (usd, usd)))

    asyncio.run(main())
    assert len(times) == 400
    assert most_in_a_window(times, 60, 0) <= 60
    assert most_in_a_window(times, 60, 1) <= 90_000 + 3000  # a bucket is filled by whole requests
    assert most_in_a_window(times, 600, 2) <= 6.0 + 0.02
    assert times[-1][0] - times[0][0] < 1.5 * 400  # and the limits are used


def test_what_was_reserved_and_not_used_is_given_back():
    bucket = TokenBucket(1000, 60.0, now=0.0)
    bucket.take(100, 0.0)
    assert bucket.wait_s(100, 0.0) == pytest.approx(100 / 15)
    bucket.take(-90, 0.0)
    assert bucket.wait_s(90, 0.0) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_max_usd_is_never_passed_and_what_it_allows_is_used(seed):
    time, chance = FakeTime(), random.Random(seed)
    rules = policy(time, max_usd=1.0, spent_usd=0.25)
    times: list = []

    async def main():
        async def one():
            most = chance.uniform(0.01, 0.05)
            await send(rules, times, time, VlmUsage(1), VlmUsage(1), (most, most * chance.random()))

        return await asyncio.gather(*(one() for _ in range(300)), return_exceptions=True)

    results = asyncio.run(main())
    assert {type(result) for result in results} == {Ended, type(None)}
    spent = 0.25 + sum(usd for _, _, usd in times)
    assert spent == pytest.approx(rules.spent_usd) and 0.9 < spent <= 1.0
    assert isinstance(rules.ending, Stopped) and "max_usd" in str(rules.ending)


def test_a_request_that_broke_counts_at_what_it_may_have_cost():
    rules = policy(FakeTime(), max_usd=1.0)

    async def main():
        with pytest.raises(KeyError):
            async with rules.sending(VlmUsage(10), 0.3):
                raise KeyError

    asyncio.run(main())
    assert rules.spent_usd == 0.3 and not rules.reserved and rules.concurrency.in_flight == 0


def test_back_off_doubles_is_spread_and_waits_at_least_as_long_as_the_server_says():
    time = FakeTime()
    rules = policy(time)

    async def main():
        for failures in range(1, 10):
            for _ in range(200):
                await rules.back_off(failures, None)
        for _ in range(200):
            await rules.back_off(1, 7.0)

    asyncio.run(main())
    for failures in range(1, 10):
        waits, longest = time.slept[200 * (failures - 1) :][:200], min(60.0, 2.0 ** (failures - 1))
        assert 0 <= min(waits) < 0.1 * longest and 0.9 * longest < max(waits) <= longest
    assert 7.0 <= min(time.slept[-200:]) and max(time.slept[-200:]) <= 8.0


def test_a_429_holds_back_everyone_and_halves_once_per_round():
    time = FakeTime()
    rules = policy(time, in_flight=64)
    sent: list = []

    async def refused(seconds):
        async with rules.sending(VlmUsage(1), 0.0) as reservation:
            await asyncio.sleep(0.001)
            reservation.settle(reply("transient", finish="http 429", retry_after_s=seconds), 0.0)

    async def main():
        await asyncio.gather(*(send(rules, sent, time, VlmUsage(1), VlmUsage(1)) for _ in range(200)))
        assert rules.concurrency.limit == 64  # doubled with every round
        await asyncio.gather(*(refused(20.0) for _ in range(40)))
        assert rules.concurrency.limit == 32  # one round, one halving
        before = time.now_s
        await send(rules, sent, time, VlmUsage(1), VlmUsage(1))
        assert sent[-1][0] >= before + 20.0 - 1e-6

    asyncio.run(main())


def test_as_many_are_in_flight_as_allowed_and_never_more():
    time = FakeTime()
    rules, seen = policy(time, in_flight=100), []

    async def one():
        async with rules.sending(VlmUsage(1), 0.0) as reservation:
            seen.append(rules.concurrency.in_flight)
            await asyncio.sleep(0.001)
            reservation.settle(reply(), 0.0)

    async def main():
        await asyncio.gather(*(one() for _ in range(2000)))

    asyncio.run(main())
    assert max(seen) == 100 and rules.concurrency.in_flight == 0


def test_many_failures_end_the_run_with_their_kinds_and_few_do_not():
    def after(num_failures: int) -> Policy:
        async def main():
            rules = policy(FakeTime())
            for number in range(1000):
                rules.count("invalid" if number % 10 < num_failures else "")
            return rules

        return asyncio.run(main())

    assert after(3).ending is None
    error = after(4).ending
    assert isinstance(error, ValueError) and "61 invalid" in str(error)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (reply("fatal", finish=DENIED, detail="bad key"), ValueError, "bad key"),
        (reply("transient", quota="GenerateRequestsPerDayPerProject"), Stopped, "tomorrow"),
    ],
)
def test_what_no_other_request_would_survive_ends_the_run(answer, error, words):
    rules = policy(FakeTime())

    async def main():
        async with rules.sending(VlmUsage(), 0.0) as reservation:
            reservation.settle(answer, 0.0)
        with pytest.raises(Ended):
            async with rules.sending(VlmUsage(), 0.0):
                pytest.fail("sent")

    asyncio.run(main())
    assert isinstance(rules.ending, error) and words in str(rules.ending)


def test_who_waits_learns_of_the_end_at_once():
    async def main():
        rules = Policy(Limits(1, requests_per_minute=1), clock=Clock())
        waiting = [asyncio.create_task(rules.back_off(9, 1000.0)) for _ in range(3)]

        async def one():
            async with rules.sending(VlmUsage(), 0.0) as reservation:
                await asyncio.sleep(0.01)
                reservation.settle(reply(), 0.0)

        waiting += [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0.05)
        rules.end(Stopped("now"))
        async with asyncio.timeout(1):
            return await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(result) for result in asyncio.run(main())].count(Ended) == 7  # the first was sent


def test_a_server_that_answers_nothing_from_the_beginning_ends_the_run_with_its_reason():
    refused = reply("transient", finish="ConnectError", detail="all connection attempts failed")
    rules = policy(FakeTime())
    for _ in range(MAX_UNANSWERED):
        assert rules.ending is None
        rules.heed(refused, 0)
    assert str(rules.ending) == "none of the first 24 requests was answered: all connection attempts failed"


def test_a_server_that_has_answered_once_or_asks_to_wait_may_fail_longer():
    refused, busy = reply("transient", finish="500"), reply("transient", finish="429", retry_after_s=1.0)
    answered, asked_to_wait = policy(FakeTime()), policy(FakeTime())
    answered.heed(reply(), 0)
    for _ in range(2 * MAX_UNANSWERED):
        answered.heed(refused, 0)
        asked_to_wait.heed(busy, 0)
    assert answered.ending is None and asked_to_wait.ending is None
