"""What updates change: the model, its optimizer and what is kept beside them of its weights.

Its law: all of a snapshot is looked through before any of it is taken up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamtrain.averaging import Average
from streamtrain.differences import model_differences, rate_change, refuse
from streamtrain.errors import CheckpointError
from streamtrain.optimizer_state import load_by_name, loadable
from streamtrain.rollback import Rollback
from streamtrain.state import Snapshot
from streamtrain.switching import Switch


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What is learned, and kept beside it: the one way into a live model, for a life and outside of one."""

    model: nn.Module
    optimizer: Optimizer
    switch: Switch | None
    average: Average | None
    rollback: Rollback | None

    def check(self, snapshot: Snapshot, settings: Mapping[str, Any], path: Path) -> float:
        """Raise CheckpointError with a table of the differences if the snapshot is of another model or average, or
        has others of these settings, or an optimizer's state that is not this one's; by what the learning rate is
        another, which it may be, 1 for the same."""
        state = snapshot.state
        saved = {key: state["settings"].get(key, settings[key] if key == "loss" else None) for key in settings}
        rate, told = rate_change(saved, settings)
        told = [*model_differences(snapshot.model, self.model), *told]
        if self.average is not None and state["average"] is not None:
            told += self.average.differences(state["average"])
        kept = None if self.rollback is None or state["kept"] is None else self._kept(state["kept"], told)
        refuse(told, path)
        try:
            if self.switch is not None:
                self.switch.check(snapshot.optimizer["learning"])
            for optimizer in (self._saved(snapshot), kept):
                if optimizer is not None:
                    loadable(self.optimizer, self.model, optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {path} does not fit: {error}", hint=error.hint) from error
        return rate

    def _saved(self, snapshot: Snapshot) -> Any:
        return snapshot.optimizer if self.switch is None else snapshot.optimizer["optimizer"]

    def _kept(self, state: Mapping[str, Any], told: list[str]) -> Any:
        """What a rollback would give the optimizer, if there is anything to go back to; in what that is of another
        model or average is `told`."""
        for name in ("step", "times"):
            int(state[name])
        kept = state["kept"]
        if kept is None:
            return None
        told += model_differences(kept["model"], self.model)
        if self.average is not None and kept["average"] is not None:
            told += self.average.differences(kept["average"])
        return kept["optimizer"]

    def load(self, snapshot: Snapshot) -> None:
        """All as a snapshot that was checked has it; on the train thread. The optimizer is the first: its class may be
        the user's, and refuse what no check knows of."""
        load_by_name(self.optimizer, self.model, self._saved(snapshot))
        self.model.load_state_dict(snapshot.model)
        if self.switch is not None:
            self.switch.load_state_dict(snapshot.optimizer["learning"])
        if self.average is not None:
            self.average.load_state_dict(snapshot.state["average"])
        if self.rollback is not None:
            self.rollback.load_state_dict(snapshot.state["kept"])
