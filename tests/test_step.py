"""What a burst promises: whole updates, numbers read once, nothing of a batch alive afterwards."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections import deque
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamtrain.control import Control
from streamtrain.data.batch import Batch
from streamtrain.device import mover
from streamtrain.errors import ConfigError, DataError, NonFiniteError, UserCodeError
from streamtrain.optimizers import build_optimizer
from streamtrain.outcome import Compute, Outcome, supervised
from streamtrain.schedulers import build_scheduler
from streamtrain.step import TrainStep
from streamtrain.tally import Report
from tests.engine import COLUMNS, Samples, bare_loop, network, pairs, same

CPU = torch.device("cpu")


class Hand:
    """Gives batches until it is empty."""

    def __init__(self, batches: Iterable[Batch], *, ended: bool = False) -> None:
        self.batches, self.ended = deque(batches), ended

    def take(self) -> Batch | None:
        return self.batches.popleft() if self.batches else None


def made(model: nn.Module, compute: Compute | None = None, *, optimizer: Any = "adamw", **options: Any) -> TrainStep:
    door = options.pop("door", Control())
    built = build_optimizer(model, optimizer)
    lr = build_scheduler(built, options.pop("scheduler", None))
    compute = compute or supervised(model, nn.MSELoss())
    return TrainStep(model, built, compute, lr, move=mover(CPU), door=door, device=CPU, **{"log_every": 5, **options})


def burst(step: TrainStep, hand: Hand, updates: int | None = None, remaining: int | None = None) -> Report:
    return step.run(hand, updates=updates, seconds=60.0, epoch=0, remaining=remaining)


def batches(count: int = 13) -> list[Batch]:
    return list(Samples(8 * count).batches(0))


def test_a_burst_ends_after_so_many_updates_and_tells_its_position() -> None:
    step, given = made(network()), batches()
    report = burst(step, Hand(given), updates=4)
    assert (report.first_step, report.updates, report.batches, report.samples) == (1, 4, 4, 32)
    assert report.cursor == given[3].cursor
    assert step.step == 4


def test_a_burst_ends_when_its_time_is_over_but_makes_one_update() -> None:
    step = made(network())
    report = step.run(Hand(batches()), updates=None, seconds=0.0, epoch=0, remaining=None)
    assert report.updates == 1


@pytest.mark.parametrize(("each", "updates"), [(1, 20), (7, 3), (8, 2), (10.5, 2), (13, 2), (14, 1), (30, 1)])
def test_a_burst_ends_as_near_to_its_time_as_whole_updates_can(
    each: float, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of updates of 10.5 ms two are made in 20 ms, not one: after each burst the loop is waited for."""
    model, clock = network(), [0.0]
    inner = supervised(model, nn.MSELoss())

    def compute(batch: Batch) -> Any:
        clock[0] += each
        return inner(batch)

    monkeypatch.setattr("streamtrain.step.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    step, hand = made(model, compute), Hand(batches(60))
    step.run(hand, updates=1, seconds=20.0, epoch=0, remaining=None)
    assert step.run(hand, updates=None, seconds=20.0, epoch=0, remaining=None).updates == updates


@pytest.mark.parametrize(("each", "updates"), [(1, 20), (7, 3), (8, 2), (10.5, 2), (13, 2), (14, 1), (300, 1)])
def test_so_does_one_whose_device_is_behind_and_waited_for_at_its_end(
    each: float, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates are queued in no time: a burst as long as they are queued would keep a stop waiting for minutes."""
    model, clock, done = network(), [0.0], [0.0]
    inner = supervised(model, nn.MSELoss())

    def compute(batch: Batch) -> Any:
        clock[0] += 0.01
        done[0] = max(clock[0], done[0]) + each
        return inner(batch)

    def read(*_: Any) -> None:
        clock[0] = max(clock[0], done[0])

    monkeypatch.setattr("streamtrain.step.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    step, hand = made(model, compute), Hand(batches(60))
    step._behind = True
    monkeypatch.setattr(step.tally, "read", read)
    step.run(hand, updates=1, seconds=20.0, epoch=0, remaining=None)
    assert step.run(hand, updates=None, seconds=20.0, epoch=0, remaining=None).updates == updates


def test_a_burst_ends_after_the_update_during_which_somebody_knocked() -> None:
    door = Control()
    model = network()
    inner = supervised(model, nn.MSELoss())
    calls: list[int] = []

    def compute(batch: Batch) -> Any:
        calls.append(1)
        if len(calls) == 3:
            door.pause()
        return inner(batch)

    assert burst(made(model, compute, door=door), Hand(batches())).updates == 3


def test_a_short_group_is_updated_in_the_burst_in_which_its_source_tells_the_end() -> None:
    """A stop between two bursts would have left it waiting, with the random numbers that it had cost."""

    class Told(Hand):
        def take(self) -> Batch | None:
            batch = super().take()
            self.ended = batch is None
            return batch

    step = made(network(), accumulate=2)
    report = burst(step, Told(batches(5)))
    assert (report.updates, report.batches, step.partial) == (3, 5, False)


def test_an_empty_hand_ends_a_burst_without_an_update() -> None:
    report = burst(made(network()), Hand([]))
    assert (report.updates, report.cursor, report.error) == (0, None, None)


@given(sizes=st.lists(st.integers(1, 5), max_size=8), accumulate=st.integers(1, 4))
def test_pieces_and_bursts_make_no_difference(sizes: list[int], accumulate: int) -> None:
    given_, step = batches(), made(network(), accumulate=accumulate, log_every=2)
    torch.manual_seed(3)
    reports, hand = [], Hand([], ended=False)
    rest = deque(given_)
    for size in [*sizes, len(given_)]:
        hand.batches.extend(rest.popleft() for _ in range(min(size, len(rest))))
        hand.ended = not rest
        taken = len(given_) - len(rest) - len(hand.batches)
        reports.append(burst(step, hand, remaining=len(given_) - taken))
    whole = made(network(), accumulate=accumulate, log_every=2)
    torch.manual_seed(3)
    one = burst(whole, Hand(given_, ended=True), remaining=len(given_))
    assert [row.values for report in reports for row in report.rows] == [row.values for row in one.rows]
    assert sum(report.updates for report in reports) == one.updates == -(-13 // accumulate)
    assert step.tally.epoch.compute() == whole.tally.epoch.compute()
    assert torch.equal(
        torch.cat([p.flatten() for p in _weights(step)]), torch.cat([p.flatten() for p in _weights(whole)])
    )


def _weights(step: TrainStep) -> list[Tensor]:
    return [p for group in step._optimizer.param_groups for p in group["params"]]


def test_lines_of_the_log_are_means_over_samples() -> None:
    model = network(dropout=0.0)
    losses: list[tuple[float, int]] = []
    inner = supervised(model, nn.MSELoss())

    def compute(batch: Batch) -> Any:
        outcome = inner(batch)
        losses.append((outcome.loss.item(), len(batch)))
        return outcome._replace(logged={"double": outcome.loss * 2, "one": 1})

    given = list(Samples(76).batches(0))  # the last batch has 4
    report = burst(made(model, compute), Hand(given))
    assert [row.step for row in report.rows] == [5, 10]
    assert [row.samples for row in report.rows] == [40, 76]
    for row, part in zip(report.rows, (losses[:5], losses[5:]), strict=True):
        mean = sum(loss * count for loss, count in part) / sum(count for _, count in part)
        assert row.values["loss"] == pytest.approx(mean)
        assert row.values["double"] == pytest.approx(2 * mean)
        assert (row.values["one"], row.values["lr"]) == (1.0, 0.001)
    assert report.loss_sum == pytest.approx(sum(loss * count for loss, count in losses))


def test_nothing_of_a_batch_outlives_it() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    model = network()
    inner = supervised(model, nn.MSELoss())

    def compute(batch: Batch) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(batch.inputs))
        return inner(batch)

    class Fresh(Hand):
        def take(self) -> Batch | None:
            batch = super().take()
            return None if batch is None else Batch(batch.inputs.clone(), batch.targets)

    gc.disable()
    try:
        burst(made(model, compute), Fresh(batches(6)))
        assert alive == [0] * 6
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("flagged", [False, True])
def test_few_frames_lie_between_a_burst_and_the_optimizer(flagged: bool) -> None:
    depth: list[int] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            depth.append(len(traceback.extract_stack()))
            return super().step(closure)

    model = network()
    step = made(model, optimizer=lambda parameters: Spy(parameters, lr=0.1, fused=True))
    step._kernel_skips = flagged
    here = len(traceback.extract_stack())
    burst(step, Hand(batches(1)))
    assert depth[0] - here <= 5  # burst, run, _update, torch's wrapper, step


def test_an_error_leaves_the_updates_before_it_and_no_trace_of_its_batch() -> None:
    model, given = network(), batches()
    inner = supervised(model, nn.MSELoss())
    calls: list[int] = []

    def compute(batch: Batch) -> Any:
        outcome = inner(batch)
        calls.append(1)
        if len(calls) == 8:
            raise KeyError("colour")
        return outcome

    step = made(model, compute, accumulate=3)
    torch.manual_seed(5)
    report = burst(step, Hand(given))
    assert isinstance(report.error, UserCodeError)
    assert isinstance(report.error.__cause__, KeyError)
    assert (report.updates, report.batches, report.cursor) == (2, 6, given[5].cursor)
    bare = bare_loop(network(), [pairs(Samples(8 * 13), 1)[0][:6]], seed=5, accumulate=3)
    assert same(model, bare)
    assert torch.rand(1) == _after_bare()
    assert not step.partial


def _after_bare() -> Tensor:
    """What the generator gives after the six batches of that bare loop."""
    bare_loop(network(), [pairs(Samples(8 * 13), 1)[0][:6]], seed=5, accumulate=3)
    return torch.rand(1)


@pytest.mark.parametrize("what", ["exit", "logged"])
def test_whatever_ends_a_burst_the_updates_before_it_are_counted(what: str) -> None:
    model, calls = network(dropout=0.0), 0

    def compute(batch: Batch) -> Outcome:
        nonlocal calls
        calls += 1
        if calls == 4 and what == "exit":
            raise SystemExit(3)
        return Outcome(model(batch.inputs).square().mean(), logged={"note": 1.0 if calls < 4 else None})

    report = burst(step := made(model, compute), Hand(batches()))
    assert isinstance(report.error, UserCodeError)
    assert (report.updates, report.batches, step.step) == (3, 3, 3)


def test_an_error_takes_back_the_random_numbers_of_its_batch() -> None:
    model = network()

    def compute(batch: Batch) -> Outcome:
        model(batch.inputs)  # dropout draws
        raise ValueError("no")

    before = torch.get_rng_state()
    assert burst(made(model, compute), Hand(batches())).error is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_without_rows_is_passed_over() -> None:
    given = batches(4)
    given.insert(2, Batch(given[0].inputs[:0], given[0].targets[:0]))
    model = network()
    step = made(model, accumulate=2)
    torch.manual_seed(5)
    report = burst(step, Hand(given))
    assert (report.updates, report.batches, report.error) == (2, 4, None)
    assert same(model, bare_loop(network(), [pairs(Samples(32), 1)[0]], seed=5, accumulate=2))


def test_where_a_burst_ends_is_nothing_to_a_short_group_behind_batches_without_rows() -> None:
    """It is short as soon as fewer batches come than it needs, those without rows counted."""
    empty, (*full, last) = Batch(torch.empty(0, COLUMNS), torch.empty(0, 1)), batches(7)
    short = Batch(last.inputs[:3], last.targets[:3])
    rest = [*full[:2], *[empty] * 3, *full[2:], short, empty]

    def trained(most: int | None) -> tuple[nn.Module, int]:
        model, hand, taken = network(), Hand(rest, ended=True), 0
        step = made(model, accumulate=4)
        torch.manual_seed(5)
        while hand.batches:
            report = burst(step, hand, most, len(rest) - taken - step.taken)
            assert report.error is None
            taken += report.batches + report.passed
        return model, taken + step.taken

    (whole, all_of_it), (pieces, taken) = trained(None), trained(1)
    assert same(pieces, whole)
    assert taken == all_of_it == len(rest)


def test_a_single_number_is_no_batch() -> None:
    report = burst(made(network()), Hand([Batch(torch.tensor(1.0), torch.tensor(2.0))]))
    assert isinstance(report.error, DataError)
    assert "a batch whose inputs are tensor(1.) has no rows" in str(report.error)


def test_undo_forgets_the_batches_of_an_unfinished_update() -> None:
    model, given = network(), batches()
    step = made(model, accumulate=4)
    torch.manual_seed(5)
    burst(step, Hand(given[:6]))
    assert (step.partial, step.taken) == (True, 2)
    step.undo()
    burst(step, Hand(given[4:8]))
    assert same(model, bare_loop(network(), [pairs(Samples(8 * 13), 1)[0][:8]], seed=5, accumulate=4))


def test_gradients_that_are_not_finite_leave_weights_state_and_statistics() -> None:
    model, given = network(), batches()
    step = made(model)
    burst(step, Hand(given[:3]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
    report = burst(step, Hand(given[3:]))
    assert isinstance(report.error, NonFiniteError)
    assert "step 4, rows" in str(report.error)
    assert "a gradient is not finite" in str(report.error)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hook.remove()
    assert burst(step, Hand(given[3:])).error is None


def test_sparse_and_clipped_gradients_are_the_bare_ones() -> None:
    def embedding() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 1))

    indices = torch.randint(0, 10, (4, 8, 3), generator=torch.Generator().manual_seed(1))
    model, bare = embedding(), embedding()
    targets = torch.ones(8, 1)
    step = made(model, optimizer={"name": "sgd", "lr": 0.1})
    assert burst(step, Hand([Batch(rows, targets) for rows in indices])).updates == 4
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    for rows in indices:
        nn.MSELoss()(bare(rows), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, bare)
    clipped = made(embedding()[2], clip_value=1e-4, optimizer={"name": "sgd", "lr": 1.0})  # type: ignore[index]
    before = [p.detach().clone() for p in _weights(clipped)]
    burst(clipped, Hand([Batch(torch.ones(8, 12), targets)]))
    assert max(float((p - q).abs().max().detach()) for p, q in zip(_weights(clipped), before, strict=True)) <= 1.0001e-4


class Looked(nn.Module):
    """Looks up its rows by a function, which no module tells to be sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.last = nn.Parameter(torch.randn(10, 4)), nn.Linear(12, 1)

    def forward(self, indices: Tensor) -> Any:
        return self.last(nn.functional.embedding(indices, self.rows, sparse=True).flatten(1))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, once a process, from Adagrad
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sparse_gradient_that_no_module_tells_is_the_bare_one(optimizer: str, accumulate: int) -> None:
    indices = torch.randint(0, 10, (4, 8, 3), generator=torch.Generator().manual_seed(1))
    model, bare, targets = Looked(), Looked(), torch.ones(8, 1)
    step = made(model, optimizer={"name": optimizer, "lr": 0.1}, accumulate=accumulate)
    report = burst(step, Hand([Batch(rows, targets) for rows in indices]))
    assert (report.error, report.updates) == (None, 4 // accumulate)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    plain = kinds[optimizer](bare.parameters(), lr=0.1)
    for number, rows in enumerate(indices, 1):
        (nn.MSELoss()(bare(rows), targets) / accumulate).backward()
        if number % accumulate == 0:
            plain.step()
            plain.zero_grad()
    assert same(model, bare)


def test_a_loss_that_is_no_loss_is_explained() -> None:
    model = network()
    for loss, told in ((1.0, "float, not a tensor"), (torch.ones(3), r"shape \(3,\)"), (torch.ones(()), "not depend")):
        report = burst(made(model, partial(Outcome, loss)), Hand(batches(1)))
        assert isinstance(report.error, ConfigError)
        with pytest.raises(ConfigError, match=told):
            raise report.error


def test_an_optimizer_that_raises_marks_the_weights_as_torn() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("half way")

    step = made(network(), optimizer=lambda parameters: Broken(parameters, lr=0.1))
    report = burst(step, Hand(batches(1)))
    assert step.torn
    assert isinstance(report.error, UserCodeError)
    assert str(report.error) == "step 1: the optimizer Broken raised RuntimeError: half way"
    assert isinstance(report.error.__cause__, RuntimeError)
    mine = ConfigError("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Broken, "step", lambda self: (_ for _ in ()).throw(mine))
        assert burst(made(network(), optimizer=lambda all_of: Broken(all_of, lr=0.1)), Hand(batches(1))).error is mine
    assert mine.__cause__ is None


def test_torch_schedulers_are_stepped_after_each_update() -> None:
    model = network()
    step = made(
        model, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), log_every=1
    )
    report = burst(step, Hand(batches(3)))
    assert [row.values["lr"] for row in report.rows] == [1e-3, 5e-4, 2.5e-4]


def test_what_comes_to_the_device_is_transformed_there() -> None:
    def double(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.inputs * 2, batch.targets

    model, bare = network(), network()
    built = build_optimizer(model)
    step = TrainStep(
        model,
        built,
        supervised(model, nn.MSELoss()),
        build_scheduler(built, None),
        move=mover(CPU, double),
        door=Control(),
        device=CPU,
        moves=True,
    )
    torch.manual_seed(5)
    burst(step, Hand(batches(3)))
    assert same(model, bare_loop(bare, [[(x * 2, y) for x, y in pairs(Samples(24), 1)[0]]], seed=5))


class Remembering(torch.optim.SGD):
    """Keeps count of how often its own `zero_grad` was asked for."""

    cleared = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)


def test_an_optimizer_with_a_zero_grad_of_its_own_has_it_called() -> None:
    model = network()
    optimizer = Remembering(model.parameters(), lr=1e-3)
    burst(made(model, optimizer=optimizer), Hand(batches(4)))
    assert optimizer.cleared == 4


def test_parameters_of_a_group_added_between_bursts_lose_their_gradients_too() -> None:
    model = network()
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([first], lr=1e-3)
    step = made(model, optimizer=optimizer)
    burst(step, Hand(batches(2)))
    optimizer.add_param_group({"params": rest})
    burst(step, Hand(batches(2)))
    assert all(parameter.grad is None for parameter in model.parameters())
