"""What groups mean that AnnData writes: sparse matrices, categoricals, columns with a mask. Pure.

Its law: a group is read as what its attributes call it, or refused by name with what to do; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from streamtrain.data.layout import Untrainable
from streamtrain.errors import DataError

Kind = Literal["csr", "categorical", "nullable"]
MEMBERS: dict[Kind, tuple[str, ...]] = {
    "csr": ("data", "indices", "indptr"),
    "categorical": ("codes", "categories"),
    "nullable": ("values", "mask"),
}
"""The arrays of such a group, that of the values first."""
DATAFRAME = "name a column of it"
REFUSED = {
    "csc_matrix": "its rows lie scattered: write it by rows, adata.X = adata.X.tocsr(), before write_zarr",
    "csc": "its rows lie scattered: write it by rows, adata.X = adata.X.tocsr(), before write_zarr",
    "nullable-string-array": "texts can't be trained on: adata.strings_to_categoricals() makes categories of them",
    "string-array": "texts can't be trained on: adata.strings_to_categoricals() makes categories of them",
    "dataframe": DATAFRAME,
    "dict": "name an array in it",
    "raw": "name an array in it",
    "anndata": "name an array in it: X, layers/..., obsm/..., obs/...",
    "awkward-array": "write it as values and offsets, and give ragged={'values': 'offsets'}",
    "rec-array": "write its columns as arrays of their own",
}


APART = frozenset({"dataframe", "dict", "raw", "anndata"})
"""What holds arrays that are named each for itself."""
READ = frozenset({"csr_matrix", "csr", "categorical", "nullable-integer", "nullable-boolean"})


@dataclass(frozen=True)
class Encoding:
    """What a group is."""

    kind: Kind
    shape: tuple[int, int] = (0, 0)
    """Of a sparse matrix: rows and columns."""

    @property
    def members(self) -> tuple[str, ...]:
        """The arrays of the group, that of the values first."""
        return MEMBERS[self.kind]


def encoding_of(name: str, attributes: object) -> Encoding | None:
    """What this group is; None for a plain one. Raises Untrainable for what can't be trained on."""
    if not isinstance(attributes, Mapping):
        return None
    said = attributes.get("encoding-type") or attributes.get("h5sparse_format")
    if said in ("csr_matrix", "csr"):
        return Encoding("csr", _shape(name, attributes))
    if said == "categorical":
        return Encoding("categorical")
    if said in ("nullable-integer", "nullable-boolean"):
        return Encoding("nullable")
    if isinstance(said, str) and said in REFUSED:
        example = f": '{name}/{_column(attributes)}'" if said == "dataframe" else ""
        raise Untrainable(f"{name!r} is a {said}, which can't be trained on as it is", hint=f"{REFUSED[said]}{example}")
    return None


def stands_for_one(attributes: object) -> bool:
    """Whether the arrays of this group make up one, which is called as the group is."""
    if not isinstance(attributes, Mapping):
        return False
    said = attributes.get("encoding-type") or attributes.get("h5sparse_format")
    return isinstance(said, str) and said in (READ | REFUSED.keys()) - APART


def old_categories(attributes: object) -> str | None:
    """The path from a column's folder to its categories, as AnnData wrote it before version 0.8; None without any."""
    path = attributes.get("categories") if isinstance(attributes, Mapping) else None
    return path if isinstance(path, str) and path.startswith("__categories/") and ".." not in path else None


def _shape(name: str, attributes: Mapping[str, Any]) -> tuple[int, int]:
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 2
        or not all(isinstance(length, int) and not isinstance(length, bool) and length >= 0 for length in shape)
    ):
        raise DataError(
            f"the sparse array {name!r} has the shape {shape!r} among its attributes, not rows and columns",
            hint="write it again",
        )
    return shape[0], shape[1]


def _column(attributes: Mapping[str, Any]) -> str:
    order = attributes.get("column-order")
    return str(order[0]) if isinstance(order, list | tuple) and order else "..."
