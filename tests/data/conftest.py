"""Servers on loopback for the tests of stores elsewhere; started where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.data.cloud import Proxy


NEED = {
    "torch": ["finished", "iterable", "loader", "mix", "transform_processes", "transforming"],
    "obstore": ["cloud", "disk_cache_far", "fetch", "web"],
}
"""Files of this folder that do not even load without a package; the others hold what the room itself needs."""
LEFT_OUT = {package: files for package, files in NEED.items() if find_spec(package) is None}
collect_ignore = [f"test_{name}.py" for files in LEFT_OUT.values() for name in files]


def pytest_report_header() -> list[str]:
    """What is not run, and why."""
    return [f"without {package}: no test_{', test_'.join(files)}" for package, files in LEFT_OUT.items()]


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


@pytest.fixture
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that are opened right after they were written count as older: what was kept of them lasts."""
    monkeypatch.setattr("streamtrain.data.files.TICK", 0)
