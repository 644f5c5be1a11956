"""`python -m data_tools {convert,...}`: the command line of the tools, with the exit codes of streamtrain's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from streamtrain.errors import ConfigError, EnvironmentProblem, StreamtrainError

CODECS = ("raw", "zstd", "blosc")
Given = argparse.Namespace
Lines = Iterable[object]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"{self.prog} --help")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 128,512, got {text!r}") from None


def _named_sizes(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    return name, _sizes(sizes)


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(","))


def _names(text: str) -> list[str]:
    return text.split(",")


def _pair(text: str) -> tuple[float, float]:
    first, second = _fractions(text)
    return first, second


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_tools", description="Bring data into shape for streaming.")
    tools = parser.add_subparsers(dest="tool", required=True, parser_class=_Parser)
    for add in (_add_convert, _add_reshuffle, _add_rechunk, _add_split, _add_stats, _add_synth, _add_verify):
        add(tools)
    return parser


def _tool(tools: Any, name: str, run: Callable[[Given], Lines], text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = tools.add_parser(name, help=text, description=text)
    made.set_defaults(run=run)
    return made


def _codec(parser: argparse.ArgumentParser, default: str | None) -> None:
    text = "raw bytes can be mapped; zstd (level 1) is smaller" + ("" if default else "; default: as it is")
    parser.add_argument("--codec", default=default, choices=CODECS, help=text)


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", default="1GiB", help="how much may be taken; 1GiB by default")


def _sampled(parser: argparse.ArgumentParser) -> None:
    text = "those with a row for each sample; default: as long as most, if it is clear"
    parser.add_argument("--arrays", type=_names, metavar="A,B,...", help=text)


def _add_convert(tools: Any) -> None:
    made = _tool(tools, "convert", _convert, "a .npy or .npz array to Zarr, in bounded memory")
    made.add_argument("source", type=Path)
    made.add_argument("target", type=Path)
    made.add_argument("--member", help="the array in an .npz")
    made.add_argument("--every", type=int, default=1, help="keep each n-th element along each axis")
    made.add_argument("--chunks", type=_sizes, metavar="N,N,...", help="default: whole rows, 16 MiB of them")
    made.add_argument("--shards", type=_sizes, metavar="N,N,...", help="several chunks in one file")
    _codec(made, "zstd")


def _convert(given: Given) -> Lines:
    from data_tools.convert import Layout, convert

    layout = Layout(chunks=given.chunks, shards=given.shards, codec=given.codec)
    every: dict[str, Any] = {"member": given.member, "every": given.every}
    yield convert(given.source, given.target, **every, layout=layout, progress=_progress)


def _add_reshuffle(tools: Any) -> None:
    made = _tool(tools, "reshuffle", _reshuffle, "a store with its samples in random order, in bounded memory")
    made.add_argument("source", type=Path)
    made.add_argument("target", type=Path)
    made.add_argument("--seed", type=int, default=0)
    _sampled(made)
    _codec(made, None)
    _memory(made)


def _reshuffle(given: Given) -> Lines:
    from data_tools.reshuffle import reshuffle

    options: dict[str, Any] = {"seed": given.seed, "arrays": given.arrays, "codec": given.codec, "memory": given.memory}
    yield reshuffle(given.source, given.target, **options, progress=_progress)


def _add_rechunk(tools: Any) -> None:
    made = _tool(tools, "rechunk", _rechunk, "a store in other chunks, shards or codec, in bounded memory")
    made.add_argument("source", type=Path)
    made.add_argument("target", type=Path)
    for name in ("--chunks", "--shards"):
        text = "for one array or all; -1, and what is left out: the whole axis"
        made.add_argument(name, type=_named_sizes, action="append", metavar="[ARRAY=]N,N,...", help=text)
    _codec(made, None)
    _memory(made)


def _rechunk(given: Given) -> Lines:
    from data_tools.rechunk import rechunk

    if not (given.chunks or given.shards or given.codec):
        raise ConfigError("rechunk needs --chunks, --shards or --codec", hint="python -m data_tools rechunk --help")
    options: dict[str, Any] = {"chunks": dict(given.chunks or ()), "shards": dict(given.shards or ())}
    options |= {"codec": given.codec, "memory": given.memory}
    yield rechunk(given.source, given.target, **options, progress=_progress)


def _add_split(tools: Any) -> None:
    made = _tool(tools, "split", _split, "a store cut along axis 0 into several")
    made.add_argument("source", type=Path)
    made.add_argument("targets", type=Path, nargs="+")
    made.add_argument("--fractions", type=_fractions, required=True, metavar="A,B,...", help="a share for each target")
    _sampled(made)
    _codec(made, None)
    _memory(made)


def _split(given: Given) -> Lines:
    from data_tools.split import split

    options: dict[str, Any] = {"fractions": given.fractions, "arrays": given.arrays}
    options |= {"codec": given.codec, "memory": given.memory}
    return split(given.source, given.targets, **options, progress=_progress)


def _add_stats(tools: Any) -> None:
    made = _tool(tools, "stats", _stats, "mean, deviation, extremes and quantiles, into the arrays' attributes")
    made.add_argument("store", type=Path)
    made.add_argument("--arrays", type=_names, metavar="A,B,...", help="default: all")
    made.add_argument("--axis", type=int, help="statistics for each index along this axis: of channels")
    made.add_argument("--rows", type=_pair, default=(0.0, 1.0), metavar="A,B", help="the part that will be trained on")
    made.add_argument("--no-decode-cf", action="store_true", help="of the numbers as stored: no scale, no fill value")
    made.add_argument("--dry-run", action="store_true", help="write nothing")
    _memory(made)


def _stats(given: Given) -> Lines:
    import json

    from data_tools.stats import stats

    options: dict[str, Any] = {"arrays": given.arrays, "axis": given.axis, "rows": given.rows, "memory": given.memory}
    found = stats(given.store, **options, decode_cf=not given.no_decode_cf, write=not given.dry_run)
    return (f"{name or 'array'}: {json.dumps(one)}" for name, one in found.items())


def _add_synth(tools: Any) -> None:
    made = _tool(tools, "synth", _synth, "a made-up regression of any size, in bounded memory")
    made.add_argument("target", type=Path)
    made.add_argument("--rows", type=int, required=True)
    made.add_argument("--columns", type=int, default=512)
    made.add_argument("--chunk-rows", type=int, default=4096)
    made.add_argument("--shard-rows", type=int)
    _codec(made, "raw")
    made.add_argument("--seed", type=int, default=0)


def _synth(given: Given) -> Lines:
    from data_tools.synth import synth

    options = {name: getattr(given, name) for name in ("rows", "columns", "chunk_rows", "shard_rows", "codec", "seed")}
    yield synth(given.target, **options, progress=_progress)


def _add_verify(tools: Any) -> None:
    made = _tool(tools, "verify", _verify, "look for damage, a line each; exit 3 if there is any")
    made.add_argument("store", help="a path or a URL")
    made.add_argument("--deep", action="store_true", help="read every byte, not only sizes and indexes")
    text = "vouch for the files as they are, if nothing is damaged"
    made.add_argument("--write-manifest", action="store_true", help=text)


def _verify(given: Given) -> Lines:
    from streamtrain.data.verification import verify

    return verify(given.store, deep=given.deep, write=given.write_manifest, progress=_files)


def _progress(done: int, rows: int) -> None:
    _tell(done, rows, "rows")


def _files(done: int, files: int) -> None:
    if done % 64 == 0 or done == files:
        _tell(done, files, "files")


def _tell(done: int, everything: int, what: str) -> None:
    if sys.stderr.isatty():
        end = "" if done < everything else "\n"
        print(f"\r{done:,} of {everything:,} {what}", end=end, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one tool; returns the exit code (0 done, 2 usage, 3 data, 5 environment, 130 ended by Ctrl-C)."""
    try:
        given = _parser().parse_args(arguments)
        for line in given.run(given):
            print(line, flush=True)
    except OSError as error:
        if error.filename is None:
            hint = "what was made stands"
            return _say(EnvironmentProblem(f"the output can't be written: {error.strerror or error}", hint=hint))
        return _say(EnvironmentProblem(f"{error.filename}: {error.strerror or error}"))
    except MemoryError as error:
        hint = "give smaller chunks: one band of them is held"
        return _say(EnvironmentProblem(f"out of memory: {error}", hint=hint))
    except StreamtrainError as error:
        return _say(error)
    except KeyboardInterrupt:
        return _complain("ended by SIGINT: the target is not there", "the same command starts anew", 130)
    return 0


def _complain(message: str, hint: str, code: int) -> int:
    with suppress(OSError):  # nobody hears it
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
    return code


def _say(error: StreamtrainError) -> int:
    return _complain(str(error), error.hint, error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
