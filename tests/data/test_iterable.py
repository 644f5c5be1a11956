"""What from_iterable promises: items become batches, positions are numbers of items, going back costs what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.iterable import IterableStream, from_iterable
from streamtrain.data.source import Stream
from streamtrain.errors import ConfigError, DataError, UserCodeError

ROWS = np.arange(6.0).reshape(3, 2)


class Again:
    """An asynchronous source that can start over."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items()

    async def _items(self) -> AsyncIterator[Any]:
        for number in range(self.count):
            yield np.full((2, 1), number)


class Stateful:
    """A source with a position of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.at, self.made = count, 0, 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.at = self.at, 0
        for number in range(begin, self.count):
            self.made += 1
            self.at = number + 1
            yield np.full((2, 1), number)
        self.at = 0

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Growing(Stateful):
    """One whose items are others in each epoch, which its position tells."""

    epoch = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield item + 10 * self.epoch
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]


class GrowingAsync(Growing):
    """The same for `async for`."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in Growing.__iter__(self):
            yield item


class LiveAsync(GrowingAsync):
    """The same, whose state is the very dict that it goes on with."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)


class StandsAtItsEnd(Growing):
    """One that tells the end of an epoch, behind its last item, as its position until it is iterated again."""

    begin = 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.begin = self.begin, 0
        for number in range(begin, self.count):
            self.at = number + 1
            yield np.full((2, 1), number)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = self.begin = state["at"]


async def numbers(stream: IterableStream) -> list[int]:
    """The rest of a pass, as the numbers in it."""
    return [int(batch.inputs[0, 0]) async for batch in stream]


async def after(stream: IterableStream, count: int) -> None:
    """Take so many batches of a new pass."""
    batches = aiter(stream)
    for _ in range(count):
        await anext(batches)


def count(source: Any, size: int) -> Any:
    return [np.full((2, 1), number) for number in range(size)] if source is list else source(size)


@pytest.mark.parametrize(
    ("item", "inputs", "targets"),
    [
        ((ROWS, ROWS[:, 0]), ROWS, ROWS[:, 0]),
        ([ROWS, ROWS[:, 0]], ROWS, ROWS[:, 0]),
        ((ROWS,), ROWS, None),
        ({"a": ROWS}, {"a": ROWS}, None),
        (Batch(ROWS, ROWS[:, 1]), ROWS, ROWS[:, 1]),
        (ROWS, ROWS, None),
    ],
)
async def test_items_become_batches(item: Any, inputs: Any, targets: Any) -> None:
    [batch] = [batch async for batch in from_iterable([item])]
    np.testing.assert_equal(batch.inputs, inputs)
    np.testing.assert_equal(batch.targets, targets)
    assert (batch.cursor, len(batch)) == (Cursor(0, 1), 3)


@pytest.mark.parametrize("item", ["text", (1, 2, 3), None, 7])
async def test_what_is_no_batch_is_named(item: Any) -> None:
    stream = from_iterable([(ROWS, ROWS), item])
    with pytest.raises(DataError, match="item 1 of the iterable is a"):
        await after(stream, 2)


@pytest.mark.parametrize("source", [7, "text", {"a": 1}, None])
def test_what_is_no_series_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError):
        from_iterable(source)


def test_it_is_a_stream() -> None:
    assert isinstance(from_iterable([]), Stream)


@pytest.mark.parametrize("source", [list, Again, Stateful])
async def test_epochs_follow_each_other(source: Any) -> None:
    stream = from_iterable(count(source, 3))
    assert await numbers(stream) == [0, 1, 2]
    assert stream.epoch == 1
    assert await numbers(stream) == [0, 1, 2]
    stream.set_epoch(0)
    assert stream.state_dict()["epoch"] == 0


@pytest.mark.parametrize("source", [list, Again, Stateful])
async def test_a_loaded_position_is_gone_on_from(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = from_iterable(count(source, 5)), from_iterable(count(source, 5))
    await after(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second.state_dict()["position"] == 2
    assert await numbers(second) == [2, 3, 4]
    assert await numbers(second) == [0, 1, 2, 3, 4]
    if source is Stateful:
        assert second.source.made == 8
        assert second.statistics().discarded == 0
    else:
        assert "2 batches are produced again and discarded" in caplog.text
        assert second.statistics().discarded == 2


async def test_while_driven_only_trained_batches_count() -> None:
    stream = from_iterable(Stateful(5))
    stream.follow(True)
    batches = aiter(stream)
    first = await anext(batches)
    stream.trained(first.cursor)
    await anext(batches)
    await anext(batches)
    state = stream.state_dict()
    assert (state["position"], state["source_position"], state["source"]) == (1, 1, {"at": 1})
    again = from_iterable(Stateful(5))
    again.load_state_dict(state)
    assert await numbers(again) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [Growing, GrowingAsync, LiveAsync])
@pytest.mark.parametrize("trained", [0, 1, 2, 5])
async def test_a_source_whose_epochs_differ_goes_on_in_the_right_one(kind: type[Growing], trained: int) -> None:
    """It was read ahead of what was trained, and stood in the epoch of a new one at a resume."""
    stream = from_iterable(kind(5))
    stream.follow(True)
    for batch in [batch async for batch in stream]:
        stream.trained(batch.cursor)
    stream.set_epoch(1)
    for number, batch in enumerate([batch async for batch in stream]):
        if number < trained:
            stream.trained(batch.cursor)
    state = json.loads(json.dumps(stream.state_dict()))
    again = from_iterable(kind(5))
    again.load_state_dict(state)
    assert await numbers(again) == [10, 11, 12, 13, 14][trained:]
    assert await numbers(again) == [20, 21, 22, 23, 24]


async def test_a_source_goes_on_behind_an_epoch_whose_end_alone_is_owed() -> None:
    stream = from_iterable(Growing(3))
    stream.follow(True)
    for batch in [batch async for batch in stream]:
        stream.trained(batch.cursor)
    again = from_iterable(Growing(3))
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    again.set_epoch(1)
    assert again.state_dict()["source"] == {"at": 0, "epoch": 1}
    assert await numbers(again) == [10, 11, 12]


@pytest.mark.parametrize("given", [1, 3])
async def test_a_source_that_stands_at_its_end_begins_the_next_epoch(given: int) -> None:
    """That was an empty epoch, and an error."""
    stream = from_iterable(StandsAtItsEnd(3))
    await (numbers(stream) if given == 3 else after(stream, given))
    again = from_iterable(StandsAtItsEnd(3))
    again.load_state_dict(stream.state_dict())
    assert await numbers(again) == [0, 1, 2][given % 3 :]
    assert await numbers(again) == [0, 1, 2]


async def test_a_new_pass_starts_the_epoch_over_and_ends_the_old_one() -> None:
    stream = from_iterable([ROWS, ROWS, ROWS])
    old = aiter(stream)
    await anext(old)
    assert len([batch async for batch in stream]) == 3
    with pytest.raises(StopAsyncIteration):
        await anext(old)


async def test_an_iterator_serves_one_epoch() -> None:
    stream = from_iterable(iter([ROWS]))
    assert stream.one_epoch
    await after(stream, 1)
    with pytest.raises(ConfigError, match="serves one epoch"):
        aiter(stream)


async def test_an_async_generator_is_closed_with_its_pass() -> None:
    closed = []

    async def items() -> AsyncIterator[Any]:
        try:
            while True:
                yield ROWS
        finally:
            closed.append(True)

    stream = from_iterable(items())
    await after(stream, 2)
    await stream.aclose()
    assert closed == [True]


async def test_a_batch_that_was_put_back_comes_first() -> None:
    for source in (iter([ROWS, 2 * ROWS]), aiter(Again(2))):
        stream = from_iterable(source)
        batches = aiter(stream)
        first = await anext(batches)
        stream.put_back(first)
        again = [batch.inputs async for batch in stream]
        np.testing.assert_equal(again[0], first.inputs)
        assert len(again) == 2


async def test_a_source_that_raises_is_named() -> None:
    def items() -> Iterator[Any]:
        yield ROWS
        raise OSError("the tape broke")

    with pytest.raises(UserCodeError, match="generator raised OSError: the tape broke") as caught:
        await after(from_iterable(items()), 2)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_state_that_json_can_not_hold_is_said_and_replaced_by_a_replay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Odd(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"at": object()}

    stream = from_iterable(Odd(4))
    await after(stream, 2)
    assert stream.state_dict()["source"] is None
    assert "resuming replays" in caplog.text
    again = from_iterable(Odd(4))
    again.load_state_dict(stream.state_dict())
    assert await numbers(again) == [2, 3]


def test_a_position_of_another_stream_is_refused() -> None:
    with pytest.raises(DataError):
        from_iterable([]).load_state_dict({"epoch": 0, "position": 3, "of": {}})
    state = from_iterable([]).state_dict()
    for wrong in ({"epoch": 2**70}, {"position": -1}, {"seed": 0}):
        with pytest.raises(DataError, match=f"no position of an iterable: .*{next(iter(wrong))!r}"):
            from_iterable([]).load_state_dict({**state, **wrong})
    foreign: Any
    for foreign in ([state], {**state, "source_position": "3"}):
        with pytest.raises(DataError, match="no position of an iterable"):
            from_iterable([]).load_state_dict(foreign)


async def test_set_epoch_is_passed_on() -> None:
    class Sampler(Stateful):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    stream = from_iterable(Sampler(1))
    await numbers(stream)
    await numbers(stream)
    assert Sampler.epochs == [0, 1]


def test_the_length_is_the_sources() -> None:
    assert len(from_iterable(Stateful(4))) == 4
    with pytest.raises(TypeError):
        len(from_iterable(Again(4)))


async def test_a_data_loader_is_taken_as_it_is() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    stream = from_iterable(DataLoader(data, batch_size=4))
    assert (len(stream), stream.batch_size) == (3, 4)
    assert [batch.targets.tolist() for batch in stream.as_loader()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(batch) async for batch in stream] == [4, 4, 2]
    assert stream.epoch == 2


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_what_a_fit_did_not_train_is_given_again_after_it(kind: str) -> None:
    stream = from_iterable(count(list if kind == "sync" else Again, 5))
    stream.follow(True)
    batches = aiter(stream)
    stream.trained((await anext(batches)).cursor)
    await anext(batches)
    stream.follow(False)
    again = from_iterable(count(list, 5))
    again.load_state_dict(stream.state_dict())
    assert await numbers(again) == [1, 2, 3, 4]


@pytest.mark.parametrize("inputs", [1.0, None, np.float32(2), torch.tensor(3.0), {}, [], {"x": 1}], ids=str)
async def test_a_batch_without_rows_says_so_when_it_is_counted(inputs: Any) -> None:
    [batch] = [batch async for batch in from_iterable([(inputs, 2.0)])]
    with pytest.raises(DataError, match=r"a batch whose inputs are .* has no rows"):
        len(batch)
    assert len(list(batch)) == 2


async def test_it_opens_and_closes_itself() -> None:
    ended = []

    async def items() -> AsyncIterator[Any]:
        try:
            yield ROWS
            yield ROWS
        finally:
            ended.append(True)

    async with from_iterable(items()) as stream:
        await anext(aiter(stream))
        assert not ended
    assert ended


def test_what_gives_no_batches_is_refused_with_what_to_give() -> None:
    dataset = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ConfigError, match="a TensorDataset gives samples, not batches") as told:
        from_iterable(dataset)
    assert "DataLoader(dataset, batch_size=..., shuffle=True), or with batch_size=None" in told.value.hint
    with pytest.raises(ConfigError, match="a str is no series of batches") as told:
        from_iterable("era5.zarr")
    assert "ZarrStream(" in told.value.hint
    from_iterable(torch.utils.data.DataLoader(dataset, batch_size=2))
