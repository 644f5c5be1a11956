"""The most memory that `fit` takes over a bare loop with the same batches: at most one batch.

Both stream the same store with the same budget, in a process of their own, watched from outside; `fit` has a folder, a
validation and all default callbacks. `python -m tests.bench.fit_memory STORE HOW FOLDER SHARE` is the process.

A stream takes memory up to its budget as it is needed. `fit` has batches ready for the next bursts, nearly two bursts'
worth, so that the stream has more of its budget in use at a time than beside a loop that holds one batch; that is no
memory of the trainer's. So both parts are longer than what a stream holds; with a validation that is shorter, of which
a bare loop leaves some of the budget untouched, the difference is told without a bar: by the step's length it is one
batch (13 ms and more) or about two.
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
SHARES = (0.5, 0.9)
"""Of the data: what is trained on; 32 batches are more than a stream holds in its budget, 6 are not."""


def run(options: Options) -> Iterator[Measure]:
    """The difference of the peaks, in batches."""
    batches = 12 if options.quick else 64
    with options.room() as room:
        store = synth(room / "s.zarr", rows=batches * BATCH, columns=COLUMNS, chunk_rows=1024, codec="zstd")
        for share in SHARES:
            more, peaks = [], []
            for number in range(min(options.rounds, 5)):
                ours = _peak(store, "fit", room / f"{share}-{number}", share)
                theirs = _peak(store, "bare", room, share)
                more.append((ours.most - theirs.most) / (BATCH * COLUMNS * 4))
                peaks.append(theirs.most / MIB)
            name = f"peak of fit over a bare loop's, validation on {1 - share:.0%}"
            bar = 1 if share == SHARES[0] else None
            yield Measure(name=name, values=tuple(more), at_most=bar, unit=" batches")
            yield Measure(name="  the bare loop's", values=tuple(peaks), unit=" MiB")


def _peak(store: Path, how: str, folder: Path, share: float) -> Peak:
    return watch(["tests.bench.fit_memory", str(store), how, str(folder), str(share)])


# ---- in the process


async def main(store: str, how: str, folder: str, share: float) -> None:
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

    async with stream((0.0, share)) as train, stream((share, 1.0)) as valid:
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
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
