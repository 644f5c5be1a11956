"""What passes for loaders promise: the same batches wherever their loop turns, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from streamtrain.data.batch import Batch
from streamtrain.data.budget import BudgetHeld
from streamtrain.data.handing import FEW, Beside, Here, run_of
from streamtrain.data.iterable import from_iterable
from streamtrain.data.mix import mix
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError, UserCodeError
from tests.data import small
from tests.data.small import ours


async def untouched(batch: Batch) -> Batch:
    return batch


WAYS: dict[str, tuple[type, dict[str, Any]]] = {"here": (Here, {}), "beside": (Beside, {"transform": untouched})}
ways = pytest.mark.parametrize("way", sorted(WAYS))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = small.write(tmp_path_factory.mktemp("stores") / "data.zarr")
    return path


def stream(store: Path, way: str = "here", **keywords: Any) -> ZarrStream:
    return small.stream(store, output="numpy", **WAYS[way][1], **keywords)


def rows(loader: Any) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


@ways
def test_the_loop_turns_where_it_must(way: str, store: Path) -> None:
    run = run_of(stream(store, way))
    assert type(run) is WAYS[way][0]
    run.close()


def test_what_gets_on_only_in_a_loop_has_one_beside(store: Path) -> None:
    class Later:
        async def __aiter__(self) -> Any:
            yield 1

    plain, later, sooner = stream(store), from_iterable(Later()), from_iterable([1])
    assert [source.needs_loop for source in (plain, later, sooner)] == [False, True, False]
    assert not mix([plain, stream(store, seed=1)]).needs_loop
    assert mix([plain, later]).needs_loop
    assert mix([plain, sooner]).needs_loop


@ways
def test_batches_and_positions_are_those_of_async_for(way: str, store: Path) -> None:
    async def passing(source: ZarrStream) -> list[tuple[list[int], dict[str, Any]]]:
        return [(batch.index.tolist(), source.state_dict()) async for batch in source]

    source, other = stream(store, way), stream(store, way)
    loader = other.as_loader()
    for _ in range(2):
        assert [(batch.index.tolist(), loader.state_dict()) for batch in loader] == asyncio.run(passing(source))
        assert loader.state_dict() == source.state_dict()
    assert ours() == []


@ways
@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 31])
def test_what_was_left_in_the_middle_goes_on_there(way: str, count: int, store: Path) -> None:
    whole = rows(stream(store, way).as_loader())
    loader, got = stream(store, way).as_loader(), []
    for batch in loader:
        got.append(batch.index.tolist())
        if len(got) == count:
            break
    other = stream(store, way).as_loader()
    other.load_state_dict(loader.state_dict())
    assert got + rows(other) == whole
    assert ours() == []


def test_a_loop_of_the_callers_own_thread_has_no_thread(store: Path) -> None:
    for number, _ in enumerate(stream(store, threads=2).as_loader()):
        if number == 3:
            assert sorted(ours()) == ["streamtrain-data-0", "streamtrain-data-1"]


@ways
def test_it_is_said_who_holds_the_memory(way: str, store: Path) -> None:
    kept: list[Batch] = []
    with pytest.raises(BudgetHeld, match="you hold batches"):
        kept.extend(stream(store, way, memory="64KiB").as_loader())
    assert len(kept) > 1
    assert ours() == []


def test_it_can_be_closed_by_another_thread_while_it_waits(store: Path) -> None:
    entered, gate = threading.Event(), threading.Event()

    def stuck(batch: Batch) -> Batch:
        entered.set()
        gate.wait(60)
        return batch

    got: list[Any] = []
    loader = small.stream(store, output="numpy", transform=stuck).as_loader()
    thread = threading.Thread(target=lambda: got.extend(loader))
    thread.start()
    assert entered.wait(60)
    loader.close()
    gate.set()
    thread.join(60)
    assert (got, thread.is_alive(), ours()) == ([], False, [])


def test_it_can_be_closed_by_a_task_of_another_loop(store: Path) -> None:
    loader = stream(store).as_loader()
    passing = iter(loader)
    next(passing)

    async def close() -> None:
        loader.close()

    asyncio.run(close())
    assert list(passing) == []
    assert ours() == []


def test_an_iteration_that_goes_on_within_a_loop_is_told_to_begin_there(store: Path) -> None:
    loader = stream(store).as_loader()
    passing = iter(loader)
    next(passing)

    async def rest() -> None:
        list(passing)

    with pytest.raises(ConfigError, match="began outside of an event loop, and can't go on within one"):
        asyncio.run(rest())
    assert ours() == []
    assert sum(map(len, loader)) == 1000  # the stream is free again


class Unclean:
    """An asynchronous source that fails when it is ended before its time."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    async def __aiter__(self) -> Any:
        try:
            for item in self.items:
                yield item
        finally:
            raise OSError("no clean end")


def test_a_source_that_fails_at_its_end_too_is_an_error_and_no_wait() -> None:
    loader = from_iterable(Unclean([1], "no batch", [2])).as_loader()
    passing = iter(loader)
    assert next(passing).inputs == 1
    with pytest.raises(DataError, match="is a str, not a batch") as told:
        next(passing)
    assert told.value.__notes__ == ["then the end of the pass raised UserCodeError: " + UNCLEAN]
    assert ours() == []


def test_a_source_that_fails_when_it_is_left_says_so_and_leaves_no_thread() -> None:
    loader = from_iterable(Unclean(*[[1]] * 9)).as_loader()
    for _ in range(2):  # the stream is free again
        passing = iter(loader)
        assert next(passing).inputs == 1
        with pytest.raises(UserCodeError, match=UNCLEAN):
            loader.close()
        assert ours() == []


UNCLEAN = "the data source Unclean raised OSError: no clean end"
WITHIN = """
import asyncio, sys
from streamtrain import ZarrStream
async def main():
    loader = ZarrStream(sys.argv[1], inputs="x", batch_size=10, output="numpy").as_loader()
    print(*(sum(len(batch) for batch in loader) for _ in range(2)))
asyncio.run(main())
"""
WAITING = """
import os, signal, sys, threading
from streamtrain import ZarrStream
signal.signal(signal.SIGINT, signal.default_int_handler)
def transform(batch):
    os.write(1, b"waiting\\n")
    os.read(0, 1)
    return batch
try:
    list(ZarrStream(sys.argv[1], inputs="x", batch_size=10, output="numpy", transform=transform, threads=1).as_loader())
except KeyboardInterrupt:
    print([thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain")], flush=True)
"""


def test_within_a_running_loop_as_in_a_notebook_it_works_too(store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHIN, str(store)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1000 1000\n", "")


def test_ctrl_c_while_it_waits_for_a_batch_ends_it(store: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WAITING, str(store)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate("\n" * 100, timeout=60)
    assert (child.returncode, out.splitlines()[-1], err) == (0, "[]", "")
