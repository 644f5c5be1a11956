"""The most memory that `fit` takes over a bare loop with the same batches: at most one batch.

Both stream the same store with the same budget, in a process of their own, watched from outside; `fit` has a folder, a
validation and all default callbacks. `python -m tests.bench.fit_memory STORE HOW [FOLDER]` is the process.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

from data_tools.synth import synth
from tests.bench.measure import Measure, Options
from tests.bench.memory import MIB, Peak, watch

COLUMNS, BATCH = 512, 8192
"""16 MiB of float32 in a batch."""


def run(options: Options) -> Iterator[Measure]:
    """The difference of the peaks, in batches."""
    batches = 12 if options.quick else 64
    more, peaks = [], []
    with options.room() as room:
        store = synth(room / "s.zarr", rows=batches * BATCH, columns=COLUMNS, chunk_rows=1024, codec="zstd")
        for number in range(min(options.rounds, 3)):
            ours, theirs = _peak(store, "fit", room / str(number)), _peak(store, "bare", room)
            more.append((ours.most - theirs.most) / (BATCH * COLUMNS * 4))
            peaks.append(theirs.most / MIB)
    yield Measure(name="peak of fit over a bare loop's", values=tuple(more), at_most=1, unit=" batches")
    yield Measure(name="  the bare loop's", values=tuple(peaks), unit=" MiB")


def _peak(store: Path, how: str, folder: Path) -> Peak:
    return watch(["tests.bench.fit_memory", str(store), how, str(folder)])


# ---- in the process


async def main(store: str, how: str, folder: str) -> None:
    """Open, wait, train."""
    import torch
    from torch import nn

    from streamtrain import Trainer, ZarrStream

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))

    def stream(part: tuple[float, float]) -> ZarrStream:
        return ZarrStream(
            store, inputs="x", targets="y", batch_size=BATCH, split=part, shuffle="block", memory="256MiB"
        )

    async with stream((0.0, 0.9)) as train, stream((0.9, 1.0)) as valid:
        trainer = Trainer(model, nn.MSELoss(), run_dir=folder, log_every=5)
        optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), nn.MSELoss()
        print("open", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        if how == "fit":
            print((await trainer.fit(train, validation=valid)).samples, flush=True)
            return
        samples = 0
        async for inputs, targets in train:
            torch.autograd.backward(loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
            samples += len(inputs)
        with torch.no_grad():
            async for inputs, targets in valid:
                loss(model(inputs), targets)
        print(samples, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
