"""The command line: what each command takes, and its exit code.

Its law: nothing heavy is imported before a command needs it, so that help is quick and loads no torch, numpy or zarr.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import signal
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from streamtrain import __version__
from streamtrain.complaints import complain, say, usage_error
from streamtrain.errors import ConfigError, EnvironmentProblem
from streamtrain.flags import Flags, RunFlags, StreamFlags, assignments, normalise, parse_value
from streamtrain.outlet import last_words
from streamtrain.signals import Interrupted
from streamtrain.spelling import shown

if TYPE_CHECKING:
    from streamtrain.said import Said

EXAMPLES = """\
Examples:
  streamtrain demo
  streamtrain fit --data era5.zarr --inputs t2m --targets rain --model nets:Net
  streamtrain fit config.toml --set optimizer.lr=0.001 --resume auto
"""
CODES = """\
Exit codes: 0 done; 1 internal; 2 usage or configuration; 3 data; 4 checkpoint;
5 environment (disk, memory, device, a read that hangs); 6 not finite; 7 user
code; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM after saving.
"""
STANDS = "What was done before stands."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DEBUG = "--debug, with any command, adds the traceback of an error."

app = App(
    name="streamtrain",
    help="Train on data that does not fit in memory: Zarr in, a trained model out.",
    help_epilogue=f"{EXAMPLES}\n{CODES}{DEBUG}",
    help_format="plaintext",
    help_formatter="plain",
    version=__version__,
    version_flags=["--version"],
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    help_on_error=False,
    suppress_keyboard_interrupt=False,
)
app["--help"].help = "Say how to use a command."
app["--version"].help = "Say the version."
command = functools.partial(app.command, help_epilogue=DEBUG)


def option(text: str, *names: str) -> Parameter:
    """An option, with its help; values are checked by us."""
    return Parameter(name=names or None, help=text, negative=(), show_default=False)


@command
def demo(
    *,
    out: Annotated[Path, option("folder of the run and its data; runs/demo by default")] = Path("runs/demo"),
    quick: Annotated[bool, option("a small world and a small model: seconds")] = False,
    max_epochs: Annotated[str | None, option("passes over the data, at most")] = None,
    prove: Annotated[bool, option("kill it three times, and compare with an undisturbed run: a minute or two")] = False,
) -> int:
    """Learn the map of the world from disk; again: carry on."""
    if max_epochs is not None and not re.fullmatch("[0-9]*[1-9][0-9]*", max_epochs):
        raise ConfigError(
            f"--max-epochs must be an integer of at least 1, got {shown(max_epochs)}", hint="For instance 3."
        )
    if prove:
        if max_epochs is not None:
            raise ConfigError("--prove trains whole epochs, as many as it needs", hint="Leave --max-epochs out.")
        from streamtrain.proof import prove as prove_it

        return prove_it(out=out / "proof", quick=quick)
    from streamtrain.demo import run
    from streamtrain.log_file import logged

    with logged(logging.INFO):
        return run(out=out, quick=quick, max_epochs=None if max_epochs is None else int(max_epochs))


@command
def fit(
    config: Annotated[str | None, Parameter(help="a TOML file; options win over what it says")] = None,
    /,
    *,
    set_: Annotated[list[str] | None, option("set any key of the configuration: a.b=value", "--set")] = None,
    dry_run: Annotated[bool, option("check everything, train and write nothing")] = False,
    print_config: Annotated[bool, option("print the resolved configuration and end")] = False,
    log_level: Annotated[str | None, option("debug, info, warning or error, for stderr")] = None,
    log_file_level: Annotated[str | None, option("the same for log.txt and log.jsonl; info or more")] = None,
    profile: Annotated[bool, option("profile steps 10 to 30 into the run's folder")] = False,
    quiet: Annotated[bool, option("only warnings and errors", "--quiet", "-q")] = False,
    verbose: Annotated[bool, option("say more on stderr", "--verbose", "-v")] = False,
    flags: Annotated[Flags | None, Parameter(name="*")] = None,
) -> int:
    """Train a model, as a file and options say.

    Ctrl-C or SIGTERM finishes the step, saves and ends; a second one ends at
    once. --resume auto carries on.
    """
    from streamtrain.config import resolve
    from streamtrain.said import Said, read

    said = Said() if config is None else read(config)
    for origin, key, value in (*_sets(set_ or ()), *assignments(flags)):
        said.assign(origin, key, value)
    resolved = resolve(said)
    if print_config:
        print(resolved.dumps(), end="")
        return 0
    from streamtrain import fit_command

    level = fit_command.log_level(log_level, quiet=quiet, verbose=verbose)
    if dry_run:
        _print(fit_command.rehearse(resolved, said, level=level))
        return 0
    to_file = fit_command.log_level(log_file_level, quiet=False, verbose=False, option="--log-file-level")
    code, report, done = fit_command.run(resolved, said, level=level, quiet=quiet, to_file=to_file, profile=profile)
    try:
        with last_words(code) if code > 128 else nullcontext():
            _print(() if quiet else report)
    except OSError as error:
        if not _unread(error):
            error.add_note(done)
            raise
        _drop_stdout()  # a signal that ended the run is told all the same
    return code


RUN = Parameter(help="a run's folder, a checkpoint, or a configuration")
CHECKPOINT = option("auto (the newest), best or the path of a checkpoint")
SET = option("set any key of the configuration: a.b=value", "--set")


@command
def validate(
    run: Annotated[str, RUN],
    /,
    *,
    checkpoint: Annotated[str | None, CHECKPOINT] = None,
    json: Annotated[bool, option("print one JSON object")] = False,
    set_: Annotated[list[str] | None, SET] = None,
    flags: Annotated[RunFlags | None, Parameter(name="*")] = None,
) -> int:
    """Measure a checkpoint on the run's validation data, or others."""
    return _measure("validate", run, checkpoint, json, set_, flags)


@command
def evaluate(
    run: Annotated[str, RUN],
    /,
    *,
    checkpoint: Annotated[str | None, CHECKPOINT] = None,
    json: Annotated[bool, option("print one JSON object")] = False,
    set_: Annotated[list[str] | None, SET] = None,
    flags: Annotated[RunFlags | None, Parameter(name="*")] = None,
) -> int:
    """The same as a test: named test_..., and kept in the run's log."""
    return _measure("evaluate", run, checkpoint, json, set_, flags)


def _measure(
    kind: Literal["validate", "evaluate"],
    run: str,
    checkpoint: str | None,
    json: bool,
    sets: list[str] | None,
    flags: RunFlags | None,
) -> int:
    from streamtrain import run_commands

    found = run_commands.find(run, checkpoint)
    typed = [*_sets(sets or ()), *assignments(flags)]
    _print(run_commands.in_words(run_commands.measure(found, kind, typed, level=logging.INFO), as_json=json))
    return 0


@command
def predict(
    run: Annotated[str, RUN],
    /,
    *,
    out: Annotated[str, option("the Zarr store that is written")],
    overwrite: Annotated[bool, option("replace a store that stands there")] = False,
    checkpoint: Annotated[str | None, CHECKPOINT] = None,
    set_: Annotated[list[str] | None, SET] = None,
    flags: Annotated[RunFlags | None, Parameter(name="*")] = None,
) -> int:
    """Write a checkpoint's predictions of all the data, or of others."""
    from streamtrain import run_commands

    found = run_commands.find(run, checkpoint)
    typed = [*_sets(set_ or ()), *assignments(flags)]
    written = run_commands.predict(found, out, typed, overwrite=overwrite, level=logging.INFO)
    _print([f"predictions are in {written}"])
    return 0


@command
def inspect(
    data: Annotated[str, Parameter(help="path or URL of a Zarr store")],
    /,
    *,
    flags: Annotated[StreamFlags | None, Parameter(name="*")] = None,
) -> int:
    """Show arrays, what a pass costs, what to change."""
    from streamtrain.inspection import inspect
    from streamtrain.log_file import logged

    with logged(logging.WARNING):
        _print(inspect(_stream_said(data, flags)))
    return 0


@command
def bench(
    data: Annotated[str, Parameter(help="path or URL of a Zarr store")],
    /,
    *,
    seconds: Annotated[str, option("how long to read; 10 by default")] = "10",
    json: Annotated[bool, option("print one JSON object")] = False,
    compare: Annotated[str | None, option("others beside it: zarr,dataloader,xbatcher,annbatch")] = None,
    flags: Annotated[StreamFlags | None, Parameter(name="*")] = None,
) -> int:
    """Measure the loader alone, or beside others."""
    from streamtrain.peers import NEEDS

    others = [name.strip() for name in compare.split(",")] if compare is not None else []
    for name in others:
        if name not in NEEDS:
            raise ConfigError(f"--compare knows no {shown(name)}", hint=f"It knows {', '.join(NEEDS)}.")
    limit = parse_value(seconds)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        raise ConfigError(f"--seconds must be a finite number above 0, got {seconds!r}", hint="For instance 10.")
    from streamtrain.bench import bench, in_words
    from streamtrain.log_file import logged

    with logged(logging.INFO):
        measured = bench(_stream_said(data, flags), seconds=float(limit), compare=others)
    _print([measured.dumps()] if json else in_words(measured))
    return 0


@command
def checkpoints(run: Annotated[Path, Parameter(help="a run's folder")], /) -> int:
    """Verify a run's checkpoints; exit 4 if none is valid."""
    folder = run if run.name == "checkpoints" else run / "checkpoints"
    hint = "Give a run's folder, such as runs/demo."
    if not run.is_dir():
        raise ConfigError(f"{run} is {'no folder' if os.path.lexists(run) else 'not there'}", hint=hint)
    from streamtrain.checkpoint import scan
    from streamtrain.errors import CheckpointError

    entries = scan(folder)
    if not entries:
        raise CheckpointError(f"there is no checkpoint in {folder}", hint=hint)
    for entry in entries:
        state = "ok" if entry.problem is None else f"damaged: {entry.problem}"
        print(f"{entry.name}  step {entry.step}  {entry.bytes} bytes  {state}", flush=True)
    if all(entry.problem is not None for entry in entries):
        raise CheckpointError(
            f"none of the {len(entries)} checkpoints in {folder} is valid", hint="Put an intact copy there."
        )
    return 0


@command
def verify(
    data: Annotated[str, Parameter(help="a Zarr store: a path or a URL")],
    /,
    *,
    deep: Annotated[bool, option("read every byte, not only sizes and indexes")] = False,
    write_manifest: Annotated[bool, option("vouch for the files as they are, if nothing is damaged")] = False,
) -> int:
    """Look for damage in a store, a line each; exit 3 if there is any."""
    from streamtrain.data import verification

    for line in verification.verify(data, deep=deep, write=write_manifest):
        print(line, flush=True)
    return 0


@app.command(name="import-pt", help_epilogue=DEBUG)
def import_pt(
    file: Annotated[Path, Parameter(help="a .pt, .pth, .ckpt or .bin of torch.save, or .safetensors")],
    out: Annotated[Path, Parameter(help="the checkpoint that is written, or a run's folder")],
    /,
    *,
    model: Annotated[str | None, option("pkg.mod:Name of the model that the weights must fit")] = None,
    partial: Annotated[bool, option("fit in part: leave out what does not")] = False,
) -> int:
    """Bring in a foreign file's weights: a checkpoint to begin with.

    Nothing in the file is run. `fit --model-weights OUT` begins with them.
    """
    from streamtrain.importing import bring_in
    from streamtrain.log_file import logged

    with logged(logging.INFO):
        written = bring_in(file, out, model=model, partial=partial)
    _print([f"{written} holds the weights; begin with them by --model-weights {written}"])
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    before_end = tokens[: tokens.index("--")] if "--" in tokens else tokens
    debug = "--debug" in before_end
    tokens = [token for at, token in enumerate(tokens) if token != "--debug" or at >= len(before_end)]
    for stream in (sys.stdout, sys.stderr):  # a locale without UTF-8 must not stop anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _command(tokens)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        signum = interrupt.signum if isinstance(interrupt, Interrupted) else signal.SIGINT
        with last_words(128 + signum):
            complain(
                f"ended by {signal.Signals(signum).name}", "The same command starts over.", interrupt if debug else None
            )
        return 128 + signum
    except Exception as error:
        if isinstance(error, OSError) and _unread(error):
            _drop_stdout()
            return 0
        return say(_of_stdout(error) or error, debug=debug, command=tokens[0] if tokens else "")


def _unread(error: OSError) -> bool:
    """Whether nobody reads our output any more: he has seen enough of a pipe, or his terminal is gone."""
    if isinstance(error, BrokenPipeError):
        return True
    with suppress(OSError):
        return error.filename is None and error.errno == errno.EIO and stat.S_ISCHR(os.fstat(1).st_mode)
    return False


def _of_stdout(error: Exception) -> EnvironmentProblem | None:
    """The error in other words, if it is that our output can't be written; then nothing more goes there."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in FULL:
        return None
    try:
        sys.stdout.write("\n")  # an error without a file's name can be anybody's: what fails again is ours
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
        return EnvironmentProblem(
            f"the output can't be written: {error.strerror or error}",
            hint=" ".join(getattr(error, "__notes__", ["Make room where stdout goes, or send it elsewhere.", STANDS])),
        )
    return None


def _drop_stdout() -> None:
    """What is still to be written there goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _command(tokens: list[str]) -> int:
    if not tokens:
        print(f"usage: streamtrain {{{','.join(_commands())}}} ...\n{EXAMPLES}", file=sys.stderr)
        print("`streamtrain --help` says more.", file=sys.stderr)
        return 2
    try:
        code: Any = app(normalise(tokens))
    except CycloptsError as error:
        raise usage_error(error, _commands()) from error
    except SystemExit:
        if {"--help", "-h", "--version"}.isdisjoint(tokens):
            raise
        return 0  # from rich, where nobody reads the help any more
    return code if isinstance(code, int) else 0


def _commands() -> list[str]:
    return [name for name in app if not name.startswith("-")]


def _sets(given: Iterable[str]) -> Iterable[tuple[str, str, object]]:
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: expected a.b=value", hint="For instance --set optimizer.lr=0.001.")
        yield f"--set {key}", key.strip(), parse_value(value.strip())


def _stream_said(store: str, flags: StreamFlags | None) -> Said:
    from streamtrain.said import Said

    said = Said()
    said.assign("DATA", "data.store", store)
    for origin, key, value in assignments(flags):
        said.assign(origin, key, value)
    return said


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
