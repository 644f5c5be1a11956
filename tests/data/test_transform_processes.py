"""What processes that transform promise: the same batches as threads, one clear error, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import Budget
from streamtrain.data.transform_processes import TransformProcess, pickled
from streamtrain.errors import ConfigError, EnvironmentProblem, UserCodeError
from tests.data import small
from tests.data.small import ours, stream, until_failure
from tests.data.test_transforming import batches, same


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = small.write(tmp_path_factory.mktemp("stores") / "data.zarr")
    return path


def named_memory() -> set[str]:
    """Names in shared memory as Python gives them, and ours might: others come and go beside this test."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "pym-", "streamtrain"))}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No process, no shared memory with a name, no file descriptor."""
    gc.collect()  # memory maps of stores that other tests have read
    shared, open_files, children = named_memory(), psutil.Process().num_fds(), set(psutil.Process().children())
    yield
    gc.collect()
    assert named_memory() <= shared
    assert set(psutil.Process().children()) <= children
    assert psutil.Process().num_fds() <= open_files
    assert ours() == []


@pytest.mark.parametrize("transform", [small.in_place, small.noisy, small.thinned, small.grown])
@pytest.mark.parametrize("memory", ["128KiB", "8MiB"])
async def test_processes_give_the_bits_of_threads(store: Path, transform: Any, memory: str) -> None:
    expected = await batches(store, transform=transform)
    budget = Budget(memory)
    got = await batches(store, transform=transform, transform_workers="process:2", memory=budget)
    assert [batch.cursor for batch in got] == [batch.cursor for batch in expected]
    for one, other in zip(got, expected, strict=True):
        assert same([one.inputs, one.targets, one.index], [other.inputs, other.targets, other.index])
    assert budget.statistics().used == 0
    assert budget.statistics().peak <= budget.total


async def test_several_processes_share_the_work_and_none_is_this_one(store: Path) -> None:
    got = await batches(store, transform=small.told_its_process, transform_workers="process:2", prefetch=4)
    numbers = {int(number) for batch in got for number in batch.targets}
    assert 1 <= len(numbers) <= 2
    assert os.getpid() not in numbers


@pytest.mark.parametrize(
    ("transform", "kind", "message"),
    [
        (small.fails_at_99, UserCodeError, r"transform raised ValueError: no .*samples 66\.\.\.98"),
        (small.leaves_at_99, UserCodeError, r"ended with exit code 3 on samples 66\.\.\.98"),
        (small.killed_at_99, EnvironmentProblem, r"was killed by SIGKILL on samples 66\.\.\.98"),
    ],
    ids=["raises", "leaves", "killed"],
)
async def test_what_ends_a_process_is_one_error_after_the_good_batches(
    store: Path, transform: Any, kind: type[Exception], message: str
) -> None:
    source = stream(store, shuffle=False, transform=transform, transform_workers="process:2")
    positions, error = await until_failure(source)
    assert positions == [33, 66]
    assert isinstance(error, kind)
    with pytest.raises(kind, match=message):
        raise error


async def test_the_traceback_comes_along(store: Path) -> None:
    source = stream(store, shuffle=False, transform=small.fails_at_99, transform_workers="process:1")
    _, error = await until_failure(source)
    assert 'raise ValueError("no")' in str(error.__cause__)


async def test_a_transform_that_hangs_does_not_keep_its_pass_from_ending(store: Path) -> None:
    source = stream(store, shuffle=False, transform=small.hangs_at_99, transform_workers="process:1")
    passing = aiter(source)
    await anext(passing)
    await anext(passing)
    await source.aclose()
    await asyncio.sleep(0)  # what its thread had to say is let go of
    assert source.budget.statistics().used == 0


async def test_a_pass_that_is_let_go_ends_its_processes(store: Path) -> None:
    before = len(psutil.Process().children())
    source = stream(store, transform=small.in_place, transform_workers="process:1")
    passing = aiter(source)
    await anext(passing)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]
    assert len(psutil.Process().children()) > before
    del passing, source
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)


@pytest.mark.parametrize("transform", [lambda batch: batch, type("Local", (), {"__call__": None})()])
def test_what_can_not_be_sent_is_refused_when_given(store: Path, transform: Any) -> None:
    with pytest.raises(ConfigError, match="this transform can't be sent to a process"):
        stream(store, transform=transform, transform_workers="process:2")


def test_an_async_transform_is_not_for_processes(store: Path) -> None:
    with pytest.raises(ConfigError, match="an async transform runs on the loop"):
        stream(store, transform=small.awaited_in_place, transform_workers="process:2")


def test_what_can_not_be_loaded_there_is_said() -> None:
    payload = pickled(small.in_place).replace(b"tests.data.small", b"tests.data.smile")
    with pytest.raises(UserCodeError, match="can't be loaded in a process: ModuleNotFoundError"):
        TransformProcess(payload, 0, Budget("1MiB").join(), 4096, lambda: False)


SCRIPT = """
import asyncio, sys
from streamtrain import ZarrStream

def doubled(batch):
    return batch.inputs * 2, batch.targets

async def main():
    stream = ZarrStream(sys.argv[1], inputs="x", targets="y", batch_size=100, transform=doubled,
                        transform_workers="process:2", output="numpy")
    print(sum([float(batch.inputs.sum()) async for batch in stream]))
    await stream.aclose()

"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_needs_its_guard_and_is_told_so(store: Path, tmp_path: Path, guarded: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + ('if __name__ == "__main__":\n    ' if guarded else "") + "asyncio.run(main())\n")
    done = subprocess.run([sys.executable, script, store], capture_output=True, text=True, timeout=100, check=False)
    if guarded:
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(2 * float(small.X.sum()), rel=1e-3)
    else:
        assert done.returncode != 0
        assert 'has no `if __name__ == "__main__":`' in done.stderr
        assert "the transform can't be loaded in a process" in done.stderr


def test_a_killed_parent_leaves_no_process(store: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.replace("asyncio, sys", "asyncio, os, sys, threading").replace(
            "    return batch",
            # in one piece, since both processes print
            '    sys.stdout.write(f"{os.getpid()}\\n")\n    sys.stdout.flush()\n'
            "    threading.Event().wait()\n    return batch",
        )
        + 'if __name__ == "__main__":\n    asyncio.run(main())\n'
    )
    with subprocess.Popen([sys.executable, script, store], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        parent.kill()
        child = psutil.Process(int(line))
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_batches_that_are_kept_by_a_transform_stay_as_they_were(store: Path) -> None:
    """In a process too each batch has memory of its own."""
    process = TransformProcess(pickled(Keeps()), 0, Budget("1MiB").join(), 4096, lambda: False)
    try:
        for number in range(3):
            made = process.transform(Batch(small.X[number : number + 2].copy(), index=small.Y[:2], cursor=Cursor(0, 2)))
            assert made.targets.tolist() == small.X[:1].tolist()
    finally:
        process.close()


class Keeps:
    """Gives as targets the first row that it ever saw."""

    def __init__(self) -> None:
        self.first: Any = None

    def __call__(self, batch: Batch) -> Any:
        self.first = batch.inputs if self.first is None else self.first
        return batch.inputs[:1], self.first[:1]
