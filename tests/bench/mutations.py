"""Metadata and checkpoints that somebody has changed: each ends in an error of ours, or in right results, in bounds.

Of stores: `zarr.json`, `.zarray`, `.zgroup`, `.zmetadata`, `.zattrs`, the index of a shard (its checksum made anew) and
our own manifest. Right is what zarr itself reads there, or what was written. Of checkpoints: the JSON of the state,
of the manifest and of both tensor files' headers, with all digests made anew, so that nothing but the values themselves
can tell. Right is a run that goes on from what they say: from the same values to the same weights. No example may take
more than LIMIT seconds of a processor, or MEMORY bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from data_tools.synth import synth
from streamtrain import EarlyStopping, ModelCheckpoint, Trainer, ZarrStream, checkpoint
from streamtrain.errors import StreamtrainError
from tests.bench import life
from tests.bench.measure import Measure, Options
from tests.bench.mutants import texts

EXAMPLES, QUICK = 500, 100
LIMIT = 2.0
MEMORY = 256 << 20
"""Bytes over what the process has before."""
ROWS, COLUMNS, BATCH = 96, 3, 16
LARGEST = 16 << 20
"""Bytes of an array or a chunk that zarr is still asked to read."""
BATCHES = 8
"""So many are looked at."""


@dataclass
class Tally:
    """What became of the examples of one kind."""

    ends: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0
    wrong: list[str] = field(default_factory=list)

    def play(self, example: Callable[[], str], shown: object) -> None:
        """Run one, whatever it does."""
        before, began = _resident("VmRSS"), time.process_time()
        _forget_peak()
        try:
            self.ends[example()] += 1
        except StreamtrainError as error:
            self.ends["refused"] += 1
            if "\n" in str(error):
                self.wrong.append(f"an error of several lines: {error!r:.300}, of {shown!r:.300}")
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__}: {error!s:.200} at {Path(at.filename).name}:{at.lineno}"
            self.wrong.append(f"{where}, of {shown!r:.400}")
        seconds = time.process_time() - began
        if seconds > LIMIT:
            self.wrong.append(f"{seconds:.1f} s, of {shown!r:.400}")
        self.seconds = max(self.seconds, seconds)
        self.memory = max(self.memory, _resident("VmHWM") - before)


def run(options: Options) -> Iterator[Measure]:
    """Half of the examples of stores, half of checkpoints."""
    each = (QUICK if options.quick else EXAMPLES) // 2
    quieted = logging.getLogger("streamtrain")
    quieted.setLevel(logging.CRITICAL)
    try:
        with options.room() as room, warnings.catch_warnings(), bounded(MEMORY):
            warnings.simplefilter("ignore")
            for what, campaign in (("stores", of_stores), ("checkpoints", of_checkpoints)):
                tally = campaign(room, each)
                yield from report(what, tally, each)
    finally:
        quieted.setLevel(logging.NOTSET)


def report(what: str, tally: Tally, count: int) -> Iterator[Measure]:
    """How they ended."""
    for line in tally.wrong:
        print(f"{what}: {line}", file=sys.stderr, flush=True)
    yield Measure(name=f"{what}: mutations", values=(count,), at_least=count)
    yield Measure(name=f"{what}: other ends than our own error or what is right", values=(len(tally.wrong),), at_most=0)
    for end, number in sorted(tally.ends.items()):
        yield Measure(name=f"  {end}", values=(number,))
    yield Measure(name=f"{what}: most seconds of a processor", values=(tally.seconds,), at_most=LIMIT, unit=" s")
    yield Measure(
        name=f"{what}: most memory over that before",
        values=(tally.memory / (1 << 20),),
        at_most=MEMORY >> 20,
        unit=" MiB",
    )


def exploring(count: int, strategy: st.SearchStrategy[Any], play: Callable[[Any], None]) -> None:
    """Give `play` so many examples, the same in each run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    made = settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )
    made(given(strategy)(play))()


# ---- stores


@dataclass(frozen=True)
class Target:
    """A file that is changed, and how."""

    store: str
    file: str
    made: st.SearchStrategy[bytes]


def of_stores(room: Path, count: int) -> Tally:
    """Read each changed store, and hold what comes against zarr's own reading."""
    (room / "stores").mkdir()
    targets, data, tally = [], numbers(), Tally()
    for name, options in KINDS.items():
        path = written(room / "stores" / name, data, options)
        for file in sorted(p for p in path.rglob("*") if p.name in METADATA):
            at = str(file.relative_to(path))
            targets.append(Target(name, at, texts(json.loads(file.read_bytes()))))
    shard = (room / "stores" / "sharded" / "x" / "c" / "0" / "0").read_bytes()
    targets.append(Target("sharded", "x/c/0/0", shards(shard)))
    synth(room / "stores" / "ours", rows=ROWS, columns=COLUMNS, chunk_rows=10, codec="zstd", shard_rows=20)
    manifest = "x/.streamtrain/manifest"
    targets.append(Target("ours", manifest, manifests((room / "stores" / "ours" / manifest).read_bytes())))
    ours = np.asarray(zarr.open_array(str(room / "stores" / "ours" / "x"), mode="r")[...])

    def play(drawn: tuple[Target, bytes]) -> None:
        target, content = drawn
        path = room / "changed"
        shutil.copytree(room / "stores" / target.store, path)
        (path / target.file).write_bytes(content)
        expected = ours if target.store == "ours" else data
        tally.play(lambda: read(path, expected), (target.store, target.file, content))
        shutil.rmtree(path)

    drawn = st.sampled_from(targets).flatmap(lambda target: st.tuples(st.just(target), target.made))
    exploring(count, drawn, play)
    return tally


METADATA = ("zarr.json", ".zarray", ".zgroup", ".zmetadata", ".zattrs")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"chunks": (10, 2), "compressors": None},
    "zstd": {"chunks": (10, COLUMNS), "attributes": {"scale_factor": 2.0, "_FillValue": -1.0}},
    "sharded": {"chunks": (5, COLUMNS), "shards": (20, COLUMNS), "dimension_names": ("time", "level")},
    "old": {"chunks": (10, 2), "zarr_format": 2, "attributes": {"scale_factor": 2.0}},
    "consolidated": {"chunks": (10, COLUMNS), "zarr_format": 2},
}


def numbers() -> NDArray[np.float32]:
    """What is stored."""
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)


def written(path: Path, data: NDArray[np.float32], options: dict[str, Any]) -> Path:
    """A group of one array."""
    given = dict(options)
    group = zarr.create_group(path, zarr_format=given.pop("zarr_format", 3))
    group.create_array("x", data=data, **given)
    if path.name == "consolidated":
        zarr.consolidate_metadata(str(path))
    return path


@st.composite
def shards(draw: st.DrawFn, whole: bytes) -> bytes:
    """A shard with another index, and a checksum that fits; or cut."""
    count = 4
    size = 16 * count + 4
    if draw(st.integers(0, 9)) == 0:
        return whole[: draw(st.integers(0, len(whole)))]
    index = np.frombuffer(whole[-size:-4], "<u8").copy()
    for _ in range(draw(st.integers(1, 3))):
        value = draw(st.sampled_from([0, 1, 2**63, 2**64 - 1, 2**64 - 2, len(whole), len(whole) - 1, 2**40, 7]))
        index[draw(st.integers(0, len(index) - 1))] = value
    text: bytes = index.tobytes()
    checksum: int = google_crc32c.value(text)
    return whole[:-size] + text + checksum.to_bytes(4, "little")


@st.composite
def manifests(draw: st.DrawFn, whole: bytes) -> bytes:
    """Our manifest with bytes changed, cut or longer."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    end = draw(st.sampled_from(["as it is", "as it is", "cut", "longer"]))
    return bytes(data[: draw(st.integers(0, len(data)))] if end == "cut" else data + b"\1" * (8 * (end == "longer")))


def read(path: Path, expected: NDArray[np.float32]) -> str:
    """Some batches, as zarr reads them."""
    refused = 0
    for decode in ("auto", False):
        try:
            found = asyncio.run(batches(path, decode))
        except StreamtrainError:
            refused += 1
            if decode is False:
                raise
            continue
        if decode is False:
            return "refused as CF, else " * refused + judged(path, found, expected)
    raise AssertionError


async def batches(path: Path, decode: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Sample numbers and rows of the first ones."""
    found: list[tuple[NDArray[Any], NDArray[Any]]] = []
    given: dict[str, Any] = {"memory": "32MiB", "threads": 1, "output": "numpy", "decode_cf": decode}
    async with ZarrStream(path, inputs="x", batch_size=BATCH, read_timeout=30, **given) as stream:
        async for batch in stream:
            found.append((batch.index.copy(), batch.inputs.copy()))
            if len(found) == BATCHES:
                break
    return found


def judged(path: Path, found: list[tuple[NDArray[Any], NDArray[Any]]], expected: NDArray[np.float32]) -> str:
    """Right by what zarr reads, or by what was written. Raises AssertionError."""
    for index, rows in found:
        known = rows.dtype == expected.dtype and index.max(initial=0) < len(expected)
        if known and np.array_equal(rows, expected[index]):
            continue
        array: Any = zarr.open_group(path, mode="r")["x"]
        if max(math.prod(array.shape), math.prod(array.chunks)) * array.dtype.itemsize > LARGEST:
            return "read, of a size that zarr is not asked for"
        theirs = np.asarray(array.oindex[index])
        same = rows.shape == theirs.shape and rows.tobytes() == theirs.astype(rows.dtype).tobytes()
        assert same or np.array_equal(rows, theirs, equal_nan=True), "other values than zarr's"
    return "read rightly"


# ---- checkpoints


def of_checkpoints(room: Path, count: int) -> Tally:
    """Go on from each changed checkpoint."""
    tally, store = Tally(), synth(room / "store.zarr", rows=ROWS, columns=COLUMNS, chunk_rows=16)
    asyncio.run(train(store, room / "run", 3))
    whole = life.digest(checkpoint.read(newest(room / "run")).model)
    shutil.rmtree(room / "run")
    asyncio.run(train(store, room / "run", 2))
    base = newest(room / "run")
    files = {path.name: path.read_bytes() for path in base.iterdir()}

    def play(drawn: dict[str, bytes]) -> None:
        folder = room / "again"
        path = folder / "checkpoints" / base.name
        path.mkdir(parents=True)
        for name, content in sealed(drawn).items():
            (path / name).write_bytes(content)
        same = all(_said(drawn[name]) == _said(files[name]) for name in drawn)
        different = {name: content for name, content in drawn.items() if content != files[name]}
        tally.play(lambda: gone_on(store, folder, whole if same else None), different)
        shutil.rmtree(folder)

    exploring(count, forged(files), play)
    return tally


async def train(store: Path, folder: Path, epochs: int) -> None:
    """A run with much in its state, or the rest of it."""
    trainer = Trainer(
        life.network(COLUMNS),
        nn.MSELoss(),
        lr=1e-3,
        scheduler={"name": "exponential", "gamma": 0.9, "warmup": "3steps", "interval": "step"},
        ema=0.9,
        callbacks=[ModelCheckpoint(every="3steps", save_top_k=1), EarlyStopping("val_loss", patience=50)],
        run_dir=folder,
        seed=1,
        sanity_batches=0,
    )
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": BATCH, "memory": "8MiB", "threads": 1}
    stream = ZarrStream(store, shuffle="block", **given)
    judge = ZarrStream(store, split=(0, 2 * BATCH), **given)
    async with stream, judge:
        await trainer.fit(stream, validation=judge, max_epochs=epochs, max_steps=6 * epochs, resume="auto")


def newest(folder: Path) -> Path:
    """The last checkpoint."""
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def gone_on(store: Path, folder: Path, whole: str | None) -> str:
    """Train to the end from there."""
    asyncio.run(train(store, folder, 3))
    if whole is None:
        return "taken as it says"
    last = checkpoint.newest_valid(folder / "checkpoints")
    assert last is not None
    assert life.digest(checkpoint.read(last.path).model) == whole, "other weights at the end"
    return "gone on to the same weights"


@st.composite
def forged(draw: st.DrawFn, files: dict[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files, one of them changed; `manifest.json` is what `sealed` would write, or changed too."""
    name = draw(st.sampled_from([*files, "state.json", "state.json"]))
    content = files[name]
    if name.endswith(".json"):
        made = draw(texts(json.loads(content)))
    else:
        made = draw(headers(content))
    return {**files, name: made}


@st.composite
def headers(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of tensors with another header, its length right or not."""
    size = int.from_bytes(content[:8], "little")
    text = draw(texts(json.loads(content[8 : 8 + size])))
    claimed = draw(st.sampled_from([len(text)] * 8 + [0, 2**63, len(text) + 1, 10**8]))
    return claimed.to_bytes(8, "little") + text + content[8 + size :]


def sealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with a manifest whose digests fit, as far as it has any."""
    try:
        manifest = json.loads(files["manifest.json"])
        manifest.pop("sha256", None)
        listed = manifest["files"]
        for name in listed:
            if listed[name]["bytes"] == len(files[name]) or name == "state.json" or name.endswith(".safetensors"):
                listed[name] |= {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
        text = _canonical({**manifest, "sha256": hashlib.sha256(_canonical(manifest)).hexdigest()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return files  # nothing in it could fit
    return {**files, "manifest.json": text}


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _said(content: bytes) -> object:
    """What a JSON file says, however it is written; other files are their bytes."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(content)
    return content


# ---- bounds


@contextlib.contextmanager
def bounded(more: int) -> Iterator[None]:
    """The kernel refuses this process more than so many bytes over what it has (RLIMIT_DATA: all private memory)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_resident("VmData") + 2 * more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _resident(what: str) -> int:
    """Bytes by /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(what)


def _forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
