"""Columns of a table that are codes of categories, or values beside a mask.

Its law: a row that has no value is refused by its number, never trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.feed import Box, Feed, Part, Put, Rows
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.ragged_site import numbers_of
from streamtrain.data.reading import Scratch
from streamtrain.errors import DataError


class CodesFeed(Feed):
    """Numbers of categories; a row without one is refused."""

    categories = 0

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the codes of these rows. Raises DataError for one that is no category's number."""

        def checked(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
            outside = self.checked and (int(values.min()) < 0 or int(values.max()) >= self.categories)
            if outside and not _damaged(scratch):
                self._refuse(values, numbers_in(numbers_of(box, rows))[wanted])
            put(wanted, values, part)

        super().fill(box, rows, checked, scratch)

    def _refuse(self, codes: NDArray[Any], numbers: Ints) -> None:
        which = int(np.flatnonzero((codes < 0) | (codes >= self.categories))[0])
        code, row, name = int(codes[which]), numbers[which], self.layout.name
        if code == -1:
            raise DataError(
                f"array {name!r}: row {row} has no category (code -1)",
                hint="leave such rows out: indices= takes sample numbers, or the name of a boolean array",
            )
        raise DataError(
            f"array {name!r}: row {row} has the code {code}; there are categories 0 to {self.categories - 1}",
            hint="restore the file from its source, or convert the data again",
        )


class NullableFeed(Feed):
    """Values beside a mask; a row that the mask marks as missing is refused."""

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the values of these rows. Raises DataError for one that is missing."""
        [mask] = self.beside
        before = len(scratch.damages)
        unknown: list[Ints] = []

        def look(wanted: Rows, missing: NDArray[Any], part: Part | None) -> None:
            if _damaged(scratch):
                unknown.append(np.arange(len(numbers_in(numbers_of(box, rows))))[wanted])
            elif self.checked and missing.any():
                row = numbers_in(numbers_of(box, rows))[wanted][int(np.flatnonzero(missing)[0])]
                raise DataError(
                    f"array {mask.layout.name!r}: row {row} has no value",
                    hint="leave such rows out: indices= takes sample numbers, or the name of a boolean array",
                )

        mask.fill(box, rows, look, scratch)
        if unknown:
            self._lose(np.concatenate(unknown), before, put, scratch)
        super().fill(box, rows, put, scratch)

    def _lose(self, lost: Ints, before: int, put: Put, scratch: Scratch) -> None:
        """Tell that of these rows the mask is damaged; their values, which are put after, are dropped with them."""
        scratch.tainted = [damage for _, damage in scratch.damages[before:]]
        try:
            self._put(put, lost, np.zeros((len(lost), *self.site.row_shape), self.site.dtype), None, scratch)
        finally:
            scratch.tainted = None
            del scratch.damages[before:]  # their rows are told: nobody else's are lost for them


def _damaged(scratch: Scratch) -> bool:
    """Whether what is put now is of a chunk that could not be used."""
    return bool(scratch.damages) and scratch.damages[-1][0] == scratch.chunks
