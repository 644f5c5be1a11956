"""What an evaluation promises: means over samples, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import pytest
import torch
from torch import nn

from streamtrain.data.batch import Batch
from streamtrain.data.iterable import from_iterable
from streamtrain.device import mover
from streamtrain.errors import ConfigError, DataError, UserCodeError
from streamtrain.evaluation import Evaluator, Stopped, evaluating
from streamtrain.life import first_rng
from streamtrain.metrics import MeanAbsoluteError, as_metric
from streamtrain.outcome import Compute, Outcome, supervised
from streamtrain.threads import train_thread
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, samples

CPU = torch.device("cpu")


def evaluator(model: nn.Module, compute: Compute | None = None, **metrics: Any) -> Evaluator:
    made = {name: as_metric(metric) for name, metric in metrics.items()}
    return Evaluator(model, compute or supervised(model, nn.MSELoss()), made, move=mover(CPU), device=CPU)


async def run(judge: Evaluator, stream: Any, **options: Any) -> dict[str, float]:
    async with train_thread() as thread:
        stream = from_iterable(stream) if isinstance(stream, list) else stream
        return await judge.run(stream, thread, first_rng(0), **options)


async def test_means_weigh_by_samples_however_the_batches_are() -> None:
    model = network()
    inputs, targets = samples(50)
    model.eval()
    with torch.no_grad():
        loss = nn.MSELoss()(model(inputs), targets).item()
        error = (model(inputs) - targets).abs().mean().item()
    model.train()
    for size in (7, 50, 64):
        means = await run(evaluator(model, mae=MeanAbsoluteError()), Samples(50, size))
        assert means == {"loss": pytest.approx(loss), "mae": pytest.approx(error)}


async def test_a_metric_starts_anew_for_each_evaluation() -> None:
    judge = evaluator(network(), mae=MeanAbsoluteError)
    assert await run(judge, Samples(30)) == await run(judge, Samples(30))


async def test_two_evaluations_at_once_do_not_share_their_sums() -> None:
    judge = evaluator(network(), mae=MeanAbsoluteError())
    one, other = Samples(30, seed=1), Samples(50, 3, seed=2)
    one.gates[24] = asyncio.Event()
    both = asyncio.gather(run(judge, one), run(judge, other))
    await asyncio.wait([both], timeout=0.05)
    one.gates[24].set()
    apart = [await run(judge, Samples(30, seed=1)), await run(judge, Samples(50, 3, seed=2))]
    assert list(await both) == apart


def test_an_evaluator_serves_one_loop_after_another() -> None:
    judge = evaluator(network(), mae=MeanAbsoluteError())

    async def twice() -> list[dict[str, float]]:
        return list(await asyncio.gather(run(judge, Samples(30)), run(judge, Samples(30))))

    assert asyncio.run(twice()) == asyncio.run(twice())


async def test_a_batch_without_rows_counts_nothing() -> None:
    inputs, targets = samples(16)
    given = [(inputs[:8], targets[:8]), (inputs[:0], targets[:0]), (inputs[8:], targets[8:])]
    model = network()
    whole = await run(evaluator(model), [(inputs, targets)])
    assert await run(evaluator(model), given) == {"loss": pytest.approx(whole["loss"])}


async def test_a_limit_is_kept() -> None:
    seen = []

    def metric(outputs: Any, targets: Any) -> float:
        seen.append(len(outputs))
        return 0.0

    await run(evaluator(network(), metric=metric), Samples(50, 8), limit=3)
    assert seen == [8, 8, 8]


async def test_modes_are_put_back_one_by_one() -> None:
    model = network()
    model[3].eval()  # type: ignore[index]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.children()] == [True, True, True, False, True]
    await run(evaluator(model), Samples(20))
    assert [module.training for module in model.children()] == [True, True, True, False, True]


async def test_random_numbers_of_an_evaluation_are_its_own_and_the_same_each_time() -> None:
    class Noisy(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.rand(len(inputs), 1)

    model = Noisy()
    before = torch.get_rng_state()
    first, second = await run(evaluator(model), Samples(50, 3)), await run(evaluator(model), Samples(50, 3))
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


async def test_a_synchronous_source_is_pulled_on_the_train_thread() -> None:
    inputs, targets = samples(30)
    batches = [(inputs[i : i + 8], targets[i : i + 8]) for i in range(0, 30, 8)]
    model = network()
    assert await run(evaluator(model), from_iterable(batches)) == pytest.approx(
        await run(evaluator(model), Samples(30))
    )


async def test_a_stop_ends_it_between_two_bursts() -> None:
    stream = Samples(50)
    with pytest.raises(Stopped):
        await run(evaluator(network()), stream, stopping=lambda: True)


class Held(nn.Module):
    """A model that has entered a batch, and goes on once the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = network(), threading.Event()
        self.loop, self.entered = asyncio.get_running_loop(), asyncio.Event()

    def forward(self, inputs: torch.Tensor) -> Any:
        self.loop.call_soon_threadsafe(self.entered.set)
        self.gate.wait(60)
        return self.inner(inputs)


@pytest.mark.parametrize("how", ["natively", "by a scope"])
async def test_a_cancelled_evaluation_waits_for_its_burst(how: str) -> None:
    model, scope = Held(), anyio.CancelScope()
    async with train_thread() as thread:

        async def evaluate() -> None:
            with scope:
                await evaluator(model).run(Samples(50), thread, first_rng(0))

        task = asyncio.create_task(evaluate())
        await model.entered.wait()
        (task if how == "natively" else scope).cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        ended = task.done()
        model.gate.set()
        assert not ended
        await asyncio.wait([task])
        assert task.cancelled() == (how == "natively")
        assert model.training


async def test_what_goes_wrong_has_a_name() -> None:
    def broken(batch: Batch) -> Outcome:
        raise ValueError("no such layer")

    with pytest.raises(UserCodeError, match=r"in evaluation: .* ValueError: no such layer"):
        await run(evaluator(network(), broken), Samples(20))

    def divides(outputs: Any, targets: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(UserCodeError, match=r"in evaluation: the metric 'odd' raised ZeroDivisionError: division by"):
        await run(evaluator(network(), odd=divides), Samples(20))
    for value, told in (
        (1 / 3, None),
        (torch.ones((), dtype=torch.bfloat16), None),
        ("x", "ValueError"),
        (None, "TypeE"),
    ):
        summed = as_metric(MeanAbsoluteError())
        summed.compute = lambda value=value: value  # type: ignore[method-assign, misc]
        if told is None:
            assert (await run(evaluator(network(), odd=summed), Samples(20)))["odd"] == float(value)  # type: ignore[arg-type]
            continue
        with pytest.raises(UserCodeError, match=rf"in evaluation: the metric 'odd' \(its compute\) raised {told}"):
            await run(evaluator(network(), odd=summed), Samples(20))
    with pytest.raises(UserCodeError, match=r"the step's 'note' must be one number, not 'text'"):
        await run(evaluator(network(), lambda batch: Outcome(torch.ones(()), logged={"note": "text"})), Samples(20))
    with pytest.raises(DataError, match="gave no batch"):
        await run(evaluator(network()), from_iterable([]))
    with pytest.raises(ConfigError, match="metrics need outputs"):
        await run(evaluator(network(), lambda batch: Outcome(torch.ones(())), mae=MeanAbsoluteError()), Samples(20))


@pytest.mark.parametrize("nothing", [None, {}])
async def test_without_a_stream_there_is_nothing_to_evaluate(nothing: Any) -> None:
    """An empty table of means looked like a result."""
    fitted = Trainer(network(), nn.MSELoss(), device="cpu")
    for measure in (fitted.evaluate, fitted.validate):
        with pytest.raises(ConfigError, match="there is no stream to evaluate on"):
            await measure(nothing)
