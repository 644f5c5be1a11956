"""What the tests of the engine train: a small network, a stream that knows its place, and the bare loop beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.callbacks.base import Callback
from streamtrain.data.batch import START, Batch, Cursor
from streamtrain.errors import CheckpointError
from streamtrain.events import Event, Log

COLUMNS = 4


def network(*, dropout: float = 0.25) -> nn.Module:
    """Dropout draws random numbers, BatchNorm keeps running means."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(COLUMNS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def samples(count: int = 100) -> tuple[Tensor, Tensor]:
    """Inputs (count, 4) and targets (count, 1)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, COLUMNS, generator=generator)
    return inputs, inputs.sum(dim=1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=generator)


class Samples:
    """A stream of shuffled samples in memory, with a cursor in samples, as a ZarrStream has."""

    pulls_inside = False

    def __init__(self, count: int = 100, batch_size: int = 8, *, seed: int = 0, known: bool = True) -> None:
        self.inputs, self.targets = samples(count)
        self.num_samples, self.batch_size, self.seed, self._known = count, batch_size, seed, known
        self.epoch, self.cursor, self._skip = 0, START, 0
        self.driven = False
        self.gates: dict[int, asyncio.Event] = {}
        """Before the sample of this number of an epoch the pass waits for the event."""
        self.failures: dict[int, Exception] = {}
        """Before the sample of this number of an epoch the pass raises."""
        self.passes: list[tuple[int, int]] = []

    async def open(self) -> None:
        pass

    def __len__(self) -> int:
        if not self._known:
            raise TypeError("nobody knows")
        return -(-self.num_samples // self.batch_size)

    def batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        """All of an epoch from a position on."""
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        for begin in range(position, self.num_samples, self.batch_size):
            rows = order[begin : begin + self.batch_size]
            cursor = Cursor(epoch, begin + len(rows))
            yield Batch(self.inputs[rows], self.targets[rows], rows, epoch, cursor)

    def __aiter__(self) -> SamplesPass:
        begin, self._skip = self._skip, 0
        self.passes.append((self.epoch, begin))
        return SamplesPass(self, begin)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._skip, self.cursor = epoch, 0, Cursor(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.cursor.epoch, "position": self.cursor.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise CheckpointError(f"seed: {state['seed']} then, {self.seed} now")
        self.cursor = Cursor(state["epoch"], state["position"])
        self.epoch, self._skip = self.cursor

    def follow(self, driven: bool) -> None:
        self.driven = driven

    def trained(self, cursor: Cursor) -> None:
        self.cursor = cursor

    def statistics(self) -> None:
        return None

    async def aclose(self) -> None:
        pass


class SamplesPass:
    """One epoch of Samples."""

    def __init__(self, stream: Samples, begin: int) -> None:
        self._stream = stream
        self._rest = stream.batches(stream.epoch, begin)
        self._at = begin

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    def next_nowait(self) -> Batch | None:
        if self._at in self._stream.gates and not self._stream.gates[self._at].is_set():
            return None
        if self._at in self._stream.failures:
            raise self._stream.failures[self._at]
        batch = next(self._rest, None)
        if batch is None:
            self._stream.epoch += 1
            raise StopAsyncIteration
        self._at = batch.cursor.position
        return batch

    async def __anext__(self) -> Batch:
        if self._at in self._stream.gates:
            await self._stream.gates[self._at].wait()
        batch = self.next_nowait()
        assert batch is not None
        return batch

    async def aclose(self) -> None:
        self._rest = iter(())


def bare_loop(
    model: nn.Module,
    epochs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    seed: int,
    accumulate: int = 1,
    clip: float | None = None,
    lr: Callable[[int], float] = lambda step: 1e-3,
) -> nn.Module:
    """The loop that everybody writes, with fused AdamW; the last group of an epoch is divided by its real size."""
    optimizer, loss, step = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), nn.MSELoss(), 0
    torch.manual_seed(seed)
    for batches in epochs:
        for begin in range(0, len(batches), accumulate):
            group = batches[begin : begin + accumulate]
            for inputs, targets in group:
                value = loss(model(inputs), targets)
                (value if len(group) == 1 else value / len(group)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for options in optimizer.param_groups:
                options["lr"] = lr(step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return model


def pairs(stream: Samples, epochs: int) -> list[list[tuple[Tensor, Tensor]]]:
    """What a bare loop is given: the same batches."""
    return [[(batch.inputs, batch.targets) for batch in stream.batches(epoch)] for epoch in range(epochs)]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and buffers are equal to the bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


class Recorder(Callback):
    """Notes what it was told, by hook."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def events(self, hook: str) -> list[Any]:
        """What came to this hook."""
        return [event for name, event in self.told if name == hook]

    async def on_train_begin(self, event: Event) -> None:
        self.told.append(("on_train_begin", event))

    async def on_train_end(self, event: Event) -> None:
        self.told.append(("on_train_end", event))

    async def on_epoch_begin(self, event: Event) -> None:
        self.told.append(("on_epoch_begin", event))

    async def on_epoch_end(self, event: Event) -> None:
        self.told.append(("on_epoch_end", event))

    async def on_batch_begin(self, event: Event) -> None:
        self.told.append(("on_batch_begin", event))

    async def on_batch_end(self, event: Event) -> None:
        self.told.append(("on_batch_end", event))

    async def on_validation_begin(self, event: Event) -> None:
        self.told.append(("on_validation_begin", event))

    async def on_validation_end(self, event: Event) -> None:
        self.told.append(("on_validation_end", event))

    async def on_checkpoint(self, event: Event) -> None:
        self.told.append(("on_checkpoint", event))

    async def on_checkpoint_failed(self, event: Event) -> None:
        self.told.append(("on_checkpoint_failed", event))

    async def on_exception(self, event: Event) -> None:
        self.told.append(("on_exception", event))

    async def on_interrupt(self, event: Event) -> None:
        self.told.append(("on_interrupt", event))

    async def on_log(self, event: Log) -> None:
        self.told.append(("on_log", event))


class AtStep(Callback):
    """Calls a function once, as soon as it hears that so many steps were made."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act
        self._done = False

    async def on_batch_end(self, event: Event) -> None:
        if event.step >= self.step and not self._done:
            self._done = True
            self.act()
