"""What log.txt promises: all that is logged, in order; and a disk that refuses it is told of in one line of our own."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest

from streamtrain.log_file import KEPT, LogFile, logged

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


def test_half_a_line_that_a_life_before_has_left_spoils_no_line_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("whole\nha")
    (tmp_path / "log.jsonl").write_text('{"message": "whole"}\n{"message": "ha')
    with logged(logging.INFO) as log:
        log.open(tmp_path)
        logger.info("new")
    texts = (tmp_path / "log.txt").read_text().splitlines()
    assert [text.partition("streamtrain.test: ")[2] or text for text in texts] == ["whole", "ha", "new"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["message"] for row in rows] == ["whole", "new"]


def test_the_same_lies_there_as_json_lines_with_tracebacks_apart(tmp_path: Path) -> None:
    with logged(logging.INFO) as log:
        log.open(tmp_path)
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("after %d", 3)
    (row,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (row["level"], row["logger"], row["message"]) == ("error", "streamtrain.test", "after 3")
    assert row["traceback"].startswith("Traceback")
    assert row["traceback"].endswith("ValueError: why")


@pytest.mark.parametrize(
    ("level", "to_file", "shown", "kept"),
    [
        (logging.INFO, logging.INFO, ["info", "warning"], ["info", "warning"]),
        (logging.WARNING, logging.INFO, ["warning"], ["info", "warning"]),
        (logging.INFO, logging.DEBUG, ["info", "warning"], ["debug", "info", "warning"]),
        (logging.ERROR, logging.ERROR, [], []),
        (logging.DEBUG, logging.ERROR, ["debug", "info", "warning"], ["debug", "info", "warning"]),
    ],
)
def test_stderr_and_the_files_have_levels_of_their_own(
    tmp_path: Path, capsys: Capture, level: int, to_file: int, shown: list[str], kept: list[str]
) -> None:
    with logged(level, to_file=to_file) as log:
        log.open(tmp_path)
        for name in ("debug", "info", "warning"):
            getattr(logger, name)(name)
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == shown
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["message"] for row in rows] == kept


def test_a_full_file_makes_room_for_another_and_the_oldest_goes(tmp_path: Path) -> None:
    log = LogFile(full=1000)
    log.open(tmp_path)
    for number in range(1000):
        log.handler.handle(logging.makeLogRecord({"msg": f"line {number}", "levelname": "INFO"}))
    log.close()
    for name in ("log.txt", "log.jsonl"):
        files = {path.name: path for path in tmp_path.iterdir() if path.name.startswith(name)}
        assert sorted(files) == [name, *(f"{name}.{number}" for number in range(1, KEPT + 1))]
        assert all(path.stat().st_size <= 1000 for path in files.values())
        assert "line 999" in files[name].read_text()


def test_warnings_of_python_are_kept(tmp_path: Path, capsys: Capture) -> None:
    with logged(logging.INFO) as log, warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        log.open(tmp_path)
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: old ways" in (tmp_path / "log.txt").read_text()
    assert "warning: " in capsys.readouterr().err


def test_the_error_that_ends_a_command_is_in_the_files_alone(tmp_path: Path, capsys: Capture) -> None:
    def command() -> None:
        with logged(logging.INFO) as log:
            log.open(tmp_path)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        command()
    text = (tmp_path / "log.txt").read_text()
    assert "ERROR streamtrain.log_file: ended by ZeroDivisionError: division by zero" in text
    assert "_ = 1 / 0" in text
    assert capsys.readouterr().err == ""
