"""What holds in every test: nothing of ours blocks an event loop, and no thread of ours outlives the test."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Before torch is imported: OpenMP's threads that spin at barriers make tests three times slower on busy cores."""

settings.register_profile("quiet", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("quiet")
"""Examples are the same in each run, and may take as long as the machine needs; `--hypothesis-profile explore` draws
others, and more of them where a test does not say how many."""

JOINS = [
    ("streamtrain/callbacks/mailbox.py", {"join"}),
    ("streamtrain/callbacks/lines.py", {"close"}),
    ("streamtrain/data/handing.py", {"_end"}),
    ("streamtrain/data/zarr_lane.py", {"aclose"}),
    ("streamtrain/data/workers.py", {"joined"}),
    ("streamtrain/file_thread.py", {"_end"}),
    ("streamtrain/threads.py", {"_joined"}),
]
"""Where a thread is joined on the loop after it has said that it is done: microseconds."""
IMPORTS = [("<frozen importlib._bootstrap>", {"_find_and_load"}), ("linecache.py", {"updatecache"})]
"""Files that Python itself reads: modules on first use, sources for a traceback."""
PRIVATE = [("streamtrain/data/zarr_lane.py", {"_serve"})]
"""A loop of ours in a thread of its own, where zarr may block."""
TOOLS = [
    ("streamtrain/data/vouching.py", {"vouch", "write_manifest"}),
    ("streamtrain/data/verification.py", {"verify"}),
    *((f"data_tools/{name}.py", {name}) for name in ("convert", "rechunk", "reshuffle", "split", "synth")),
]
"""What looks at whole stores or writes them, for the command line: no stream calls it."""
HARMLESS = ("os.getcwd", "os.path.abspath")
"""System calls that touch no disk."""


def pytest_collection_finish() -> None:
    """What imports and collecting made stays: no later collection looks at it again, for which each took 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop() -> Iterator[None]:
    """A call of ours that could wait for a disk or a lock raises BlockingError where a loop runs."""
    guard = BlockBuster("streamtrain")
    for name in HARMLESS:
        del guard.functions[name]
    for function in guard.functions.values():
        function.can_block_functions += [*IMPORTS, *PRIVATE, *TOOLS, *(JOINS if "lock" in function.full_name else [])]
    guard.activate()
    yield
    guard.deactivate()


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """Threads named `streamtrain-*` end with the test that started them; those that a test let hang get a moment."""
    before = set(threading.enumerate())
    yield
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]
    started = [thread for thread in ours if thread not in before]
    for thread in started:
        thread.join(timeout=5)
    left = [thread.name for thread in started if thread.is_alive()]
    assert not left, f"threads left behind: {left}"
