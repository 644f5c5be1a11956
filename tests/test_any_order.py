"""Outside of `fit` everything works in any order: a state machine beside a plain model of what each call must do.

The plain model is bare torch: weights, AdamW, the generator's state and a position, copied by hand where a checkpoint
is saved, and put back where one is loaded.
"""

from __future__ import annotations

import asyncio
import copy
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from streamtrain.checkpoint import read
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, same

BATCHES, DECAY = 5, 0.5
LOSS = nn.MSELoss()


def stream() -> Samples:
    return Samples(36)  # 5 batches, the last of 4


@dataclass
class Plain:
    """What the calls must do, by hand."""

    average: bool
    model: nn.Module = field(default_factory=network)
    epoch: int = 0
    step: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.averaged: Any = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(5).get_state()

    def train(self, updates: int) -> None:
        """So many updates, from epoch to epoch."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator)
        for _ in range(updates):
            batch = list(stream().batches(self.epoch))[self.batch]
            loss: Any = LOSS(self.model(batch.inputs), batch.targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.averaged.update_parameters(self.model)
            self.step += 1
            self.batch += 1
            if self.batch == BATCHES:
                self.epoch, self.batch = self.epoch + 1, 0
        self.generator = torch.get_rng_state()
        torch.set_rng_state(before)

    @property
    def judged(self) -> nn.Module:
        """What is validated and predicted with."""
        if not (self.average and self.step):
            return copy.deepcopy(self.model).eval()
        inner: nn.Module = copy.deepcopy(self.averaged.module)
        inner.load_state_dict(dict(self.model.named_buffers()), strict=False)
        return inner.eval()

    def means(self, count: int) -> float:
        with torch.no_grad():
            model = self.judged
            sums = [(LOSS(model(b.inputs), b.targets).double() * len(b)) for b in Samples(count).batches(0)]
        return float(sum(sums) / count)

    def copied(self) -> Plain:
        return copy.deepcopy(self)


class AnyOrder(RuleBasedStateMachine):
    saved = Bundle("saved")

    @initialize(average=st.booleans())
    def begin(self, average: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.plain = Plain(average)
        self.source = stream()
        ema = DECAY if average else None
        self.trainer = Trainer(network(), LOSS, seed=5, device="cpu", log_every=1, ema=ema)
        self.logged: dict[str, float] = {}
        self.count = 0
        self.state = torch.get_rng_state()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule()
    def train_epoch(self) -> None:
        """The epoch, or the rest of the one that was begun."""
        means = asyncio.run(self.trainer.train_epoch(self.source))
        self.plain.train(BATCHES - self.plain.batch)
        assert means.items() >= self.logged.items()
        self.logged = {}

    @rule(updates=st.integers(1, 7))
    def fit(self, updates: int) -> None:
        asyncio.run(self.trainer.fit(self.source, max_steps=self.plain.step + updates))
        self.plain.train(updates)
        self.logged = {}

    @rule(count=st.sampled_from([8, 20]))
    def validate(self, count: int) -> None:
        assert asyncio.run(self.trainer.validate(Samples(count))) == {"val_loss": self.plain.means(count)}

    @rule(count=st.sampled_from([8, 20]))
    def evaluate(self, count: int) -> None:
        named = asyncio.run(self.trainer.evaluate({"a": Samples(count)}))
        assert named == {"test_a_loss": self.plain.means(count)}

    @rule()
    def evaluate_on_what_is_trained(self) -> None:
        """Training goes on where it was all the same."""
        asyncio.run(self.trainer.evaluate(self.source))

    @rule(stop=st.integers(1, 4))
    def predict(self, stop: int) -> None:
        """All of it, or some and then no more."""
        batches = [batch.inputs for batch in Samples(20).batches(0)]

        async def some() -> list[Any]:
            outputs = []
            async for output in self.trainer.predict(batches):
                outputs.append(output)
                if len(outputs) == stop:
                    break
            return outputs

        with torch.no_grad():
            model = self.plain.judged
            expected = [model(inputs) for inputs in batches[:stop]]
        assert all(map(torch.equal, asyncio.run(some()), expected))

    @rule(target=saved)
    def save_checkpoint(self) -> tuple[Path, Plain]:
        self.count += 1
        path = asyncio.run(self.trainer.save_checkpoint(self.folder / f"kept-{self.count}"))
        assert read(path).state["step"] == self.plain.step
        return path, self.plain.copied()

    @rule(kept=saved)
    def load_checkpoint(self, kept: tuple[Path, Plain]) -> None:
        path, plain = kept
        asyncio.run(self.trainer.load_checkpoint(path))
        self.plain = plain.copied()

    @rule(kept=saved)
    def go_on_in_another_process(self, kept: tuple[Path, Plain]) -> None:
        """A new trainer, as a new process would have."""
        path, plain = kept
        self.trainer = Trainer(network(), LOSS, seed=5, device="cpu", log_every=1, ema=DECAY if plain.average else None)
        self.source, self.plain, self.logged = stream(), plain.copied(), {}
        asyncio.run(self.trainer.load_checkpoint(path))

    @rule(value=st.floats(-1, 1))
    def log_metrics(self, value: float) -> None:
        self.trainer.log_metrics({"extra": value})
        self.logged["extra"] = value

    @invariant()
    def everything_is_where_it_must_be(self) -> None:
        if not hasattr(self, "plain"):
            return
        state = self.trainer.state
        assert (state.epoch, state.step, state.batch) == (self.plain.epoch, self.plain.step, self.plain.batch)
        assert same(self.trainer.model, self.plain.model)
        assert torch.equal(torch.get_rng_state(), self.state), "the caller's random numbers"
        assert all(module.training for module in self.trainer.model.modules())
        assert not asyncio._get_running_loop()


AnyOrder.TestCase.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize("average", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize(
    "calls",
    [
        "fit save fit load fit",
        "fit save other fit",
        "fit save epoch load epoch log epoch",
        "fit save load save other fit epoch",
        "fit save other save other epoch",
        "save fit load fit",
        "fit evaluate fit save other fit",
        "fit evaluate save other fit",
        "fit save load evaluate fit",
        "epoch save fit other log epoch",
    ],
)
def test_what_hypothesis_seldom_finds(calls: str, average: bool) -> None:
    machine = AnyOrder()
    machine.begin(average)
    kept: Any = None
    for call in calls.split():
        if call == "save":
            kept = machine.save_checkpoint()
        elif call == "fit":
            machine.fit(updates=3)
        elif call in ("load", "other"):
            {"load": machine.load_checkpoint, "other": machine.go_on_in_another_process}[call](kept=kept)
        elif call == "log":
            machine.log_metrics(value=0.5)
        else:
            {"epoch": machine.train_epoch, "evaluate": machine.evaluate_on_what_is_trained}[call]()
        machine.everything_is_where_it_must_be()
    machine.teardown()
