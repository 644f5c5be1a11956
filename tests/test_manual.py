"""What the manual mode promises: a bare loop with several optimizers, to the bit, and exact after a resume."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.data.batch import Batch
from streamtrain.errors import CheckpointError, ConfigError, NonFiniteError, UserCodeError
from streamtrain.optimizers import build_optimizer
from streamtrain.several_optimizers import build_optimizers
from streamtrain.trainer import Trainer
from tests.engine import Samples, pairs, same

OPTIMIZERS: dict[str, Any] = {"gen": {"name": "adam", "betas": (0.5, 0.9)}, "disc": {"name": "sgd", "lr": 0.05}}


class Pair(nn.Module):
    """A generator of targets, and what tells them from real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gen = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.25), nn.Linear(16, 1))
        self.disc = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))


def losses(model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the discriminator and of the generator."""
    fake = model.gen(inputs)
    told = (
        nn.functional.softplus(model.disc(fake.detach())).mean() + nn.functional.softplus(-model.disc(targets)).mean()
    )
    return told, fake


def fooled(model: Any, fake: Tensor) -> Tensor:
    return nn.functional.softplus(-model.disc(fake)).mean()


class Adversarial(Trainer):
    def training_step(self, model: Any, batch: Batch) -> Any:
        told, fake = losses(model, batch.inputs, batch.targets)
        assert self.manual_update(told, "disc") is torch.is_grad_enabled()
        self.manual_update(fooled(model, fake), "gen")
        return {"told": told.detach(), "outputs": fake}


def trainer(**options: Any) -> Adversarial:
    return Adversarial(Pair(), **{"optimizer": OPTIMIZERS, "seed": 5, "device": "cpu", "log_every": 5, **options})


def by_hand(epochs: int, *, clip: float | None = None, lr: Any = lambda step: 1.0) -> tuple[nn.Module, list[float]]:
    """The bare loop; the sum of both losses of each batch."""
    model = Pair()
    gen = torch.optim.Adam(model.gen.parameters(), lr=1e-3, betas=(0.5, 0.9), fused=True)
    disc = torch.optim.SGD(model.disc.parameters(), lr=0.05, fused=True)
    torch.manual_seed(5)
    sums = []
    for step, (inputs, targets) in enumerate(pair for epoch in pairs(Samples(), epochs) for pair in epoch):
        gen.param_groups[0]["lr"], disc.param_groups[0]["lr"] = 1e-3 * lr(step), 0.05 * lr(step)
        told, fake = losses(model, inputs, targets)
        for optimizer, part in ((disc, model.disc), (gen, model.gen)):
            loss: Any = told if optimizer is disc else fooled(model, fake)
            model.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(part.parameters(), clip)
            optimizer.step()
            sums.append(float(loss.detach()))
    return model, [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]


async def test_the_weights_are_those_of_the_bare_loop() -> None:
    fitted = trainer(metrics={"mae": nn.L1Loss()})
    result = await fitted.fit(Samples(), validation=Samples(24), max_epochs=2)
    model, sums = by_hand(2)
    assert same(fitted.model, model)
    assert result.step == 26
    counts = [8] * 12 + [4]
    mean = sum(loss * count for loss, count in zip(sums[13:], counts, strict=True)) / 100
    assert result.metrics["loss"] == pytest.approx(mean, rel=1e-6)
    assert {"told", "val_loss", "val_told", "val_mae"} <= result.metrics.keys()


async def test_clipping_and_the_schedule_are_each_optimizers_own() -> None:
    fitted = trainer(gradient_clip_norm=0.01, scheduler={"name": "linear", "total": 26})
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, by_hand(2, clip=0.01, lr=lambda step: 1 - step / 26)[0])


async def test_torchs_schedulers_are_stepped_after_each_batch() -> None:
    fitted = trainer(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5))
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, by_hand(2, lr=lambda step: 0.5 ** (step // 4))[0])


@pytest.mark.parametrize("stop", [1, 9, 13, 20])
async def test_a_resumed_run_has_all_optimizers_as_they_were(tmp_path: Path, stop: int) -> None:
    await trainer(run_dir=tmp_path).fit(Samples(), max_steps=stop)
    again = trainer(run_dir=tmp_path)
    await again.fit(Samples(), max_epochs=2, resume="auto")
    assert same(again.model, by_hand(2)[0])


async def test_a_function_is_given_update() -> None:
    def step(model: Any, batch: Batch, update: Any) -> None:
        told, fake = losses(model, batch.inputs, batch.targets)
        model.disc(batch.targets).sum().backward() if torch.is_grad_enabled() else None  # no part of it
        update(told, "disc")
        update(fooled(model, fake), "gen")

    fitted = Trainer(Pair(), step=step, optimizer=OPTIMIZERS, seed=5, device="cpu")
    await fitted.fit(Samples(), validation=Samples(24), max_epochs=2)
    assert same(fitted.model, by_hand(2)[0])


async def test_nothing_of_a_step_is_alive_in_the_next() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def step(model: Any, batch: Batch, update: Any) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        told, fake = losses(model, batch.inputs, batch.targets)
        seen.extend(weakref.ref(tensor) for tensor in (told, fake))
        update(told, "disc")
        update(fooled(model, fake), "gen")

    gc.disable()
    try:
        await Trainer(Pair(), step=step, optimizer=OPTIMIZERS, device="cpu", ema=0.9).fit(Samples())
    finally:
        gc.enable()
    assert alive == [0] * 13


class Broken(Trainer):
    """Whose generator's loss is no number at step 4."""

    def training_step(self, model: Any, batch: Batch) -> Any:
        told, fake = losses(model, batch.inputs, batch.targets)
        bad = batch.cursor.position == 32
        parts = {"disc": told * float("nan") if bad and self.bad == "disc" else told}
        self.manual_update(parts["disc"], "disc")
        loss = fooled(model, fake)
        self.manual_update(loss * float("nan") if bad and self.bad == "gen" else loss, "gen")

    bad = "gen"


@pytest.mark.parametrize(("bad", "saved"), [("disc", [3]), ("gen", [])])
async def test_after_half_a_step_nothing_is_saved(tmp_path: Path, bad: str, saved: list[int]) -> None:
    fitted = Broken(Pair(), optimizer=OPTIMIZERS, seed=5, device="cpu", run_dir=tmp_path)
    fitted.bad = bad
    with pytest.raises(NonFiniteError, match=r"step 4, rows .*: the loss is nan"):
        await fitted.fit(Samples())
    found = (tmp_path / "checkpoints").glob("step-*")
    assert [int(path.name.removeprefix("step-")) for path in found] == saved


async def test_an_update_that_is_skipped_is_one_optimizers(caplog: pytest.LogCaptureFixture) -> None:
    fitted = Broken(Pair(), optimizer=OPTIMIZERS, seed=5, device="cpu", nonfinite="skip")
    result = await fitted.fit(Samples())
    assert caplog.text.count("the update is skipped") == 1
    assert result.metrics["loss"] == result.metrics["loss"]
    assert fitted.optimizer is not None
    steps = [state["step"] for state in fitted.optimizer.state.values() if "step" in state]
    assert {int(step) for step in steps} == {12}


def test_the_state_of_several_is_that_of_one_with_their_groups() -> None:
    model = Pair()
    several = build_optimizers(model, {"gen": "adamw", "disc": "adamw"}, 1e-3)
    one = build_optimizer(model, {"name": "adamw", "rules": [("^gen", {}), ("^disc", {})]})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    one.step()
    several.load_state_dict(one.state_dict())
    assert set(several.members["disc"].state) == set(model.disc.parameters())
    mine, theirs = several.state_dict(), one.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    assert all(torch.equal(mine["state"][n]["exp_avg"], theirs["state"][n]["exp_avg"]) for n in mine["state"])


async def test_a_group_is_added_to_one_of_the_optimizers_and_never_lost() -> None:
    extra = nn.Parameter(torch.ones(()))

    class Scaled(Adversarial):
        def training_step(self, model: Any, batch: Batch) -> None:
            told, fake = losses(model, batch.inputs, batch.targets)
            self.manual_update(told * extra, "disc")
            self.manual_update(fooled(model, fake), "gen")

    fitted = Scaled(Pair(), optimizer=OPTIMIZERS, seed=5, device="cpu")
    several: Any = fitted.optimizer
    with pytest.raises(ConfigError, match="which of several optimizers") as caught:
        several.add_param_group({"params": [extra]})
    assert "members[name].add_param_group(...), with one of 'gen', 'disc'" in caught.value.hint
    several.members["disc"].add_param_group({"params": [extra]})
    await fitted.fit(Samples(24))
    assert float(extra.detach()) != 1.0
    assert len(several.param_groups) == 3


async def test_schedules_that_ask_for_defaults_find_those_that_all_optimizers_have() -> None:
    spec = {"gen": "adam", "disc": "adamw"}
    cycle = {"name": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01, "total_steps": 26}
    fitted = trainer(optimizer=spec, scheduler=cycle)
    await fitted.fit(Samples(), max_epochs=1)
    with pytest.raises(ConfigError, match="momentum"):
        await trainer(scheduler=cycle).fit(Samples(), max_epochs=1)  # Adam's betas are none of SGD's


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        ({"gen": "adam"}, r"none of 'gen' updates disc.0.weight"),
        ({"gen": "adam", "disk": "sgd"}, r"optimizer.disk: nothing to train is named '\^disk"),
        (
            {"gen": "adam", "disc": {"name": "sgd", "params": "weight"}},
            r"gen.0.weight belongs to both 'gen' and 'disc'",
        ),
        ({"gen": "adan", "disc": "sgd"}, r"optimizer.gen: optimizer: unknown name 'adan'"),
        ({"gen": "adam", "disc": {"name": "sgd", "params": "("}}, r"optimizer.disc.params: '\(' is no regular"),
    ],
)
def test_a_parameter_belongs_to_exactly_one_optimizer(optimizer: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trainer(optimizer=optimizer)


def test_an_optimizer_that_was_made_for_anothers_parameters_too_is_refused() -> None:
    model = Pair()
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"optimizer\.disc holds gen\..*, which is for 'gen' to update"):
        Trainer(model, optimizer={"gen": "adam", "disc": both})


async def test_what_manual_mode_cannot_do_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="accumulate_grad_batches is for one optimizer"):
        await trainer(accumulate_grad_batches=2, run_dir=run).fit(Samples())
    with pytest.raises(ConfigError, match="need a training step"):
        await Trainer(Pair(), nn.MSELoss(), optimizer=OPTIMIZERS, run_dir=run).fit(Samples())
    assert not run.exists()
    steps: list[tuple[Any, str]] = [
        (lambda model, batch: model.gen(batch.inputs).mean(), "returns no loss"),
        (lambda model, batch, update: update(model.gen(batch.inputs).mean(), "dis"), "there is no optimizer 'dis'"),
        (lambda model, batch, update: update(model.gen(batch.inputs), "gen"), r"not one of the shape \(8, 1\)"),
    ]
    for step, told in steps:
        with pytest.raises(ConfigError, match=told):
            await Trainer(Pair(), step=step, optimizer=OPTIMIZERS, device="cpu").fit(Samples())
    with pytest.raises(ConfigError, match="is for the training_step"):
        trainer().manual_update(torch.zeros(()), "gen")
    with pytest.raises(ConfigError, match="needs several optimizers"):
        Trainer(Pair()).manual_update(torch.zeros(()), "gen")


async def test_a_step_that_makes_no_update_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of a loss that is returned among what is to be logged nothing is learned."""

    def step(model: Any, batch: Batch, update: Any) -> dict[str, Tensor]:
        if model.seen:
            return {"gen_loss": model.gen(batch.inputs).mean()}
        model.seen = True
        update(model.gen(batch.inputs).mean(), "gen")
        return {}

    model = Pair()
    model.seen = False  # type: ignore[assignment]
    await Trainer(model, step=step, optimizer=OPTIMIZERS, device="cpu").fit(Samples())
    assert caplog.text.count("made no update") == 1
    assert "step 2 made no update" in caplog.text


async def test_a_step_that_makes_no_update_has_no_loss_and_logs_what_it_returns(tmp_path: Path) -> None:
    """Its loss was NaN in the log, as if it were not finite, and the others were left out."""
    steps = itertools.count(1)

    def step(model: Pair, batch: Batch, update: Any) -> dict[str, Tensor]:
        loss = model.gen(batch.inputs).mean()
        if next(steps) % 2 == 0:
            update(loss, "gen")
        return {"mean": loss.detach()}

    how: dict[str, Any] = {"step": step, "optimizer": OPTIMIZERS, "device": "cpu", "log_every": 1, "run_dir": tmp_path}
    await Trainer(Pair(), **how).fit(Samples(), max_steps=4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["loss" in row for row in rows] == [False, True, False, True]
    assert all(row["mean"] is not None and "nonfinite" not in row for row in rows)


async def test_no_update_is_made_in_validation_even_with_gradients() -> None:
    class Penalised(Trainer):
        def training_step(self, model: Any, batch: Batch) -> None:
            with torch.enable_grad():
                told, fake = losses(model, batch.inputs, batch.targets)
                self.manual_update(told, "disc")
                self.manual_update(fooled(model, fake), "gen")

    fitted = Penalised(Pair(), optimizer=OPTIMIZERS, seed=5, device="cpu")
    before = {name: value.clone() for name, value in fitted.model.state_dict().items()}
    await fitted.validate(Samples(24))
    assert all(torch.equal(value, before[name]) for name, value in fitted.model.state_dict().items())
    await fitted.fit(Samples(24))
    assert not all(torch.equal(value, before[name]) for name, value in fitted.model.state_dict().items())


async def test_running_statistics_forget_the_batch_of_a_skipped_update() -> None:
    stream = Samples(24)
    stream.inputs[int(list(stream.batches(0))[1].index[0])] = float("nan")

    class Careless(Trainer):
        def training_step(self, model: Any, batch: Batch) -> None:
            told, fake = losses(model, batch.inputs, batch.targets)
            self.manual_update(told, "disc")
            self.manual_update(fooled(model, fake), "gen")

    fitted = Careless(Pair(), optimizer=OPTIMIZERS, seed=5, device="cpu", nonfinite="skip")
    await fitted.fit(stream)
    assert all(value.isfinite().all() for value in fitted.model.state_dict().values())


async def test_rates_by_samples_are_those_of_each_step() -> None:
    rates: list[float] = []

    class Told(Adversarial):
        def training_step(self, model: Any, batch: Batch) -> Any:
            if torch.is_grad_enabled():
                assert self.optimizer is not None
                rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(model, batch)

    fitted = Told(
        Pair(),
        optimizer=OPTIMIZERS,
        seed=5,
        device="cpu",
        lr=1.0,
        scheduler={"name": lambda t: 1.0 / (1.0 + t), "interval": "samples"},
    )
    await fitted.fit(Samples(40))
    assert rates == pytest.approx([1.0 / (1 + 8 * step) for step in range(5)])


async def test_a_step_of_batch_and_update_is_called_with_those() -> None:
    model = Pair()

    def step(batch: Batch, update: Any) -> None:
        told, fake = losses(model, batch.inputs, batch.targets)
        update(told, "disc")
        update(fooled(model, fake), "gen")

    fitted = Trainer(model, optimizer=OPTIMIZERS, step=step, seed=5, device="cpu")
    assert (await fitted.fit(Samples(24))).step == 3


async def test_weights_of_half_a_step_are_not_saved_by_hand(tmp_path: Path) -> None:
    class Broken(Trainer):
        def training_step(self, model: Any, batch: Batch) -> None:
            self.manual_update(losses(model, batch.inputs, batch.targets)[0], "disc")
            raise RuntimeError("between the two")

    fitted = Broken(Pair(), optimizer=OPTIMIZERS, seed=5, device="cpu")
    with pytest.raises(UserCodeError, match="between the two"):
        await fitted.fit(Samples(24))
    with pytest.raises(CheckpointError, match="middle of an update"):
        await fitted.save_checkpoint(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_optimizer_that_learns_with_other_weights_is_refused_among_several() -> None:
    class Free(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    with pytest.raises(ConfigError, match=r"optimizer\.gen: Free learns with other weights"):
        build_optimizers(Pair(), {"gen": Free, "disc": "sgd"}, 0.1)


class Odd(nn.Module):
    """A table with sparse gradients, and weights that are complex."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 4, sparse=True)
        self.turn = nn.ParameterDict({"by": nn.Parameter(torch.randn(4, dtype=torch.complex64))})

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = self.table(batch.index % 10)
        return (rows - batch.inputs).pow(2).mean(), (rows.detach() * self.turn["by"]).abs().mean()


async def test_sparse_and_complex_gradients_are_those_of_the_bare_loop() -> None:
    def step(model: Any, batch: Batch, update: Any) -> None:
        for name, loss in zip(("table", "turn"), model(batch), strict=True):
            update(loss, name)

    spec: Any = {"table": {"name": "sgd", "lr": 0.1}, "turn": {"name": "sgd", "lr": 0.1}}
    fitted = Trainer(Odd(), step=step, optimizer=spec, seed=5, device="cpu")
    await fitted.fit(Samples(), max_epochs=1)
    bare = Odd()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (bare.table, bare.turn)]
    for batch in Samples().batches(0):
        for loss, optimizer in zip(bare(batch), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(fitted.model, bare)


def half(step: Any, **options: Any) -> Trainer:
    """In fp16 on the CPU, where nobody would want it: the scale of its losses is the same as on a GPU."""
    made = Trainer(Pair(), step=step, optimizer=OPTIMIZERS, seed=5, device="cpu", **options)
    made._parts.options = replace(made._parts.options, precision="16")
    return made


async def test_in_fp16_an_optimizer_may_be_stepped_several_times_for_a_batch_as_in_the_bare_loop() -> None:
    told: list[bool] = []

    def step(model: Any, batch: Batch, update: Any) -> None:
        loss, _ = losses(model, batch.inputs, batch.targets)
        told.append(update(loss, "disc"))
        loss, fake = losses(model, batch.inputs, batch.targets)
        told.extend((update(loss, "disc"), update(fooled(model, fake), "gen")))

    fitted = half(step)
    await fitted.fit(Samples(), max_epochs=1)
    model: Any = Pair()
    gen = torch.optim.Adam(model.gen.parameters(), lr=1e-3, betas=(0.5, 0.9), fused=True)
    disc = torch.optim.SGD(model.disc.parameters(), lr=0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    made: list[bool] = []

    def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            made.append(not any(map(float, scaler._found_inf_per_device(optimizer).values())))
            scaler.step(optimizer)
        model.zero_grad()

    torch.manual_seed(5)
    for batch in Samples().batches(0):
        with torch.autocast("cpu", torch.float16):
            loss, _ = losses(model, batch.inputs, batch.targets)
            update(disc, loss)
            scaler.update()
            loss, fake = losses(model, batch.inputs, batch.targets)
            update(disc, loss)
            update(gen, fooled(model, fake))
        scaler.update()
    assert same(fitted.model, model)
    assert told == made
    assert set(told) == {True, False}  # the first scale is too large


@pytest.mark.parametrize("what", ["loss", "gradient"])
async def test_in_fp16_what_is_never_finite_ends_the_run(what: str) -> None:
    """Its updates were left out one after the other, and nothing was said."""

    def step(model: Any, batch: Batch, update: Any) -> None:
        loss, fake = losses(model, batch.inputs, batch.targets)
        update(loss, "disc")
        fooling = fooled(model, fake)
        if what == "gradient":
            fooling.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
        update(fooling * float("nan") if what == "loss" else fooling, "gen")

    with pytest.raises(NonFiniteError, match="the loss is nan" if what == "loss" else "the loss's scale is down to"):
        await half(step).fit(Samples(), max_epochs=5)


async def test_in_fp16_an_update_that_is_skipped_is_one_optimizers(caplog: pytest.LogCaptureFixture) -> None:
    def step(model: Any, batch: Batch, update: Any) -> None:
        loss, fake = losses(model, batch.inputs, batch.targets)
        assert not update(loss * float("nan"), "disc")
        update(fooled(model, fake), "gen")

    fitted = half(step, nonfinite="skip")
    await fitted.fit(Samples(), max_epochs=1)
    assert same(fitted.model.get_submodule("disc"), Pair().disc)
    assert not same(fitted.model.get_submodule("gen"), Pair().gen)
    assert caplog.text.count("the update is skipped") == 13
