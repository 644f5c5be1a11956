"""From chunks to rows of different lengths, cell by cell.

Its law: a column number is used only after it was held against the number of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.feed import Box, Feed, Part, Put, Rows
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.ragged import Run, copy_runs, strictly_rising
from streamtrain.data.ragged_parts import Stretch, Wanted, gathered, inner_chunks, parts_of
from streamtrain.data.ragged_site import RaggedSite, numbers_of
from streamtrain.data.reading import Scratch
from streamtrain.errors import DataError


class RaggedFeed(Feed):
    """One array's rows of different lengths, cell by cell; beside it is the feed of sparse rows' columns."""

    site: RaggedSite

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over these rows of a cell, as `Run`s. Raises DataError for what can't be used."""
        wanted = Wanted.of(self.site.table, numbers_of(box, rows))
        before = len(scratch.damages)
        scratch.tainted = []
        try:
            self._put_parts(0, wanted, put, scratch, self._elements(wanted, scratch))
            for columns in self.beside:
                self._put_parts(1, wanted, put, scratch, parts_of(columns, wanted, scratch))
            if wanted.bad:
                scratch.tainted = [damage for _, damage in scratch.damages[before:]]
                lost = np.flatnonzero(wanted.lost)
                put(lost, self._nothing(wanted.lengths[lost]), None)
        finally:
            scratch.tainted = None
            del scratch.damages[before:]  # their rows are told: nobody else's are lost for them

    def _put_parts(self, number: int, wanted: Wanted, put: Put, scratch: Scratch, parts: Iterator[Stretch]) -> None:
        """Hand over all parts of the rows' values (0) or columns (1)."""
        for part in parts:
            repeated = number == 1 and self.checked and self._check_columns(part, wanted)
            run = Run({number: part.elements}, part.starts, part.lengths, part.skipped, repeated)
            self._put(put, wanted.rows(part.rows), run, None, scratch)

    def _elements(self, wanted: Wanted, scratch: Scratch) -> Iterator[Stretch]:
        """The rows' values as they are handed over."""
        if self.layout.ndim == 1 and self.change is None:
            yield from parts_of(self, wanted, scratch)
            return
        if not self.checked:
            for chunk, cut in inner_chunks(self.layout):
                yield from parts_of(self, wanted, scratch, chunk, cut)
            return
        elements = self._changed(gathered(self, wanted, scratch), scratch)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(wanted.lengths)])[:-1]
        yield Stretch(slice(0, len(starts)), elements, starts, wanted.lengths, np.zeros(len(starts), dtype=np.int64), 0)

    def _changed(self, values: NDArray[Any], scratch: Scratch) -> NDArray[Any]:
        """Elements as they are handed over: the taken places of their axes, and what is done to numbers."""
        for axis, places in self.site.taken.items():
            values = values.take(places, axis=axis)
        if self.change is None:
            return values
        size = values.size * self.site.dtype.itemsize
        out = scratch.take("ragged changed", size).view(self.site.dtype).reshape(values.shape)

        def keep(wanted: Rows, changed: NDArray[Any], part: Part | None) -> None:
            out[wanted] = changed

        self.change.around(keep, scratch)(slice(0, len(values)), values, None)
        return out

    def _nothing(self, lengths: Ints) -> Run:
        """Rows of zeros, in place of lost ones."""
        zeros, most = np.zeros(len(lengths), dtype=np.int64), int(lengths.max(initial=0))
        arrays = {n: np.zeros((most, *piece.shape), dtype=piece.dtype) for n, piece in enumerate(self.site.pieces)}
        return Run(arrays, zeros, lengths, zeros)

    def _check_columns(self, part: Stretch, wanted: Wanted) -> bool:
        """Whether a row may name a column twice. Raises DataError where a column is none of the array's."""
        rows, first, lengths = part.rows, part.starts, part.lengths
        if not lengths.all():
            some = lengths > 0
            rows, first, lengths = numbers_in(rows)[some], first[some], lengths[some]
            if not len(first):
                return False
        ends, columns = first + lengths, part.elements
        if part.joined or (first[1:] == ends[:-1]).all():
            columns = columns[int(first[0]) : int(ends[-1])]
            ends = ends - int(first[0])
        else:
            ends = np.cumsum(lengths)
            columns = np.empty(int(ends[-1]), dtype=columns.dtype)
            copy_runs(columns, ends - lengths, part.elements, first, lengths)
        rising = strictly_rising(columns, ends)
        first_ones, last_ones = columns[ends - lengths], columns[ends - 1]
        low, high = (first_ones, last_ones) if rising else (columns, columns)
        if int(low.min()) < 0 or int(high.max()) >= self.site.width:
            raise self._wrong(part, wanted)
        twice = not rising or bool((first_ones <= wanted.last_columns[rows]).any())
        wanted.last_columns[rows] = last_ones
        return twice

    def _wrong(self, part: Stretch, wanted: Wanted) -> DataError:
        """Names the first column of a row that is none."""
        assert self.site.columns is not None
        columns, layout = part.elements, self.site.columns
        for row, start, length in zip(wanted.numbers_at(part.rows), part.starts, part.lengths, strict=True):
            mine = columns[start : start + length]
            if len(found := np.flatnonzero((mine < 0) | (mine >= self.site.width))):
                return DataError(
                    f"array {layout.name!r}: row {row} names column {mine[found[0]]}, in chunk {part.chunk}; there are "
                    f"columns 0 to {self.site.width - 1}",
                    hint="restore the file from its source, or convert the data again",
                )
        raise AssertionError("each column is one of the array's")


class LengthsFeed(Feed):
    """How many elements of each row are taken."""

    site: RaggedSite

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the lengths of these rows, int64 of shape (n,)."""
        scratch.tainted = []
        try:
            put(slice(None), self.site.table.of(numbers_of(box, rows))[1], None)
        finally:
            scratch.tainted = None
