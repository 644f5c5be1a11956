"""Spawned processes that transform, each served by a thread of ours that waits for it.

Its law: a process is never forked, has no name anywhere (its shared memory is a `memfd`, granted inside the budget),
lives no longer than the thread that serves it, and whatever ends it early is one error.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any

from streamtrain.data.batch import Batch
from streamtrain.data.budget import Share, format_bytes
from streamtrain.data.transform import Transform, rows_of
from streamtrain.data.transform_child import Failure, Order, Result, Room, copied, laid_out, serving, view
from streamtrain.errors import ConfigError, EnvironmentProblem, StreamtrainError, UserCodeError

logger = logging.getLogger(__name__)

GRACE = 2.0
"""Seconds that a transform may go on after its pass has ended, before its process is killed."""
LOOK = 0.1
"""Seconds between two looks at whether the pass has ended."""
BOOT = (
    "import sys; from multiprocessing.connection import Connection; c = Connection({fd}); p = c.recv(); "
    "sys.path[:] = p['sys_path']; from streamtrain.data.transform_child import main; main(c, p, {area})"
)


def pickled(transform: Transform) -> bytes:
    """The transform as it goes to the processes. Raises ConfigError where it can't."""
    try:
        return pickle.dumps(transform)
    except Exception as error:  # PicklingError, AttributeError, TypeError, or whatever a __reduce__ raises
        raise ConfigError(
            f"this transform can't be sent to a process: {error}",
            hint="define it at the top of a module (functools.partial takes arguments), or use threads",
        ) from error


class TransformProcess:
    """One process with its shared memory; used by one thread."""

    def __init__(self, payload: bytes, seed: int, share: Share, size: int, stopped: Callable[[], bool]) -> None:
        """`size`: bytes of shared memory to begin with. Blocks until the transform is loaded there, a second or so."""
        if serving:
            raise ConfigError(
                'the script has no `if __name__ == "__main__":` before what it does: a process that imports it to '
                "transform began to do the same",
                hint="put what the script does under that line",
            )
        self._share, self._stopped = share, stopped
        self._area: mmap.mmap | None = None
        self._told = False
        self._fd = os.memfd_create("streamtrain-transform")
        mine, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, *util._args_from_interpreter_flags(), "-c", _boot(theirs, self._fd)],  # type: ignore[attr-defined]
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), self._fd],
            )
        except OSError as error:
            mine.close()
            os.close(self._fd)
            raise EnvironmentProblem(f"no process can be started to transform in: {error}") from error
        finally:
            theirs.close()
        self._connection = Connection(mine.detach())
        try:
            self._begin(payload, seed, size)
        except BaseException:
            self.close()
            raise

    def _begin(self, payload: bytes, seed: int, size: int) -> None:
        self._room(size)
        self._send(_preparation(payload, seed), "while it started")
        self._send(payload, "while it started", raw=True)
        failure = self._receive("while it started")
        if isinstance(failure, Failure):
            raise UserCodeError(
                f"the transform can't be loaded in a process: {failure.cause.strip().splitlines()[-1]}",
                hint='it is imported there by its module; guard a script with if __name__ == "__main__"',
            ) from _Remote(failure.cause)

    def transform(self, batch: Batch) -> Batch:
        """The transformed batch. Raises what the transform did, or what became of the process."""
        doing = f"on {rows_of(batch)}"
        tree, places, size = laid_out([batch.inputs, batch.targets, batch.index])
        if self._room(size):
            assert self._area is not None
            for slot, array in places:
                view(self._area, slot)[...] = array
            del array
        else:
            tree = [batch.inputs, batch.targets, batch.index]
        del places
        held = 0 if self._area is None else len(self._area)
        self._send(Order(tree, batch.epoch, batch.cursor, held), doing)
        answer = self._receive(doing)
        if isinstance(answer, Room):
            self._room(answer.size)
            self._send(Room(0 if self._area is None else len(self._area)), doing)
            answer = self._receive(doing)
        if isinstance(answer, Failure):
            error = answer.error or UserCodeError(f"transform raised an error that can't be sent here, {doing}")
            raise error from _Remote(answer.cause)
        assert isinstance(answer, Result)
        inputs, targets, index = answer.tree if self._area is None else copied(self._area, answer.tree)
        return Batch(inputs, targets, index, batch.epoch, batch.cursor)

    def _room(self, size: int) -> bool:
        """Whether there is shared memory of this size, taken within the budget where there was not."""
        held = 0 if self._area is None else len(self._area)
        if size <= held:
            return True
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if not self._share.try_acquire(size - held):
            if not self._told:
                self._told = True
                logger.warning(
                    "memory=%s has no %s free for what a transform process is given or makes: it goes through a pipe, "
                    "which is slower",
                    format_bytes(self._share.budget.total),
                    format_bytes(size - held),
                )
            return False
        os.ftruncate(self._fd, size)
        self._area = mmap.mmap(self._fd, size)
        return True

    def _send(self, message: Any, doing: str, *, raw: bool = False) -> None:
        try:
            if raw:
                self._connection.send_bytes(message)
            else:
                self._connection.send(message)
        except OSError:
            raise self._ended(doing) from None

    def _receive(self, doing: str) -> Any:
        deadline = None
        try:
            while not self._connection.poll(LOOK):
                if self._process.poll() is not None and not self._connection.poll(0):
                    raise self._ended(doing)  # something that it has started keeps the other end open
                if self._stopped():
                    deadline = deadline or time.monotonic() + GRACE
                    if time.monotonic() > deadline:
                        self._process.kill()
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._ended(doing) from None

    def _ended(self, doing: str) -> StreamtrainError:
        """What became of a process that answers no more."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        number = self._process.pid
        if code >= 0:
            return UserCodeError(
                f"transform process {number} ended with exit code {code} {doing}",
                hint="what it wrote to stderr may say why; something in it ends the interpreter",
            )
        name = signal.Signals(-code).name
        if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
            return EnvironmentProblem(
                f"transform process {number} was killed by {name} {doing}",
                hint="out of memory? dmesg says so; fewer processes or smaller batches take less",
            )
        return UserCodeError(
            f"transform process {number} crashed by {name} {doing}",
            hint="a C extension that the transform uses is broken, or used wrongly",
        )

    def close(self) -> None:
        """End the process and wait for it; gives the memory back. Blocks for `GRACE` seconds at most."""
        self._connection.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            held, self._area = (0 if self._area is None else len(self._area)), None
            self._share.release(held)


class _Remote(Exception):
    """A traceback from another process, as the cause of an error here."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def _boot(connection: socket.socket, area: int) -> str:
    return BOOT.format(fd=connection.fileno(), area=area)


def _preparation(payload: bytes, seed: int) -> dict[str, Any]:
    """What the process must know before it can import; as multiprocessing does, but touching no global of it."""
    told: dict[str, Any] = {
        "name": "streamtrain-transform",
        "sys_path": sys.path.copy(),
        "sys_argv": sys.argv,
        "dir": os.getcwd(),
        "seed": seed,
        "needs_main": b"__main__" in payload,
    }
    main = sys.modules["__main__"]
    name, path = getattr(getattr(main, "__spec__", None), "name", None), getattr(main, "__file__", None)
    if name is not None:
        told["init_main_from_name"] = name
    elif path is not None:
        told["init_main_from_path"] = os.path.abspath(path)
    return told
