"""A log in parts: once `metrics.jsonl` is full it becomes `metrics-000001.jsonl`, and a new one begins.

Its law: the parts in the order of their numbers, and the file itself last, are the whole log; no line is in two of
them, and what a life that goes on cuts off is cut off all of them.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streamtrain.data.budget import parse_bytes
from streamtrain.errors import UNREADABLE, ConfigError

LEAST = 1 << 12
"""Bytes of a part."""
TAIL = 4096
"""Lines of a part that are looked at for some that may be missing."""
Keep = Callable[[bytes], bool]


def part_bytes(size: str | int, name: str) -> int:
    """How large a part may grow, from "64MiB" or a number of bytes. Raises ConfigError."""
    limit = parse_bytes(size, name)
    if limit < LEAST:
        raise ConfigError(f"{name} must be at least {LEAST} bytes, not {size!r}")
    return limit


def older(path: Path) -> list[Path]:
    """The parts that are full, the first one first."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    found = [(int(match[1]), each) for each in path.parent.iterdir() if (match := pattern.fullmatch(each.name))]
    return [each for _, each in sorted(found)]


def parts(path: Path) -> list[Path]:
    """All files of the log that there are, in its order."""
    return [*older(path), *([path] if path.is_file() else [])]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log of JSON lines, of all its parts; what is no line of it is left out."""
    for part in parts(path):
        try:
            with open(part, "rb") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                    except UNREADABLE:  # torn, or still being written
                        continue
                    if isinstance(row, dict):
                        yield row
        except FileNotFoundError:  # cut off just now
            continue


def roll(path: Path, *, headed: bool) -> None:
    """Make the file the next part, and begin a new one; `headed`: with the same first line."""
    before = older(path)
    number = int(before[-1].stem.rpartition("-")[2]) + 1 if before else 1
    with open(path, "rb") as file:
        head = file.readline() if headed else b""
        os.fsync(file.fileno())
    os.replace(path, path.with_name(f"{path.stem}-{number:06d}{path.suffix}"))
    with open(path, "wb") as file:
        file.write(head)


def prune(path: Path, keep_of: Callable[[Path], Keep], *, head: int) -> list[bytes]:
    """Drop the lines of full parts that `keep_of(part)` refuses, and parts of which but `head` lines are left.

    Goes back from the newest to the first of which nothing is dropped. The last lines of the newest that stays.
    """
    last: list[bytes] = []
    for part in reversed(older(path)):
        keep, temp = keep_of(part), part.with_name(f".{part.name}.tmp")
        stay, dropped = 0, 0
        tail: deque[bytes] = deque(maxlen=TAIL)
        with open(part, "rb") as old, open(temp, "wb") as new:
            for line in old:
                if line.endswith(b"\n") and keep(line):
                    new.write(line)
                    tail.append(line)
                    stay += 1
                else:
                    dropped += 1
            if dropped and stay > head:
                new.flush()
                os.fsync(new.fileno())
        if stay <= head:
            part.unlink()
            temp.unlink()
            continue
        last = last or list(tail)
        if not dropped:
            temp.unlink()
            break
        os.replace(temp, part)
    return last
