"""That models learn from real data as they do in a bare loop: a part of each set, for a little while."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtrain.errors import EnvironmentProblem
from tests.bench import datasets, fashion, gaps
from tests.bench.measure import Options

QUICK = Options(rounds=1, quick=True)


def there(get: object) -> Path:
    """The folder of a data set; the test is skipped where nobody has fetched it."""
    try:
        return get(fetch=False)  # type: ignore[operator,no-any-return]
    except EnvironmentProblem as error:
        pytest.skip(f"{error}; {error.hint}")


def test_images_are_learned_as_in_a_bare_loop() -> None:
    there(datasets.fashion)
    ours, theirs, difference = fashion.run(QUICK)
    assert ours.median > 70
    assert difference.median == theirs.median - ours.median < 3


def test_gaps_and_masks_are_learned_as_in_a_bare_loop() -> None:
    there(datasets.flights)
    found = {measure.name: measure for measure in gaps.run(QUICK)}
    assert found["flights: error over a bare loop's"].median < 1.1
    assert found["sea: error over a bare loop's"].median < 1.1


def test_flights_have_gaps_and_texts_are_numbers() -> None:
    rows = datasets.flight_rows(there(datasets.flights), ("dep_delay", "arr_delay", "carrier", "distance"))
    assert rows.shape == (336_776, 4)
    assert 8_000 < np.isnan(rows[:, 0]).sum() < np.isnan(rows[:, 1]).sum() < 10_000
    assert sorted(set(rows[:, 2].tolist())) == list(range(16))


def test_a_third_of_the_globe_is_land() -> None:
    assert 0.3 < datasets.land_mask(600).mean() < 0.36
