"""The data room and the tools know no torch: they import, convert and stream where it can not be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHILD = """
import asyncio, importlib, pkgutil, sys
import numpy as np

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "safetensors"}:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, NoTorch())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("the block does not hold")

import data_tools, streamtrain.data
names = [f"{room.__name__}.{module.name}" for room in (streamtrain.data, data_tools)
         for module in pkgutil.iter_modules(room.__path__) if module.name != "__main__"]
for name in names:
    importlib.import_module(name)

from data_tools.synth import synth
from streamtrain import EnvironmentProblem, ZarrStream

async def main():
    store = synth(sys.argv[1], rows=50, columns=3, chunk_rows=8, codec="zstd")
    stream = ZarrStream(store, inputs="x", targets="y", batch_size=7, shuffle=True, memory="8MiB", output="numpy")
    async with stream:
        batches = [(batch.inputs, batch.targets, batch.index) async for batch in stream]
    assert sorted(np.concatenate([index for *_, index in batches]).tolist()) == list(range(50))
    assert all(isinstance(part, np.ndarray) for batch in batches for part in batch)
    try:
        await ZarrStream(store, inputs="x", batch_size=7).open()
    except EnvironmentProblem as error:
        assert error.hint == 'install torch, or give output="numpy"'
    else:
        raise SystemExit("tensors without torch")

asyncio.run(main())
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
print(len(names))
"""


def test_the_data_room_and_the_tools_work_without_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path / "t.zarr")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20
