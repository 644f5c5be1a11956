"""Processes that are there at once: forks of one that has imported torch and the package, which costs 3 s of a core.

Law: what runs in one is what `python ARGUMENTS` would run, as `__main__`, alone in its process, killed and waited for
like any other. Only what a start itself does (which modules it imports, and when) is not to be seen here.

`python -m tests.warm DESCRIPTOR` is the process that is forked: single-threaded, it waits on this socket for what to
run, and for its children's ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO

IMPORTED = ("torch", "torch._dynamo", "zarr", "streamtrain.trainer", "streamtrain.prediction", "streamtrain.cli")
"""Those which nearly all that is run here would import, before any thread of theirs runs."""
LONGEST = 1 << 20
"""Bytes of a request."""


class Process:
    """A running fork, with what tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, ended: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As subprocess gives it: minus the signal's number, if one ended it."""
        self._ended = ended

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; TimeoutExpired if it takes longer than this many seconds."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a warm process", timeout or 0)
            told = os.read(self._ended, 16)
            os.close(self._ended)
            assert told, "the process that is forked has ended"
            self.returncode = int(told)
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """By SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    arguments: list[str],
    *,
    stdout: IO[bytes],
    stderr: IO[bytes],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """`python ARGUMENTS` (`-m MODULE ...` or `-c PROGRAM ...`), with `environment` beside or over this process's."""
    request = {
        "arguments": arguments,
        "cwd": str(cwd or Path.cwd()),
        "environment": {**os.environ, **(environment or {})},
    }
    message = json.dumps(request).encode()
    assert len(message) < LONGEST
    ended, telling = os.pipe()
    try:
        with _asking:
            connection = _server()
            socket.send_fds(connection, [message], [stdout.fileno(), stderr.fileno(), telling])
            return Process(int(connection.recv(16)), ended)
    finally:
        os.close(telling)


def piped(arguments: list[str], *, cwd: Path | None = None) -> tuple[Process, IO[bytes]]:
    """The same with what it says on both outputs, as it comes."""
    reading, writing = os.pipe()
    with open(writing, "wb") as end:
        return start(arguments, stdout=end, stderr=end, cwd=cwd), open(reading, "rb")


def run(
    arguments: list[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = 100,
    stdout: IO[bytes] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The same to its end, with what it printed where not to the caller's `stdout`; its code is not looked at.

    Killed after `timeout` seconds, with subprocess's TimeoutExpired.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(arguments, stdout=stdout or out, stderr=err, cwd=cwd, environment=environment)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)  # they share their position with the fork
        return subprocess.CompletedProcess(arguments, code, out.read().decode(), err.read().decode())


_asking = threading.Lock()
_started: dict[int, socket.socket] = {}
"""By the process that started it: what forks this one starts its own."""


def _server() -> socket.socket:
    if os.getpid() not in _started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        root = Path(__file__).resolve().parent.parent
        process = subprocess.Popen(
            command, cwd=root, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        atexit.register(_end, os.getpid(), ours, process)
        _started[os.getpid()] = ours
    return _started[os.getpid()]


def _end(owner: int, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    if os.getpid() == owner:
        connection.close()
        process.wait(10)


# ---- in the process that is forked


def serve(connection: socket.socket) -> dict[str, object] | None:
    """Fork for each request, and tell each end; a fork returns with its request, None is the end of all."""
    running: dict[int, tuple[int, int]] = {}
    while True:
        ready, _, _ = select.select([connection.fileno(), *running], [], [])
        for pidfd in set(ready) - {connection.fileno()}:
            pid, telling = running.pop(pidfd)
            os.write(telling, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.close(telling)
            os.close(pidfd)
        if connection.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, LONGEST, 3)
        if not message:
            return None
        out, err, telling = descriptors
        pid = os.fork()
        if pid == 0:
            os.dup2(out, 1)
            os.dup2(err, 2)
            others = (descriptor for pidfd, (_, pipe) in running.items() for descriptor in (pidfd, pipe))
            for descriptor in (*descriptors, connection.detach(), *others):
                os.close(descriptor)
            request: dict[str, object] = json.loads(message)
            return request
        os.close(out)
        os.close(err)
        running[os.pidfd_open(pid)] = pid, telling
        connection.send(b"%d" % pid)


def become(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Go on as `python ARGUMENTS` there."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # anew: the old ones remember whether what stood there could be sought in
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.path[0] = cwd
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    kind, what, *rest = arguments
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    assert kind == "-c"
    sys.argv = ["-c", *rest]
    sys.modules["__main__"] = made = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), made.__dict__)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    if (given := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        become(**given)  # type: ignore[arg-type]
