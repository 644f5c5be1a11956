"""What warm processes promise: each is what `python ARGUMENTS` would be, alone, with its own outputs and exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import warm

SEEN = """
import json, os, sys, threading
fds = sorted(os.listdir("/proc/self/fd"))[:-1]  # the last is the list's own
seen = [__name__, sys.argv, os.getcwd(), os.environ["SEEN"], threading.active_count(), fds]
print(json.dumps(seen))
print("said", file=sys.stderr)
"""


def test_a_program_is_main_in_its_folder_and_environment_with_nothing_open_and_no_thread(tmp_path: Path) -> None:
    done = warm.run(["-c", SEEN, "a", "b"], cwd=tmp_path, environment={"SEEN": "yes"})
    assert (done.returncode, done.stderr) == (0, "said\n")
    assert json.loads(done.stdout) == ["__main__", ["-c", "a", "b"], str(tmp_path), "yes", 1, ["0", "1", "2"]]


def test_a_module_of_its_folder_runs_and_each_run_is_the_first(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text(
        "import sys, torch\nprint(sys.argv[1:], hasattr(torch, 'seen'))\ntorch.seen = 1\n"
    )
    for _ in range(2):
        assert warm.run(["-m", "here", "x"], cwd=tmp_path).stdout == "['x'] False\n"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("", 0),
        ("raise SystemExit(5)", 5),
        ("raise ValueError('no')", 1),
        ("import os; os._exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_how_it_ended_is_told_as_subprocess_tells_it(program: str, code: int) -> None:
    done = warm.run(["-c", program])
    assert done.returncode == code
    assert ("ValueError: no" in done.stderr) == (code == 1)


def test_several_run_at_once_and_are_waited_for_and_ended_one_by_one() -> None:
    program = (  # whoever runs the tests in the background has it ignore this signal
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('there', flush=True)\nwhile True: pass"
    )
    one, other = warm.piped(["-c", program]), warm.piped(["-c", program])
    for process, said in (one, other):
        assert said.readline() == b"there\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0)
    for process, said in (other, one):
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in said.read()
        assert process.wait(30) == process.poll() == -signal.SIGINT
        process.kill()  # it has ended: nobody else is hit
        said.close()


def test_a_run_that_takes_too_long_is_ended() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as said:
        with open(writing, "wb") as out, pytest.raises(subprocess.TimeoutExpired):
            warm.run(["-c", "import threading; threading.Event().wait()"], stdout=out, timeout=0.1)
        assert said.read() == b""


def test_each_thread_gets_the_process_that_it_asked_for() -> None:
    def ask(_: int) -> tuple[int, int]:
        process, said = warm.piped(["-c", "import os; print(os.getpid())"])
        with said:
            found = int(said.read())
        process.wait()
        return process.pid, found

    with ThreadPoolExecutor(4) as pool:
        assert all(one == other for one, other in pool.map(ask, range(8)))
