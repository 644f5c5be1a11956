"""One budget in bytes: memory is granted before it is taken, and what cannot be granted is said with its size."""

from __future__ import annotations

import re
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil

from streamtrain.data.container import OWN, ROOT, memory_limits
from streamtrain.errors import ConfigError, UserCodeError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
UNITS = "the units are B, KB, MB, GB, TB (of 1000), K, M, G, T, KiB, MiB, GiB and TiB (of 1024)"


class BudgetHeld(UserCodeError):
    """The caller keeps so many batches alive that the next one can't be granted."""


def parse_bytes(size: str | int, name: str = "memory") -> int:
    """Bytes in a size such as 268435456, "256MiB", "1.5GB".

    Raises ConfigError if it is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    elif isinstance(size, str) and (match := re.fullmatch(r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([a-zA-Z]*)\s*", size)):
        unit = match[2].lower()
        if unit not in _UNITS:
            raise ConfigError(
                f"{name}={size!r}: unknown unit {match[2]!r}", hint=f"write it like 256MiB or 2GB; {UNITS}"
            )
        value = int(Fraction(match[1]) * _UNITS[unit])
    else:
        raise ConfigError(f"{name} must be a size in bytes, got {size!r}", hint=f"write it like 256MiB or 2GB; {UNITS}")
    if value < 0:
        raise ConfigError(f"{name} must not be negative, got {size!r}")
    return value


def format_bytes(size: float) -> str:
    """A size as a person reads it: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_enough(size: int) -> str:
    """The same rounded up: what is read of it is no less than the size."""
    power = 0
    while size >= 1024 ** (power + 1) and power < 4:
        power += 1
    tenths = -(-10 * size // 1024**power)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{-(-tenths // 10)} {unit}" if not power or tenths > 1000 else f"{tenths // 10}.{tenths % 10} {unit}"


def available_memory(root: Path = ROOT, own: Path = OWN) -> int:
    """Bytes this process may use: the tightest limit of its cgroups and those above, where it is below the host's RAM.

    `root` and `own` are what `memory_limits` takes.
    """
    return min([psutil.virtual_memory().total, *memory_limits(root, own)])


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """How a budget stands."""

    total: int
    """Bytes in all."""
    used: int
    """Bytes granted now. Near `total` with a waiting consumer: memory is the bottleneck, or batches are kept."""
    peak: int
    """Most bytes that were ever granted together; never above `total`."""


class Budget:
    """`memory=Budget("1GiB")`: grants bytes, also to several streams that share it. Thread-safe, never blocks."""

    def __init__(self, total: str | int) -> None:
        self.total = parse_bytes(total)
        self._lock = threading.Lock()
        self._used = self._peak = 0
        self._returned: deque[int] = deque()
        self._shares: weakref.WeakSet[Share] = weakref.WeakSet()
        self.cache: Callable[[], object] | None = None
        """Gives what its streams keep together, as long as that lives."""

    def join(self) -> Share:
        """An account of one stream's bytes; the budget is divided by their number."""
        share = Share(self)
        with self._lock:
            self._shares.add(share)
        return share

    def shares(self) -> list[Share]:
        """The accounts of all streams that live."""
        with self._lock:
            return list(self._shares)

    def try_acquire(self, size: int, share: Share | None = None) -> bool:
        """Grant `size` bytes, or say no and change nothing. `share`: for whom, if for a stream: what is promised to the
        others is kept for them."""
        with self._lock:
            self._collect()
            if self._used + size + self._promised(size, share) > self.total:
                return False
            self._used += size
            self._peak = max(self._peak, self._used)
            return True

    def _promised(self, size: int, share: Share | None) -> int:
        """Bytes that other streams have still to get; none of them matters to one that asks for its own."""
        if share is None:
            return 0
        dividing = [each for each in self._shares if each.active]
        part = self.total // max(1, len(dividing))
        if share.active and share.used + size <= min(share.promise(part), part):
            return 0
        return sum(max(0, each.promise(part) - each.used) for each in dividing if each is not share)

    def kept_from(self, share: Share) -> int:
        """Bytes that this stream could not have, though nobody has them now."""
        with self._lock:
            return self._promised(self.total, share)

    def release(self, size: int) -> None:
        """Give `size` granted bytes back."""
        with self._lock:
            assert size <= self._used
            self._used -= size

    def release_from_finalizer(self, size: int) -> None:
        """The same without a lock, for finalizers, which may run while this very thread holds it."""
        self._returned.append(size)

    @property
    def free(self) -> int:
        """Bytes that could be granted now."""
        with self._lock:
            self._collect()
            return self.total - self._used

    def _collect(self) -> None:
        while self._returned:
            self._used -= self._returned.popleft()

    def statistics(self) -> BudgetStatistics:
        """How the budget stands now."""
        with self._lock:
            self._collect()
            return BudgetStatistics(self.total, self._used, self._peak)


class Share:
    """One stream's account in a budget: grants as the budget does, after asking all for what lies idle."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.lend: list[Callable[[], None]] = []
        """Each gives idle bytes back, from any thread; asked where another stream needs them."""
        self.lend_kept: Callable[[], None] | None = None
        """The same for what is kept only to save work; asked by this stream too, and last."""
        self.active = True
        """Whether its stream counts among those that divide the budget: it is not closed."""
        self.least: int | None = None
        """Bytes with which its stream gets on; None while nobody knows, and an equal part is kept for it."""
        self.keeps = False
        """Whether it is no stream's, but what streams keep together: it stays as long as they do."""
        self._lock = threading.Lock()
        self._used = 0
        self._returned: deque[int] = deque()

    @property
    def total(self) -> int:
        """Bytes to plan with: an equal part for each stream that is not closed."""
        return self.budget.total // (1 + sum(share.active for share in self.budget.shares() if share is not self))

    def promise(self, part: int) -> int:
        """Bytes that are kept for it, so that no stream that stands still keeps it from getting on.

        `part`: an equal part of the budget.
        """
        return part if self.least is None else min(self.least, part)

    @property
    def free(self) -> int:
        """Bytes that the budget could grant to it now."""
        return max(0, self.budget.free - self.budget.kept_from(self))

    @property
    def used(self) -> int:
        """Bytes granted to this stream."""
        with self._lock:
            while self._returned:
                self._used -= self._returned.popleft()
            return self._used

    @property
    def others_hold(self) -> bool:
        """Whether another stream has bytes that may come back, or a part in those that are kept together."""
        others = [share for share in self.budget.shares() if share is not self]
        several = any(share.active for share in others)
        return any(share.used and (several or not share.keeps) for share in others)

    def try_acquire(self, size: int) -> bool:
        """Grant `size` bytes, or say no and change nothing."""
        granted = self.budget.try_acquire(size, self)
        if not granted and size <= self.budget.total:
            for share in self.budget.shares():
                for lend in list(share.lend):  # its own, too: what lies idle may be what the next pass begins with
                    lend()
            granted = self.budget.try_acquire(size, self)
            for share in self.budget.shares() if not granted else ():
                if share.lend_kept is not None:
                    share.lend_kept()
            granted = granted or self.budget.try_acquire(size, self)
        if granted:
            with self._lock:
                self._used += size
        return granted

    def release(self, size: int) -> None:
        """Give `size` granted bytes back."""
        with self._lock:
            self._used -= size
        self.budget.release(size)

    def release_from_finalizer(self, size: int) -> None:
        """The same without a lock."""
        self._returned.append(size)
        self.budget.release_from_finalizer(size)
