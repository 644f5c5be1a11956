"""What converting promises: the same numbers in bounded memory, whole or nothing, and damage by name."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_tools.__main__ import main
from data_tools.convert import Layout, convert
from data_tools.rechunk import rechunk
from data_tools.reshuffle import reshuffle
from data_tools.split import split
from data_tools.synth import synth
from streamtrain.data.layout import parse_array
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError, EnvironmentProblem
from tests.data.stores import chunks_of, layout_of

DTYPES = ["bool", "int8", ">i4", "<u8", "float16", ">f8", "complex64"]


def saved(folder: Path, array: NDArray[Any], name: str = "source.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


def numbers(*shape: int, dtype: str = "int32") -> NDArray[Any]:
    return (np.arange(np.prod(shape)) % 251 + 1).reshape(shape).astype(dtype)


def stored(target: Path) -> Any:
    return zarr.open_array(str(target), mode="r")[...]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# The same numbers


@given(st.data())
def test_the_array_arrives_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("c")
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    chunks = data.draw(st.none() | st.tuples(*[st.integers(1, 10)] * len(shape)))
    shards = data.draw(st.none() | st.just(tuple(2 * c for c in chunks))) if chunks else None
    every = data.draw(st.integers(1, 4))
    layout = Layout(chunks=chunks, shards=shards, codec=data.draw(st.sampled_from(["raw", "zstd", "blosc"])))
    array = numbers(*shape, dtype=data.draw(st.sampled_from(DTYPES)))
    target = convert(saved(folder, array), folder / "t.zarr", every=every, layout=layout)
    expected = array[tuple(slice(None, None, every) for _ in shape)]
    found = stored(target)
    assert np.array_equal(found, expected)
    assert found.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 5, 16, 100])
def test_one_dimension_is_read_in_bands_of_any_size(
    rows: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.convert.BAND_BYTES", 40)
    array = numbers(61)
    convert(saved(tmp_path, array), tmp_path / "t", every=every, layout=Layout(chunks=(rows,)))
    assert np.array_equal(stored(tmp_path / "t"), array[::every])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=lambda save: save.__name__)
def test_members_of_an_archive_are_found_by_name(save: Any, tmp_path: Path) -> None:
    a, b = numbers(5, 3), numbers(4, dtype="float32")
    save(tmp_path / "two.npz", a=a, b=b)
    save(tmp_path / "one.npz", only=a)
    assert np.array_equal(stored(convert(tmp_path / "two.npz", tmp_path / "a", member="a")), a)
    assert np.array_equal(stored(convert(tmp_path / "two.npz", tmp_path / "b", member="b")), b)
    assert np.array_equal(stored(convert(tmp_path / "one.npz", tmp_path / "one")), a)
    for member, text in [(None, "holds 2 arrays"), ("c", "no array 'c'")]:
        with pytest.raises(ConfigError, match=text) as caught:
            convert(tmp_path / "two.npz", tmp_path / "t", member=member)
        assert caught.value.hint == "choose one of: a, b"


def test_arrays_of_one_folder_are_one_store(tmp_path: Path) -> None:
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    convert(tmp_path / "x.npy", tmp_path / "deep.zarr" / "fields" / "x")
    convert(tmp_path / "y.npy", tmp_path / "deep.zarr" / "y")
    found: Any = zarr.open_group(tmp_path / "deep.zarr", mode="r")
    np.testing.assert_array_equal(found["fields/x"][:], x)
    np.testing.assert_array_equal(found["y"][:], y)
    assert not (tmp_path / "zarr.json").exists()
    stream = ZarrStream(tmp_path / "deep.zarr", inputs="fields/x", targets="y", batch_size=4, output="numpy")
    asyncio.run(_same(stream, x, y))


async def _same(stream: ZarrStream, x: Any, y: Any) -> None:
    async for batch in stream:
        np.testing.assert_array_equal(batch.inputs, x[batch.index])
        np.testing.assert_array_equal(batch.targets, y[batch.index])


def test_a_store_whose_readers_would_not_see_the_array_is_refused_or_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "x.npy", np.arange(6))
    zarr.create_group(tmp_path / "two.zarr", zarr_format=2)
    with pytest.raises(ConfigError, match=r"two\.zarr is Zarr 2"):
        convert(tmp_path / "x.npy", tmp_path / "two.zarr" / "x")
    assert not (tmp_path / "two.zarr" / "x").exists()
    zarr.create_group(tmp_path / "three.zarr").create_array("y", data=np.arange(3))
    zarr.consolidate_metadata(tmp_path / "three.zarr")
    convert(tmp_path / "x.npy", tmp_path / "three.zarr" / "x")
    assert "three.zarr has consolidated metadata, in which the new array is not" in caplog.text


def test_a_store_that_stands_keeps_what_it_says_of_itself(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6))
    zarr.create_group(tmp_path / "s.zarr", attributes={"title": "old"})
    convert(tmp_path / "x.npy", tmp_path / "s.zarr" / "x")
    assert zarr.open_group(tmp_path / "s.zarr", mode="r").attrs["title"] == "old"
    np.save(tmp_path / "y.npy", np.arange(6))
    convert(tmp_path / "y.npy", tmp_path / "plain" / "y")
    assert not (tmp_path / "plain" / "zarr.json").exists()


def test_newer_headers_are_read(tmp_path: Path) -> None:
    array = numbers(4, 3)
    for version in [(1, 0), (2, 0), (3, 0)]:
        with (tmp_path / "v.npy").open("wb") as file:
            np.lib.format.write_array(file, array, version=version)
        assert np.array_equal(stored(convert(tmp_path / "v.npy", tmp_path / f"t{version[0]}")), array)


@pytest.mark.parametrize("shards", [None, (4, 3)])
def test_no_chunk_is_left_out_and_the_array_says_so(shards: Any, tmp_path: Path) -> None:
    source = saved(tmp_path, np.zeros((8, 3), dtype="float32"))
    layout = Layout(chunks=(2, 3), shards=shards, codec="raw")
    convert(source, tmp_path / "t", layout=layout, attributes={"about": "zeros", "streamtrain": 7})
    array = zarr.open_array(str(tmp_path / "t"), mode="r")
    assert array.attrs["about"] == "zeros"
    parsed = parse_array("", array.metadata.to_dict(), array.dtype, 0)
    assert parsed.complete
    assert all((tmp_path / "t" / parsed.key(chunk)).is_file() for chunk in chunks_of(parsed))


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
def test_the_fast_lanes_read_what_it_writes(codec: Any, tmp_path: Path) -> None:
    convert(saved(tmp_path, numbers(9, 4)), tmp_path / "g/x", layout=Layout(chunks=(2, 4), shards=(4, 4), codec=codec))
    layout = layout_of(tmp_path / "g")
    assert layout.slow is None
    assert layout.raw == (codec == "raw")


def test_progress_counts_kept_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = saved(tmp_path, numbers(20, 2))
    convert(source, tmp_path / "t", every=2, layout=Layout(chunks=(4, 1)), progress=lambda *given: seen.append(given))
    assert seen == [(4, 10), (8, 10), (10, 10)]


# Memory


@pytest.mark.parametrize(
    ("shape", "every", "chunks"),
    [
        ((4000, 4000), 1, (64, 4000)),
        ((4000, 4000), 3, (20, 1000)),
        ((16_000_000,), 1, (100_000,)),
        ((16_000_000,), 50, (100_000,)),
    ],
    ids=str,
)
def test_memory_holds_one_band_of_rows(
    shape: tuple[int, ...], every: int, chunks: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MB of source, 1 MB of band."""
    monkeypatch.setattr("data_tools.convert.BAND_BYTES", 1 << 20)
    np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.float32, shape=shape)
    convert(saved(tmp_path, numbers(4, 4)), tmp_path / "warm")
    tracemalloc.start()
    try:
        convert(tmp_path / "large.npy", tmp_path / "t", every=every, layout=Layout(chunks=chunks, codec="zstd"))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_default_chunks_are_whole_rows_of_16_mib() -> None:
    assert Layout().resolve((10_000, 1024), 4) == ((4096, 1024), None)
    assert Layout().resolve((10, 1024), 4) == ((10, 1024), None)
    assert Layout().resolve((10, 1 << 30), 4) == ((1, 1 << 30), None)


# Whole or nothing


KILLED = """
import sys
from pathlib import Path
from data_tools.convert import Layout, convert

def hold(done, rows):
    if done >= 20:
        print("held", flush=True)
        sys.stdin.read()

convert(Path(sys.argv[1]), Path(sys.argv[2]), layout=Layout(chunks=(10, 3), codec="raw"), progress=hold)
"""


def test_a_killed_conversion_leaves_no_store_and_the_next_one_sweeps_up_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    array = numbers(50, 3)
    source, target = saved(tmp_path, array), tmp_path / "out" / "odd [name]*.zarr"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child, child.stdin, child.stdout:
        assert child.stdout.readline() == b"held\n"
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    assert left(target.parent) == {f".{target.name}.{child.pid}.part"}
    assert len(list((target.parent / f".{target.name}.{child.pid}.part").rglob("c/*/*"))) == 2
    assert np.array_equal(stored(convert(source, target)), array)
    assert left(target.parent) == {target.name}
    assert caplog.messages == [f"{target} is not there: its writing was cut short, and starts anew"]


def test_a_conversion_that_is_under_way_elsewhere_is_not_swept(tmp_path: Path) -> None:
    other = tmp_path / f".t.{os.getppid()}.part"
    other.mkdir()
    convert(saved(tmp_path, numbers(3)), tmp_path / "t")
    assert other.exists()


@pytest.mark.parametrize("error", [DataError("x"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_whatever_interrupts_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def interrupt(done: int, rows: int) -> None:
        raise error

    source = saved(tmp_path, numbers(50, 3))
    with pytest.raises(type(error)):
        convert(source, tmp_path / "t", layout=Layout(chunks=(10, 3)), progress=interrupt)
    assert left(tmp_path) == {"source.npy"}


@pytest.mark.parametrize("tool", ["convert source.npy t --chunks 10,3", "synth t --rows 50 --chunk-rows 10"])
def test_ctrl_c_is_said_and_leaves_nothing(tool: str, tmp_path: Path) -> None:
    saved(tmp_path, numbers(50, 3))
    script = "import signal, sys\nfrom data_tools import __main__ as tools\n"
    script += "tools._progress = lambda done, rows: signal.raise_signal(signal.SIGINT)\n"
    script += "sys.exit(tools.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *tool.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 130
    assert done.stderr == "error: ended by SIGINT: the target is not there\nhint: the same command starts anew\n"
    assert left(tmp_path) == {"source.npy"}


def test_an_output_that_is_full_is_said_and_the_store_stands(tmp_path: Path) -> None:
    saved(tmp_path, numbers(5, 3))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "data_tools", "convert", str(tmp_path / "source.npy"), str(tmp_path / "t")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 5
    assert done.stderr.splitlines()[:2] == [
        "error: the output can't be written: No space left on device",
        "hint: what was made stands",
    ]
    assert stored(tmp_path / "t").shape == (5, 3)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; in a child, since it cannot be raised again."""
    source = saved(tmp_path, numbers(1000, 100))
    script = "import resource, sys; from data_tools.__main__ import main; "
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main(sys.argv[1:]))"
    arguments = ["convert", str(source), str(tmp_path / "t"), "--codec", "raw"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(f"error: cannot write {tmp_path / 't'}: ")
    assert "\nhint: " in done.stderr
    assert left(tmp_path) == {"source.npy"}


@pytest.mark.parametrize(
    "make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nothing")], ids=["folder", "file", "link"]
)
def test_what_exists_is_not_overwritten(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "t")
    with pytest.raises(ConfigError, match="exists already"):
        convert(saved(tmp_path, numbers(3)), tmp_path / "t")
    assert os.path.lexists(tmp_path / "t")


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def appear(done: int, rows: int) -> None:
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "theirs").touch()

    source = saved(tmp_path, numbers(3))
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        convert(source, tmp_path / "t", progress=appear)
    assert left(tmp_path) == {"t", "source.npy"}
    assert left(tmp_path / "t") == {"theirs"}


def test_a_target_below_a_file_is_the_environments_problem(tmp_path: Path) -> None:
    source = saved(tmp_path, numbers(3))
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        convert(source, source / "t")


# Sources that are wrong


def _npy(array: NDArray[Any], *, fortran: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asfortranarray(array) if fortran else array)
    return buffer.getvalue()


def _npz(content: bytes, name: str = "a.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def _header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


GOOD = _npy(numbers(40, 3))
ZIPPED = _npz(GOOD)
SOURCES = {
    "empty": (b"", "no array in numpy's format"),
    "garbage": (b"not numpy" * 9, "no array in numpy's format"),
    "cut": (GOOD[:-7], "is cut short: 473 of 480 bytes"),
    "header cut": (GOOD[:40], "no array in numpy's format"),
    "goes on": (GOOD + b"!", "goes on after its array"),
    "fortran": (_npy(numbers(4, 3), fortran=True), "holds Fortran order, which cannot be streamed"),
    "scalar": (_npy(np.array(3.0)), "holds a single number"),
    "objects": (_npy(np.array([None, 1])), "holds Python objects"),
    "text": (_npy(np.array(["a", "bc"])), "holds <U2, which can't be trained on"),
    "records": (_npy(np.zeros(3, dtype="i4,f8")), "which can't be trained on"),
    "dates": (_npy(np.zeros(3, dtype="M8[s]")), "which can't be trained on"),
    "long double": (_npy(np.zeros(3, dtype="longdouble")), "which can't be trained on"),
    "no rows": (_npy(np.zeros((0, 3))), r"shape \(0, 3\), without a sample"),
    "no columns": (_npy(np.zeros((3, 0))), r"shape \(3, 0\), without a sample"),
    "1e15 rows": (_header("(10**15, 4)".replace("10**15", str(10**15))), "is cut short: 0 of 16000000000000000 bytes"),
    "absurd": (_header(f"({10**40}, 4)"), "is cut short"),
    "negative": (_header("(-5, 4)"), "without a sample"),
    "no literal": (_header("(open('x'), 4)"), "no array in numpy's format"),
    "nested": (_header("(" * 3000 + ")" * 3000), "no array in numpy's format"),
    "bad dtype": (_header("(3,)", "nonsense"), "no array in numpy's format"),
}
ARCHIVES = {
    "empty": (b"", "is damaged or no .npy or .npz file"),
    "garbage": (b"not a zip" * 9, "is damaged or no .npy or .npz file"),
    "cut": (ZIPPED[:-30], "is damaged or no .npy or .npz file"),
    "bit flipped": (ZIPPED.replace(GOOD[-9:], b"\xff" * 9, 1), "is damaged or no .npy or .npz file: Bad CRC-32"),
    "member cut": (_npz(GOOD[:-7]), "is cut short"),
    "member goes on": (_npz(GOOD + b"!"), "goes on after its array"),
    "encrypted": (
        ZIPPED.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
        "encrypted",
    ),
    "foreign method": (ZIPPED.replace(b"\x14\x00\x00\x00\x00\x00", b"\x14\x00\x00\x00\x63\x00"), "damaged or no"),
}


def refused(source: Path, message: str, folder: Path) -> None:
    before = left(folder)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        convert(source, folder / "t", layout=Layout(codec="raw"))
    assert source.name in str(caught.value)
    assert caught.value.hint
    assert left(folder) == before


@pytest.mark.parametrize(("content", "message"), SOURCES.values(), ids=SOURCES)
def test_a_source_that_is_wrong_is_refused_by_name_and_nothing_is_left(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "source.npy").write_bytes(content)
    refused(tmp_path / "source.npy", message, tmp_path)


@pytest.mark.parametrize(("content", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_is_wrong_is_refused_by_name_and_nothing_is_left(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "source.npz").write_bytes(content)
    refused(tmp_path / "source.npz", message, tmp_path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "source.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    refused(tmp_path / "source.npy", "holds Python objects, which cannot be streamed", tmp_path)


def test_an_archive_without_arrays_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source.npz").write_bytes(_npz(b"hello", "readme.txt"))
    refused(tmp_path / "source.npz", "holds no arrays", tmp_path)


def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "pipe.npy", "is no regular file", tmp_path)
    refused(tmp_path / "folder.npy", "is no regular file", tmp_path)
    refused(tmp_path / "absent.npy", "does not exist", tmp_path)


@given(st.binary(max_size=120), st.booleans())
def test_no_header_gets_through_as_anything_but_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, after_magic: bool
) -> None:
    folder = tmp_path_factory.mktemp("h")
    text = b"\x93NUMPY\x01\x00" + len(noise).to_bytes(2, "little") + noise if after_magic else noise
    (folder / "source.npy").write_bytes(text)
    with pytest.raises(DataError):
        convert(folder / "source.npy", folder / "t")


# Layouts that do not fit


@pytest.mark.parametrize(
    ("layout", "every", "message"),
    [
        (Layout(chunks=(4,)), 1, r"chunks=\(4,\) does not fit an array of shape \(8, 3\)"),
        (Layout(chunks=(4, 0)), 1, r"chunks=\(4, 0\) does not fit"),
        (Layout(chunks=(4, 3), shards=(6, 3)), 1, r"shards=\(6, 3\) is no multiple of chunks=\(4, 3\)"),
        (Layout(chunks=(4, 3), shards=(8,)), 1, r"shards=\(8,\) does not fit"),
        (Layout(codec="lzma"), 1, "codec='lzma' is unknown"),  # type: ignore[arg-type]
        (Layout(), 0, "every=0 must be at least 1"),
        (Layout(), -2, "every=-2 must be at least 1"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, every: int, message: str, tmp_path: Path) -> None:
    source = saved(tmp_path, numbers(8, 3))
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "t", layout=layout, every=every)
    assert left(tmp_path) == {"source.npy"}


# The command line


def test_the_command_prints_where_the_store_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = saved(tmp_path, numbers(8, 3)), tmp_path / "t"
    assert main(["convert", str(source), str(target), "--chunks", "2,3", "--shards", "4,3", "--every", "2"]) == 0
    assert capsys.readouterr() == (f"{target}\n", "")
    assert np.array_equal(stored(target), numbers(8, 3)[::2, ::2])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["nonsense"], 2),
        (["convert"], 2),
        (["convert", "absent.npy", "t"], 3),
        (["convert", "source.npy", "t", "--chunks", "2;3"], 2),
        (["convert", "source.npy", "t", "--chunks", "2"], 2),
        (["convert", "source.npy", "t", "--every", "0"], 2),
        (["convert", "source.npy", "t", "--codec", "lzma"], 2),
        (["convert", "source.npy", "source.npy"], 2),
        (["convert", "source.npy", "source.npy/t"], 5),
        (["synth", "t", "--rows", "0"], 2),
        (["synth", "t", "--rows", "5", "--seed", "-1"], 2),
        (["synth", "t", "--rows", "9" * 22], 2),
        (["synth", "t", "--rows", "9", "--columns", "9" * 16], 2),
        (["synth", "t", "--rows", "9", "--chunk-rows", "9" * 12], 2),
        (["synth", "t", "--rows", str(1 << 38)], 5),
        (["convert", "source.npy", "nul\0"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_an_error_is_one_line_and_a_hint_and_its_code(
    arguments: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, numbers(8, 3))
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert left(tmp_path) == {"source.npy"}


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.asfortranarray(np.ones((4, 3))), "ascontiguousarray"),
        (np.array(3.0), "array[None]"),
        (np.array([None, 1]), "astype"),
        (np.array([None, 1]).reshape(1, 2, order="F"), "astype"),
    ],
    ids=["fortran", "scalar", "objects", "objects of two axes"],
)
def test_what_can_not_be_streamed_is_said_with_what_makes_it_so(array: Any, hint: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "a.npy", tmp_path / "t")
    assert hint in caught.value.hint


@pytest.mark.parametrize("made", [rechunk, reshuffle], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("link", [False, True])
def test_a_target_within_its_source_is_refused_before_anything_is_written(
    made: Any, link: bool, tmp_path: Path
) -> None:
    source = synth(tmp_path / "s", rows=20, columns=2)
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="lies within"):
        made(source, (tmp_path / "link" if link else source) / "inside" / "deep")
    with pytest.raises(ConfigError, match="lies within"):
        made((tmp_path / "link" if link else source) / "x", source)
    with pytest.raises(ConfigError, match="is the source itself"):
        made(source, tmp_path / "link" if link else source)
    assert sorted(tmp_path.rglob("*")) == before


def test_parts_within_their_source_or_each_other_are_refused(tmp_path: Path) -> None:
    source = synth(tmp_path / "s", rows=20, columns=2)
    before = sorted(tmp_path.rglob("*"))
    for targets in (
        [tmp_path / "a", source / "b"],
        [tmp_path / "a", tmp_path / "a/b"],
        [tmp_path / "a/b", tmp_path / "a"],
    ):
        with pytest.raises(ConfigError, match="lies within"):
            split(source, targets, fractions=[0.5, 0.5])
    assert sorted(tmp_path.rglob("*")) == before
