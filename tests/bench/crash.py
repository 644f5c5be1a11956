"""What a power cut leaves: every image of the disk after a crash at each operation of a save, and what is found there.

A model of a file system (tests/disks.py) loses, keeps and tears whatever was not synced, in any combination. Each image
is then taken up as the next life does: swept, the newest checkpoint sought, read and held against what was saved; and
again for each image that a second power cut, in the middle of that sweep, may leave; and where first only the process
was killed. The same where an operation of the
save fails before: each of them once by EIO and ENOSPC, alone or with all that follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from streamtrain import ModelCheckpoint, Trainer, checkpoint
from streamtrain.disk import LOCAL, Disk
from streamtrain.errors import CheckpointError, EnvironmentProblem
from streamtrain.run_folder import RunFolder
from streamtrain.state import Snapshot
from tests.bench.measure import Measure, Options
from tests.disks import Image, MemoryDisk, RefusingDisk
from tests.engine import Samples, network

RUN = Path("/run")
CHECKPOINTS = RUN / "checkpoints"
BEYOND = 10
"""So many fits in a row that have no operation to fail any more end the search."""
Mark = int | None
"""What tells one snapshot from all others; None where there is none."""
Act = tuple[Callable[[Disk], object], Mark]
"""Something done to the disk, and the mark of the newest checkpoint once it is done."""


@dataclass(frozen=True)
class Scenario:
    """A save, or another thing that is done to checkpoints."""

    name: str
    before: Sequence[Act]
    """What was done long ago: all of it lasts."""
    acts: Sequence[Act]
    swaps: bool = True
    """Whether the file system can exchange two names."""


def snapshot(mark: int, step: int) -> Snapshot:
    """A small one of all kinds of content."""
    state = {"step": step, "mark": mark, "rng": torch.arange(5, dtype=torch.uint8)}
    return Snapshot({"w": torch.full((3,), float(mark)), "b": torch.arange(2)}, {"m": torch.full((2,), mark)}, state)


def saved(mark: int, step: int, *, replace: bool = False) -> Act:
    """A commit."""
    return lambda disk: checkpoint.commit(_path(step), snapshot(mark, step), replace=replace, disk=disk), mark


def pruned(mark: int, *steps: int) -> Act:
    """All removed but these."""
    keep = {_path(step).name for step in steps}
    return lambda disk: checkpoint.prune(CHECKPOINTS, keep, disk=disk), mark


def moved(mark: int, old: str, new: str) -> Act:
    """A name given away, durably: what a process that died has left."""

    def move(disk: Disk) -> None:
        disk.rename(CHECKPOINTS / old, CHECKPOINTS / new)

    return move, mark


def swept(mark: int) -> Act:
    """Cleared of what died."""
    return lambda disk: checkpoint.sweep(CHECKPOINTS, disk=disk), mark


def told(mark: int, text: str) -> Act:
    """The run's own small files replaced."""

    def write(disk: Disk) -> None:
        folder = RunFolder(RUN, disk=disk)
        folder.write_config(text)
        folder.write_error(ValueError(text))

    return write, mark


def _path(step: int) -> Path:
    return CHECKPOINTS / f"step-{step:09d}"


_ONE, _TWO = _path(1).name, _path(2).name
SCENARIOS = (
    Scenario("the first save", (), [saved(1, 1)]),
    Scenario("a second save", [saved(1, 1)], [saved(2, 2)]),
    Scenario("the same step again", [saved(1, 1)], [saved(2, 1, replace=True)]),
    Scenario("the same, no exchange", [saved(1, 1)], [saved(2, 1, replace=True)], swaps=False),
    Scenario("a save and its prune", [saved(1, 1), saved(2, 2)], [saved(3, 3), pruned(3, 2, 3)]),
    Scenario("a prune of two", [saved(1, 1), saved(2, 2), saved(3, 3)], [pruned(3, 3)]),
    Scenario("a sweep of what died", [saved(1, 1), saved(2, 2), moved(1, _TWO, f".tmp-{_TWO}-0123abcd")], [swept(1)]),
    Scenario("a sweep of the only one", [saved(1, 1), moved(1, _ONE, f".old-{_ONE}-0123abcd")], [swept(1)]),
    Scenario(
        "a sweep after a replacement",
        [saved(1, 1), moved(1, _ONE, f".old-{_ONE}-0123abcd"), saved(2, 1)],
        [swept(2)],
    ),
    Scenario("configuration and error", [saved(1, 1), told(1, "old")], [told(1, "new")]),
)


@dataclass
class Found:
    """What a campaign has seen."""

    instants: int = 0
    """Operations after which the power was cut."""
    images: int = 0
    """Different ones."""
    bad: list[str] = field(default_factory=list)
    _judged: set[tuple[Image, frozenset[Mark]]] = field(default_factory=set)

    def judge(self, name: str, image: Image, allowed: frozenset[Mark], *, again: bool, swaps: bool = True) -> None:
        """Take an image up; `again`: cut the power in the middle of that, too."""
        known = (_without_tokens(image), allowed)
        if known in self._judged:
            return
        self._judged.add(known)
        self.images += 1
        disk = MemoryDisk(image)
        disk.swaps = swaps
        later: set[Image] = set()
        if again:
            disk.changed = lambda: later.update(disk.images())
        checkpoint.sweep(CHECKPOINTS, disk=disk)
        if problem := _problem(disk, allowed):
            self.bad.append(f"{name}: {problem}")
        for cut in later:
            self.judge(f"{name}, cut again", cut, allowed, again=False, swaps=swaps)


def _without_tokens(image: Image) -> Image:
    """The same for all random names of half-made folders: one of them is looked at."""
    named = ((_TOKEN.sub("", name), content) for name, content in image)
    return tuple(sorted((name, _without_tokens(inner) if isinstance(inner, tuple) else inner) for name, inner in named))


_TOKEN = re.compile(r"(?<=-)[0-9a-f]{8}$")


def _problem(disk: MemoryDisk, allowed: frozenset[Mark]) -> str:
    """What is wrong with what a life finds; nothing if it is one of these, whole."""
    with contextlib.suppress(FileNotFoundError):
        left = [name for name in disk.names(CHECKPOINTS) if not name.startswith("step-")]
        if left:
            return f"{left} stays after a sweep"
    try:
        newest = checkpoint.newest_valid(CHECKPOINTS, disk=disk)
        damaged = [entry for entry in checkpoint.scan(CHECKPOINTS, disk=disk) if entry.problem is not None]
        if damaged:
            return f"{damaged[0].name} is damaged: {damaged[0].problem}"
        mark = None if newest is None else _mark(newest.path, disk)
    except CheckpointError as error:
        return str(error)
    if mark not in allowed:
        return f"the newest is {mark}, not {sorted(allowed, key=str)}"
    return _torn(disk)


def _mark(path: Path, disk: Disk) -> int:
    read = checkpoint.read(path, disk=disk)
    mark = int(read.state["mark"])
    whole = snapshot(mark, read.state["step"])
    same = all(torch.equal(read.model[name], whole.model[name]) for name in whole.model)
    return mark if same and torch.equal(read.optimizer["m"], whole.optimizer["m"]) else -1


def _torn(disk: MemoryDisk) -> str:
    for name in ("config.toml", "error.json"):
        try:
            fd = disk.open(RUN / name, 0)
        except FileNotFoundError:
            continue
        into = bytearray(1 << 16)
        text = into[: disk.read(fd, memoryview(into), 0)].decode()
        if name == "config.toml" and text not in ("old", "new"):
            return f"config.toml holds {text!r}"
        if name == "error.json" and json.loads(text or "{}").get("message") not in ("old", "new"):
            return f"error.json holds {text!r}"
    return ""


def cut(scenario: Scenario, found: Found, *, again: bool = False) -> None:
    """Cut the power after each operation of a scenario."""
    disk, mark = _prepared(scenario)
    for act, promised in scenario.acts:
        _watch(disk, scenario, found, frozenset({mark, promised}), again=again)
        act(disk)
        mark = promised
        disk.changed = lambda: None
        for image in disk.images():
            found.judge(f"{scenario.name}, done", image, frozenset({mark}), again=again, swaps=scenario.swaps)


def refused(scenario: Scenario, found: Found, code: int, *, lasting: bool, every: int = 1) -> None:
    """Have each operation fail, or each so many, and cut the power after each operation of what is made of that."""
    for at in range(0, 1000, every):
        disk, mark = _prepared(scenario)
        refusing = RefusingDisk(disk, at, code, lasting, kinds=_CHANGING)
        for act, promised in scenario.acts:
            name = f"{scenario.name}, operation {at} failed by {errno.errorcode[code]}"
            _watch(disk, scenario, found, frozenset({mark, promised}), name=name)
            try:
                act(refusing)
            except EnvironmentProblem as problem:
                _judge_refusal(name, disk, problem, found, mark, promised, lasting=lasting)
                break
            mark = promised
        if not refusing.failed:
            return


_CHANGING = frozenset({"mkdir", "open", "write", "fsync", "truncate", "rename", "exchange", "unlink", "rmdir"})


def _judge_refusal(
    name: str,
    disk: MemoryDisk,
    problem: EnvironmentProblem,
    found: Found,
    mark: Mark,
    promised: Mark,
    *,
    lasting: bool,
) -> None:
    if str(RUN) not in str(problem) or not isinstance(problem.__cause__, OSError):
        found.bad.append(f"{name}: no path or no cause in {problem}")
    stands = frozenset({mark, promised} if lasting else {mark})
    found.judge(f"{name}, told", disk.image(), stands, again=False)


def _prepared(scenario: Scenario) -> tuple[MemoryDisk, Mark]:
    disk = MemoryDisk(((RUN.name, ()),))
    for act, _ in scenario.before:
        act(disk)
    disk = MemoryDisk(disk.image())
    disk.swaps = scenario.swaps
    return disk, scenario.before[-1][1] if scenario.before else None


def _watch(
    disk: MemoryDisk, scenario: Scenario, found: Found, allowed: frozenset[Mark], *, name: str = "", again: bool = False
) -> None:
    def look() -> None:
        found.instants += 1
        for image in disk.images():
            found.judge(name or scenario.name, image, allowed, again=again, swaps=scenario.swaps)
        if again:
            killed, later = disk.after_kill(), set[Image]()
            killed.changed = lambda: later.update(killed.images())
            checkpoint.sweep(CHECKPOINTS, disk=killed)
            for image in later:
                found.judge(f"{scenario.name}, killed and cut", image, allowed, again=False, swaps=scenario.swaps)

    disk.changed = look


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is said of what a life finds is not of interest here."""
    loggers = [logging.getLogger(f"streamtrain.{name}") for name in ("checkpoint", "run_folder", "saving", "keeping")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fits(room: Path, code: int, *, every: int = 1) -> Iterator[str]:
    """Whole fits on a real disk, of which one operation fails: for each what is wrong with how it ends, or nothing.

    How many there are differs from fit to fit, since saves that are due while one is under way are joined.
    """
    whole = asyncio.run(_fit(LOCAL, room / f"{code}-whole"))
    assert isinstance(whole, nn.Module)
    beyond = 0
    for at in range(0, 10_000, every):
        disk, folder = RefusingDisk(LOCAL, at, code, kinds=_CHANGING), room / f"{code}-{at}"
        ended = asyncio.run(_fit(disk, folder))
        if not disk.failed:
            beyond += 1
            shutil.rmtree(folder, ignore_errors=True)
            if beyond == BEYOND:
                return
            continue
        beyond = 0
        newest = checkpoint.newest_valid(folder / "checkpoints")
        if isinstance(ended, EnvironmentProblem):
            told = str(folder) in str(ended) and os.strerror(code) in str(ended)
            yield "" if told else f"{disk.failed}: {ended}"
        elif isinstance(ended, nn.Module):
            same = newest is not None and all(map(torch.equal, _weights(ended), _weights(whole)))
            yield "" if same else f"{disk.failed}: other weights, or none saved"
        else:
            yield f"{disk.failed}: {ended!r}"
        shutil.rmtree(folder, ignore_errors=True)


def _weights(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


async def _fit(disk: Disk, folder: Path) -> nn.Module | Exception:
    trainer = Trainer(network(), nn.MSELoss(), run_dir=folder, callbacks=[ModelCheckpoint(every="5steps")], seed=5)
    trainer._run.disk = disk
    try:
        await trainer.fit(Samples(), max_epochs=2)
    except Exception as error:
        return error
    return trainer.model


def run(options: Options) -> Iterator[Measure]:
    """All scenarios."""
    with options.room() as room, quiet():
        for code in (errno.EIO, errno.ENOSPC):
            ends = list(fits(room, code, every=5 if options.quick else 1))
            name = errno.errorcode[code]
            yield Measure(name=f"fits with one operation failed by {name}", values=(len(ends),))
            yield Measure(name="  that ended otherwise than promised", values=(sum(map(bool, ends)),), at_most=0)
            for line in filter(None, ends):
                print(f"  {line}", flush=True)
    for scenario in SCENARIOS:
        plain, failing = Found(), Found()
        with quiet():
            cut(scenario, plain, again=not options.quick)
            for code in (errno.EIO, errno.ENOSPC):
                for lasting in (False, True):
                    refused(scenario, failing, code, lasting=lasting)
        yield Measure(name=f"{scenario.name}: instants, cut", values=(plain.instants,))
        yield Measure(name=f"{scenario.name}: different images", values=(plain.images,))
        yield Measure(name=f"{scenario.name}: bad ones", values=(len(plain.bad),), at_most=0)
        yield Measure(name=f"{scenario.name}: images after failures", values=(failing.images,))
        yield Measure(name=f"{scenario.name}: bad ones of them", values=(len(failing.bad),), at_most=0)
        for line in (plain.bad + failing.bad)[:10]:
            print(f"  {line}", flush=True)
