"""What a loader promises: the batches of the stream, a position, and no thread left behind, whatever ends it."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamtrain import Budget, from_iterable, mix
from streamtrain.data.budget import BudgetHeld
from streamtrain.errors import ConfigError, UserCodeError
from tests import warm
from tests.data import small
from tests.data.small import ours, stream


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = small.write(tmp_path_factory.mktemp("stores") / "data.zarr")
    return path


def rows(loader: Any) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def taken(loader: Any, count: int) -> list[list[int]]:
    got = []
    for batch in loader:
        got.append(batch.index.tolist())
        if len(got) == count:
            break
    return got


def keep(loader: Any, kept: list[Any]) -> None:
    for batch in loader:
        kept.append(batch)  # noqa: PERF402 (what came before an error is to be kept)


async def test_it_gives_the_batches_of_the_stream_epoch_after_epoch(store: Path) -> None:
    source = stream(store)
    expected = [[batch.index.tolist() async for batch in source] for _ in range(2)]
    loader = stream(store).as_loader()
    assert [await _in_thread(loader) for _ in range(2)] == expected
    loader.set_epoch(0)
    assert await _in_thread(loader) == expected[0]
    assert ours() == []


async def _in_thread(loader: Any) -> list[list[int]]:
    """Loaders block: a loop must not wait for one."""
    import asyncio

    return await asyncio.to_thread(rows, loader)


def test_it_is_like_a_data_loader(store: Path) -> None:
    loader = stream(store, drop_last=True).as_loader()
    assert (len(loader), loader.batch_size, len(loader.dataset), loader.drop_last) == (30, 33, 1000, True)
    x, y = next(iter(loader))
    assert isinstance(x, torch.Tensor)
    assert len(x) == len(y) == 33
    loader.close()


def test_batches_are_made_into_what_is_wanted(store: Path) -> None:
    loader = stream(store).as_loader(lambda batch: {"x": batch.inputs, "labels": batch.targets})
    assert {frozenset(item) for item in loader} == {frozenset({"x", "labels"})}


@pytest.mark.parametrize("count", [1, 17, 30, 31])
def test_a_position_is_what_the_loop_was_given(store: Path, count: int) -> None:
    whole = rows(stream(store).as_loader())
    first, second = stream(store).as_loader(), stream(store).as_loader()
    assert taken(first, count) == whole[:count]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rows(second) == whole[count:]
    assert second.stream.epoch == 1


def test_after_its_end_the_position_is_the_next_epochs_begin(store: Path) -> None:
    loader = stream(store).as_loader()
    rows(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)


def test_what_is_left_in_the_middle_starts_over_and_leaves_no_thread(store: Path) -> None:
    loader = stream(store).as_loader()
    first = taken(loader, 3)
    assert ours() == []
    assert taken(loader, 3) == first
    assert ours() == []


def test_a_new_iteration_ends_the_old_one(store: Path) -> None:
    loader = stream(store).as_loader()
    old = iter(loader)
    next(old)
    assert len(rows(loader)) == 31
    assert list(old) == []
    assert ours() == []


def test_letting_go_ends_the_thread(store: Path) -> None:
    loader = stream(store).as_loader()
    passing = iter(loader)
    next(passing)
    assert ours()
    del passing, loader
    gc.collect()
    assert ours() == []


def test_an_error_comes_after_the_good_batches_and_leaves_no_thread(store: Path) -> None:
    loader = stream(store, shuffle=False, transform=small.fails_at_99).as_loader()
    got: list[Any] = []
    with pytest.raises(UserCodeError, match="transform raised ValueError"):
        keep(loader, got)
    assert [batch.cursor.position for batch in got] == [33, 66]
    assert ours() == []


def test_nobody_else_reads_meanwhile(store: Path) -> None:
    source = stream(store)
    passing = iter(source.as_loader())
    next(passing)
    with pytest.raises(ConfigError, match="reading this stream"):
        next(iter(source.as_loader()))
    passing.close()  # type: ignore[attr-defined]
    assert len(rows(source.as_loader())) == 31


def test_an_iteration_that_another_one_ended_does_not_pass_for_a_whole_epoch(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for loader in (stream(store).as_loader(), from_iterable([np.ones((2, 1))] * 40).as_loader()):
        outer = iter(loader)
        for _ in range(3):
            next(outer)
        assert len(list(loader)) in (31, 40)
        assert caplog.messages == []
        assert list(outer) == []
        assert [message for message in caplog.messages if "another one over this stream began" in message]
        caplog.clear()
    assert ours() == []


def test_an_iteration_ends_in_peace_where_the_loader_is_closed_or_goes_elsewhere(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = stream(store).as_loader()
    for leave in (loader.close, lambda: loader.set_epoch(7)):
        passing = iter(loader)
        next(passing)
        leave()
        assert list(passing) == []
    assert caplog.messages == []
    assert ours() == []


def test_it_goes_on_within_a_small_budget_and_says_who_holds_it(store: Path) -> None:
    budget = Budget("64KiB")
    assert len(rows(stream(store, memory=budget).as_loader())) == 31
    kept: list[Any] = []
    with pytest.raises(BudgetHeld, match="you hold batches"):
        keep(stream(store, memory="64KiB").as_loader(), kept)
    assert len(kept) > 3
    assert ours() == []


def test_mixes_have_loaders_too(store: Path) -> None:
    def mixed() -> Any:
        return mix([stream(store), stream(store, seed=1, batch_size=50)], stop=9).as_loader()

    loader = mixed()
    epochs = [rows(loader) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [9, 9]
    one, other = mixed(), mixed()
    rows(one)
    assert taken(one, 4) == epochs[1][:4]
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert rows(other) == epochs[1][4:]
    again = mixed()
    rows(again)
    other.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert rows(other) == epochs[1]


class Later:
    """An asynchronous source."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        for number in range(5):
            yield np.full((2, 1), number)


@pytest.mark.parametrize("source", [[np.full((2, 1), number) for number in range(5)], Later()])
def test_foreign_sources_have_loaders_too(source: Any) -> None:
    one, other = from_iterable(source).as_loader(), from_iterable(source).as_loader()
    for batch in one:
        if batch.inputs[0, 0] == 2:
            break
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [int(batch.inputs[0, 0]) for batch in other] == [3, 4]
    assert [int(batch.inputs[0, 0]) for batch in other] == [0, 1, 2, 3, 4]
    assert ours() == []


SCRIPT = """
import sys, threading
from streamtrain import ZarrStream
stream = ZarrStream(sys.argv[1], inputs="x", targets="y", batch_size=10)
try:
    for number, batch in enumerate(stream.as_loader()):
        if number == 3:
            print("going", flush=True)
            threading.Event().wait(60)
except KeyboardInterrupt:
    print([thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain")], flush=True)
"""
HELD = """
import sys
from streamtrain import ZarrStream
passing = iter(ZarrStream(sys.argv[1], inputs="x", targets="y", batch_size=10).as_loader())
print(len(next(passing)))
"""


def test_ctrl_c_ends_it_at_once(store: Path) -> None:
    child, said = warm.piped(["-c", SCRIPT, str(store)])
    with said:
        assert said.readline() == b"going\n"
        child.send_signal(signal.SIGINT)
        assert said.read() == b"[]\n"
    assert child.wait(60) == 0


def test_an_interpreter_that_ends_in_the_middle_ends(store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HELD, str(store)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
