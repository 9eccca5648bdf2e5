"""When a request may be sent, and when to stop: rates, money, back-off, concurrency, failures.

Time and chance come in as arguments, so the laws are tested without waiting: no window of a minute holds more
than its limit, no request is sent that max_usd could not pay, waiting doubles and is spread at random.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from conf.command import Stopped
from storyanchors.vlm import DENIED, VlmReply, VlmUsage

BURST = 0.1  # of a limit may be used at once; the rest of it comes evenly over the window
MAX_BACK_OFF_S = 60.0
FAILURE_WINDOW = 200  # settled questions
FIRST_IN_FLIGHT = 8


class Ended(BaseException):
    """Raised where something waits to be sent although the run is ending; no `except Exception` stops it."""


@dataclass(frozen=True)
class Clock:
    """Seconds that only grow, and waiting for them."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True)
class Limits:
    """Of one task of a run; None: no limit."""

    in_flight: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    usd_per_10min: float | None = None
    max_usd: float | None = None  # in all, earlier runs of the task included
    max_failures: float = 0.3  # of the last 200 questions
    back_off_s: float = 1.0  # before the first repetition, at most


class TokenBucket:
    """An amount per window: a tenth of it at once, the rest evenly, so no window ever holds more than all.

    What was taken may turn out smaller or larger; a bucket in debt is waited for.
    """

    def __init__(self, limit: float, window_s: float, now: float):
        self.size = limit * BURST
        self.per_second = (limit - self.size) / window_s
        self._level, self._time = self.size, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; an amount larger than the bucket needs a full one."""
        self._fill(now)
        return max(0.0, (min(amount, self.size) - self._level) / self.per_second)

    def take(self, amount: float, now: float) -> None:
        """A negative amount gives back."""
        self._fill(now)
        self._level = min(self.size, self._level - amount)

    def _fill(self, now: float) -> None:
        self._level = min(self.size, self._level + (now - self._time) * self.per_second)
        self._time = now


class Concurrency:
    """How many requests are in flight: twice as many after every round of replies until the server says stop;
    then half as many, and one more after every round. Who waits is served in order.
    """

    def __init__(self, most: int):
        self.most, self.limit = most, float(min(most, FIRST_IN_FLIGHT))
        self.in_flight, self._growth = 0, 1.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        if self.in_flight < int(self.limit) and not self._waiting:
            self.in_flight += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        await place  # whoever released has counted us in

    def release(self) -> None:
        self.in_flight -= 1
        self._admit()

    def speed_up(self) -> None:
        self.limit = min(self.most, self.limit + (self._growth or 1 / self.limit))
        self._admit()

    def slow_down(self) -> None:
        self.limit, self._growth = max(1.0, self.limit / 2), 0.0

    def abandon(self, error: BaseException) -> None:
        """Whoever waits gets the error instead of a place."""
        while self._waiting:
            if not (place := self._waiting.popleft()).done():
                place.set_exception(error)

    def _admit(self) -> None:
        while self._waiting and self.in_flight < int(self.limit):
            if not (place := self._waiting.popleft()).done():
                self.in_flight += 1
                place.set_result(None)


MAX_UNANSWERED = 24  # of the first requests of a task


class Policy:
    """All that requests of one task share. `ending` is why the run ends, once it does."""

    def __init__(
        self,
        limits: Limits,
        *,
        spent_usd: float = 0.0,
        rng: random.Random | None = None,
        clock: Clock | None = None,
    ):
        self.limits, self.spent_usd = limits, spent_usd
        self.reserved: set[Reservation] = set()
        self.ending: Exception | None = None
        self.concurrency = Concurrency(limits.in_flight)
        self._rng, self._clock = rng or random.Random(), clock or Clock()
        self._ended, self._settled = asyncio.Event(), asyncio.Event()
        self._gate = asyncio.Lock()  # who waits for rates and money waits in line
        self._not_before, self._num_halvings = self._clock.now(), 0
        self._problems: deque[str] = deque(maxlen=FAILURE_WINDOW)
        self._num_unanswered: int | None = 0  # None once the server has answered anything
        self.last_failure = ""  # why a request was not answered, for whoever watches
        now = self._clock.now()
        minute, ten = 60.0, 600.0
        self._requests = limits.requests_per_minute and TokenBucket(limits.requests_per_minute, minute, now)
        self._tokens = limits.tokens_per_minute and TokenBucket(limits.tokens_per_minute, minute, now)
        self._usd = limits.usd_per_10min and TokenBucket(limits.usd_per_10min, ten, now)

    def end(self, why: Exception) -> None:
        """Nothing more is sent; what is in flight may come back. The first reason counts."""
        if self.ending is None:
            self.ending = why
            self._ended.set()
            self._settled.set()
            self.concurrency.abandon(Ended())

    async def ended(self) -> None:
        await self._ended.wait()

    @asynccontextmanager
    async def sending(self, usage: VlmUsage, usd: float):
        """Inside, a request that uses at most that may be sent; settle() is told its reply. Ended otherwise.

        Leaving without settle(), because something broke, counts the reservation as spent.
        """
        self._check_ending()
        await self.concurrency.acquire()
        try:
            async with self._gate:
                await self._wait_for_turn(usage, usd)
                self.reserved.add(reservation := Reservation(self, usage, usd, self._num_halvings))
            try:
                yield reservation
            finally:
                reservation.close()
        finally:
            self.concurrency.release()

    async def back_off(self, num_failures: int, retry_after_s: float | None) -> None:
        """Full jitter: anything up to back_off_s * 2^(failures - 1), on top of what the server asked for."""
        longest = min(MAX_BACK_OFF_S, self.limits.back_off_s * 2 ** (num_failures - 1))
        await self._sleep((retry_after_s or 0.0) + self._rng.uniform(0, longest))

    def count(self, problem: str) -> None:
        """A question is settled, "" without a problem; too many problems end the run early."""
        self._problems.append(problem)
        problems = Counter(filter(None, self._problems))
        if problems.total() > self.limits.max_failures * FAILURE_WINDOW:
            kinds = ", ".join(f"{number} {kind}" for kind, number in problems.most_common())
            self.end(
                ValueError(
                    f"{problems.total()} of the last {FAILURE_WINDOW} questions failed ({kinds}), more than "
                    f"max_failures={self.limits.max_failures:g}: no more were asked, start again to continue"
                )
            )

    def heed(self, reply: VlmReply, num_halvings: int) -> None:
        """What a reply says about the requests after it; its own was sent after so many halvings."""
        now = self._clock.now()
        self._note_failure(reply)
        if reply.status == "fatal" and reply.finish == DENIED:
            self.end(ValueError(f"no request can succeed: {reply.detail}"))
        elif reply.status == "transient" and "perday" in reply.quota.lower():
            self.end(Stopped(f"the quota of the day is used up ({reply.quota}): start again tomorrow"))
        elif reply.status == "transient" and (reply.retry_after_s is not None or "429" in reply.finish):
            self._not_before = max(self._not_before, now + (reply.retry_after_s or 0.0))
            if num_halvings == self._num_halvings:  # what was sent before a halving does not halve again
                self.concurrency.slow_down()
                self._num_halvings += 1
        elif reply.status != "transient":
            self.concurrency.speed_up()

    def _note_failure(self, reply: VlmReply) -> None:
        """A server that answers nothing from the beginning is a wrong address, not bad luck."""
        if reply.status != "transient":
            self._num_unanswered = None
            return
        self.last_failure = reply.detail
        if self._num_unanswered is None or reply.retry_after_s is not None or "429" in reply.finish:
            return
        self._num_unanswered += 1
        if self._num_unanswered >= MAX_UNANSWERED:
            self.end(ValueError(f"none of the first {MAX_UNANSWERED} requests was answered: {reply.detail}"))

    def _settle(self, reserved: "Reservation", usage: VlmUsage, usd: float) -> None:
        self.reserved.discard(reserved)
        self.spent_usd += usd
        now = self._clock.now()
        if self._tokens:
            self._tokens.take(_tokens(usage) - _tokens(reserved.usage), now)
        if self._usd:
            self._usd.take(usd - reserved.usd, now)
        self._settled.set()

    async def _wait_for_turn(self, usage: VlmUsage, usd: float) -> None:
        """Returns at the moment at which the request may be sent, with all of it taken."""
        await self._wait_for_money(usd)
        amounts = [(self._requests, 1.0), (self._tokens, _tokens(usage)), (self._usd, usd)]
        buckets = [(bucket, amount) for bucket, amount in amounts if bucket]
        while True:
            self._check_ending()
            now = self._clock.now()
            waits = [bucket.wait_s(amount, now) for bucket, amount in buckets]
            if (wait_s := max(self._not_before - now, *waits, 0.0)) <= 0:
                break
            await self._sleep(max(wait_s, 1e-3))  # never so short that rounding would make it nothing
        for bucket, amount in buckets:
            bucket.take(amount, now)

    async def _wait_for_money(self, usd: float) -> None:
        if self.limits.max_usd is None:
            return
        while self.spent_usd + sum(one.usd for one in self.reserved) + usd > self.limits.max_usd:
            self._check_ending()
            if not self.reserved:  # nothing in flight that could turn out cheaper
                self.end(
                    Stopped(
                        f"max_usd: {self.spent_usd:.4f} of {self.limits.max_usd:.4f} USD are spent, the next "
                        f"request may cost {usd:.4f}; start again with more"
                    )
                )
                raise Ended
            self._settled.clear()
            await self._settled.wait()

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, or raises Ended as soon as the run is ending."""
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        ending = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((sleeping, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            ending.cancel()
        self._check_ending()

    def _check_ending(self) -> None:
        if self.ending is not None:
            raise Ended


class Reservation:
    """The money and the tokens of one request in flight."""

    def __init__(self, policy: Policy, usage: VlmUsage, usd: float, num_halvings: int):
        self.usage, self.usd, self._num_halvings = usage, usd, num_halvings
        self._policy: Policy | None = policy

    def settle(self, reply: VlmReply, usd: float) -> None:
        policy, self._policy = self._policy, None
        policy._settle(self, reply.usage, usd)
        policy.heed(reply, self._num_halvings)

    def close(self) -> None:
        if self._policy is not None:
            self._policy._settle(self, self.usage, self.usd)


def _tokens(usage: VlmUsage) -> int:
    """Limits per minute count what is sent."""
    return usage.input_tokens
