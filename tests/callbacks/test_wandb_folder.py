"""What an offline life of wandb left is read out of its file, and what it did not leave out of the log.

wandb itself is not needed: files are written here as LevelDB's documentation describes its log format, with JSON in
place of wandb's messages.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.wandb_folder import kind_of, mend, missing, offline, reached, records, settle

TRAIN, VALID = kind_of(["loss"]), kind_of(["val_loss"])


def transaction_log(bodies: Sequence[bytes]) -> bytes:
    """A file of these records."""
    out = bytearray(b":W&B\xe1\xbe\x00")
    for body in bodies:
        first = True
        while first or body:
            left = 32768 - len(out) % 32768
            if left < 7:
                out += bytes(left)
                continue
            part, body = body[: left - 7], body[left - 7 :]
            kind = bytes([(1 if first else 4) if not body else (2 if first else 3)])
            out += zlib.crc32(kind + part).to_bytes(4, "little") + len(part).to_bytes(2, "little") + kind + part
            first = False
    return bytes(out)


class Record:
    """A message of theirs, as far as it is looked at."""

    def ParseFromString(self, data: bytes) -> None:  # noqa: N802  (their name)
        self.kind, items = json.loads(data)
        each = [SimpleNamespace(key=key, nested_key=[], value_json=json.dumps(value)) for key, value in items.items()]
        self.history = SimpleNamespace(item=each)

    def WhichOneof(self, group: str) -> str:  # noqa: N802
        assert group == "record_type"
        return str(self.kind)


def history(step: int, **values: float) -> bytes:
    return json.dumps(["history", {"_step": 7, "epoch": 0, "samples": step, **values, "step": step}]).encode()


SIZES = st.lists(st.integers(0, 3) | st.integers(32740, 32780) | st.integers(0, 100_000), max_size=8)


@given(SIZES, st.data())
def test_a_file_cut_anywhere_gives_the_records_before_the_cut(sizes: list[int], data: st.DataObject) -> None:
    bodies = [bytes([n]) * size for n, size in enumerate(sizes)]
    whole = transaction_log(bodies)
    assert list(records(io.BytesIO(whole))) == bodies
    found = list(records(io.BytesIO(whole[: data.draw(st.integers(0, len(whole) - 1))])))
    assert found == bodies[: len(found)]
    assert len(found) < len(bodies) or not bodies


def test_what_lies_behind_damage_does_not_count() -> None:
    whole = bytearray(transaction_log([b"one", b"two", b"three"]))
    whole[7 + 7 + 3 + 7] ^= 1
    assert list(records(io.BytesIO(whole))) == [b"one"]
    assert list(records(io.BytesIO(b"something else"))) == []


@given(SIZES, st.data())
def test_a_torn_end_is_cut_off_and_nothing_else(sizes: list[int], data: st.DataObject) -> None:
    bodies = [b'["run", {}]', *(json.dumps(["x", {"y": "z" * size}]).encode() for size in sizes)]
    whole = transaction_log(bodies)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run-abc.wandb"
        file.write_bytes(whole[: data.draw(st.integers(len(transaction_log(bodies[:1])), len(whole)))])
        before = list(records(io.BytesIO(file.read_bytes())))
        mend([file], Record)
        assert file.read_bytes() == transaction_log(before)


def test_the_last_step_of_each_kind_of_line_is_found_in_all_lives(tmp_path: Path) -> None:
    lives = [
        [history(1, loss=1.0), history(2, loss=0.5), history(2, val_loss=0.7)],
        [history(3, loss=0.4), json.dumps(["summary", {}]).encode(), json.dumps(["history", {"step": 9}]).encode()],
    ]
    for number, life in enumerate(lives):
        folder = tmp_path / f"offline-run-{number}-abc"
        folder.mkdir()
        (folder / "run-abc.wandb").write_bytes(transaction_log(life))
    (tmp_path / "offline-run-3-other").mkdir()
    files = offline(tmp_path, "abc")
    assert reached(files, Record) == {TRAIN: 3, VALID: 2}
    assert reached(offline(tmp_path, "abc", "offline-run-1-abc"), Record) == {TRAIN: 2, VALID: 2}


def log(folder: Path, steps: Sequence[int], **more: Any) -> Path:
    path = folder / "metrics.jsonl"
    fixed = {"epoch": 0, "time": 1.5, "split": "train"}
    path.write_text(
        "".join(json.dumps({"step": n, "samples": 8 * n, **fixed, "loss": 1 / n, **more}) + "\n" for n in steps)
    )
    return path


def test_lines_that_were_lost_come_out_of_the_log(tmp_path: Path) -> None:
    found = list(missing(log(tmp_path, range(1, 9)), 6, {TRAIN: 3}, (6, [TRAIN])))
    assert found == [{"step": n, "epoch": 0, "samples": 8 * n, "loss": 1 / n} for n in (4, 5, 6)]


def test_a_value_that_was_not_finite_is_one_again(tmp_path: Path) -> None:
    path = log(tmp_path, [1], loss=None, nonfinite=["loss"])
    (row,) = missing(path, 1, {}, (1, [TRAIN]))
    assert math.isnan(row["loss"])
    assert "nonfinite" not in row


def test_where_the_last_line_is_there_nothing_is_read(tmp_path: Path) -> None:
    assert list(missing(tmp_path / "nowhere" / "metrics.jsonl", 6, {TRAIN: 6}, (6, [TRAIN]))) == []


def test_a_log_that_another_task_still_completes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = log(tmp_path, [1, 2])
    monkeypatch.setattr("time.sleep", lambda seconds: log(tmp_path, [1, 2, 3]))
    assert [row["step"] for row in missing(path, 3, {TRAIN: 1}, (3, [TRAIN]))] == [2, 3]


def test_a_log_that_stays_incomplete_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = list(missing(log(tmp_path, [1, 2]), 3, {}, (3, [TRAIN]), 0.0))
    assert [row["step"] for row in found] == [1, 2]
    assert "lacks lines of step 3" in caplog.text


def test_files_are_waited_for_while_a_process_of_wandb_has_them_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run-abc.wandb"
    open_files = [[SimpleNamespace(path=str(file))], [], []]
    process = SimpleNamespace(info={"name": "wandb-core"}, open_files=lambda: open_files.pop(0))
    monkeypatch.setattr("psutil.process_iter", lambda names: [process])
    assert settle([file])
    assert len(open_files) == 1
    open_files[:] = [[SimpleNamespace(path=str(file))]] * 2
    assert not settle([file], -1.0)
