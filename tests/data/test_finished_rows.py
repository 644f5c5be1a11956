"""What kept rows promise: of shuffled epochs each sample is transformed once, and batches are those without a cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from tests.data import small


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = small.write(tmp_path_factory.mktemp("stores") / "data.zarr", compressed=True)
    return path


class Counted:
    """A transform of each sample by itself, a filter, that counts the samples that it was given."""

    def __init__(self, most: int = 10**9) -> None:
        self.samples, self.most = 0, most

    def __call__(self, batch: Batch) -> Batch:
        self.samples += len(batch)
        keep = (batch.index % 3 > 0) & (batch.index < self.most)
        inputs = {"a": batch.inputs[keep] * 2, "b": [batch.inputs[keep].sum(axis=1)]}
        return Batch(inputs, batch.targets[keep] + 1, batch.index[keep])


def twice_every_third(batch: Batch) -> Batch:
    """Fewer rows than samples, and two of each."""
    rows = np.repeat(np.flatnonzero(batch.index % 3 == 0), 2)
    return Batch(batch.inputs[rows], batch.targets[rows], batch.index[rows])


def stream(path: Path, transform: Any, **keywords: Any) -> ZarrStream:
    return small.stream(path, transform=transform, **{"cache_transform": True, "output": "numpy", **keywords})


async def listed(source: ZarrStream) -> list[Batch]:
    return [batch async for batch in source]


def same(one: list[Batch], other: list[Batch]) -> None:
    assert [batch.cursor for batch in one] == [batch.cursor for batch in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.targets, b.targets)
        np.testing.assert_array_equal(a.inputs["a"], b.inputs["a"])
        np.testing.assert_array_equal(a.inputs["b"][0], b.inputs["b"][0])
        assert a.epoch == b.epoch


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["block", "global"]),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([None, (0.0, 0.5), (200, 300)]),
    st.sampled_from([10**9, 250]),
    st.integers(0, 5),
)
def test_batches_are_the_same_and_each_sample_is_transformed_once(
    store: Path, shuffle: Any, size: int, drop: bool, split: Any, most: int, seed: int
) -> None:
    given: dict[str, Any] = {"shuffle": shuffle, "batch_size": size, "drop_last": drop, "split": split, "seed": seed}
    transform = Counted(most)

    async def scenario() -> None:
        plain = stream(store, Counted(most), cache_transform=False, **given)
        source = stream(store, transform, **given)
        for _ in range(3):
            same(await listed(source), await listed(plain))
        assert drop or transform.samples == source.num_samples  # what one epoch drops the next may need
        await source.aclose()
        assert source.budget.statistics().used == 0

    if not (drop and split == (200, 300) and size > 100):
        asyncio.run(scenario())


async def test_kept_rows_are_private_and_a_position_is_gone_on_from(store: Path) -> None:
    source, plain = stream(store, Counted()), stream(store, Counted(), cache_transform=False)
    for _ in range(3):
        for batch in await listed(source):
            batch.inputs["a"][:] = -1
            batch.index[:] = -1
    plain.set_epoch(3)
    whole = await listed(plain)
    passing = aiter(source)
    for _ in range(7):
        await anext(passing)
    source.load_state_dict(source.state_dict())
    same(await listed(source), whole[7:])
    await source.aclose()


@pytest.mark.parametrize("seed", [1, 6])
async def test_what_a_resumed_pass_dropped_comes_in_later_epochs(store: Path, seed: int) -> None:
    given: dict[str, Any] = {"seed": seed, "split": (0, 96), "shuffle_blocks": 1}
    before = stream(store, Counted(), batch_size=8, **given)
    async for _ in before:
        break
    source = stream(store, Counted(), batch_size=32, drop_last=True, **given)
    plain = stream(store, Counted(), batch_size=32, drop_last=True, cache_transform=False, **given)
    for each in (source, plain):
        await each.open()
        each.load_state_dict(before.state_dict())
    for _ in range(4):
        same(await listed(source), await listed(plain))
    for each in (before, source, plain):
        await each.aclose()


async def test_rows_of_an_epoch_that_was_broken_off_are_kept(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    transform = Counted()
    source, plain = stream(store, transform), stream(store, Counted(), cache_transform=False)
    passing = aiter(source)
    for _ in range(20):
        await anext(passing)
    for each in (source, plain):
        each.set_epoch(1)
    for _ in range(2):
        same(await listed(source), await listed(plain))
    seen = transform.samples
    same(await listed(source), await listed(plain))
    assert transform.samples == seen
    assert "not kept" not in caplog.text
    await source.aclose()


@pytest.mark.parametrize(
    ("transform", "why"),
    [
        (lambda batch: ({"x": batch.inputs, "n": 3}, batch.targets), "it makes a int, which has no rows"),
        (lambda batch: (batch.inputs, np.float32(len(batch)).reshape(1)), "one row for each sample"),
        (lambda batch: (batch.inputs[:, : 1 + len(batch) % 2], batch.targets), "another shape or dtype"),
        (twice_every_third, "it makes several rows of one sample"),
    ],
)
async def test_what_is_no_rows_is_not_kept_and_said(
    store: Path, caplog: pytest.LogCaptureFixture, transform: Any, why: str
) -> None:
    caplog.set_level("INFO")
    source, plain = stream(store, transform), stream(store, transform, cache_transform=False)
    for _ in range(2):
        for got, expected in zip(await listed(source), await listed(plain), strict=True):
            np.testing.assert_array_equal(got.index, expected.index)
    told = source.statistics().finished
    assert told is not None
    assert (told.hits, told.bytes) == (0, 0)
    assert sum(why in record.getMessage() for record in caplog.records) == 1
    await source.aclose()


async def test_samples_that_do_not_fit_are_said_and_left(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = stream(store, Counted(), cache="20KiB")
    assert len(await listed(source)) == len(await listed(source)) == 31
    assert sum("those of all 1000 samples take" in record.getMessage() for record in caplog.records) == 1
    await source.aclose()


async def test_draws_that_are_kept_are_said_once(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    def noisy(batch: Batch) -> tuple[Any, Any]:
        assert batch.rng is not None
        return batch.inputs + batch.rng.random(), batch.targets

    caplog.set_level("WARNING")
    source = stream(store, noisy)
    kept = []
    for _ in range(2):
        batches = await listed(source)
        order = np.argsort(np.concatenate([batch.index for batch in batches]))
        kept.append(np.concatenate([batch.inputs for batch in batches])[order])
    np.testing.assert_array_equal(kept[0], kept[1])
    assert len([record for record in caplog.records if "does not end with the same weights" in record.message]) == 1
    await source.aclose()
