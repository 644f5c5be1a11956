"""What the TOML writer and the place finder promise: it reads back equal, and each key is found where it stands."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.toml_text import dumps, place, places

DOCUMENT = '''\
title = "x" # a comment with [brackets] and a = b

[data]
store = 'a#b.zarr'
split = [0.0, # from
         0.9]
"quoted key" = """
several = lines
"""

[model]
target = "nets:Net"
args = { width = 8, deep = { er = 1 } }

[[callbacks]]
name = "one"

[[callbacks]]
name = "two"
nested.key = true
'''

texts = st.text(st.characters(codec="utf-8"), max_size=20)
scalars = st.one_of(texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3))
)


@given(st.dictionaries(texts, values, max_size=5))
def test_what_is_written_reads_back_equal(tables: dict[str, Any]) -> None:
    assert tomllib.loads(dumps(tables)) == tables


@given(st.dictionaries(texts, values, max_size=4))
def test_each_key_written_is_found_where_it_stands(tables: dict[str, Any]) -> None:
    text = dumps(tables)
    found = places(text)
    lines = text.split("\n")
    for key in tables:
        line, column = found[(key,)]
        assert lines[line - 1][column - 1 :].startswith((key[:1] or '"', '"'))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("title",), (1, 1)),
        (("data",), (3, 2)),
        (("data", "store"), (4, 1)),
        (("data", "split", 1), (6, 10)),
        (("data", "quoted key"), (7, 1)),
        (("model", "args", "deep", "er"), (13, 30)),
        (("callbacks", 0, "name"), (16, 1)),
        (("callbacks", 1, "name"), (19, 1)),
        (("callbacks", 1, "nested", "key"), (20, 1)),
    ],
)
def test_a_key_is_found_by_line_and_column(path: tuple[str | int, ...], expected: tuple[int, int]) -> None:
    assert place(DOCUMENT, path) == expected


def test_a_key_that_is_missing_is_looked_for_at_its_parent() -> None:
    assert place(DOCUMENT, ("data", "stroe")) == (3, 2)
    assert place(DOCUMENT, ("nowhere",)) is None


def test_what_has_no_form_in_toml_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot write object"):
        dumps({"a": object()})


def test_none_is_left_out() -> None:
    assert dumps({"data": {"a": None, "b": 1}}) == "[data]\nb = 1\n"
