"""The record of what files were promises: none is forgotten, a million take tens of MB, and a full record says so."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import pytest

from streamtrain.data.files import StoreFiles
from streamtrain.data.seen import Seen


def test_a_change_is_noticed_however_many_files_were_read_since(tmp_path: Path) -> None:
    file = tmp_path / "0"
    file.write_bytes(b"before")
    files = StoreFiles(tmp_path)
    files.check_unchanged("0", file.stat())
    for number in range(1, 70_000):
        files.check_unchanged(str(number), file.stat())
    file.write_bytes(b"after it")
    with pytest.raises(ValueError, match=r"it changed during the run: 6 bytes of .*, 8 bytes of"):
        files.check_unchanged("0", file.stat())
    file.unlink()
    with pytest.raises(ValueError, match="it was there, and vanished"):
        files.check_absent("0")


def test_a_million_files_take_tens_of_megabytes() -> None:
    seen, some = Seen("store"), 200_000
    tracemalloc.start()
    for number in range(some):
        seen.first(f"c/{number}/0", (number, 10**18 + number, number))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    buckets = 12 << 20  # all of them are there by now; more files only lengthen them
    assert (taken - buckets) / some < 40
    assert seen.first("c/7/0", (0, 0, 0)) == (7, 10**18 + 7, 7)


def test_a_full_record_forgets_nothing_and_says_once_that_it_is_full(caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen("the store", files=2)
    with caplog.at_level(logging.WARNING):
        for key in ("a", "b", "c", "d", "c"):
            assert seen.first(key, (1, 2, 3)) == (1, 2, 3)
    assert seen.first("a", (9, 9, 9)) == (1, 2, 3)
    assert seen.first("c", (9, 9, 9)) == (9, 9, 9)
    assert (len(seen), "b" in seen, "c" in seen) == (2, True, False)
    assert [record.getMessage()[:42] for record in caplog.records] == ["the store: 2 files are kept in mind, and n"]
