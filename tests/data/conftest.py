"""Servers on loopback for the tests of stores elsewhere; started where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.data.cloud import Proxy


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of a server that speaks S3."""
    from tests.data.cloud import moto

    with moto() as url:
        yield url


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    """A server before it that can go wrong."""
    from tests.data.cloud import Proxy

    made = Proxy(s3)
    yield made
    made.close()
