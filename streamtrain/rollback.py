"""Back to weights of a while ago when a number is not finite: `nonfinite="rollback"`.

Every 100 updates the weights, the optimizer and the average are kept in memory. Where a loss or gradient is not finite
the run goes back to them and on with the next batch: those since then are passed over, as in the training of PaLM
(Chowdhery et al. 2022, section 5.1), where the same batches from other weights did no harm.

Its law: the position, the step number and the learning rate go forward alone; what is kept is part of every checkpoint,
so that a resumed run goes back to the same weights; and after 5 times in a run the error is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamtrain import state as trees
from streamtrain.averaging import Average
from streamtrain.errors import NonFiniteError, StreamtrainError
from streamtrain.optimizer_state import load_by_name, state_by_name
from streamtrain.state import Tree

logger = logging.getLogger(__name__)

EVERY = 100
"""Updates between two times of keeping."""
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum")
"""What schedules set of a group: it stays that of now."""
MOST = 5
"""Rollbacks in a run."""


class Rollback:
    """What can be gone back to."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, average: Average | None) -> None:
        self._model, self._optimizer, self._average = model, optimizer, average
        self._kept: dict[str, Tree] | None = None
        self._step = self._times = 0

    def due(self, step: int) -> bool:
        """Whether what there is after `step` updates is to be kept: every so often, and the first time."""
        return self._kept is None or (step % EVERY == 0 and step != self._step)

    def keep(self, step: int) -> None:
        """Keep what there is after `step` updates if that is due; on the train thread, once it is known that each of
        their numbers was finite."""
        if self.due(step):
            average = None if self._average is None else self._average.state_dict()
            live = {
                "model": dict(self._model.state_dict()),
                "optimizer": state_by_name(self._optimizer, self._model),
            }
            self._kept, self._step = trees.clone({**live, "average": average}), step

    def back(self, problem: StreamtrainError, step: int) -> None:
        """Go back, because of `problem` in update `step`. Raises NonFiniteError if that was done too often."""
        what = str(problem).partition("; the weights are")[0]
        assert self._kept is not None
        if self._times >= MOST:
            raise NonFiniteError(
                f"{what}; {MOST} rollbacks did not help, the last one to step {self._step}", hint=problem.hint
            ) from problem
        kept: Any = trees.clone(self._kept)  # torch takes tensors as they are, and goes on in them
        self._model.load_state_dict(kept["model"])
        rates = [{key: group[key] for key in SCHEDULED if key in group} for group in self._groups()]
        load_by_name(self._optimizer, self._model, kept["optimizer"])
        for group, now in zip(self._groups(), rates, strict=True):
            group.update(now)
        if self._average is not None:
            self._average.load_state_dict(kept["average"])
        self._times += 1
        logger.warning(
            "%s; back to the weights of step %d, the %d updates since then are given up (rollback %d of %d)",
            *(what, self._step, step - 1 - self._step, self._times, MOST),
        )

    def forget(self) -> None:
        """Other weights were put into the model: what was kept is none to go back to."""
        self._kept = None

    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def state_dict(self) -> dict[str, Tree]:
        """`{"kept", "step", "times"}`."""
        return {"kept": self._kept, "step": self._step, "times": self._times}

    def load_state_dict(self, state: Mapping[str, Tree] | None) -> None:
        """Take back what `state_dict` gave; None: nothing is kept yet."""
        self._kept = None if state is None else state["kept"]
        self._step, self._times = (0, 0) if state is None else (int(state["step"]), int(state["times"]))
