"""What the train thread frees it finds again: a step pays for no pages twice. In a process of its own, since any block
that was freed before moves what glibc keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, resource, sys
import torch
from streamtrain import malloc, threads

if sys.argv[1] == "without":
    threads.keep_freed = lambda: None

def step():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    kept = [torch.ones(400_000) for _ in range(3)]  # 4.6 MiB: 1,172 pages
    del kept
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

async def main():
    async with threads.train_thread() as thread:
        print(sum([await thread.run(step) for _ in range(30)][10:]) // 20)

asyncio.run(main())
"""


def faults(how: str) -> int:
    """Page faults of a job that takes and frees 4.6 MiB, once it has done so ten times."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_a_job_finds_the_pages_that_the_one_before_has_freed() -> None:
    assert faults("with") < 20
    assert faults("without") > 200


def test_the_block_that_does_it_takes_no_memory() -> None:
    script = (
        "import resource; from streamtrain.malloc import keep_freed; use = resource.getrusage\n"
        "before = use(resource.RUSAGE_SELF).ru_minflt; [keep_freed() for _ in range(10)]\n"
        "print(use(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000  # of 10,240 pages
