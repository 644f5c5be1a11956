"""What log.txt promises: all that is logged, in order; and a disk that refuses it is told of in one line of our own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from streamtrain.log_file import logged

Capture = pytest.CaptureFixture[str]
logger = logging.getLogger("streamtrain.test")


def test_what_was_logged_before_the_folder_was_there_comes_first(tmp_path: Path) -> None:
    with logged(logging.INFO) as log:
        logger.info("one")
        log.open(tmp_path)
        logger.info("two %d", 2)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition("INFO ")[2] for line in lines] == ["streamtrain.test: one", "streamtrain.test: two 2"]


def test_a_full_disk_is_said_once_and_lines_still_go_to_stderr(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with logged(logging.INFO) as log:
        log.open(tmp_path)
        for number in range(5):
            logger.warning("line %d", number)
    said = capsys.readouterr().err.splitlines()
    missing = "lines are missing there until it can be"
    full = f"warning: {tmp_path / 'log.txt'} can't be written: No space left on device; {missing}"
    assert sorted(said) == sorted([*(f"warning: line {number}" for number in range(5)), full])
