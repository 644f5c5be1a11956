"""One request for bytes of an object: bounded in time, made again after failures that may pass, and accounted for.

Its law: what a failure means is said once, here. An object that is not there is an answer and no failure; damage is
never asked for again; what may pass is, `retries` times, after a pause that doubles and is blurred by chance, so that
many readers do not come back at once.
"""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from streamtrain.data.filters import Bytes

FIRST_PAUSE = 0.1
"""Seconds before a request is made for the second time; twice as long each time after."""
LONGEST_PAUSE = 10.0
RECENT = 64
"""Requests by which latency is judged."""

REFUSALS = ("PermissionDeniedError", "UnauthenticatedError", "NoBucket")
"""Errors by which a store says no."""

Range = tuple[int, int] | int | None
"""Which bytes of an object: from one to before another; the last so many; all."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What an answer says before its bytes come."""

    length: int
    """Bytes that follow."""
    size: int | None
    """Bytes of the whole object, where the store tells."""
    version: str | None
    """Changes with the object, where the store tells: its ETag, which is weak if it begins with `W/`; without one DATED
    and when it was last modified."""


DATED = "dated "
"""Begins what is known of a version by its date alone."""


def tells(version: str | None) -> bool:
    """Whether other bytes have another version: weak ETags may be the same for both, and dates for a second."""
    return version is not None and not version.startswith(("W/", DATED))


def differ(then: str | None, now: str | None) -> bool:
    """Whether an object is another than it was, as far as ETags tell: weak ones too, by RFC 9110's weak comparison."""
    if then is None or now is None or then.startswith(DATED) or now.startswith(DATED):
        return False
    return then.removeprefix("W/") != now.removeprefix("W/")


class ByteSource(Protocol):
    """Where objects are."""

    lane: str
    """`obstore` or `store`."""

    async def get(self, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
        """The bytes; `headed` is called before they are taken, and what it raises ends the request.

        Raises FileNotFoundError where there is no such object.
        """

    def transient(self, error: Exception) -> bool:
        """Whether the same request may succeed later."""

    def url(self, key: str) -> str:
        """What messages call an object."""


class FetchFailed(Exception):
    """An object could not be had, for a reason that is not its content; `str` is the cause."""

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class FetchStatistics:
    """How requests for bytes of a store elsewhere do; sums are of the live pass, or else of the last one."""

    requests: int
    """Answers asked for, repetitions among them. Far fewer than `chunks`: neighbours share requests."""
    retries: int
    """Requests made again. More than a few in a hundred: the store throttles, or the network loses."""
    seconds: float
    """Time of all requests from asking to the last byte; they overlap, so that this is more than the pass took."""
    latency: float
    """Median seconds from asking to the answer's heading, of the last 64: what no bandwidth takes away. If steps wait
    for data and this is most of a request's time, larger chunks help (or shards of them)."""
    bytes: int
    """Bytes that came, gaps between neighbours among them: `bytes / seconds` times `at_once` is the bandwidth."""
    under_way: int
    """Requests that wait for their answer now."""
    at_once: int
    """How many may: from sizes, memory, threads, and what was measured (`spans.requests_at_once` has the formula)."""


@dataclass
class Account:
    """What was fetched since the pass began. Written on the private loop only."""

    requests: int = 0
    retries: int = 0
    seconds: float = 0.0
    bytes: int = 0
    under_way: int = 0
    at_once: int = 0
    latencies: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=RECENT))
    """Seconds to the heading."""

    def statistics(self) -> FetchStatistics:
        """How it stands."""
        ordered = sorted(self.latencies.copy())
        latency = ordered[len(ordered) // 2] if ordered else 0.0
        return FetchStatistics(
            self.requests, self.retries, self.seconds, latency, self.bytes, self.under_way, self.at_once
        )


def pause(attempt: int, chance: float) -> float:
    """Seconds before a request is made again after `attempt` failures; `chance` in [0, 1) blurs it by half."""
    return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1))) * (0.5 + chance)


class Fetcher:
    """Requests to one source, for one stream. Its coroutines run on the stream's private loop."""

    def __init__(
        self,
        source: ByteSource,
        *,
        retries: int,
        timeout: float,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self.source, self.retries, self.timeout = source, retries, timeout
        self._sleep, self._chance = sleep, chance or random.Random().random
        self.account = Account()

    @property
    def longest(self) -> float:
        """Seconds after which a request must have ended one way or another."""
        return (self.retries + 1) * (self.timeout + 1.5 * LONGEST_PAUSE)

    async def fetch(
        self,
        key: str,
        wanted: Range,
        headed: Callable[[Heading], None],
        asking: Callable[[], None] | None = None,
    ) -> Bytes:
        """The bytes; `headed` is called with each answer's heading, `asking` before each request.

        Raises FileNotFoundError where there is no such object, ValueError where `headed` refuses it, FetchFailed with
        the cause where it could not be had.
        """
        for attempt in range(1, self.retries + 2):
            if asking is not None:
                asking()
            try:
                return await self._once(key, wanted, headed)
            except (FileNotFoundError, ValueError):
                raise
            except Exception as error:
                hung = isinstance(error, TimeoutError)
                if attempt > self.retries or not (hung or self.source.transient(error)):
                    raise self._failed(error, attempt) from error
            self.account.retries += 1
            await self._sleep(pause(attempt, self._chance()))
        raise AssertionError("unreachable")

    async def _once(self, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
        account, began = self.account, time.monotonic()
        account.requests += 1
        account.under_way += 1

        def answered(heading: Heading) -> None:
            account.latencies.append(time.monotonic() - began)
            headed(heading)

        try:
            async with asyncio.timeout(self.timeout):
                data = await self.source.get(key, wanted, answered)
        finally:
            account.under_way -= 1
            account.seconds += time.monotonic() - began
        account.bytes += len(data)
        return data

    def _failed(self, error: Exception, attempts: int) -> FetchFailed:
        times = f", {attempts} times" if attempts > 1 else ""
        if isinstance(error, TimeoutError):
            return FetchFailed(
                f"it was not read within {self.timeout:g} s{times}", "check the storage, or raise read_timeout"
            )
        if isinstance(error, PermissionError) or type(error).__name__ in REFUSALS:
            hint = "check the credentials: the usual environment variables, or storage_options="
        else:
            hint = "check the network and the endpoint, or raise retries"
        return FetchFailed(f"it can't be had{times}: {one_line(error)}", hint)


def one_line(error: Exception) -> str:
    """A cause as one line, without what only a developer of the client library reads."""
    text = str(error).partition("\n\nDebug source")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"[:400]
