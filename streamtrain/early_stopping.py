"""When to give up: a rule of patience that is a pure function of the values so far, and a callback that wires it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamtrain.callbacks.base import Callback
from streamtrain.errors import ConfigError
from streamtrain.events import EpochEnd, ValidationEnd, Verdict
from streamtrain.metrics import direction, no_such_monitor
from streamtrain.options import count, finite, flag, monitored

logger = logging.getLogger(__name__)


class Patience:
    """Counts the values since the best one; a value that is not finite is no improvement.

    With a `baseline` only a best that is better than it, by more than `min_delta`, begins the count anew, as in Keras'
    EarlyStopping: a run that does not get there is given up however steadily it improves.
    """

    def __init__(
        self, patience: int, *, min_delta: float = 0.0, mode: str = "min", baseline: float | None = None
    ) -> None:
        self.patience, self.min_delta, self.mode, self.baseline = patience, min_delta, mode, baseline
        self.best: float | None = None
        self.since = 0
        """Values since the best one (of those that are better than the baseline)."""

    @property
    def exhausted(self) -> bool:
        """Whether `patience` values in a row were no improvement."""
        return self.since >= max(1, self.patience)

    @property
    def half_way(self) -> bool:
        """Whether half of the patience, rounded down, is used up."""
        return self.since >= max(1, self.patience // 2)

    def offer(self, value: float) -> bool:
        """Take in the next value; whether it is the best so far, by more than `min_delta`."""
        better = math.isfinite(value) and self._beats(value, self.best)
        if better:
            self.best = value
        self.since = 0 if better and self._beats(value, self.baseline) else self.since + 1
        return better

    def _beats(self, value: float, other: float | None) -> bool:
        sign = 1.0 if self.mode == "min" else -1.0
        return other is None or sign * (other - value) > self.min_delta

    def told(self) -> str:
        """Why patience is at its end, in words."""
        if self.baseline is not None and not (self.best is not None and self._beats(self.best, self.baseline)):
            reached = "nothing" if self.best is None else f"{self.best:.6g}"
            return f"has reached {reached}, not the baseline {self.baseline:.6g}, in {self.since}"
        return f"has not improved on {'nothing' if self.best is None else f'{self.best:.6g}'} for {self.since}"

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
    improvement. `mode`: min, max, or auto by the name. `baseline`: a value to get beyond; patience runs until that is
    done. These three are for all monitors, or dicts by monitor. `restore_best`: at the end the weights of the best
    value (of the first monitor) are loaded into the model, from its checkpoint, which stays that long; several best are
    kept by `ModelCheckpoint(save_top_k=...)`. `reduce_lr`: once half of the patience is used up, the learning rate is
    multiplied by this; only if that does not help either the fit ends. `condition`: a function of the metrics that ends
    the fit when it is true. `combine`: whether all monitors, or any of them, must have run out of patience (or of half
    of it). A value that is not finite is never an improvement.

    A run that has ended so does not go on by resuming it, unless a larger patience (or another rule) lets it.
    """

    decides = True

    def __init__(
        self,
        monitor: str | Sequence[str] | None = None,
        *,
        patience: int = 3,
        min_delta: float | Mapping[str, float] = 0.0,
        mode: str | Mapping[str, str] = "auto",
        baseline: float | Mapping[str, float] | None = None,
        restore_best: bool = True,
        reduce_lr: float | None = None,
        condition: Callable[[Mapping[str, float]], bool] | None = None,
        combine: str = "all",
    ) -> None:
        names = monitor if isinstance(monitor, list | tuple) else ["val_loss" if monitor is None else monitor]
        self.monitors = tuple(monitored(name, "EarlyStopping: monitor") for name in names or ["val_loss"])
        """The names that must be logged."""
        self.state_key = ", ".join(self.monitors)
        count(patience, "EarlyStopping: patience", least=0)
        deltas, modes = self._each(min_delta, "min_delta", 0.0), self._each(mode, "mode", "auto")
        if baseline is not None and not isinstance(baseline, Mapping) and len(self.monitors) > 1:
            raise ConfigError(
                f"EarlyStopping: baseline={baseline!r} for several monitors",
                hint='Give a dict of them: baseline={"val_loss": 0.5}.',
            )
        baselines = self._each(baseline, "baseline", None)
        if reduce_lr is not None and not 0 < finite(reduce_lr, "EarlyStopping: reduce_lr") < 1:
            raise ConfigError(f"EarlyStopping: reduce_lr must be a factor between 0 and 1, not {reduce_lr!r}")
        if reduce_lr is not None and patience < 2:
            raise ConfigError(
                f"EarlyStopping: reduce_lr needs a patience of at least 2, not {patience}",
                hint="The rate is lowered when half of it is used up, and the fit ended when all of it is.",
            )
        if condition is not None and not callable(condition):
            raise ConfigError(f"EarlyStopping: condition must be a function of the metrics, not {condition!r}")
        if combine not in ("all", "any"):
            raise ConfigError(f"EarlyStopping: combine must be 'all' or 'any', not {combine!r}")
        self.rules = {
            name: Patience(
                patience,
                min_delta=finite(deltas[name], "EarlyStopping: min_delta"),
                mode=direction(name, modes[name]),
                baseline=None if baselines[name] is None else _number(baselines[name]),
            )
            for name in self.monitors
        }
        self._met = False
        """The condition was."""
        self.restore_best = flag(restore_best, "EarlyStopping: restore_best")
        self.reduce_lr, self.condition = reduce_lr, condition
        self._combine = all if combine == "all" else any
        self._at_validations = any(name.startswith("val_") for name in self.monitors)

    async def on_validation_end(self, event: ValidationEnd) -> Verdict | None:
        """Asked after each validation; after the sanity check only whether the names are right."""
        if not self._at_validations:
            return None
        if event.sanity:
            self._values(event.metrics, [name for name in self.monitors if name.startswith("val_")], known=["loss"])
            return None
        return self.judge(event.metrics)

    async def on_epoch_end(self, event: EpochEnd) -> Verdict | None:
        """Asked at the end of each epoch; only for monitors of the training itself."""
        return None if self._at_validations else self.judge(event.metrics)

    def judge(self, metrics: Mapping[str, float]) -> Verdict | None:
        """The verdict on these metrics. Raises ConfigError if a monitor is not among them."""
        values = self._values(metrics, self.monitors)
        was_half_way = self._half_way
        improved = {name: self.rules[name].offer(value) for name, value in values.items()}
        first = self.monitors[0]
        stop, detail = self._stops(metrics)
        reduce = self.reduce_lr is not None and not stop and self._half_way and not was_half_way
        if reduce:
            waits = "; ".join(f"{name} {rule.told()}" for name, rule in self.rules.items() if rule.half_way)
            logger.info("the learning rate is multiplied by %g: %s %s", self.reduce_lr, waits, self._unit)
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
    def directions(self) -> dict[str, str]:
        """Of each monitor, whether less (`"min"`) or more (`"max"`) is better."""
        return {name: rule.mode for name, rule in self.rules.items()}

    @property
    def gives_up(self) -> bool:
        """Whether it has ended the fit, by the patience that it has now."""
        return self._met or self._combine(rule.exhausted for rule in self.rules.values())

    @property
    def _unit(self) -> str:
        return "validations" if self._at_validations else "epochs"

    @property
    def _half_way(self) -> bool:
        return self._combine(rule.half_way for rule in self.rules.values())

    def _each(self, given: Any, name: str, default: Any) -> dict[str, Any]:
        """An option by monitor: the same for all, or what a dict says."""
        if not isinstance(given, Mapping):
            return dict.fromkeys(self.monitors, given)
        for monitor in given:
            if monitor not in self.monitors:
                raise no_such_monitor(f"EarlyStopping: {name}", str(monitor), self.monitors)
        return {monitor: given.get(monitor, default) for monitor in self.monitors}

    def _values(
        self, metrics: Mapping[str, float], names: Sequence[str], known: Sequence[str] = ()
    ) -> dict[str, float]:
        for name in names:
            if name not in metrics:
                raise no_such_monitor("EarlyStopping", name, {*metrics, *known})
        return {name: float(metrics[name]) for name in names}

    def _stops(self, metrics: Mapping[str, float]) -> tuple[bool, str]:
        self._met = self.condition is not None and bool(self.condition(metrics))
        if self._met:
            return True, "the condition is met"
        if not self._combine(rule.exhausted for rule in self.rules.values()):
            return False, ""
        told = [f"{name} {rule.told()}" for name, rule in self.rules.items() if rule.exhausted]
        return True, f"{'; '.join(told)} {self._unit}"

    def state_dict(self) -> dict[str, Any]:
        """The state of each monitor's rule, and whether the condition was met."""
        return {"rules": {name: rule.state_dict() for name, rule in self.rules.items()}, "met": self._met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; monitors that were not watched before start anew."""
        for name, rule in self.rules.items():
            if name in state["rules"]:
                rule.load_state_dict(state["rules"][name])
        self._met = bool(state["met"]) and self.condition is not None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"EarlyStopping: baseline must be a finite number, not {value!r}")
    return float(value)
