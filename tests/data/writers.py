"""Stores as other packages write them: `python -m tests.data.writers NAME FOLDER` writes them and what is in them.

Each writer runs in a process of its own, so that neither its threads nor its warnings meet the tests. Beside each
store lies `expected.npz`: every array by its path, as numpy had it before it was written.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""By path within the store."""
FORMATS: tuple[Literal[2, 3], ...] = (2, 3)
SHAPE = (23, 5, 6)
DTYPES = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]


def numbers(dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> NDArray[Any]:
    """Numbers that differ, with a part of zeros that many writers leave out."""
    data = np.random.default_rng(len(dtype) + len(shape)).integers(0, 100, shape)
    data[: shape[0] // 3] = 0
    return (data > 50 if dtype == "bool" else data).astype(dtype)


def by_zarr(folder: Path) -> Iterator[tuple[str, Arrays]]:
    """Its defaults, in both formats, nested and consolidated."""
    import zarr

    for zarr_format in FORMATS:
        data = {f"group/{dtype}": numbers(dtype) for dtype in DTYPES}
        root = zarr.create_group(folder / f"v{zarr_format}.zarr", zarr_format=zarr_format)
        for name, values in data.items():
            root.create_array(name, shape=SHAPE, chunks=(4, 5, 4), dtype=values.dtype)[...] = values
        zarr.consolidate_metadata(root.store)
        yield f"v{zarr_format}.zarr", data


def by_tensorstore(folder: Path) -> Iterator[tuple[str, Arrays]]:
    """Both formats; sharded with the index at either end, inner codecs and orders; big-endian; transposed."""
    import tensorstore

    for dtype in DTYPES:
        data = numbers(dtype)
        for driver in ("zarr", "zarr3"):
            spec: dict[str, Any] = {"schema": {"chunk_layout": {"chunk": {"shape": [4, 5, 4]}}}}
            _tensorstore(tensorstore, folder / f"{driver}.zarr" / dtype, driver, data, spec)
    yield "zarr.zarr", {dtype: numbers(dtype) for dtype in DTYPES}
    yield "zarr3.zarr", {dtype: numbers(dtype) for dtype in DTYPES}
    stored: Arrays = {}
    for name, metadata in _tensorstore_metadata().items():
        stored[name] = numbers("int16" if "int16" in name else "float32")
        _tensorstore(tensorstore, folder / "kinds.zarr" / name, "zarr3", stored[name], {"metadata": metadata})
    yield "kinds.zarr", stored
    stored = {"fortran": numbers(), "big": numbers("int16"), "zlib": numbers("uint32")}
    kinds: dict[str, dict[str, Any]] = {
        "fortran": {"order": "F", "compressor": {"id": "blosc", "cname": "zstd"}},
        "big": {"dtype": ">i2", "compressor": None, "dimension_separator": "/"},
        "zlib": {"compressor": {"id": "zlib", "level": 1}, "dtype": "<u4", "fill_value": 7},
    }
    for name, given in kinds.items():
        _tensorstore(
            tensorstore,
            folder / "kinds2.zarr" / name,
            "zarr",
            stored[name],
            {"metadata": {"chunks": [4, 5, 4], **given}},
        )
    yield "kinds2.zarr", stored


def _tensorstore(package: Any, path: Path, driver: str, data: NDArray[Any], spec: dict[str, Any]) -> None:
    kvstore = {"driver": "file", "path": str(path)}
    made = package.open(
        {"driver": driver, "kvstore": kvstore, **spec}, create=True, dtype=data.dtype, shape=data.shape
    ).result()
    made.write(data).result()
    group = path.parent / (".zgroup" if driver == "zarr" else "zarr.json")
    if driver == "zarr":
        group.write_text(json.dumps({"zarr_format": 2}))
    else:
        group.write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))


def _tensorstore_metadata() -> dict[str, dict[str, Any]]:
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    big: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "big"}}
    crc: dict[str, Any] = {"name": "crc32c"}
    turned = {"name": "transpose", "configuration": {"order": [2, 0, 1]}}
    blosc = {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"}}
    chains: dict[str, list[dict[str, Any]]] = {
        "gzip": [little, {"name": "gzip", "configuration": {"level": 1}}],
        "zstd-crc32c-int16": [little, {"name": "zstd", "configuration": {"level": 3}}, crc],
        "blosc": [little, blosc],
        "turned-big-int16": [turned, big],
    }
    found = {name: _metadata([4, 5, 4], chain) for name, chain in chains.items()}
    for location in ("start", "end"):
        for name, inner in chains.items():
            config = {
                "chunk_shape": [2, 5, 3],
                "codecs": inner,
                "index_codecs": [little, crc],
                "index_location": location,
            }
            shards = {"name": "sharding_indexed", "configuration": config}
            found[f"shards-{location}-{name}"] = _metadata([8, 5, 6], [shards])
    config = {"chunk_shape": [2, 5, 3], "codecs": [little], "index_codecs": [big, crc], "index_location": "end"}
    found["shards-big-index"] = _metadata([8, 5, 6], [{"name": "sharding_indexed", "configuration": config}])
    nested = {"name": "sharding_indexed", "configuration": {**config, "chunk_shape": [1, 5, 3]}}
    config = {"chunk_shape": [4, 5, 6], "codecs": [nested], "index_codecs": [little, crc]}
    found["shards-nested"] = _metadata([8, 5, 6], [{"name": "sharding_indexed", "configuration": config}])
    return found


def _metadata(chunk: list[int], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"chunk_grid": grid, "codecs": codecs, "dimension_names": ["time", "y", "x"]}


def by_xarray(folder: Path) -> Iterator[tuple[str, Arrays]]:
    """Coordinates, missing numbers, packed numbers: as it reads them back itself."""
    import xarray

    values = numbers("float64")
    values[5, 2] = np.nan
    dataset = xarray.Dataset(
        {
            "t2m": (("time", "y", "x"), values + 273.15),
            "rain": (("time", "y", "x"), numbers("float32")),
            "count": (("time",), numbers("int64", (23,))),
        },
        coords={"y": np.linspace(-1, 1, 5), "time": np.arange(23)},
    )
    packed = {"t2m": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 273.15, "_FillValue": -32767}}
    for zarr_format in FORMATS:
        for consolidated in (False, True):
            name = f"v{zarr_format}{'-consolidated' * consolidated}.zarr"
            dataset.to_zarr(folder / name, zarr_format=zarr_format, consolidated=consolidated, encoding=packed)
            with xarray.open_zarr(folder / name, consolidated=consolidated, chunks=None) as found:
                yield name, {str(each): found[each].values for each in ("t2m", "rain", "count", "y", "time")}


def by_anndata(folder: Path) -> Iterator[tuple[str, Arrays]]:
    """A dense matrix with layers and columns of observations; its default format, and chunked by rows."""
    import anndata
    import pandas

    frame = pandas.DataFrame({"age": numbers("int32", (23,)), "kind": pandas.Categorical(list("abc" * 7 + "ab"))})
    frame.index = frame.index.astype(str)
    x, counts = numbers("float32", (23, 7)), numbers("uint16", (23, 7))
    made = anndata.AnnData(X=x, obs=frame, layers={"counts": counts}, obsm={"pca": numbers("float64", (23, 3))})
    codes = frame["kind"].cat.codes.to_numpy()
    expected = {"X": x, "layers/counts": counts, "obsm/pca": made.obsm["pca"], "obs/age": numbers("int32", (23,))}
    for name, chunks in (("default.zarr", None), ("rows.zarr", (4, 7))):
        made.write_zarr(folder / name, chunks=chunks)
        yield name, {**expected, "obs/kind/codes": codes}


def by_dask(folder: Path) -> Iterator[tuple[str, Arrays]]:
    """Blocks of a dask array as chunks."""
    import dask.array
    import zarr

    blocks_of: Any = dask.array.from_array
    store_blocks: Any = dask.array.store
    expected = {"x": numbers("float32"), "y": numbers("int16")}
    for zarr_format in FORMATS:
        store = folder / f"v{zarr_format}.zarr"
        zarr.create_group(store, zarr_format=zarr_format)
        for name, values in expected.items():
            blocks = blocks_of(values, chunks=(4, 5, 3))
            target = zarr.create_array(
                store, name=name, shape=values.shape, chunks=(4, 5, 3), dtype=values.dtype, zarr_format=zarr_format
            )
            store_blocks(blocks, target, lock=False)
        yield store.name, expected
    blocks_of(expected["x"], chunks=(4, 5, 3)).to_zarr(str(folder / "to_zarr.zarr"), component="x")
    yield "to_zarr.zarr", {"x": expected["x"]}


def by_ome_zarr(folder: Path) -> Iterator[tuple[str, Arrays]]:
    """An image of five axes in scales, in the formats 0.4 (Zarr 2) and 0.5 (Zarr 3)."""
    import ome_zarr.format
    import ome_zarr.writer
    import zarr

    image = numbers("uint16", (3, 2, 4, 32, 32))
    for version in (ome_zarr.format.FormatV04(), ome_zarr.format.FormatV05()):
        store = folder / f"{version.version}.zarr"
        group = zarr.create_group(store, zarr_format=version.zarr_format)
        ome_zarr.writer.write_image(image, group, axes="tczyx", fmt=version)
        yield store.name, {"0" if (store / "0").exists() else "s0": image}


WRITERS: dict[str, Callable[[Path], Iterator[tuple[str, Arrays]]]] = {
    "zarr": by_zarr,
    "tensorstore": by_tensorstore,
    "xarray": by_xarray,
    "anndata": by_anndata,
    "dask": by_dask,
    "ome_zarr": by_ome_zarr,
}


def main(name: str, folder: str) -> None:
    """Write all stores of one writer."""
    warnings.simplefilter("ignore")
    for store, arrays in WRITERS[name](Path(folder)):
        np.savez(Path(folder) / f"{store}.npz", **{key.replace("/", "|"): value for key, value in arrays.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
