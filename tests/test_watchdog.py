"""What is under way is asked for without stopping it: it may be over while it is being told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from streamtrain.callbacks.bus import Bus
from streamtrain.fitting import busy


class Ending:
    """A train thread whose job ends as soon as it was asked for."""

    def __init__(self) -> None:
        self.asked: list[float | None] = [1.0, None]

    @property
    def since(self) -> float | None:
        return self.asked.pop(0)


def test_a_job_that_ends_while_it_is_told_was_one_that_had_begun() -> None:
    ending: Any = Ending()
    idle: Any = SimpleNamespace(waiting=None)
    assert [each.since for each in busy(ending, Bus(()), None, idle)] == [1.0]
