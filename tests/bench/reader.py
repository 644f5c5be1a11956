"""A process that streams a store once: `python -m tests.bench.reader STORE MEMORY [K]`, with raw floats in `x`.

It says `open` when torch is imported and the metadata is read, starts at the next line of its standard input, and
says how many samples it has seen.
"""

from __future__ import annotations

import asyncio
import sys

from streamtrain import ZarrStream


async def main(store: str, memory: str, blocks: int | None) -> None:
    """Open, wait, read all."""
    import torch

    stream = ZarrStream(
        store, inputs="x", targets="y", batch_size=256, shuffle="block", memory=memory, shuffle_blocks=blocks
    )
    async with stream:
        print("open", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        samples = 0
        async for batch in stream:
            assert isinstance(batch.inputs, torch.Tensor)
            samples += len(batch)
        print(samples, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None))
