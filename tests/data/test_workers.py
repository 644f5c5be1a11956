"""What the workers promise: jobs in order, threads that end when told, and nothing kept alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest

from streamtrain.data.reading import Scratch
from streamtrain.data.workers import Workers, default_threads


class Gate:
    """A job that holds its thread until the gate is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, scratch: Scratch) -> None:
        self.entered.set()
        self.open.wait(30)


def noting(seen: list[int], number: int, done: threading.Event | None = None) -> Callable[[Scratch], None]:
    def job(scratch: Scratch) -> None:
        seen.append(number)
        if done is not None:
            done.set()

    return job


def end(workers: Workers) -> None:
    workers.stop()
    workers.join(30)
    assert not workers.alive


def test_one_thread_takes_jobs_in_order_and_those_for_the_front_first() -> None:
    workers, gate, seen, done = Workers(1, "streamtrain-test"), Gate(), list[int](), threading.Event()
    workers.submit(gate)
    gate.entered.wait(30)
    for number in range(5):
        workers.submit(noting(seen, number, done if number == 4 else None))
    workers.submit(noting(seen, 99), front=True)
    gate.open.set()
    done.wait(30)
    assert seen == [99, 0, 1, 2, 3, 4]
    end(workers)


def test_jobs_run_side_by_side_each_with_a_scratch_of_its_own() -> None:
    workers, together, scratches = Workers(3, "streamtrain-test"), threading.Barrier(4), list[Scratch]()

    def job(scratch: Scratch) -> None:
        scratches.append(scratch)
        together.wait(30)

    for _ in range(3):
        workers.submit(job)
    together.wait(30)
    assert len({id(scratch) for scratch in scratches}) == 3
    end(workers)


def test_stopping_ends_after_the_job_in_hand_and_drops_the_rest() -> None:
    workers, gate, seen = Workers(1, "streamtrain-test"), Gate(), list[int]()
    workers.submit(gate)
    gate.entered.wait(30)
    workers.submit(noting(seen, 1))
    workers.stop()
    workers.submit(noting(seen, 2))
    assert workers.alive
    gate.open.set()
    workers.join(30)
    assert not workers.alive
    assert seen == []


def test_idle_workers_stop_at_once_and_twice_is_once() -> None:
    workers = Workers(4, "streamtrain-test")
    workers.stop()
    end(workers)


def test_threads_carry_the_name_of_their_pass() -> None:
    workers = Workers(2, "streamtrain-test")
    assert {t.name for t in threading.enumerate()} >= {"streamtrain-test-0", "streamtrain-test-1"}
    end(workers)


def test_an_idle_worker_keeps_nothing_of_its_last_job_alive() -> None:
    class Thing:
        pass

    workers, thing, gone = Workers(1, "streamtrain-test"), Thing(), threading.Event()
    weakref.finalize(thing, gone.set)
    workers.submit(lambda scratch, thing=thing: None)  # type: ignore[misc]
    del thing
    assert gone.wait(30)
    end(workers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_index_error_in_a_job_is_not_taken_for_an_empty_queue() -> None:
    """A job reports its own failures; one that does not is a bug that must be heard of."""
    heard, before = threading.Event(), threading.excepthook
    threading.excepthook = lambda given: heard.set()
    try:
        workers = Workers(1, "streamtrain-test")
        workers.submit(lambda scratch: [][0])
        assert heard.wait(30)
        end(workers)
    finally:
        threading.excepthook = before


def test_there_is_a_thread_a_core_up_to_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in [(1, 1), (2, 2), (8, 8), (64, 8)]:
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_threads() == threads
