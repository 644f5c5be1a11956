#!/usr/bin/env python3
"""The two commands: `python3 run.py demo` and `python3 run.py test` make `.venv` where needed and go on in it.

Law: only the standard library, and no state but `.venv` (and `.venv-3.12`, `.venv-3.13`, where the room without torch
is tested with the newest zarr and numpy, and `.venv-torch-2.6.0` and the like). The stamp in `.venv` is written last
and names everything that the environment was made from; an environment without the right stamp is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-from.json"
MARK = VENV / "made-by-run.py"
PYTHON = VENV / "bin" / "python"

IN_TWO = ("-n", "2", "--dist", "worksteal")
"""How pytest is told to use two processes."""
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "demo": (["-m", "streamtrain", "demo"], ("demo",)),
    "test": (
        ["-m", "pytest", *IN_TWO],
        ("demo", "cloud", "tensorboard", "plots", "test", "lint", "writers", "peers"),
    ),
    "setup": ([], ("demo", "cloud", "tensorboard", "plots", "test", "lint", "writers", "peers")),
}
"""Command: what the environment's Python is given, and the extras and dependency groups that it needs."""

SOUND = """
import importlib.metadata, re, sys
import streamtrain
found = list(importlib.metadata.distributions())
tops = [file for one in found for file in one.files or () if file.name == "__init__.py" and len(file.parts) == 2]
same = lambda name: re.sub("[-_.]+", "-", name).lower()
sys.exit(bool({same(name) for name in sys.argv[1:]} - {same(one.name) for one in found})
         or not all(file.locate().exists() for file in tops))
"""
"""Run in the environment: fails where a package that was asked for, or the root of any package, is gone."""

USAGE = """usage: python3 run.py demo [options of `streamtrain demo`]   learn the world map from disk
       python3 run.py test [options of pytest]               run the tests, in two processes (-n 0: in one)
       python3 run.py setup                                  only make .venv, with all that developing needs
       python3 run.py newest [options of pytest]             run the tests that need no torch on newer Pythons
       python3 run.py torch VERSION [options of pytest]      run the tests that need torch with that one, as 2.6.0
Each makes the environment in .venv first, or reuses it."""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["newest"]:
        return on_newest(arguments[1:])
    if arguments[:1] == ["torch"] and len(arguments) > 1 and re.fullmatch(r"[\d.]+", arguments[1]):
        return on_torch(arguments[1], arguments[2:])
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    if sys.version_info < (3, 11):  # noqa: UP036  (the reason why this script is here)
        return on_newer_python()
    command, needed = COMMANDS[arguments[0]]
    try:
        ensure(set(needed))
    except KeyboardInterrupt:
        print("\nstopped; the same command again goes on", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        return fail(
            f"pip ended with {error.returncode}", "its output above says why; the same command again starts over"
        )
    if not command:
        return 0
    if arguments[0] == "test":
        os.chdir(ROOT)
    return become(PYTHON, *command, *arguments[1:])


def become(program: str | Path, *arguments: str) -> NoReturn:
    """Go on as that program, in the same process: Ctrl-C and exit codes are its own."""
    sys.stdout.flush()
    os.execv(program, [str(program), *arguments])


def ensure(parts: set[str]) -> None:
    """Leave with a `.venv` that holds the project and `parts`; make or mend it if it does not."""
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once: the second waits and finds it made
        made = stamp()
        if made is None:
            fresh()
        elif parts <= set(made):
            return
        else:
            parts |= set(made)
            STAMP.unlink()
        names = install(parts, lock)
        temporary = STAMP.with_suffix(".new")
        temporary.write_text(json.dumps({"source": source(), "parts": sorted(parts), "packages": names}))
        temporary.replace(STAMP)


def stamp() -> list[str] | None:
    """The parts that a sound, current `.venv` holds; None if it is absent, half made, out of date or moved."""
    try:
        found = json.loads(STAMP.read_text())
        subprocess.run([PYTHON, "-c", SOUND, *found["packages"]], cwd=VENV, check=True, capture_output=True)
        parts: list[str] = found["parts"]
        return parts if found["source"] == source() else None
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError):
        return None


def source() -> str:
    """A digest of all that the environment is made from."""
    digest = hashlib.sha256(f"{ROOT}\n".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def fresh() -> None:
    """Make an empty environment; one of ours that is half made goes, a foreign one is put aside."""
    if MARK.exists():
        say("making .venv anew: it is unfinished or out of date")
        shutil.rmtree(VENV)
    elif VENV.exists() or VENV.is_symlink():
        aside = VENV.with_name(f".venv.{int(time.time())}")
        say(f"making .venv; the one that stood here is now {aside.name}")
        VENV.rename(aside)
    else:
        say("making .venv")
    VENV.mkdir()
    MARK.touch()
    try:
        venv.EnvBuilder(with_pip=True).create(VENV)
    except subprocess.CalledProcessError as error:
        fail("Python's venv module could not bring pip along", "on Debian: apt-get install python3-venv")
        raise SystemExit(5) from error


def install(parts: set[str], lock: IO[str]) -> list[str]:
    """Install the project with these extras and groups; the names of what was asked for."""
    import tomllib  # not in a Python that is too old, which gets as far as saying so

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    wanted = [requirement for part in sorted(parts & groups.keys()) for requirement in groups[part]]
    target = f"{ROOT}[{','.join(sorted(parts & extras.keys()))}]"
    say(f"installing streamtrain with {', '.join(sorted(parts))} (some minutes the first time: torch is large)")
    pip: list[Any] = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip += ["-c", ROOT / "constraints.txt", "-e", target, *wanted]
    # pip holds the lock too: if only this script is killed, the next command waits until pip is through
    subprocess.run(pip, check=True, stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()])
    wanted += project["project"]["dependencies"] + [name for part in parts & extras.keys() for name in extras[part]]
    return sorted(re.split(r"[^\w.-]", requirement)[0] for requirement in wanted)


def on_newer_python() -> int:
    """Start over under a Python that is new enough, if there is one."""
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):
        if found := shutil.which(name):
            return become(found, *sys.argv)
    return fail(f"this is Python {sys.version.split()[0]}; 3.11 or newer is needed", "python3.11 run.py ...")


NEWEST = ("3.13", "3.12")
"""Pythons on which the newest zarr and numpy run that 3.11 no longer gets, the newest first."""
TORCH_FREE = ("tests/data", "tests/data_tools")
"""What runs on the first of them that is found."""
MEETS_PYTHON = (
    *("any_store", "budget", "cache", "container", "disk_cache", "handing", "opening", "queue", "readahead", "readers"),
    *("remote_manifest", "shared_cache", "stores", "stream", "stream_properties", "torch_free", "whole", "workers"),
)
"""Files of tests/data about loops, threads, processes and files of the system's. All that the others could find on a
Python between 3.11 and the newest, the newest one finds too: it has the same zarr and numpy. So they are run there."""
BETWEEN = (*(f"tests/data/test_{name}.py" for name in MEETS_PYTHON), "tests/data_tools/test_convert.py")
NOT_THERE = ("torch", "pydantic", "cyclopts", "rich", "safetensors", "starlette", "uvicorn")
"""What the room without torch does without."""
SERVERS = ("moto", "boto3")
"""Of the packages for tests, those of stores elsewhere, whose tests need obstore."""
WRITERS = ("tensorstore", "xarray", "dask", "ml-dtypes")


def on_newest(options: list[str]) -> int:
    """The tests of the room without torch on the newest Python that is found, those that meet Python's own parts on
    the others; the first exit code that is not 0."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups, needed = project["dependency-groups"], project["project"]["dependencies"]
    wanted = [one for one in needed if not one.startswith(NOT_THERE)] + [
        one for one in groups["test"] if not one.startswith(SERVERS)
    ]
    wanted += [one for one in groups["writers"] if one.startswith(WRITERS)]
    found = {version: path for version in NEWEST if (path := interpreter(version)) is not None}
    for version in NEWEST:
        if version not in found:
            say(f"no Python {version} is found: the newest zarr and numpy are not tested on it")
    tests = dict(zip(found, ([*IN_TWO, *TORCH_FREE], *[[*BETWEEN]] * len(found)), strict=False))
    with ThreadPoolExecutor(len(NEWEST)) as pool:  # side by side: each waits for its own pip and tests
        codes = list(pool.map(lambda one: on_one(one, found[one], wanted, [*tests[one], *options]), found))
    return next((code for code in codes if code), 0)


def on_torch(version: str, options: list[str]) -> int:
    """The tests of all rooms but the one without torch, with that torch and the newest of all else."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    wanted = [f"torch=={version}", *project["project"]["dependencies"]]
    wanted += [one for extra in ("demo", "cloud", "tensorboard", "plots") for one in extras[extra]]
    wanted += [*groups["test"], *groups["writers"], *groups["peers"]]
    others = ["tests", *(f"--ignore={room}" for room in TORCH_FREE)]
    return on_one(f"torch-{version}", sys.executable, wanted, [*IN_TWO, *others, *options])


def on_one(version: str, found: str, wanted: list[str], arguments: list[str]) -> int:
    """Tests on one of them, by these arguments of pytest's; what they print comes at their end."""
    what = f"Python {version}" if version in NEWEST else version
    try:
        python = str(environment(found, version, wanted))
    except subprocess.CalledProcessError as error:
        return fail(f"pip ended with {error.returncode} for {what}", "its output above says why")
    shown = [python, "-c", "import zarr, numpy; print(f'zarr {zarr.__version__}, numpy {numpy.__version__}')"]
    say(f"{what}: {subprocess.run(shown, check=True, capture_output=True, text=True).stdout.strip()}")
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    there = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
    }  # for what tests start elsewhere: the project is not installed there
    ended = subprocess.run(
        tests, cwd=ROOT, env=there, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(ended.stdout, flush=True)
    return ended.returncode


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: on the path, or one of pyenv's."""
    installed = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    ours = sorted(installed.glob(f"{version}.*/bin/python{version}"), key=lambda path: path.parts[-3], reverse=True)
    for candidate in (shutil.which(f"python{version}"), *ours):
        if candidate is not None:
            asked = subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False)
            if asked.returncode == 0:  # what stands on the path may be a stand-in that only says what is missing
                return str(candidate)
    return None


def environment(interpreter: str, version: str, wanted: list[str], needs: str = "zarr, numpy") -> Path:
    """An environment of its own with these packages in their newest versions, made where there is none, or where it
    can't import what it `needs`."""
    folder = ROOT / f".venv-{version}"
    python, mark = folder / "bin" / "python", folder / "made-from.json"
    with open(ROOT / f".venv-{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if json.loads(mark.read_text()) == wanted:
                subprocess.run([python, "-c", f"import {needs}"], check=True, capture_output=True)
                return python
        except (OSError, ValueError, subprocess.CalledProcessError):
            pass
        say(f"making {folder.name}")
        if folder.is_symlink():
            folder.unlink()  # venv would empty what it leads to, which may be another checkout's
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
        pip: list[Any] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        subprocess.run([*pip, *wanted], check=True, stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()])
        mark.write_text(json.dumps(wanted))
    return python


def say(text: str) -> None:
    print(f"run.py: {text}", file=sys.stderr, flush=True)


def fail(text: str, hint: str) -> int:
    print(f"error: {text}\nhint: {hint}", file=sys.stderr, flush=True)
    return 5


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
