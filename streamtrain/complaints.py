"""How errors are said on the command line: one `error:` and one `hint:` line on stderr, and an exit code.

Its law: whatever was raised, the user reads what to do about it; a traceback is for those who ask.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress

from cyclopts import CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from streamtrain.errors import NO_THREAD, ConfigError, EnvironmentProblem, StreamtrainError, named
from streamtrain.spelling import nearest


def usage_error(error: CycloptsError, commands: list[str]) -> ConfigError:
    """What the parser found, in our words."""
    command = " ".join(["streamtrain", *(error.command_chain or ())])
    hint = f"`{command} --help` lists what there is."
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
        close = nearest(option, known)
        return ConfigError(f"unknown option {option}", hint=f"Did you mean {close}?" if close else hint)
    if isinstance(error, UnknownCommandError) and error.unused_tokens and error.unused_tokens[0].startswith("-"):
        return ConfigError(f"unknown option {error.unused_tokens[0].partition('=')[0]}", hint=hint)
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        close = nearest(error.unused_tokens[0], commands)
        there = f"There are: {', '.join(commands)}."
        hint = f"Did you mean {close}?" if close else there
        return ConfigError(f"unknown command {error.unused_tokens[0]}", hint=hint)
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return ConfigError(f"unexpected argument {error.unused_tokens[0]}", hint=hint)
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return ConfigError(f"{command}: {error.keyword or error.argument.name} needs a value", hint=hint)
    error.verbose = False
    return ConfigError(str(error), hint=hint)


def say(error: BaseException, *, debug: bool, command: str = "") -> int:
    """Print an error's two lines; its exit code. `command`: what was asked for, which the hint then does not name."""
    while isinstance(error, BaseExceptionGroup):
        error = next((one for one in error.exceptions if isinstance(one, StreamtrainError)), error.exceptions[0])
    known = error if isinstance(error, StreamtrainError) else _known(error)
    traced = error if debug else None
    if known is None:
        message = f"internal error: {named(error)}"
        complain(message, "This is a fault of streamtrain's own; --debug shows where.", traced)
        return 1
    complain(str(known), known.hint or OWN_HINTS.get(command, {}).get(known.exit_code, HINTS[known.exit_code]), traced)
    return known.exit_code


HINTS = {
    1: "--debug shows the traceback.",
    2: "`--help` after the command lists its options.",
    3: "`streamtrain inspect DATA` shows what is there.",
    4: "`streamtrain checkpoints RUN` lists the good ones.",
    5: "Once the machine allows it, the same command with `--resume auto` carries on.",
    6: "Lower the learning rate, or look at the rows named.",
    7: "--debug shows the traceback.",
}
"""What to do where an error itself does not say."""
OWN_HINTS = {
    "inspect": {
        3: "Restore what is named, or convert the data again; `streamtrain verify DATA` looks for more damage."
    },
    "checkpoints": {4: "Restore the folder named, or start anew with another --run-dir."},
}
"""The same for commands that the others are sent to."""


def _known(error: BaseException) -> StreamtrainError | None:
    """The machine's own refusals, which can come from anywhere."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return EnvironmentProblem(f"out of memory: {error}", hint="Lower batch_size, or memory.")
    if (isinstance(error, RuntimeError) and str(error) == NO_THREAD) or (
        isinstance(error, ImportError) and "failed to map segment" in str(error)
    ):
        hint = "Raise the limits of this process (ulimit -v, -u), or free memory."
        return EnvironmentProblem(f"the machine refuses: {error}", hint=hint)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return EnvironmentProblem(f"{where}{error.strerror or str(error) or type(error).__name__}")
    return None


def complain(message: str, hint: str, traced: BaseException | None = None) -> None:
    """The two lines on stderr, after the traceback of `traced` if there is one."""
    with suppress(OSError):  # nobody hears it
        if traced is not None:
            traceback.print_exception(traced)
        if sys.stderr is not None:
            sys.stderr.write(f"error: {_line(message)}\nhint: {_line(hint)}\n")
            sys.stderr.flush()


def _line(text: str) -> str:
    """On one line, and nothing in it that a terminal would obey."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
