"""The house stands: floors, doors between rooms, names; a new file must be given its place here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamtrain

ROOT = Path(__file__).resolve().parents[1]
FLOORS = """
errors events spelling flags toml_text outlet log_file spikes stacks
data.batch data.source data.permutation data.cells data.splits data.chosen data.order data.ranks
data.daemons data.container data.budget data.codecs data.layout data.draws data.entropy
dense dotted losses means regression_metrics class_metrics ranking_metrics metrics tasks monitors
schedules learning_rate schedulers parameter_groups muon optimizers several_optimizers
data.spans data.seen data.described data.filters data.decode data.manifest data.trust data.contents data.regions
data.reading
data.files data.readers data.zarr_codecs data.zarr_lane data.cache data.queue data.workers
data.block data.ragged data.feed data.ragged_site data.ragged_parts data.ragged_feed data.coded_feed data.cf
data.values data.times data.crops data.selecting data.windows
data.cropping data.framing data.fetch data.bucket data.zarr_bytes data.remote_manifest data.remote data.remote_zarr
data.segments
data.disk_cache
data.kept_chunks data.wants data.parcels data.ahead data.readahead data.consolidated data.encodings data.opening
data.stores data.columns data.places data.selected data.choosing data.locating data.units data.ragged_sizes
data.scanning
data.options data.transform data.survey data.routes data.gathering data.together data.laying data.skipping
data.transforming
data.glance data.transform_child data.transform_processes data.vouching data.whole data.afar data.verification
data.crews data.pulling data.handing data.loader
data.canvas data.stitching data.coordinates data.predicted
data.iterable data.mix_pass data.mix
outside_changes unkept expanded untrained uncalled averaging compiling freezing toggled recomputing media options
progress
numpy_rng rng openmp malloc ending threads watchdog file_thread under_training grace signals control disk tensors device
tensor_file state
buffers foreign warm_start optimizer_state rollback switching checkpoint_files checkpoint run_folder status_file
data.asked data.passes data.finished data.finished_rows data.stream_statistics data.settling data.stream
own_rng overfitting streams blame outcome supply tally running_statistics flagged unrecorded step manual refusing
callbacks.base callbacks.naming callbacks.mailbox callbacks.bus early_stopping evaluation prediction taking_up
differences learned life
resume plan notes telling
callbacks.rolling callbacks.lines callbacks.json_logger callbacks.csv_logger callbacks.event_log callbacks.progress_bar
callbacks.media_folder callbacks.lr_monitor callbacks.needed callbacks.once callbacks.tensorboard
callbacks.resource_monitor callbacks.series callbacks.plots callbacks.profiler
callbacks.spool callbacks.sending callbacks.remote_logger callbacks.wandb_folder callbacks.wandb_rows
callbacks.wandb_logger callbacks.mlflow_logger
callbacks.model_checkpoint callbacks.defaults saving
objective parts checks keeping driving outside failure
loop fitting
trainer
config_tables said config assembly watch inspection peers bench fit_command run_commands importing demo proof
complaints cli
__main__
"""
"""A file imports only from the floors above it in this list (the ground floor comes first), and on its own floor only
from the files to its left."""
PLACES = {name: place for place, name in enumerate(FLOORS.split())}
ROOMS = {"", "callbacks", "data", "web"}
"""The `__init__` of these stand outside the floors: the package resolves its names on first use, rooms are empty."""
DATA_NEEDS = {"numpy", "zarr", "numcodecs", "anyio", "aiofiles", "psutil", "google_crc32c", "obstore"}
"""What the data room and the tools may import; google_crc32c comes with zarr, obstore with the extra."""
FORBIDDEN = re.compile(r"(util|utils|helper|helpers|common|core|manager|managers|misc)$")
PUBLIC = """
__version__ Batch Best Budget CSVLogger Callback CheckpointError ConfigError DataError EarlyStopping EnvironmentProblem
FitResult JSONLogger LearningRateMonitor MLflowLogger ModelCheckpoint NonFiniteError Plots Profiler ProgressBar
RemoteLogger ResourceMonitor Scheduler StreamtrainError TensorBoard Trainer UserCodeError Verdict WandbLogger
ZarrStream build_optimizer build_scheduler from_iterable mix
"""


def modules(package: str) -> dict[str, Path]:
    """The files of a package by their dotted name within it; "" and rooms for the `__init__`s."""
    folder = ROOT / package
    found = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for path, name in found.items()}


OURS, TOOLS = modules("streamtrain"), modules("data_tools")


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a file imports when it runs (not those for type checkers); `lazy`: in functions too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def ours(imported: str) -> str | None:
    """The module of streamtrain that an imported name lies in; None for all that is not ours."""
    if imported.partition(".")[0] != "streamtrain":
        return None
    name = imported.partition(".")[2]
    return name if name in OURS else name.rpartition(".")[0]


def test_every_file_has_its_floor_and_every_floor_its_files() -> None:
    assert set(PLACES) == set(OURS) - ROOMS
    assert set(OURS) >= ROOMS


@pytest.mark.parametrize("name", sorted(set(OURS) - ROOMS))
def test_a_file_imports_only_from_below(name: str) -> None:
    needed = {ours(imported) for imported in imports(OURS[name])} - {None, ""}
    above = {other for other in needed if PLACES.get(str(other), 10**6) >= PLACES[name]}
    assert not above, f"{name} imports {', '.join(map(str, above))}"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_doors_of_rooms_import_nothing_of_ours(room: str) -> None:
    assert {ours(imported) for imported in imports(OURS[room])} <= {None}


@pytest.mark.parametrize("name", sorted(name for name, place in PLACES.items() if place < PLACES["trainer"]))
def test_nothing_below_the_trainer_knows_it(name: str) -> None:
    if name in OURS:
        assert not re.search(r"\bTrainer\b", OURS[name].read_text())


@pytest.mark.parametrize("name", sorted(name for name in OURS if name.startswith("data")))
def test_the_data_room_needs_little_and_no_torch(name: str) -> None:
    """One door leads to tensors, opened only when a stream is to give them."""
    found = set(imports(OURS[name]))
    outside = {imported.partition(".")[0] for imported in found} - {"streamtrain"} - sys.stdlib_module_names
    assert outside <= DATA_NEEDS
    rooms = {other for other in map(ours, found) if other and not other.startswith("data.")}
    assert rooms <= ({"errors", "tensors"} if name == "data.settling" else {"errors"})
    assert "tensors" not in {ours(imported) for imported in imports(OURS[name], lazy=False)}


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_the_tools_know_the_data_room_and_errors(name: str) -> None:
    found = set(imports(TOOLS[name]))
    outside = {imported.partition(".")[0] for imported in found} - {"streamtrain", "data_tools"}
    assert outside - sys.stdlib_module_names <= DATA_NEEDS
    assert all(other is None or other == "errors" or other.startswith("data.") for other in map(ours, found))


def test_no_file_is_named_for_nothing() -> None:
    files = [
        path for folder in ("streamtrain", "data_tools", "tests", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    assert not [path for path in files if FORBIDDEN.search(path.stem.removeprefix("test_"))]
    assert not [path for path in files if any(FORBIDDEN.fullmatch(part) for part in path.relative_to(ROOT).parts)]


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(streamtrain.__all__) == sorted(PUBLIC.split())
    assert set(dir(streamtrain)) >= set(PUBLIC.split())


@pytest.mark.parametrize("name", PUBLIC.split())
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(streamtrain, name) is getattr(streamtrain, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'streamtrain' has no attribute 'Traner'"):
        _ = streamtrain.Traner  # type: ignore[attr-defined,unused-ignore]


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, streamtrain; print(sorted({'torch', 'numpy', 'zarr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_packages_that_only_one_callback_wants_are_not_imported_with_it() -> None:
    ours = [f"streamtrain.{name}" for name in PLACES if name.startswith("callbacks.")]
    wanted = {"tensorboard", "tensorboardX", "matplotlib", "wandb", "mlflow"}
    script = (
        f"import importlib, sys; [importlib.import_module(name) for name in {ours}]; print({wanted} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "set()\n"
