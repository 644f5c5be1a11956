"""`python -m data_tools {convert,synth}`: the command line of the tools, with the exit codes of streamtrain's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from streamtrain.errors import ConfigError, StreamtrainError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"{self.prog} --help")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_tools", description="Bring data into shape for streaming.")
    tools = parser.add_subparsers(dest="tool", required=True, parser_class=_Parser)
    codec = {"choices": ("raw", "zstd", "blosc"), "help": "raw bytes can be mapped; zstd (level 1) is smaller"}

    convert = tools.add_parser("convert", help="a .npy or .npz array to Zarr, in bounded memory")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--member", help="the array in an .npz")
    convert.add_argument("--every", type=int, default=1, help="keep each n-th element along each axis")
    convert.add_argument("--chunks", type=_sizes, metavar="N,N,...", help="default: whole rows, 16 MiB of them")
    convert.add_argument("--shards", type=_sizes, metavar="N,N,...", help="several chunks in one file")
    convert.add_argument("--codec", default="zstd", **codec)  # type: ignore[arg-type]

    synth = tools.add_parser("synth", help="a made-up regression of any size, in bounded memory")
    synth.add_argument("target", type=Path)
    synth.add_argument("--rows", type=int, required=True)
    synth.add_argument("--columns", type=int, default=512)
    synth.add_argument("--chunk-rows", type=int, default=4096)
    synth.add_argument("--shard-rows", type=int)
    synth.add_argument("--codec", default="raw", **codec)  # type: ignore[arg-type]
    synth.add_argument("--seed", type=int, default=0)
    return parser


def _progress(done: int, rows: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {rows:,} rows", end="" if done < rows else "\n", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one tool; returns the exit code (0 done, 2 usage, 3 data, 5 environment)."""
    try:
        given = _parser().parse_args(arguments)
        if given.tool == "convert":
            from data_tools.convert import Layout, convert

            layout = Layout(chunks=given.chunks, shards=given.shards, codec=given.codec)
            made = convert(
                given.source, given.target, member=given.member, every=given.every, layout=layout, progress=_progress
            )
        else:
            from data_tools.synth import synth

            made = synth(
                given.target,
                rows=given.rows,
                columns=given.columns,
                chunk_rows=given.chunk_rows,
                shard_rows=given.shard_rows,
                codec=given.codec,
                seed=given.seed,
                progress=_progress,
            )
    except StreamtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
