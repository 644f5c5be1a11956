"""Columns of a table that are codes of categories, or values beside a mask.

Its law: a row that has no value is refused by its number, never trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.feed import Box, Feed, Part, Put, Rows
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged_site import number_array, numbers_of
from streamtrain.data.readers import Scratch
from streamtrain.errors import DataError


class CodesFeed(Feed):
    """Numbers of categories; a row without one is refused."""

    categories = 0

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the codes of these rows. Raises DataError for one that is no category's number."""

        def checked(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
            damaged = scratch.damages and scratch.damages[-1][0] == scratch.chunks
            if self.checked and not damaged and (int(values.min()) < 0 or int(values.max()) >= self.categories):
                self._refuse(values, number_array(numbers_of(box, rows))[wanted])
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

        def look(wanted: Rows, missing: NDArray[Any], part: Part | None) -> None:
            if self.checked and len(scratch.damages) == before and missing.any():
                row = number_array(numbers_of(box, rows))[wanted][int(np.flatnonzero(missing)[0])]
                raise DataError(
                    f"array {mask.layout.name!r}: row {row} has no value",
                    hint="leave such rows out: indices= takes sample numbers, or the name of a boolean array",
                )

        mask.fill(box, rows, look, scratch)
        super().fill(box, rows, put, scratch)
