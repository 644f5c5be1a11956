"""What building from a configuration promises: a name that leads nowhere is named, with what was found instead."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import assembly
from streamtrain.callbacks.base import NEWS
from streamtrain.config import resolve
from streamtrain.config_tables import DataTable, Named
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.metrics import SHORT
from streamtrain.optimizers import build_optimizer
from streamtrain.said import Said, read
from streamtrain.schedulers import build_scheduler
from streamtrain.tasks import TaskLosses

MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, 1)

class Bare(nn.Module):
    pass

class Broken(nn.Module):
    def __init__(self):
        raise RuntimeError("no weights here")

def factory(width):
    return Net(width)

def nothing():
    return None

def leaves():
    raise SystemExit(3)

made = Net()
number = 3

def close(outputs, targets, scale=1.0):
    return scale * ((outputs - targets) ** 2).mean()
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nets_here.py").write_text(MODULE)
    (tmp_path / "nets_broken.py").write_text("x = 1\nimport no_such_package\n")
    (tmp_path / "nets_syntax.py").write_text("from torch import nn\nclass Net nn.Module:\n    pass\n")
    (tmp_path / "nets_indirect.py").write_text("import nets_syntax\n")
    (tmp_path / "nets_raise.py").write_text("def f():\n    return 1 / 0\nf()\n")
    (tmp_path / "nets_exit.py").write_text("raise SystemExit(5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("nets_")]:
        del sys.modules[name]


def made(target: str, **arguments: Any) -> nn.Module:
    said = Said({"data": {"store": "d"}, "model": {"target": target, "args": arguments}})
    return assembly.model(resolve(said), said)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("nets_here:Net", {}),
        ("nets_here:Net", {"width": 3}),
        ("nets_here:factory", {"width": 5}),
        ("nets_here:made", {}),
    ],
)
def test_a_model_is_a_class_a_function_or_a_module(target: str, arguments: dict[str, Any]) -> None:
    assert isinstance(made(target, **arguments), nn.Module)


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("nets_here:Nett", {}, "module nets_here has no Nett", "Did you mean Net?"),
    ("nets_here:Net.zz", {}, "module nets_here has no Net.zz", "Name Net itself: nets_here:Net."),
    ("nets_here:Net.forwards", {}, "module nets_here has no Net.forwards", "Did you mean Net.forward?"),
    ("nets_here:zz", {}, "module nets_here has no zz", "It has: Bare, Broken, Net, close, factory, leaves, made, n"),
    ("nets_her:Net", {}, "there is no module nets_her (for nets_her:Net)", "Modules are looked for in"),
    (
        "nets_broken:Net",
        {},
        "importing nets_broken (for nets_broken:Net) failed: ModuleNotFoundError: No",
        "Try `python",
    ),
    ("nets_raise:Net", {}, "importing nets_raise (for nets_raise:Net) failed: ZeroDivisionError: division", "Try"),
    ("nets_exit:Net", {}, "importing nets_exit (for nets_exit:Net) failed: SystemExit: 5", "Try"),
    ("nets_here:nothing", {}, "nets_here:nothing gave None of type NoneType, not a torch.nn.Module", "Name a"),
    ("nets_here:number", {}, "nets_here:number gave 3 of type int, not a torch.nn.Module", "Name a"),
    ("nets_here:Bare", {}, "nets_here:Bare gave a Bare without parameters: nothing to train", "Check that"),
    ("nets_here:Net", {"widht": 3}, "unknown key model.args.widht: nets_here:Net takes no", "Did you mean width?"),
    (
        "nets_syntax:Net",
        {},
        "importing nets_syntax (for nets_syntax:Net) failed: SyntaxError: invalid syntax (nets_syntax.py:2)",
        "Try",
    ),
    (
        "nets_indirect:Net",
        {},
        "importing nets_indirect (for nets_indirect:Net) failed: SyntaxError: invalid syntax (nets_syntax.py:2)",
        "Try",
    ),
    (
        "nets_here:factory",
        {},
        "nets_here:factory cannot be made: missing a required argument: 'width'",
        "Its arguments",
    ),
]


@pytest.mark.parametrize(("target", "arguments", "message", "hint"), WRONG)
def test_what_is_no_model_is_said(target: str, arguments: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(target, **arguments)
    assert str(caught.value).replace(f"{Path.cwd()}/", "").startswith(message)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nets_here:Broken", "nets_here:Broken raised RuntimeError: no weights here ("),
        ("nets_here:leaves", "nets_here:leaves raised SystemExit: 3 ("),
    ],
)
def test_what_a_model_raises_while_it_is_made_is_its_own_fault(target: str, message: str) -> None:
    with pytest.raises(UserCodeError) as caught:
        made(target)
    assert str(caught.value).startswith(message)


def test_an_import_error_inside_a_module_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made("nets_raise:Net")
    assert str(caught.value).endswith(f"({tmp_path / 'nets_raise.py'}:2)")


def test_losses_go_by_short_name_or_by_where_they_are() -> None:
    said, outputs, targets = Said(), torch.ones(3, 1), torch.zeros(3)
    named = assembly.loss(Named(name="MSE"), said)
    own = assembly.loss(Named.model_validate({"name": "nets_here:close", "scale": 2.0}), said)
    assert callable(named)
    assert callable(own)
    assert named(outputs, targets) == 1
    assert own(outputs, targets.reshape(3, 1)) == 2
    assert assembly.loss(None, said) is None


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        ({"name": "msee"}, "there is no loss 'msee'", "Did you mean mse? Known: "),
        (
            {"name": "huber", "detla": 1.0},
            "unknown key loss.detla: huber takes no such argument",
            "Did you mean delta?",
        ),
        ({"name": "nets_here:number"}, "nets_here:number is 3, which cannot be called", "Name a function or a class."),
    ],
)
def test_a_loss_that_is_none_is_said(table: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assembly.loss(Named.model_validate(table), Said())
    assert str(caught.value) == message
    assert caught.value.hint.startswith(hint)


def test_losses_and_metrics_of_outputs_are_made_by_name() -> None:
    tables = {
        "data": {"store": "d.zarr"},
        "model": "nets_here:Net",
        "loss": {"rain": "mse", "kind": {"name": "cross_entropy", "label_smoothing": 0.1}},
        "metrics": {"rain": {"mae": "mae"}, "kind": {"acc": "accuracy", "table": "confusion"}},
        "trainer": {"loss_weights": {"kind": 0.5}, "device": "cpu"},
    }
    trainer = assembly.build(resolve(Said(tables)), Said(tables)).trainer
    assert isinstance(trainer.loss, TaskLosses)
    assert trainer.loss.weights == {"rain": 1.0, "kind": 0.5}
    assert list(trainer.evaluator.metrics) == ["rain_mae", "kind_acc", "kind_table"]
    with pytest.raises(ConfigError, match="there is no metric 'mea'"):
        assembly.metrics({"rain": {"mae": Named(name="mea")}}, Said())
    with pytest.raises(ConfigError, match=r"unknown key loss\.kind\.smooth: cross_entropy takes no such argument"):
        assembly.loss({"kind": Named.model_validate({"name": "cross_entropy", "smooth": 1})}, Said())


@pytest.mark.parametrize("name", sorted(SHORT))
def test_every_metric_has_its_short_name(name: str) -> None:
    assert hasattr(assembly.metric(Named(name=name), Said(), "m"), "compute")


@pytest.mark.parametrize("name", sorted(assembly.CALLBACKS))
def test_every_callback_has_its_short_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # whatever is installed
    needed = {"RemoteLogger": {"url": "https://host"}}.get(name, {})
    made = assembly.callback(Named.model_validate({"name": name, **needed}), Said(), 0)
    assert type(made).__name__ == name


@pytest.mark.parametrize("name", sorted(assembly.CALLBACKS))
def test_no_shipped_callback_can_lag_behind_the_batches(name: str) -> None:
    """Only the progress bar hears of them, and only adds to sums."""
    kind = getattr(importlib.import_module(assembly.CALLBACKS[name]), name)
    news = [hook for hook in NEWS if callable(getattr(kind, hook, None))]
    assert news == (["on_batch_end"] if name == "ProgressBar" else [])
    assert all(inspect.iscoroutinefunction(getattr(kind, hook)) for hook in news)


def test_a_callback_with_a_wrong_argument_is_said_by_its_number() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key callbacks\.2\.evry: ModelCheckpoint takes no such argument$"):
        assembly.callback(Named.model_validate({"name": "ModelCheckpoint", "evry": "1epoch"}), Said(), 2)


def test_a_callback_without_a_hook_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^nets_here:Net gave a Net, which has none of the hooks$"):
        assembly.callback(Named(name="nets_here:Net"), Said(), 0)


def test_an_optimizer_may_be_named_by_where_it_is() -> None:
    said = Said({"data": "d", "model": "nets_here:Net"})
    tables = {**said.tables, "data": {"store": "d"}, "optimizer": {"name": "torch.optim:RMSprop", "momentum": 0.5}}
    spec = assembly.optimizer(resolve(Said(tables)), said)
    built = build_optimizer(nn.Linear(2, 1), spec, 1e-3)
    assert isinstance(built, torch.optim.RMSprop)
    assert built.defaults["momentum"] == 0.5
    assert built.defaults["lr"] == 1e-3


@pytest.mark.parametrize(
    ("tables", "where", "message"),
    [
        ('[optimizer]\nname = "adamv"\n', "5:1", "optimizer: unknown name 'adamv'"),
        ('[optimizer]\nname = "sgd"\nnesterow = true\n', "6:1", "optimizer: unknown key 'nesterow'"),
        ('[optimizer]\nname = "adam"\nlr = 1.0\nbetas = [0.9]\n', "7:1", "optimizer.betas must be 2 numbers"),
        ('[optimizer]\nrules = [["^9", { lr = 0.1 }]]\n', "5:1", "optimizer.rules[0]: '^9' names no parameter"),
        ('[optimizer.a]\nparams = "weight"\nname = "x"\n', "4:2", "optimizer.a: optimizer: unknown name 'x'"),
        ('[trainer]\nema = 0.9\nfreeze = "^9"\n', "6:1", "freeze: '^9' names no parameter"),
        ('[trainer]\ndevice = "gpu"\n', "5:1", "device must be"),
        ('[loss]\nname = "mse"\n[trainer]\nloss_weights = { a = 1.0 }\n', "7:1", "loss_weights are for losses by name"),
    ],
)
def test_what_the_trainer_refuses_is_said_where_the_file_has_it(
    tmp_path: Path, tables: str, where: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "nets_here:Net"\n[data]\nstore = "d.zarr"\n' + tables)
    said = read(str(path))
    with pytest.raises(ConfigError) as caught:
        assembly.build(resolve(said), said)
    assert str(caught.value).startswith(f"{path}:{where}: {message}")


def test_several_optimizers_are_tables_by_name_and_stay_so_in_the_resolved_configuration() -> None:
    tables = {"gen": {"name": "adam"}, "disc": {"name": "sgd", "momentum": 0.5, "params": "^d"}}
    config = resolve(Said({"data": {"store": "d"}, "model": {"target": "m:N"}, "optimizer": {**tables, "lr": 0.1}}))
    again = resolve(Said(tomllib.loads(config.dumps())))
    assert assembly.optimizer(config, Said()) == assembly.optimizer(again, Said()) == tables
    assert again.optimizer.lr == 0.1


def test_a_schedule_may_be_named_by_where_it_is_and_is_tried_before_training() -> None:
    named = Named.model_validate({"name": "torch.optim.lr_scheduler:StepLR", "step_size": 2, "interval": "epoch"})
    bound = build_scheduler(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), assembly.scheduler(named, Said()))
    assert bound.interval == "epoch"
    assert assembly.scheduler(None, Said()) is None
    with pytest.raises(ConfigError, match=r"^scheduler\.warmup must be like"):
        assembly.scheduler(Named.model_validate({"name": "cosine", "warmup": "3 parsecs"}), Said())


def test_the_current_folder_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assembly.make_importable(str(tmp_path))
    assert sys.path[0] == str(tmp_path)


def test_axes_by_number_are_numbers_also_where_keys_are_texts() -> None:
    table = DataTable(store="d", inputs="x", window={"time": 3, "1": 2}, select={"2": [0, 3]}, weights="w")
    made = assembly.stream(table, Said(), "data")
    assert made._asked.framing.window == {"time": 3, 1: 2}
    assert made._asked.framing.select == {2: (0, 3)}


def test_groups_and_schedules_are_said_in_toml_as_in_python(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'model = "nets_here:Net"\n[data]\nstore = "d"\n'
        '[optimizer]\nname = "muon"\nlr = 0.02\nno_decay = true\nrules = [["bias$", {lr = 0.5}]]\n'
        "adamw = {lr = 0.001}\n"
        '[scheduler]\nname = "wsd"\ninterval = "samples"\nwarmup = "100samples"\ndecay = 0.2\nshape = "sqrt"\n'
    )
    said = read(str(path))
    config = resolve(said)
    built = build_optimizer(nn.Linear(2, 2), assembly.optimizer(config, said), config.optimizer.lr)
    assert [(group["name"], group["lr"]) for group in built.param_groups] == [
        ("Muon", 0.02),
        ("rule 'bias$', AdamW, no decay", 0.5),
    ]
    bound = build_scheduler(built, assembly.scheduler(config.scheduler, said), total_samples=1000)
    bound.before_update(7, 0, 999)
    assert built.param_groups[0]["lr"] < 1e-3
    assert resolve(Said(tomllib.loads(config.dumps()))) == config
