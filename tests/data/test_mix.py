"""What a mix promises: keyed draws, exact resume in any place, and ends as they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from streamtrain import Budget, Trainer, mix
from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.source import Stream
from streamtrain.errors import ConfigError, DataError, UserCodeError
from tests.data import small
from tests.data.small import ours, stream, until_failure


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    return [small.write(folder / f"{rows}.zarr", rows=rows) for rows in (1000, 400)]


def mixed(stores: list[Path], *, seed: int = 3, weights: Any = (3, 1), stop: Any = "first", **keywords: Any) -> Any:
    """The large store in batches of 33 (31 of them), the small one in batches of 50 (8)."""
    one, other = stream(stores[0], **keywords), stream(stores[1], batch_size=50, seed=1, **keywords)
    return mix([one, other], weights=weights, stop=stop, seed=seed)


def told(batch: Batch) -> list[int]:
    rows: list[int] = batch.index.tolist()
    return rows


def flat(lists: list[list[int]]) -> list[int]:
    return [row for rows in lists for row in rows]


async def taken(source: Any, count: int) -> list[list[int]]:
    passing = aiter(source)
    return [told(await anext(passing)) for _ in range(count)]


async def whole(source: Any) -> list[list[int]]:
    return [told(batch) async for batch in source]


def test_it_is_a_stream(stores: list[Path]) -> None:
    assert isinstance(mixed(stores), Stream)


async def test_each_source_comes_in_its_own_order(stores: list[Path]) -> None:
    alone = await whole(stream(stores[0])), await whole(stream(stores[1], batch_size=50, seed=1))
    got = await whole(mixed(stores, stop="all"))
    firsts = [rows for rows in got if len(rows) != 50]
    assert firsts[:31] == alone[0]
    assert [rows for rows in got if len(rows) == 50][:8] == alone[1]


async def test_the_same_draws_at_any_memory_threads_and_prefetch(stores: list[Path]) -> None:
    expected = await whole(mixed(stores, stop="all"))
    assert await whole(mixed(stores, stop="all", prefetch=1, threads=1)) == expected
    assert await whole(mixed(stores, stop="all", memory="128KiB")) == expected
    assert await whole(mixed(stores, stop="all", memory=Budget("1MiB"))) == expected
    assert ours() == []


@pytest.mark.parametrize("stop", ["first", "all", 5, 50])
async def test_len_is_what_comes_in_every_epoch(stores: list[Path], stop: Any) -> None:
    source = mixed(stores, stop=stop)
    await source.open()
    for epoch in range(2):
        assert source.epoch == epoch
        assert len(await whole(source)) == len(source)
    await source.aclose()


async def test_first_ends_with_a_source_and_all_sees_every_sample(stores: list[Path]) -> None:
    first, every = await whole(mixed(stores)), await whole(mixed(stores, stop="all"))
    assert every[: len(first)] == first
    small_rows = [row for rows in every if len(rows) == 50 for row in rows]
    assert set(small_rows) == set(range(400))
    assert {row for rows in every if len(rows) != 50 for row in rows} == set(range(1000))


async def test_what_starts_over_within_an_epoch_comes_in_another_order(stores: list[Path]) -> None:
    source = mixed(stores, stop="all", weights=(1, 3))
    rounds = [rows for rows in await whole(source) if len(rows) == 50]
    assert source.statistics().restarts[1] >= 1
    assert sorted(flat(rounds[:8])) == sorted(flat(rounds[8:16]))
    assert rounds[:8] != rounds[8:16]


async def test_an_epoch_of_a_number_of_batches_is_followed_by_what_comes_next(stores: list[Path]) -> None:
    source = mixed(stores, stop=7)
    parts = [await whole(source) for _ in range(4)]
    assert [rows for part in parts for rows in part] == await whole(mixed(stores, stop=28))
    source.set_epoch(0)
    assert await whole(source) == parts[0]


def test_what_is_no_position_of_a_mix_is_refused_by_its_key(stores: list[Path]) -> None:
    source = mixed(stores)
    state = source.state_dict()
    for wrong, said in (({"epoch": 2**70}, "'epoch' is"), ({"position": "3"}, "'position' is '3'"), ({"k": 1}, "'k'")):
        with pytest.raises(DataError, match=f"no position of a mix: .*{said}"):
            source.load_state_dict({**state, **wrong})
    foreign: Any
    for foreign in ([state], {**state, "of": 3}):
        with pytest.raises(DataError, match="no position of a mix"):
            source.load_state_dict(foreign)
    source.load_state_dict(state)


@pytest.mark.parametrize("stop", ["first", "all", 50])
async def test_a_mix_that_is_closed_under_who_waits_for_it_ends_quietly(stores: list[Path], stop: Any) -> None:
    source = mixed(stores, stop=stop, prefetch=1)
    passing = aiter(source)
    await anext(passing)
    for each in source.sources:
        await each.pause()
    rest = asyncio.create_task(whole(passing))
    await asyncio.sleep(0)  # until it has what is ready, and waits for more, which does not come
    assert not rest.done()
    before = source.statistics().drawn
    await source.aclose()
    got = await rest
    assert source.statistics().drawn == before
    assert len(got) == sum(before) - 1 < len(source)
    assert ours() == []


async def test_what_arrives_after_a_mix_was_closed_is_not_given(stores: list[Path]) -> None:
    """A source of somebody else's goes on until it has its item."""
    asked, answer = asyncio.Event(), asyncio.Event()

    class Slow:
        def __aiter__(self) -> Slow:
            return self

        async def __anext__(self) -> tuple[Any, Any]:
            if asked.is_set():
                await answer.wait()
            asked.set()
            return np.zeros(1), np.zeros(1)

    async def lengths() -> list[int]:
        return [len(batch) async for batch in source]

    source = mix([Slow()], stop=5)
    rest = asyncio.create_task(lengths())
    await asked.wait()
    closing = asyncio.create_task(source.aclose())
    await asyncio.sleep(0)
    answer.set()
    await closing
    assert await rest == [1]
    assert source.state_dict()["position"] == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_a_resume_in_any_place_is_exact(stores: list[Path], data: st.DataObject) -> None:
    stop = data.draw(st.sampled_from(["first", "all", 6]))
    source = mixed(stores, stop=stop)
    epochs = [await whole(source) for _ in range(3)]
    await source.aclose()
    epoch = data.draw(st.integers(0, 2))
    at = data.draw(st.integers(0, len(epochs[epoch])))
    first = mixed(stores, stop=stop)
    await first.open()
    for _ in range(epoch):
        await whole(first)
    assert await taken(first, at) == epochs[epoch][:at]
    text = json.dumps(first.state_dict())
    assert len(text) <= 1024
    await first.aclose()
    second = mixed(stores, stop=stop, prefetch=2)
    await second.open()
    second.load_state_dict(json.loads(text))
    assert await whole(second) == epochs[epoch][at:]
    if epoch < 2:
        assert await whole(second) == epochs[epoch + 1]
    await second.aclose()


async def test_weights_set_for_later_are_part_of_the_position(stores: list[Path]) -> None:
    source = mixed(stores, stop=20, weights=(1, 1))
    await taken(source, 5)
    with pytest.raises(ConfigError, match="5 are drawn already"):
        source.set_weights(4, [1, 0])
    source.set_weights(10, [0, 1])
    state = json.loads(json.dumps(source.state_dict()))
    await source.aclose()
    other = mixed(stores, stop=20, weights=(1, 1))
    await other.open()
    other.load_state_dict(state)
    rest = await whole(other)
    assert [len(rows) for rows in rest[5:]] == [50] * 10
    await other.aclose()


async def test_a_function_of_the_step_goes_on_over_epochs_of_a_number(stores: list[Path]) -> None:
    source = mixed(stores, stop=4, weights=lambda i: [1, 0] if i < 6 else [0, 1])
    assert [len(rows) == 50 for _ in range(3) for rows in await whole(source)] == [False] * 6 + [True] * 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 then, 4 now"),
        ({"weights": (1, 1)}, "weights"),
        ({"stop": "all"}, "stop: first then, all now"),
        ({"shuffle": False}, "source 0 of the mix differs"),
    ],
    ids=str,
)
async def test_a_position_of_another_mix_is_refused_by_its_difference(
    stores: list[Path], change: dict[str, Any], named: str
) -> None:
    source, other = mixed(stores), mixed(stores, **change)
    await source.open()
    await other.open()
    with pytest.raises(DataError, match=named):
        other.load_state_dict(source.state_dict())
    with pytest.raises(DataError, match="none in a mix"):
        other.load_state_dict(source.sources[0].state_dict())


async def test_while_driven_only_trained_batches_count(stores: list[Path]) -> None:
    expected = await whole(mixed(stores, stop=12))
    source = mixed(stores, stop=12)
    source.follow(True)
    async for batch in source:
        if batch.cursor.position <= 5:
            source.trained(batch.cursor)
    state = source.state_dict()
    assert (state["epoch"], state["position"]) == (0, 5)
    await source.aclose()
    other = mixed(stores, stop=12)
    await other.open()
    other.load_state_dict(state)
    assert await whole(other) == expected[5:]


class Numbers:
    """A source that can start over."""

    def __init__(self, count: int, value: float) -> None:
        self.count, self.value = count, value

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            yield np.full((2, 1), self.value + number)


class Later(Numbers):
    """The same, asynchronous."""

    __iter__ = None  # type: ignore[assignment]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for number in range(self.count):
            yield np.full((2, 1), self.value + number)


async def values(source: Any) -> list[float]:
    return [float(batch.inputs[0, 0]) async for batch in source]


@pytest.mark.parametrize("kinds", [(Numbers, Numbers), (Later, Later), (Numbers, Later)])
async def test_foreign_sources_are_mixed_and_resumed(kinds: Any) -> None:
    def made() -> Any:
        return mix([kind(5, 10 * number) for number, kind in enumerate(kinds)], stop=9)

    source = made()
    epochs = [await values(source) for _ in range(3)]
    assert {value for epoch in epochs for value in epoch} == {0, 1, 2, 3, 4, 10, 11, 12, 13, 14}
    again = made()
    await values(again)
    passing = aiter(again)
    for _ in range(4):
        await anext(passing)
    state = json.loads(json.dumps(again.state_dict()))
    await again.aclose()
    other = made()
    other.load_state_dict(state)
    assert await values(other) == epochs[1][4:]
    assert await values(other) == epochs[2]
    await source.aclose()
    await other.aclose()
    assert ours() == []


async def test_endless_generators_go_on_from_epoch_to_epoch() -> None:
    def endless(sign: int) -> Iterator[Any]:
        number = 0
        while True:
            number += 1
            yield np.full((2, 1), sign * number)

    source = mix([endless(1), endless(-1)], stop=10)
    seen = [value for _ in range(3) for value in await values(source)]
    for sign in (1, -1):
        mine = [abs(value) for value in seen if value * sign > 0]
        assert mine == list(range(1, len(mine) + 1))
    await source.aclose()


async def test_a_source_that_gives_nothing_is_named() -> None:
    with pytest.raises(DataError, match="source 1 of the mix gave no batch"):
        await values(mix([Numbers(3, 0), Numbers(0, 0)], stop=10))


async def test_a_source_that_fails_fails_the_mix(stores: list[Path]) -> None:
    source = mix([stream(stores[0], shuffle=False, transform=small.fails_at_99), stream(stores[1])])
    _, error = await until_failure(source)
    assert isinstance(error, UserCodeError)
    assert ours() == []


@pytest.mark.parametrize(
    ("sources", "keywords", "message"),
    [
        ([], {}, "takes a list"),
        ("ab", {}, "takes a list"),
        ([[1], [2]], {"stop": 0}, "stop must be"),
        ([[1], [2]], {"stop": "last"}, "stop must be"),
        ([[1], [2]], {"weights": [1]}, "1 weights for 2 sources"),
        ([3], {}, "iterable"),
    ],
)
def test_arguments_are_checked_when_given(sources: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mix(sources, **keywords)


def test_one_source_can_not_be_two() -> None:
    with pytest.raises(ConfigError, match="one stream twice"):
        mix([source := [1], source])


async def test_memory_and_threads_are_given_back(stores: list[Path]) -> None:
    budget = Budget("2MiB")
    source = mixed(stores, memory=budget, stop="all")
    passing = aiter(source)
    await anext(passing)
    await source.aclose()
    assert budget.statistics().used == 0
    assert ours() == []


async def test_it_is_trained_validated_and_resumed(stores: list[Path], tmp_path: Path) -> None:
    def trainer(folder: str) -> Trainer:
        model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
        nn.init.constant_(model[0].weight, 0.1)  # type: ignore[arg-type]
        nn.init.constant_(model[0].bias, 0.1)  # type: ignore[arg-type]
        return Trainer(
            model,
            loss=lambda out, y: ((out - y * 1e-4) ** 2).mean(),
            optimizer="sgd",
            lr=1e-9,
            seed=0,
            run_dir=tmp_path / folder,
            accumulate_grad_batches=2,
        )

    def parts() -> dict[str, Any]:
        return {"validation": mixed(stores, stop="all", shuffle=False)}

    straight = trainer("straight")
    result = await straight.fit(mixed(stores, stop=15), max_epochs=2, **parts())
    assert (result.step, result.epoch) == (16, 2)
    cut = await trainer("cut").fit(mixed(stores, stop=15), max_steps=5, max_epochs=2, **parts())
    assert cut.step == 5
    again = trainer("cut")
    await again.fit(mixed(stores, stop=15), max_epochs=2, resume="auto", **parts())
    for one, other in zip(straight.model.parameters(), again.model.parameters(), strict=True):
        assert one.tolist() == other.tolist()
    assert ours() == []


def test_cursors_count_draws() -> None:
    passing = aiter(mix([Numbers(3, 0), Numbers(3, 9)], stop=2))
    assert passing.next_nowait().cursor == Cursor(0, 1)  # type: ignore[union-attr]


async def test_it_opens_and_closes_itself(stores: list[Path]) -> None:
    async with mixed(stores, stop=3) as source:
        assert len(source) == 3
        await anext(aiter(source))
        assert ours() != []
    assert ours() == []
