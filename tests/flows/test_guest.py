"""That a host which trains finds its house as it left it: in a process of its own, in which nothing else has been."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from data_tools.synth import synth
from streamtrain.callbacks.base import Callback
from streamtrain.events import EpochBegin


def house(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """All that a library could have changed in its process, by name, as texts."""
    umask = os.umask(0)
    os.umask(umask)
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    found = {
        "signal handlers": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "wakeup descriptor": wakeup,
        "default executor": getattr(loop, "_default_executor", None),
        "exception handler": loop.get_exception_handler(),
        "debug": (loop.get_debug(), loop.slow_callback_duration, loop.get_task_factory()),
        "event loop policy": asyncio.get_event_loop_policy(),
        "tasks": len(asyncio.all_tasks(loop)),
        "zarr.config": zarr.config.config,
        "logging": [
            (name, made.level, made.handlers, made.propagate, made.disabled)
            for name, made in sorted({"": logging.getLogger(), **logging.root.manager.loggerDict}.items())
            if isinstance(made, logging.Logger) and (made.handlers or made.level or not made.propagate or made.disabled)
        ],
        "logging's last resort": (logging.lastResort, logging.raiseExceptions, logging.getLoggerClass()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "random": random.getstate(),
        "numpy.random": str(np.random.get_state()),
        "numpy's errors": np.geterr(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "torch's dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "torch's threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch's gradients": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "torch's determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "torch's precision": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "switch interval": sys.getswitchinterval(),
        "garbage collection": (gc.isenabled(), gc.get_threshold(), gc.get_debug()),
        "recursion": sys.getrecursionlimit(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "nice": os.nice(0),
        "cores": sorted(os.sched_getaffinity(0)),
        "temporary folder": tempfile.tempdir,
        "time zone": time.tzname,
    }
    return {name: re.sub(r"running at .*?>", "", str(value)) for name, value in found.items()}


class Fourth(Callback):
    """Cancels the task that trains in the fourth epoch."""

    async def on_epoch_begin(self, event: EpochBegin) -> None:
        if event.epoch == 3:
            for task in asyncio.all_tasks():
                if task.get_name() == "fit":
                    task.cancel()


async def train(store: Path, run_dir: Path) -> dict[str, tuple[str, str]]:
    """Fit with all that touches the outside; what is different afterwards."""
    from streamtrain import EarlyStopping, Trainer, ZarrStream
    from streamtrain.metrics import MeanAbsoluteError

    def made() -> Trainer:
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
        return Trainer(
            torch.nn.Sequential(model, torch.nn.Flatten(0)),
            torch.nn.MSELoss(),
            metrics={"mae": MeanAbsoluteError()},
            callbacks=[EarlyStopping("val_loss")],
            run_dir=run_dir,
            seed=1,
            deterministic=True,
            precision="bf16",
        )

    data: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 32, "memory": "16MiB"}
    loop = asyncio.get_running_loop()
    warm = torch.nn.Linear(2, 2)  # what torch itself makes at its first step
    torch.optim.AdamW(warm.parameters(), fused=True)
    warm(torch.ones(1, 2)).sum().backward()
    trainer, second = made(), made()  # their weights are drawn here
    before = house(loop)
    async with (
        ZarrStream(store, split=(0.0, 0.8), shuffle="block", **data) as stream,
        ZarrStream(store, split=(0.8, 1.0), shuffle=False, transform=lambda batch: batch, **data) as valid,
    ):
        await trainer.fit(stream, validation=valid, max_epochs=2)
        trainer.callbacks.append(Fourth())
        task = asyncio.create_task(trainer.fit(stream, validation=valid, max_epochs=10**6), name="fit")
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert (await second.fit(stream, validation=valid, max_epochs=8, resume="auto")).epoch > 3
        await trainer.evaluate(valid)
        async for _ in trainer.predict(valid):
            pass
    del trainer, second, stream, valid, task
    gc.collect()
    after = house(loop)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_fit_leaves_everything_in_its_host_as_it_was(kind: str, tmp_path: Path) -> None:
    store = synth(tmp_path / "s.zarr", rows=2000, columns=8, chunk_rows=100, codec="zstd")
    command = [sys.executable, "-m", "tests.flows.test_guest", kind, str(store), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


if __name__ == "__main__":
    wanted, store, run_dir = sys.argv[1:]
    if wanted == "uvloop":
        import uvloop

        uvloop.install()
    print(json.dumps(asyncio.run(train(Path(store), Path(run_dir)))))
