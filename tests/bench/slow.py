"""A callback that takes a second an event: how much slower each step is, and whether that is said.

A fit with it and one without make steps in short turns; the callback is plain, so that it sleeps in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.loops import near
from tests.bench.measure import Measure, Options
from tests.bench.turns import Way, take_turns

TURNS = 24


def run(options: Options) -> Iterator[Measure]:
    """The ratio of the steps' times; steps that the callback was not told of; times that it was said, a fit."""
    size = near(500e-6)
    slowed, plain = Way("slow", size), Way("fit", size)
    quick = options.quick
    with options.room() as room:
        take_turns(
            options,
            (slowed, plain),
            lead=40 if quick else 500,
            steps=100 if quick else 1000,
            turns=2 if quick else TURNS,
            folder=room,
        )
    yield Measure(name="a step with it over one without", values=slowed.over(plain), at_most=1.01)
    yield Measure(name="  its thread's processor time", values=slowed.over(plain, cpu=True), at_most=1.01)
    untold = tuple(one["untold"] for one in slowed.found)
    yield Measure(name="  steps that it was not told of", values=untold, at_most=0)
    said = tuple(one["said"] for one in slowed.found)
    yield Measure(name="  times that this was said, a fit", values=said, at_least=1, at_most=1)
