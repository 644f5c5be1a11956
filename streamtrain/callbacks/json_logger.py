"""`metrics.jsonl`: one flat JSON object a line; a value that is not finite is null, its name stands in `nonfinite`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamtrain.callbacks.lines import FIXED, MetricsLog, cut
from streamtrain.callbacks.rolling import prune
from streamtrain.errors import UNREADABLE
from streamtrain.events import Log


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """These numbers as JSON can hold them: null for what is not finite, with the names under `nonfinite` at the end."""
    odd = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**values, **dict.fromkeys(odd), "nonfinite": odd} if odd else dict(values)


def json_line(record: Mapping[str, Any]) -> str:
    """A line of JSON, of ASCII alone."""
    return json.dumps(record, separators=(", ", ": "), allow_nan=False) + "\n"


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is no line of ours."""
    try:
        record = json.loads(line)
    except UNREADABLE:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


class JSONLogger(MetricsLog):
    """Writes `metrics.jsonl` in the run's folder: `step, epoch, samples, time, split`, and the metrics by their names.

    After a resume each step stands there once; a fresh start empties the file. Once it has `part` bytes it becomes
    `metrics-000001.jsonl`, and so on, and a new one begins; `streamtrain.callbacks.rolling.rows` reads all of them.
    """

    file_name = "metrics.jsonl"
    reserved = (*FIXED, "nonfinite")

    async def on_log(self, event: Log) -> None:
        """Write one line."""
        values = self.values(event)
        if self._file is not None and not self.again(event, values):
            record = dict(zip(FIXED, self.fixed(event), strict=True))
            self._file.put(json_line({**record, **finite(values)}))

    def prepare(self, path: Path, step: int) -> None:
        """Cut off what comes after `step`; at step 0, all."""

        def keep(line: bytes) -> bool:
            record = parsed(line)
            if step == 0 or record is None or record["step"] > step:
                return False
            if record["step"] == step:
                self._there.add((str(record.get("split")), frozenset(record) - frozenset(self.reserved)))
            return True

        there = {line.decode() for line in prune(path, lambda part: keep, head=0)} if step < sys.maxsize else ()
        cut(path, keep, [line for line in self._missing if line not in there and keep(line.encode())])
