"""What may become of a JSON document: hypothesis draws a place in it, and what happens there or to the whole text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Json = Any
Path = tuple[str | int, ...]

DEEP: Json = []
for _ in range(900):  # as deep as json.dumps goes
    DEEP = [DEEP]
ODD: list[Json] = [
    *[None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, float("nan"), float("inf"), 1e308, 2**31, 2**53 + 1],
    *[2**63, 2**64, -(2**63) - 1, 10**40, 10**4200, 10**15],
    *["", "x", "\ud800", "\0", "ä\u202e", "../../etc/passwd", "/", "a" * 5000, "NaN", "1e999", "0x" + "f" * 5000],
    *[[], {}, [[]], [None], [1, 2, 3], {"": 1}, {"name": "x"}, {"a": {"b": {}}}, DEEP],
]
"""Values that somebody may have put there."""
KEYS = ["", "x", "name", "$tensor", "$float", "$int", "__metadata__", "\ud800", "configuration"]


def places(document: Json, path: Path = ()) -> Iterator[Path]:
    """The paths of all values in a document."""
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*path, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from places(value, (*path, number))


@st.composite
def changed(draw: st.DrawFn, document: Json) -> Json:
    """A document with one to three changes: values gone, doubled, exchanged, of other types, keys renamed or added."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        made = _once(draw, made)
    return made


def _once(draw: st.DrawFn, document: Json) -> Json:
    found = list(places(document))
    path = draw(st.sampled_from(found))
    if not path:
        return draw(st.sampled_from(ODD)) if draw(st.integers(0, 9)) == 0 else document
    holder = _at(document, path[:-1])
    key: Any = path[-1]
    value = holder[key]
    what = draw(st.sampled_from(["odd", "odd", "odd", "near", "near", "gone", "key", "swap", "wrap", "twice"]))
    if what == "odd":
        holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    elif what == "near":
        holder[key] = _near(draw, value)
    elif what == "gone":
        del holder[key]
    elif what == "key" and isinstance(holder, dict):
        holder[draw(st.sampled_from(KEYS))] = holder.pop(key) if draw(st.booleans()) else copy.deepcopy(value)
    elif what == "swap":
        other = draw(st.sampled_from(found[1:]))
        holder[key] = copy.deepcopy(_at(document, other))
    elif what == "wrap":
        holder[key] = draw(st.sampled_from([[value], {"value": value}, str(value), [value, value]]))
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    return document


def _near(draw: st.DrawFn, value: Json) -> Json:
    """Nearly what it was."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw(st.sampled_from([value + 1, value - 1, -value, 2 * value, float(value), value * 1_000_003]))
    if isinstance(value, str):
        return draw(st.sampled_from([value.upper(), value + " ", value[:-1], value + "\0", value * 2]))
    return draw(st.sampled_from([[], {}, None]))


def _at(document: Json, path: Path) -> Json:
    for key in path:
        document = document[key]
    return document


@st.composite
def texts(draw: st.DrawFn, document: Json) -> bytes:
    """The bytes of such a document; or of the whole one, which then suffer as bytes do."""
    if draw(st.integers(0, 3)):
        return json.dumps(draw(changed(document))).encode("utf-8", "surrogatepass")
    whole = json.dumps(document)
    what = draw(st.sampled_from(["cut", "garbage", "twice", "utf-16", "mark", "byte", "nested", "raw", "key"]))
    data = whole.encode()
    if what == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if what == "garbage":
        return draw(st.binary(max_size=200))
    if what == "twice":
        return data + data
    if what == "utf-16":
        return whole.encode("utf-16")
    if what == "mark":
        return b"\xef\xbb\xbf" + data
    if what == "byte":
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if what == "nested":
        return draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([100, 5000, 200_000]))
    if what == "raw":
        return whole.replace("e", '\\ud800", "', 1).encode()
    return b'{"format": 1, "shape": 1, "node_type": 1, ' + data[1:]  # keys that come twice
