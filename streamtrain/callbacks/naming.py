"""What callbacks are called, in messages and in checkpoints; its law: a name tells who one is, not where it stands.

`Class`, or `Class['key']` of one that has a `state_key`; a number tells only those apart that nothing else does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence


def named(callbacks: Sequence[object]) -> list[str]:
    """A name for each, of which no two are the same."""
    kinds = [type(callback).__name__ for callback in callbacks]
    keys = [getattr(callback, "state_key", "") for callback in callbacks]
    # In quotes, a key is never the number of another.
    names = [f"{kind}[{str(key)!r}]" if key else kind for kind, key in zip(kinds, keys, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name}[{names[: i + 1].count(name) - 1}]" for i, name in enumerate(names)
    ]


def alike(callbacks: Mapping[str, object]) -> list[list[str]]:
    """The names, in groups, of those that only their order tells apart."""
    each = {name: named([callback])[0] for name, callback in callbacks.items()}
    groups = [[name for name, own in each.items() if own == shared] for shared in dict.fromkeys(each.values())]
    return [group for group in groups if len(group) > 1]


def matched(saved: Collection[str], callbacks: Mapping[str, object]) -> dict[str, str]:
    """Whose state each callback is given: the saved name by the name of now.

    The same name, or the only one of a class for the only one of it, whatever their keys: what it watches may be
    another now, and its own `load_state_dict` knows what that means. Nothing is guessed.
    """
    pairs = {name: name for name in callbacks if name in saved}
    theirs = Counter(_kind(name) for name in saved)
    ours = Counter(type(callback).__name__ for callback in callbacks.values())
    for name, callback in callbacks.items():
        kind = type(callback).__name__
        if theirs[kind] == ours[kind] == 1:
            pairs[name] = next(other for other in saved if _kind(other) == kind)
    return pairs


def unmatched(states: Mapping[str, object], callbacks: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """The saved names, of those that have a state, which are nobody's now: those of classes that are gone, and those
    of classes that are there."""
    taken = set(matched(states, callbacks).values())
    left = [name for name, state in states.items() if state and name not in taken]
    there = {type(callback).__name__ for callback in callbacks.values()}
    return [name for name in left if _kind(name) not in there], [name for name in left if _kind(name) in there]


def _kind(name: str) -> str:
    return name.partition("[")[0]
