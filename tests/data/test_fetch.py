"""What a request promises: made again after what may pass, never after what does not; bounded, and accounted for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from streamtrain.data import bucket
from streamtrain.data.fetch import LONGEST_PAUSE, Fetcher, FetchFailed, Heading, Range, pause
from streamtrain.data.filters import Bytes
from streamtrain.data.zarr_bytes import StoreBytes


class Source:
    """Answers as it is told, one outcome a request."""

    lane = "told"

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)

    async def get(self, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
        outcome = self.outcomes.pop(0)
        if outcome == "hang":
            await asyncio.Event().wait()
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, bytes)
        headed(Heading(len(outcome), None, None))
        return np.frombuffer(outcome, dtype=np.uint8)

    def transient(self, error: Exception) -> bool:
        return isinstance(error, ConnectionError)

    def url(self, key: str) -> str:
        return key


class Pauses:
    """A sleep that is only noted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def fetcher(source: Source, **changes: Any) -> tuple[Fetcher, Pauses]:
    pauses = Pauses()
    given: dict[str, Any] = {"retries": 3, "timeout": 30, "chance": lambda: 0.5, **changes}
    return Fetcher(source, sleep=pauses, **given), pauses


def fetched(made: Fetcher, headed: Callable[[Heading], None] = id) -> bytes:  # type: ignore[assignment]
    return asyncio.run(made.fetch("key", None, headed)).tobytes()


LOST = ConnectionResetError("lost")


def test_what_may_pass_is_asked_for_again_after_pauses_that_double() -> None:
    made, pauses = fetcher(Source(LOST, LOST, LOST, b"data"))
    assert fetched(made) == b"data"
    assert pauses.seconds == [0.1, 0.2, 0.4]
    told = made.account.statistics()
    assert (told.requests, told.retries, told.bytes, told.under_way) == (4, 3, 4, 0)


def test_it_is_given_up_after_so_many_times_with_the_cause() -> None:
    made, pauses = fetcher(Source(*[LOST] * 4))
    with pytest.raises(FetchFailed, match="it can't be had, 4 times: ConnectionResetError: lost") as caught:
        fetched(made)
    assert len(pauses.seconds) == 3
    assert caught.value.hint


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("damaged")])
def test_what_is_an_answer_is_not_asked_for_again(error: Exception) -> None:
    made, pauses = fetcher(Source(error, b"data"))
    with pytest.raises(type(error)):
        fetched(made)
    assert not pauses.seconds


def test_a_refusal_is_not_asked_for_again() -> None:
    made, pauses = fetcher(Source(PermissionError("no"), b"data"))
    with pytest.raises(FetchFailed, match="it can't be had: PermissionError: no") as caught:
        fetched(made)
    assert "credentials" in caught.value.hint
    assert not pauses.seconds


def test_what_the_heading_shows_to_be_wrong_is_refused_before_its_bytes() -> None:
    def refuse(heading: Heading) -> None:
        raise ValueError(f"{heading.length} bytes")

    with pytest.raises(ValueError, match="4 bytes"):
        fetched(fetcher(Source(b"data"))[0], refuse)


def test_a_request_that_hangs_is_made_again_then_given_up() -> None:
    assert fetched(fetcher(Source("hang", b"data"), timeout=0.01)[0]) == b"data"
    with pytest.raises(FetchFailed, match=r"it was not read within 0.01 s, 2 times"):
        fetched(fetcher(Source("hang", "hang"), timeout=0.01, retries=1)[0])


def test_pauses_are_blurred_and_bounded() -> None:
    assert pause(1, 0.0) < pause(1, 0.9) < pause(3, 0.0)
    assert pause(100, 0.5) == LONGEST_PAUSE


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (GenericError("Server returned non-2xx status code: 503 Slow Down"), True),
        (GenericError("Server returned non-2xx status code: 429"), True),
        (GenericError("Server returned non-2xx status code: 400 Bad Request"), False),
        (GenericError("HTTP error: error sending request"), True),
        (PermissionDeniedError("403"), False),
        (ConnectionResetError(), True),
        (ValueError("x"), False),
    ],
)
def test_what_passes_of_obstore(error: Exception, passing: bool) -> None:
    assert bucket.transient(error) is passing


class ServerTimeoutError(Exception):
    """As client libraries name theirs."""


class Status(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError("network"), True),
        (ConnectionResetError(), True),
        (ServerTimeoutError(), True),
        (Status(503), True),
        (Status(403), False),
        (PermissionError(), False),
        (KeyError("x"), False),
    ],
)
def test_what_passes_of_other_stores(error: Exception, passing: bool) -> None:
    assert StoreBytes.transient(None, error) is passing  # type: ignore[arg-type]
