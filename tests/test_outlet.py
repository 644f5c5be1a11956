"""Nobody waits for a reader who does not read."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from streamtrain.log_file import logged
from streamtrain.outlet import BLINK, MOST, Outlet, last_words, write, writer


class Reader:
    """A pipe that nobody empties, until `read` does."""

    def __init__(self) -> None:
        self.descriptor, self.end = os.pipe()
        os.set_blocking(self.end, False)
        self.before = 0
        try:
            while True:
                self.before += os.write(self.end, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(self.end, True)

    def read(self, until: bytes) -> bytes:
        """All that was written, up to this."""
        got = b""
        while not got.endswith(until):
            got += os.read(self.descriptor, 1 << 16)
        return got[self.before :]


@pytest.fixture
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    os.close(one.descriptor)


def test_lines_are_written_in_their_order_each_before_whoever_said_it_goes_on() -> None:
    written: list[str] = []
    outlet = Outlet(written.append)
    for number in range(100):
        outlet.put(f"{number}\n", wait=60)
        assert len(written) == number + 1
    outlet.close()
    assert written == [f"{number}\n" for number in range(100)]


def test_of_a_reader_who_is_stuck_only_the_first_line_is_waited_for_and_he_gets_all_when_he_reads(
    reader: Reader,
) -> None:
    outlet = Outlet(lambda line: write(reader.end, line.encode()))
    began = time.monotonic()
    for number in range(MOST):
        outlet.put(f"{number}\n")
    assert time.monotonic() - began < BLINK * MOST / 10
    assert reader.read(f"{MOST - 1}\n".encode()) == "".join(f"{number}\n" for number in range(MOST)).encode()
    outlet.put("again in order\n", wait=60)
    assert os.read(reader.descriptor, 1 << 16) == b"again in order\n"
    outlet.close()
    os.close(reader.end)


def test_lines_beyond_those_that_are_kept_are_counted(reader: Reader) -> None:
    outlet = Outlet(lambda line: write(reader.end, line.encode()))
    for number in range(MOST + 12):
        outlet.put(f"{number}\n")
    shown = reader.read(b"in time\n").decode()
    kept = shown.splitlines()
    lost = MOST + 12 - (len(kept) - 1)
    assert kept[:-1] == [str(number) for number in range(len(kept) - 1)]
    assert kept[-1] == f"warning: {lost} lines were left out here: nobody read them in time"
    outlet.close()
    os.close(reader.end)


def test_a_reader_who_went_away_costs_nothing_but_his_lines() -> None:
    descriptor, end = os.pipe()
    os.close(descriptor)
    outlet = Outlet(lambda line: write(end, line.encode()))
    outlet.put("nobody hears it\n", wait=60)
    outlet.put("nor this\n", wait=60)
    outlet.close()
    os.close(end)


def test_what_is_logged_waits_for_no_reader(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(reader.end, "w") as stuck:
        monkeypatch.setattr(sys, "stderr", stuck)
        with logged(logging.INFO):
            for number in range(50):
                logging.getLogger("streamtrain.some").info("line %d", number)
        assert reader.read(b"line 49\n").decode().splitlines() == [f"note: line {number}" for number in range(50)]


def test_a_file_that_only_python_knows_is_written_to_as_well() -> None:
    file = io.StringIO()
    writer(file)("some\n")
    assert file.getvalue() == "some\n"


def test_last_words_that_nobody_takes_end_the_process_all_the_same() -> None:
    left, told = threading.Event(), []

    def leave(code: int) -> None:
        told.append(code)
        left.set()

    with last_words(143, seconds=0.001, leave=leave):
        assert left.wait(60)
    with last_words(143, seconds=3600, leave=leave):
        pass
    assert told == [143]
