"""When to give up: a rule of patience that is a pure function of the values so far, and a callback that wires it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamtrain.callbacks.base import Callback
from streamtrain.errors import ConfigError
from streamtrain.events import EpochEnd, ValidationEnd, Verdict
from streamtrain.metrics import direction, no_such_monitor
from streamtrain.options import count, finite, flag, monitored


class Patience:
    """Counts the values since the best one; a value that is not finite is no improvement."""

    def __init__(self, patience: int, *, min_delta: float = 0.0, mode: str = "min") -> None:
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.best: float | None = None
        self.since = 0
        """Values since the best one."""

    @property
    def exhausted(self) -> bool:
        """Whether `patience` values in a row were no improvement."""
        return self.since >= max(1, self.patience)

    def offer(self, value: float) -> bool:
        """Take in the next value; whether it is the best so far, by more than `min_delta`."""
        sign = 1.0 if self.mode == "min" else -1.0
        if math.isfinite(value) and (self.best is None or sign * (self.best - value) > self.min_delta):
            self.best, self.since = value, 0
            return True
        self.since += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """`{"best", "since"}`."""
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.best = None if state["best"] is None else float(state["best"])
        self.since = int(state["since"])


class EarlyStopping(Callback):
    """Ends a fit once a monitored metric has not improved for `patience` validations in a row.

    `monitor`: a name or a list of names, `val_loss` by default; names that begin with `val_` are looked at after
    validations, others (`loss`) at the ends of epochs, where patience counts epochs. `min_delta`: what counts as an
    improvement. `mode`: min, max, or auto by the name. `restore_best`: at the end the weights of the best value (of the
    first monitor) are loaded into the model. `reduce_lr`: each time half of the patience is used up without an
    improvement, the learning rate is multiplied by this. `condition`: a function of the metrics that ends the fit when
    it is true. `combine`: whether all monitors, or any of them, must have run out of patience.
    """

    decides = True

    def __init__(
        self,
        monitor: str | Sequence[str] | None = None,
        *,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: str = "auto",
        restore_best: bool = True,
        reduce_lr: float | None = None,
        condition: Callable[[Mapping[str, float]], bool] | None = None,
        combine: str = "all",
    ) -> None:
        names = monitor if isinstance(monitor, list | tuple) else ["val_loss" if monitor is None else monitor]
        self.monitors = tuple(monitored(name, "EarlyStopping: monitor") for name in names or ["val_loss"])
        """The names that must be logged."""
        count(patience, "EarlyStopping: patience", least=0)
        min_delta = finite(min_delta, "EarlyStopping: min_delta")
        if reduce_lr is not None and not 0 < finite(reduce_lr, "EarlyStopping: reduce_lr") < 1:
            raise ConfigError(f"EarlyStopping: reduce_lr must be a factor between 0 and 1, not {reduce_lr!r}")
        if condition is not None and not callable(condition):
            raise ConfigError(f"EarlyStopping: condition must be a function of the metrics, not {condition!r}")
        if combine not in ("all", "any"):
            raise ConfigError(f"EarlyStopping: combine must be 'all' or 'any', not {combine!r}")
        self.rules = {
            name: Patience(patience, min_delta=min_delta, mode=direction(name, mode)) for name in self.monitors
        }
        self.restore_best = flag(restore_best, "EarlyStopping: restore_best")
        self.reduce_lr, self.condition = reduce_lr, condition
        self._combine = all if combine == "all" else any
        self._at_validations = any(name.startswith("val_") for name in self.monitors)

    async def on_validation_end(self, event: ValidationEnd) -> Verdict | None:
        """Asked after each validation; after the sanity check only whether the names are right."""
        if not self._at_validations:
            return None
        if event.sanity:
            self._values({"loss": 0.0, **event.metrics})
            return None
        return self.judge(event.metrics)

    async def on_epoch_end(self, event: EpochEnd) -> Verdict | None:
        """Asked at the end of each epoch; only for monitors of the training itself."""
        return None if self._at_validations else self.judge(event.metrics)

    def judge(self, metrics: Mapping[str, float]) -> Verdict | None:
        """The verdict on these metrics. Raises ConfigError if a monitor is not among them."""
        values = self._values(metrics)
        improved = {name: self.rules[name].offer(value) for name, value in values.items()}
        first = self.monitors[0]
        stop, detail = self._stops(metrics)
        rule = self.rules[first]
        reduce = self.reduce_lr is not None and not stop and rule.since and rule.since % self._half == 0
        return Verdict(
            stop=stop,
            detail=detail,
            save="best" if self.restore_best and improved[first] else "",
            monitor=first,
            value=values[first],
            restore=self.restore_best,
            lr_factor=self.reduce_lr if reduce else None,
        )

    @property
    def _half(self) -> int:
        return max(1, self.rules[self.monitors[0]].patience // 2)

    def _values(self, metrics: Mapping[str, float]) -> dict[str, float]:
        for name in self.monitors:
            if name not in metrics:
                raise no_such_monitor("EarlyStopping", name, metrics)
        return {name: float(metrics[name]) for name in self.monitors}

    def _stops(self, metrics: Mapping[str, float]) -> tuple[bool, str]:
        if self.condition is not None and self.condition(metrics):
            return True, "the condition is met"
        if not self._combine(rule.exhausted for rule in self.rules.values()):
            return False, ""
        told = [
            f"{name} has not improved on {'nothing' if rule.best is None else f'{rule.best:.6g}'} for {rule.since}"
            for name, rule in self.rules.items()
            if rule.exhausted
        ]
        unit = "validations" if self._at_validations else "epochs"
        return True, f"{'; '.join(told)} {unit}"

    def state_dict(self) -> dict[str, Any]:
        """The state of each monitor's rule."""
        return {name: rule.state_dict() for name, rule in self.rules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; monitors that were not watched before start anew."""
        for name, rule in self.rules.items():
            if name in state:
                rule.load_state_dict(state[name])
