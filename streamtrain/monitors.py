"""Which names a fit will log, as far as that is known before it begins; its law: what can't be known is not refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from streamtrain.metrics import no_such_monitor


def validation_names(streams: Iterable[str], logged: Collection[str]) -> list[str]:
    """What a validation on these streams logs; the stream "" is the only one, and has no name of its own.

    `logged`: the losses and metrics of each.
    """
    prefixes = [f"val_{stream}_" if stream else "val_" for stream in streams]
    return [prefix + name for prefix in prefixes for name in logged]


def check_monitors(
    who: str, monitors: Iterable[str], *, training: Collection[str] | None, validation: Collection[str] | None
) -> None:
    """Raise ConfigError for a monitor that nothing will log.

    `training`, `validation`: what is logged there; None where a function of the user's may log anything.
    """
    for monitor in monitors:
        known = validation if monitor.startswith("val_") else training
        if known is not None and monitor not in known:
            raise no_such_monitor(who, monitor, [*(training or ()), *(validation or ())])
