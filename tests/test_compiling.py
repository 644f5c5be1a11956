"""What `compile=` promises: the numbers of a compiled bare loop, the model's own names, nothing left behind."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import list_mode_options

from streamtrain.compiling import runs_in_graphs
from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError, EnvironmentProblem, UserCodeError
from streamtrain.trainer import Trainer
from tests.engine import Samples, bare_loop, network, pairs, same

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
"""torch's own, when it first compiles."""
QUICK = {"backend": "aot_eager"}
"""Traces as the others do, and needs no C++ compiler."""


def trainer(model: nn.Module | None = None, **options: Any) -> Trainer:
    return Trainer(model or network(), nn.MSELoss(), **{"seed": 5, "device": "cpu", "compile": QUICK, **options})


async def test_the_compilers_code_makes_a_compiled_bare_loops_weights() -> None:
    """Its random numbers are not those of torch's own kernels, therefore without dropout."""
    threads = set(threading.enumerate())
    fitted = trainer(network(dropout=0.0), compile=True)
    await fitted.fit(Samples(96))
    assert not set(threading.enumerate()) - threads
    bare = network(dropout=0.0)
    whole: Any = torch.compile(bare, options={"compile_threads": 1})
    bare_loop(whole, pairs(Samples(96), 1), seed=5)
    assert same(fitted.model, bare)


async def test_a_run_is_compiled_once_for_training_and_the_weights_are_the_bare_ones() -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return graph

    fitted = trainer(compile={"backend": backend, "dynamic": False})
    await fitted.fit(Samples(96), max_epochs=2)
    assert len(graphs) == 1
    assert same(fitted.model, bare_loop(network(), pairs(Samples(96), 2), seed=5))


async def test_names_copies_and_checkpoints_are_the_models_own(tmp_path: Path) -> None:
    whole = trainer()
    await whole.fit(Samples(), max_epochs=2)
    await trainer(run_dir=tmp_path).fit(Samples(), max_steps=7)
    again = trainer(run_dir=tmp_path)
    await again.fit(Samples(), max_epochs=2, resume="auto")
    assert same(whole.model, again.model)
    assert type(again.model) is nn.Sequential
    other = pickle.loads(pickle.dumps(again.model))
    assert same(other, again.model)
    assert other._compiled_call_impl is None
    assert same(copy.deepcopy(again.model), again.model)


async def test_a_forward_that_is_compiled_again_and_again_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    inputs, targets = Samples().inputs, Samples().targets
    batches = [(inputs[:size], targets[:size]) for size in (2, 3, 4, 5, 6, 7)]
    await trainer(compile={**QUICK, "dynamic": False}).fit(batches, max_epochs=2)
    assert caplog.text.count("the model was compiled") == 1


async def test_the_time_that_compiling_takes_is_not_an_updates() -> None:
    fitted = trainer()
    await fitted.fit(Samples(96), max_steps=1)
    assert fitted._run.life is not None
    assert fitted._run.life.step.seconds == 0.0


async def test_a_machine_without_a_compiler_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent/g++"))
    with pytest.raises(EnvironmentProblem, match=r"there is no /nonexistent/g\+\+") as caught:
        await trainer(compile=True, run_dir=tmp_path / "run").fit(Samples())
    assert "CXX" in caught.value.hint
    assert not (tmp_path / "run").exists()
    assert (await trainer().fit(Samples())).step == 13


async def test_a_compiler_that_fails_is_the_machines_fault() -> None:
    def broken(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no space left")

    with pytest.raises(EnvironmentProblem, match=r"step 1: the model could not be compiled: .*no space left"):
        await trainer(compile={"backend": broken}).fit(Samples())


async def test_a_forward_that_cannot_be_compiled_whole_is_the_models_fault() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Any:
            torch._dynamo.graph_break()
            return self.net(x)

    with pytest.raises(UserCodeError, match="the model could not be compiled: Unsupported"):
        await trainer(Breaks(), compile={**QUICK, "fullgraph": True}).fit(Samples())


async def test_blocks_that_are_computed_again_are_compiled_unless_they_keep_statistics() -> None:
    def deep(*norm: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(4, 4), *norm, nn.Dropout(0.25)) for _ in range(3)]
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*blocks), nn.Linear(4, 1))

    plain, both = trainer(deep(), compile=False), trainer(deep(), gradient_checkpointing=r"^1\.")
    await plain.fit(Samples(96))
    await both.fit(Samples(96))
    assert same(plain.model, both.model)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing of 1.0, which has running statistics"):
        trainer(deep(nn.BatchNorm1d(4)), gradient_checkpointing=r"^1\.")


async def test_the_average_is_validated_by_the_compiled_model() -> None:
    plain, both = trainer(compile=False, ema=0.9), trainer(ema=0.9)
    first = await plain.fit(Samples(96), validation=Samples(24))
    second = await both.fit(Samples(96), validation=Samples(24))
    assert first.metrics == second.metrics


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("fast", "unknown mode 'fast'"), ({"mod": "x"}, "unknown key 'mod'"), (3, "compile must be true, false, a mode")],
)
def test_what_torch_would_not_take_is_refused(wrong: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trainer(compile=wrong)


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_a_mode_is_what_torch_makes_of_it(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def compiled(call: Any, **options: Any) -> Any:
        given.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    trainer(compile=mode).model(torch.ones(8, 4))
    assert given == [{"options": {"compile_threads": 1, **list_mode_options(mode)}}]


class Graphs:
    """Memory as CUDA graphs have it: what was given since the last mark is written over at the next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marks, self._given = 0, list[Tensor]()
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self._mark)

    def _mark(self) -> None:
        self.marks += 1
        for tensor in self._given:
            tensor.detach().fill_(float("nan"))
        self._given.clear()

    def step(self, model: nn.Module, batch: Batch) -> Any:
        outputs = model(batch.inputs)
        loss = nn.functional.mse_loss(outputs, batch.targets)
        self._given += [outputs, loss]
        return {"loss": loss, "outputs": outputs, "twice": 2 * loss}

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        outputs = model(batch.inputs)
        self._given.append(outputs)
        return {"made": outputs}


class Keeping:
    """A metric that keeps what it is given until it is asked."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, outputs: Any, targets: Any) -> None:
        self.kept.append(outputs)

    def compute(self) -> float:
        return float(torch.cat(self.kept).sum())

    def merge(self, other: Keeping) -> None:
        self.kept += other.kept

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("accumulate", [1, 3])
async def test_what_is_kept_of_cuda_graphs_is_copied_before_their_next_run(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, logged numbers, outputs for metrics and predictions; within a group nothing is written over."""
    results, predictions = [], []
    for spec in (False, {"mode": "reduce-overhead", "backend": "eager"}):
        graphs = Graphs(monkeypatch)

        class Predicting(Trainer):
            def predict_step(self, model: nn.Module, batch: Batch) -> Any:
                return graphs.predict(model, batch)  # noqa: B023

        options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "metrics": {"sum": Keeping()}}
        fitted = Predicting(network(), step=graphs.step, compile=spec, seed=5, device="cpu", **options)
        await fitted.fit(Samples(96), validation=Samples(24, seed=2), max_epochs=1)
        assert graphs.marks == (12 // accumulate + 2 + 3 if spec else 0)  # two of the sanity check
        results.append(await fitted.validate(Samples(24)) | dict(fitted._run.life.metrics if fitted._run.life else {}))
        predictions.append([each["made"].clone() async for each in fitted.predict(Samples(24))])
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(*predictions, strict=True))


async def test_the_losses_of_manual_updates_are_copied_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)

    def step(model: nn.Module, batch: Batch, update: Any) -> None:
        update(graphs.step(model, batch)["loss"], "all")

    spec = {"all": {"name": "sgd", "params": ""}}
    given: Any = {"mode": "reduce-overhead", "backend": "eager"}
    fitted = Trainer(network(), step=step, optimizer=spec, compile=given, device="cpu")
    result = await fitted.fit(Samples(96))
    assert result.metrics["loss"] > 0
    assert graphs.marks == 12


@pytest.mark.parametrize(
    ("spec", "graphs"),
    [
        (None, False),
        ({}, False),
        ({"mode": "default"}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"options": {"triton.cudagraphs": False}}, False),
        ({"options": None}, False),
    ],
)
def test_cuda_graphs_are_asked_for_by_a_mode_or_an_option(spec: Any, graphs: bool) -> None:
    assert runs_in_graphs(spec) is graphs
