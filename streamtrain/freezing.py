"""Parameters that are not trained, or not yet; its law: what is frozen is a function of the epoch and the step.

So a resumed run needs no state of it. A frozen parameter requires no gradient; one that never will is left out of the
optimizer, one that will has its place there from the start, and its state from its first update. Layers with running
statistics (BatchNorm) whose parameters are all frozen are in evaluation mode meanwhile, as is usual in fine-tuning:
else their statistics would go on moving. Dropout goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from streamtrain.errors import ConfigError
from streamtrain.schedulers import parse_span

FreezeSpec = str | Sequence[str] | Mapping[str, str] | None
"""A regex, several, or a table of them and of when each is unfrozen: "2epochs", "500steps" or "never"."""


@dataclass(frozen=True)
class Rule:
    """Parameters that are frozen together."""

    pattern: re.Pattern[str]
    until: int | None = None
    """Epochs or steps after which they are trained; None: they never are."""
    unit: str = "epoch"

    def frozen(self, step: int, epoch: int) -> bool:
        """Whether they are frozen after `step` updates, in `epoch` (from 0)."""
        return self.until is None or (epoch if self.unit == "epoch" else step) < self.until


def parse_freeze(spec: FreezeSpec) -> tuple[Rule, ...]:
    """The rules that `freeze=` describes. Raises ConfigError."""
    if spec is None:
        return ()
    if isinstance(spec, str):
        spec = [spec]
    if not isinstance(spec, Mapping | Sequence):
        raise ConfigError(f"freeze must be a regex, a list of them, or a table of them, not {spec!r}", hint=LIKE)
    table: Mapping[Any, Any] = spec if isinstance(spec, Mapping) else dict.fromkeys(spec, "never")
    return tuple(_rule(regex, until) for regex, until in table.items())


LIKE = "For instance freeze=['^backbone'], or {'^backbone': '2epochs'}."


def _rule(regex: Any, until: Any) -> Rule:
    try:
        pattern = re.compile(regex)
    except (re.error, TypeError) as error:
        raise ConfigError(f"freeze: {regex!r} is no regular expression: {error}", hint=LIKE) from error
    if until == "never":
        return Rule(pattern)
    amount, unit = parse_span(until, f"freeze: {regex!r}") if isinstance(until, str) else (0.0, "")
    if unit not in ("epoch", "step"):
        raise ConfigError(f"freeze: {regex!r} must be '2epochs', '500steps' or 'never', not {until!r}", hint=LIKE)
    return Rule(pattern, int(amount), unit)


@dataclass
class Freezing:
    """The rules of one model; a parameter follows the first whose regex is found in its name (one of them, if tied)."""

    model: nn.Module
    rules: tuple[Rule, ...]
    _members: dict[Rule, list[nn.Parameter]] = field(default_factory=dict)
    _norms: dict[Rule, list[nn.Module]] = field(default_factory=dict)
    _now: list[bool] = field(default_factory=list)
    """Which of the rules froze last."""
    _anew: bool = True

    def __post_init__(self) -> None:
        """Freeze what never thaws, so that the optimizer leaves it out. Raises ConfigError for a rule of nothing."""
        homes: dict[int, Rule] = {}
        for rule in self.rules:
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                if id(parameter) not in homes and rule.pattern.search(name):
                    homes[id(parameter)] = rule
                    self._members.setdefault(rule, []).append(parameter)
        for name, layer in self.model.named_modules():
            if isinstance(layer, _NormBase) and layer.track_running_stats:
                own = {homes.get(id(p)) for p in layer.parameters(recurse=False)} or {self._of(f"{name}.running_mean")}
                if None not in own:
                    last = max((rule for rule in own if rule is not None), key=self.rules.index)
                    self._norms.setdefault(last, []).append(layer)
        for rule in self.rules:
            if rule not in self._members:
                names = ", ".join(name for name, _ in list(self.model.named_parameters())[:8])
                raise ConfigError(f"freeze: {rule.pattern.pattern!r} names no parameter", hint=f"Names: {names}.")
            for parameter in self._members[rule]:
                parameter.requires_grad_(rule.until is not None)

    def _of(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.pattern.search(name)), None)

    def check(self, optimizer: Optimizer) -> None:
        """Raise ConfigError if what thaws is not in the optimizer, or if nothing is trained at the start."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for rule in self.rules:
            if rule.until is not None and not all(id(parameter) in held for parameter in self._members[rule]):
                raise ConfigError(
                    f"freeze: {rule.pattern.pattern!r} is to be trained later, but the optimizer does not hold it",
                    hint="Give the optimizer by name or as a callable, or all parameters to it.",
                )
        frozen = {id(p) for rule in self.rules if rule.frozen(0, 0) for p in self._members[rule]}
        if held <= frozen:
            raise ConfigError("freeze leaves nothing to train", hint="Leave some of its rules out.")

    def governed(self) -> list[nn.Parameter | nn.Module]:
        """All that the rules name, and the layers whose mode follows from them."""
        named: list[nn.Parameter | nn.Module] = [one for members in self._members.values() for one in members]
        return named + [layer for layers in self._norms.values() for layer in layers]

    def for_good(self) -> Iterator[nn.Parameter]:
        """What never thaws."""
        return (parameter for rule in self.rules if rule.until is None for parameter in self._members[rule])

    def steps(self) -> Iterator[int]:
        """Numbers of updates at which something thaws."""
        return (rule.until for rule in self.rules if rule.until is not None and rule.unit == "step")

    def begin(self) -> None:
        """A fit begins: somebody may have changed modes and gradients meanwhile."""
        self._anew = True

    def apply(self, step: int, epoch: int) -> None:
        """Freeze what is frozen after `step` updates, in `epoch`; on the train thread, while the model trains."""
        now = [rule.frozen(step, epoch) for rule in self.rules]
        if now == self._now and not self._anew:
            return
        before = self._now or [False] * len(now)
        for rule, frozen, was in zip(self.rules, now, before, strict=True):
            for parameter in self._members[rule]:
                parameter.requires_grad_(not frozen)
            if frozen or was:  # else its mode is the user's own
                for layer in self._norms.get(rule, ()):
                    layer.train(not frozen)
        self._now, self._anew = now, False
