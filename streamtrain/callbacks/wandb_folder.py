"""What the folders of one run of wandb hold: which lines of the log lives before this one have left there.

The files are what wandb calls transaction logs: LevelDB's log format (blocks of 32 KiB; a record is a checksum, a
length, a kind and bytes, one that goes over a block's end is several) around messages of theirs. Its law: what lies
behind the first damage does not count, for `wandb sync` reads no further either.
"""

from __future__ import annotations

import logging
import math
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from streamtrain.callbacks.json_logger import JSONLogger
from streamtrain.callbacks.rolling import rows

logger = logging.getLogger(__name__)

BLOCK = 1 << 15
HEAD = 7
"""Bytes at the head of the file, and of each part of a record."""
MARK = b":W&B\xe1\xbe"
"""What a file begins with; a byte for the version follows."""
_WHOLE, _FIRST, _LAST = 1, 2, 4
ENDING = 10.0
"""Seconds for which the process of a killed life is waited for, which writes what it still has; and `metrics.jsonl`."""

EMPTY = ".empty"
"""Ending of a file that was put aside."""

Kind = frozenset[str]
"""The names of a line's metrics; lines of one kind have different steps."""


def kind_of(names: Iterable[str]) -> Kind:
    """Of a line with these names, in the log, in a file of theirs or in `metrics.jsonl`."""
    return frozenset(name for name in names if name not in JSONLogger.reserved and not name.startswith("_"))


def folder_of(run_dir: str | Path) -> Path:
    """Where wandb puts the lives of runs whose `dir` this is, as its documentation tells."""
    hidden = Path(run_dir, ".wandb")
    return hidden if hidden.is_dir() else Path(run_dir, "wandb")


def offline(place: Path, run: str, own: str = "") -> list[Path]:
    """The files of the offline lives of this run in a folder of wandb's, but that of the life whose folder is `own`."""
    places = [each for each in place.glob(f"offline-run-*-{run}*") if each.name != own]
    files = [each / f"run-{run}.wandb{end}" for each in places for end in ("", EMPTY)]
    return [file for file in files if file.is_file()]


def lives(place: Path, run: str) -> list[Path]:
    """The files of all lives of this run, offline or online, in a folder of wandb's."""
    return list(place.glob(f"*run-*-{run}*/run-{run}.wandb"))


def mend(files: Iterable[Path], record: Any) -> None:
    """Cut off what a kill left torn at the end of files, and put those aside that it left without even the run's own
    record: at either `wandb sync` gives up, and sends no folder after it."""
    for file in files:
        if file.suffix == EMPTY:
            continue
        if not any(kind == "run" for kind, _ in _messages(file, record)):
            file.rename(file.with_name(file.name + EMPTY))
            logger.info("%s holds nothing, and is put aside as %s", file, file.name + EMPTY)
            continue
        end = 0
        with open(file, "rb") as opened:
            for _ in records(opened):
                end = opened.tell()
        if torn := file.stat().st_size - end:
            os.truncate(file, end)
            logger.info("%s: %d bytes of a record that a kill has torn are cut off", file, torn)


def missing(
    log: Path, step: int, there: Mapping[Kind, int], last: tuple[int, Sequence[Kind]], seconds: float = ENDING
) -> Iterator[dict[str, float]]:
    """The lines up to `step` of which `there` lacks the kind's step, out of `metrics.jsonl`, as they were logged.

    `last`: the step and kinds of the last lines that were logged. As long as the file lacks one of them, another task
    is still at bringing it to where the checkpoint left it: that is waited for. A value that was not finite is NaN.
    """
    number, kinds = last
    if all(there.get(kind, -1) >= number for kind in kinds):
        return  # lines go in their order: all before it are there too
    deadline = time.monotonic() + seconds
    while True:
        found = [row for row in rows(log) if _lost(row, step, there)]
        lacking = {kind for kind in kinds if there.get(kind, -1) < number}
        lacking -= {kind_of(row) for row in found if row["step"] == number}
        if not lacking or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if lacking:
        logger.warning("%s lacks lines of step %d, which wandb does not get again either", log, number)
    for row in found:
        values = {name: math.nan if row[name] is None else row[name] for name in kind_of(row)}
        yield {"epoch": row["epoch"], "samples": row["samples"], **values, "step": row["step"]}


def _lost(row: Mapping[str, Any], step: int, there: Mapping[Kind, int]) -> bool:
    own = row.get("step")
    return isinstance(own, int) and there.get(kind_of(row), -1) < own <= step and "samples" in row and "epoch" in row


def reached(files: Iterable[Path], record: Any) -> dict[Kind, int]:
    """The last step of each kind of line that these files hold. `record`: the class of their messages."""
    last: dict[Kind, int] = {}
    for file in files:
        for step, kind in _lines(file, record):
            last[kind] = max(step, last.get(kind, -1))
    return last


def settle(files: Iterable[Path], seconds: float = ENDING) -> bool:
    """Wait until no process of wandb writes these files any more; False if one still does after so long."""
    paths = {str(file.resolve()) for file in files}
    deadline = time.monotonic() + seconds
    while paths and any(paths & _open_files(process) for process in psutil.process_iter(["name"])):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def records(file: BinaryIO) -> Iterator[bytes]:
    """The records of a transaction log, to its end or the first damage; nothing of what is none."""
    if file.read(HEAD)[: len(MARK)] != MARK:
        return
    at, parts = HEAD, bytearray()
    while True:
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += len(file.read(left))
        head = file.read(HEAD)
        if len(head) < HEAD:
            return
        checksum, length, part = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:6], "little"), head[6]
        body = file.read(length)
        if not _WHOLE <= part <= _LAST or len(body) < length or zlib.crc32(body, zlib.crc32(head[6:])) != checksum:
            return
        at += HEAD + length
        if part in (_WHOLE, _FIRST):
            parts.clear()
        parts += body
        if part in (_WHOLE, _LAST):
            yield bytes(parts)


def _messages(file: Path, record: Any) -> Iterator[tuple[str, Any]]:
    """Kind and message of each record of a file; the message is another one after the next."""
    message = record()
    with open(file, "rb") as opened:
        for data in records(opened):
            message.ParseFromString(data)
            yield message.WhichOneof("record_type"), message


def _lines(file: Path, record: Any) -> Iterator[tuple[int, Kind]]:
    """Step and kind of each of our lines that a file holds."""
    for kind, message in _messages(file, record):
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): item for item in message.history.item}
            if {"step", "epoch", "samples"} <= items.keys():  # a line of the log: no resources, no media
                yield int(float(items["step"].value_json)), kind_of(items)


def _open_files(process: psutil.Process) -> set[str]:
    if "wandb" not in (process.info["name"] or ""):
        return set()
    with suppress(psutil.Error):
        return {file.path for file in process.open_files()}
    return set()
