"""Updates that the kernels themselves leave out by a flag, as on CUDA, where nobody reads it before the burst ends.

The fused kernels of the CPU look at the flag as well, so that all of it runs here.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamtrain import rollback
from streamtrain.averaging import Average
from streamtrain.data.batch import Batch
from streamtrain.errors import EnvironmentProblem, NonFiniteError, UserCodeError
from streamtrain.outcome import Compute, supervised
from streamtrain.step import TrainStep
from streamtrain.tally import Report
from tests.engine import network, same
from tests.test_step import Hand, Looked, batches, burst, made

BAD = 3
"""Number of the batch whose loss is no number."""


def bad_at(model: nn.Module, *numbers: int) -> Compute:
    """A loss that is no number for these batches, whenever they come, nor is what the model makes of them."""
    inner, places = supervised(model, nn.MSELoss()), {8 * number for number in numbers}

    def compute(batch: Batch) -> Any:
        if batch.cursor.position in places:
            outcome = inner(replace(batch, inputs=batch.inputs * float("inf")))
            return outcome._replace(loss=outcome.loss * float("nan"))
        return inner(batch)

    return compute


def flagged(model: nn.Module, *bad: int, **options: Any) -> TrainStep:
    step = made(model, bad_at(model, *(bad or (BAD,))), **options)
    step._kernel_skips = True
    return step


def with_rollback(step: TrainStep, model: nn.Module) -> TrainStep:
    step._rollback = rollback.Rollback(model, step._optimizer, None)
    return step


def standing(step: TrainStep, model: nn.Module) -> list[Any]:
    """All that a burst leaves, as lists."""
    spikes: Any = step.spikes.state_dict()
    weights = [value.tolist() for value in model.state_dict().values()]
    rates = [group["lr"] for group in step._optimizer.param_groups]
    means = [step.tally.epoch.state_dict(), step.tally.window.state_dict()]
    return [
        weights,
        rates,
        step.lr.state_dict(),
        means,
        spikes,
        step.step,
        torch.default_generator.get_state().tolist(),
    ]


def without_it() -> nn.Module:
    """The weights after the others of six batches."""
    model, loss = network(dropout=0.0), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for number, batch in enumerate(batches(6), 1):
        value: Any = loss(model(batch.inputs), batch.targets)
        if number != BAD:
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_an_error_comes_at_the_end_of_the_burst_and_no_later_update_was_made() -> None:
    model = network(dropout=0.0)
    average = Average(model, 0.9)
    step = flagged(model, average=average)
    report = burst(step, Hand(batches(6)))
    assert isinstance(report.error, NonFiniteError)
    assert (report.updates, step.step) == (2, 2)
    expected = network(dropout=0.0)
    plain = Average(expected, 0.9)
    burst(made(expected, average=plain), Hand(batches(6)[:2]))
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in expected.named_parameters())
    assert all(torch.equal(weight, plain.weights()[name]) for name, weight in average.weights().items())


def test_a_skipped_update_is_no_part_of_the_means() -> None:
    model = network(dropout=0.0)
    step = flagged(model, skip=True)
    report = burst(step, Hand(batches(6)))
    assert (report.error, report.updates, report.skipped, report.samples) == (None, 6, 1, 48)
    assert step.tally.epoch.compute()["loss"] == step.tally.epoch.compute()["loss"]
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in without_it().named_parameters())


@pytest.mark.parametrize("bad", [(1,), (1, 2), (1, 2, 3, 4), (3,), (1, 4)], ids=str)
@pytest.mark.parametrize("cut", [1, 3, None])
def test_the_average_begins_with_the_first_update_that_is_made(bad: tuple[int, ...], cut: int | None) -> None:
    """Not with the weights that the model began with, though nobody knows yet that an update was left out."""
    outcomes = []
    for late in (True, False):
        model = network(dropout=0.0)
        average = Average(model, 0.9)
        step = flagged(model, *bad, average=average, skip=True)
        step._kernel_skips = late
        hand = Hand(batches(4))
        burst(step, hand, cut)
        burst(step, hand)
        state = average.state_dict()
        outcomes.append([state["updates"], {name: weight.tolist() for name, weight in state["weights"].items()}])
    assert outcomes[0] == outcomes[1]


def to_the_end(step: TrainStep, hand: Hand) -> tuple[Report, list[int]]:
    """Bursts until there are no batches, or an error; the last report, and updates, skipped ones and samples of all."""
    sums = [0, 0, 0]
    while True:
        report = burst(step, hand)
        sums = [a + b for a, b in zip(sums, (report.updates, report.skipped, report.samples), strict=True)]
        if not hand.batches or report.error is not None:
            return report, sums


@pytest.mark.parametrize("bad", [(3,), (1, 2), (4, 7), (9,)], ids=str)
def test_a_rollback_is_made_before_the_next_update_as_where_each_number_is_looked_at_at_once(
    bad: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Which batches it gives up depends on no burst's end, for that is a matter of time: two runs would differ."""
    outcomes = []
    for late in (True, False):
        model = network()
        step = with_rollback(flagged(model, *bad), model)
        step._kernel_skips = late
        torch.manual_seed(7)
        report, sums = to_the_end(step, Hand(batches(9)))
        assert report.error is None
        outcomes.append([sums, *standing(step, model)])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == [9, len(bad), 72]
    assert f"back to the weights of step 0, the {bad[0] - 1} updates since then are given up" in caplog.text


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"skip": True}, {"average": True}], ids=lambda o: str(*o))
def test_numbers_are_read_once_a_burst(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading would wait for the device."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        plain: Any = getattr(torch.Tensor, name)

        def read(self: Any, *arguments: Any) -> Any:
            reads.append(name)
            return plain(self, *arguments)

        return read

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    counts = []
    for updates in (4, 12):
        model = network(dropout=0.0)
        given = {**options, "average": Average(model, 0.9)} if "average" in options else options
        step = made(model, log_every=1000, **given)
        step._kernel_skips = True
        reads.clear()
        assert burst(step, Hand(batches(updates))).updates == updates
        counts.append(len(reads))
    assert counts[0] == counts[1]


SCHEDULES = {
    "none": None,
    "ours": {"name": "cosine", "total": 40},
    "torch's": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "samples": {"name": "linear", "total": 400, "interval": "samples"},
}


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=8)
@given(
    bad=st.sets(st.integers(1, 9), min_size=1),
    accumulate=st.integers(1, 3),
    clip=st.booleans(),
    cuts=st.lists(st.integers(1, 4), max_size=4),
)
def test_a_flag_leaves_what_looking_at_once_leaves(
    nonfinite: str, schedule: str, bad: set[int], accumulate: int, clip: bool, cuts: list[int]
) -> None:
    """Weights, statistics, rates, means, norms and random numbers, however the updates are divided into bursts."""
    options: dict[str, Any] = {"skip": nonfinite == "skip", "accumulate": accumulate, "log_every": 3}
    options |= {"scheduler": SCHEDULES[schedule], "clip_norm": 0.5 if clip else None}
    outcomes = []
    for late in (True, False):
        model = network()
        step = flagged(model, *bad, **options)
        step._kernel_skips = late
        torch.manual_seed(7)
        hand = Hand(batches(9), ended=True)
        reports = []
        for updates in (*cuts, None):
            reports.append(burst(step, hand, updates))
            if reports[-1].error is not None:
                step.undo()
                break
        told = [
            (r.updates, r.skipped, r.samples, r.cursor, [row.step for row in r.rows], str(r.error)) for r in reports
        ]
        outcomes.append([told, *standing(step, model)])
    mine, at_once = outcomes
    assert mine[0][:-1] == at_once[0][:-1]
    assert mine[0][-1][:-1] == at_once[0][-1][:-1]
    assert mine[1:] == at_once[1:]


@pytest.mark.parametrize("schedule", ["ours", "torch's"])
def test_a_rate_that_is_a_tensor_is_that_of_the_last_good_step_too(schedule: str) -> None:
    """It is written in place: what is kept of it has to be a copy."""
    outcomes = []
    for late in (True, False):
        model = network()
        rate = torch.tensor(1e-3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        step = made(model, bad_at(model, 7), optimizer=optimizer, scheduler=SCHEDULES[schedule])
        step._kernel_skips = late
        assert isinstance(burst(step, Hand(batches(9))).error, NonFiniteError)
        assert optimizer.param_groups[0]["lr"] is rate
        outcomes.append(float(rate))
    assert outcomes[0] == outcomes[1]


def test_the_error_names_the_rows_and_the_last_good_step() -> None:
    model, rows = network(), ", ".join(map(str, batches(6)[2].index.tolist()))
    report = burst(flagged(model), Hand(batches(6)))
    told = f"step 3, rows {rows}: the loss is nan; the weights are those of step 2, the last good one"
    assert str(report.error) == told


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_batch_whose_loss_was_bad_is_known_though_it_is_gone(accumulate: int) -> None:
    """For error.json, which tells of its rows and where they lie."""
    model = network()
    step = flagged(model, accumulate=accumulate)
    assert isinstance(burst(step, Hand(batches(6))).error, NonFiniteError)
    assert step.culprit is not None
    assert (step.culprit.step, step.culprit.rows) == (-(-BAD // accumulate), 8)
    assert step.culprit.index == batches(6)[BAD - 1].index.tolist()


def test_it_comes_before_the_error_of_a_later_batch_of_its_burst(caplog: pytest.LogCaptureFixture) -> None:
    """Which the run has not come to: all is as before the bad update."""
    told = []
    for late in (True, False):
        model = network()
        inner = bad_at(model, BAD)

        def compute(batch: Batch, inner: Compute = inner) -> Any:
            if batch.cursor.position == 8 * 5:
                raise ValueError("what a NaN leads to")
            return inner(batch)

        step = made(model, compute)
        step._kernel_skips = late
        report = burst(step, Hand(batches(6)))
        told.append((str(report.error).split(",")[0], report.updates, step.step))
    assert told[0] == told[1] == ("step 3", 2, 2)
    assert "behind it came up in the same burst" in caplog.text


def test_after_too_many_rollbacks_the_error_is_that_of_the_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights, statistics and position of before the bad update, as where each number is looked at at once."""
    monkeypatch.setattr(rollback, "MOST", 1)
    outcomes = []
    for late in (True, False):
        model = network()
        step = with_rollback(flagged(model, 1, 5), model)
        step._kernel_skips = late
        torch.manual_seed(7)
        report, sums = to_the_end(step, Hand(batches(8)))
        assert isinstance(report.error, NonFiniteError)
        assert str(report.error).startswith("step 5, rows ")
        assert str(report.error).endswith(": the loss is nan; 1 rollbacks did not help, the last one to step 0")
        assert report.cursor in (batches(8)[3].cursor, None)
        outcomes.append([sums, *standing(step, model)])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("bad", [(3,), (4,), (5,), (4, 8), (9,)], ids=str)
def test_only_what_is_known_to_be_good_is_kept_for_a_rollback(
    bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts are of one update; what is kept is what is kept where each number is looked at at once."""
    monkeypatch.setattr(rollback, "EVERY", 4)
    kept = []
    for late in (True, False):
        model = network(dropout=0.0)
        step = with_rollback(flagged(model, *bad), model)
        step._kernel_skips = late
        hand, updates = Hand(batches(12)), 0
        while hand.batches:
            updates += (report := burst(step, hand, None if late else 1)).updates
            assert report.error is None
            if late:
                assert step._rollback is not None
                assert step._rollback._step == 4 * (updates // 4)
        assert step._rollback is not None
        state: Any = step._rollback.state_dict()
        kept.append([state["step"], state["times"]])
        assert all(torch.isfinite(value).all() for value in state["kept"]["model"].values())
    assert kept[0] == kept[1]


def test_what_fails_while_a_burst_is_read_ends_it_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an error of a kernel, which CUDA tells only there: nothing is raised past the burst, nothing is saved."""

    def read(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    for where in ("read", "take_norms"):
        model = network()
        step = made(model, clip_norm=1.0)
        monkeypatch.setattr(step.tally, where, read)
        report = burst(step, Hand(batches(2)))
        assert isinstance(report.error, UserCodeError)
        assert "device-side assert" in str(report.error)
        assert step.torn


def test_what_fails_while_a_rollbacks_weights_are_kept_ends_the_burst_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(step: int) -> None:
        raise torch.OutOfMemoryError("no room")

    model = network()
    step = with_rollback(made(model), model)
    monkeypatch.setattr(step._rollback, "keep", full)
    report = burst(step, Hand(batches(2)))
    assert isinstance(report.error, EnvironmentProblem)
    assert (report.updates, step.torn) == (0, False)


def test_batches_of_a_group_that_was_begun_after_a_bad_update_are_given_back_too() -> None:
    model = network(dropout=0.0)
    step = flagged(model, 3, accumulate=2)
    report = burst(step, Hand(batches(5)))
    assert isinstance(report.error, NonFiniteError)
    assert (report.updates, report.batches, step.partial, step.tally.losses) == (1, 2, False, [])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_of_torchs_generators_stand_where_they_stood_before_the_bad_update() -> None:
    """As those of a GPU do, beside that of the CPU."""
    model, own = network(dropout=0.0), torch.Generator()
    step, drawn = flagged(model), []
    inner = step._compute

    def compute(batch: Batch) -> Any:
        drawn.append(torch.rand((), generator=own).item())
        return inner(batch)

    step._compute = compute
    step._sources.append(own)
    burst(step, Hand(batches(6)))
    assert torch.rand((), generator=own).item() == drawn[BAD - 1]


def cudas_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of CUDA takes no bfloat16 (pytorch/pytorch#127176, AmpKernels.cu); the CPU's does."""
    plain = torch._amp_foreach_non_finite_check_and_unscale_

    def check(values: list[torch.Tensor], found: torch.Tensor, scale: torch.Tensor) -> None:
        if any(value.dtype is torch.bfloat16 for value in values):
            raise NotImplementedError(
                "\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'"
            )
        plain(values, found, scale)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", check)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("where", ["nowhere", "the loss", "a gradient"])
def test_a_model_in_bfloat16_trains_where_the_device_checks_none_and_what_is_not_finite_is_left_out(
    late: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(count: int) -> list[Batch]:
        return [replace(b, inputs=b.inputs.bfloat16(), targets=b.targets.bfloat16()) for b in batches(count)]

    def trained(given: list[Batch], bad: int | None) -> nn.Module:
        model = network(dropout=0.0).bfloat16()
        inner = supervised(model, nn.MSELoss())

        def compute(batch: Batch) -> Any:
            outcome = inner(batch)
            assert outcome.loss.dtype is torch.bfloat16
            if batch.cursor.position != bad:
                return outcome
            if where == "a gradient":
                outcome.outputs.register_hook(lambda gradient: gradient * float("inf"))
            return outcome._replace(loss=outcome.loss * float("nan")) if where == "the loss" else outcome

        step = made(model, compute, skip=True)
        step._kernel_skips = late
        report = burst(step, Hand(given))
        assert (report.error, report.skipped) == (None, 0 if bad is None else 1)
        return model

    expected = trained(
        [batch for number, batch in enumerate(narrow(6), 1) if number != BAD or where == "nowhere"], None
    )
    cudas_check(monkeypatch)
    assert same(trained(narrow(6), None if where == "nowhere" else 8 * BAD), expected)


@pytest.mark.parametrize("bad", [False, True])
def test_kernels_that_take_sparse_gradients_and_know_of_no_flag_leave_out_what_it_tells(bad: bool) -> None:
    outcomes = []
    for late in (True, False):
        model = Looked()
        inner = supervised(model, nn.MSELoss())

        def compute(batch: Batch, inner: Compute = inner) -> Any:
            outcome = inner(batch)
            return outcome._replace(loss=outcome.loss * (float("nan") if bad and batch.epoch == 2 else 1.0))

        step = made(model, compute, optimizer={"name": "sgd", "lr": 0.1}, skip=True)
        step._kernel_skips = late
        indices = torch.randint(0, 10, (4, 8, 3), generator=torch.Generator().manual_seed(1))
        report = burst(step, Hand([Batch(rows, torch.ones(8, 1), epoch=at) for at, rows in enumerate(indices)]))
        assert (report.error, report.updates, report.skipped) == (None, 4, int(bad))
        outcomes.append([weight.tolist() for weight in model.parameters()])
    assert outcomes[0] == outcomes[1]


def test_an_optimizer_that_is_stepped_by_hand_after_a_bad_update_makes_it() -> None:
    """The flag is the fit's own: left on the optimizer, it has every later step left out in silence."""
    model = network(dropout=0.0)
    step = flagged(model)
    assert isinstance(burst(step, Hand(batches(6))).error, NonFiniteError)
    before, batch = copy.deepcopy(model), batches(1)[0]
    nn.MSELoss()(model(batch.inputs), batch.targets).backward()
    step._optimizer.step()
    assert not torch.equal(model[0].weight, before[0].weight)  # type: ignore[index]
    assert not hasattr(step._optimizer, "grad_scale")  # a GradScaler of the user's would multiply it
