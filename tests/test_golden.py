"""The format of checkpoints stays: one that was written once is read to equal values, and written again byte by byte.

`tests/golden/step-000000007` was written by `checkpoint.commit(..., golden())` when the format was fixed. Where the
second test fails the bytes have changed: a new number for FORMAT, and a golden checkpoint beside this one, which must
be read for ever.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamtrain import checkpoint
from streamtrain.checkpoint_files import FILES, MANIFEST
from streamtrain.state import Snapshot
from tests.test_state import same

GOLDEN = Path(__file__).parent / "golden" / "step-000000007"


def golden() -> Snapshot:
    """All that the format knows, in a few bytes each."""
    shared = torch.arange(6, dtype=torch.float32) / 4
    base = torch.arange(12, dtype=torch.int32)
    kinds = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int64,
        torch.bool,
    )
    model: dict[str, Any] = {
        "embed.weight": shared.view(2, 3),
        "head.weight": shared.view(2, 3),
        "conv.weight": torch.arange(24, dtype=torch.float32).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "norm.num_batches_tracked": torch.tensor(5),
        "empty": torch.empty(0, 3),
    }
    optimizer = {
        "state": {"embed.weight": {"step": torch.tensor(7.0), "exp_avg": torch.full((2, 3), -0.5)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": ["embed.weight"], "fused": None}],
    }
    state = {
        "step": 7,
        "numbers": [0, -1, 2**70, 1.5, float("inf"), float("-inf"), -0.0, True, None, "größe", "$tensor"],
        "keys": {0: "int", -3: "negative", "$a": "dollar", True: "bool"},
        "ordered": OrderedDict(b=1, a=[(), (1, (2,))]),
        "counter": Counter({"x": 2, 4: 1}),
        "arrays": [
            np.arange(4, dtype=">i2"),
            np.array(["ab", "c"]),
            np.array(["2026-01-02"], dtype="M8[D]"),
            np.float32(0.1),
        ],
        "kinds": [torch.ones(3).to(kind) for kind in kinds],
        "complex": [torch.tensor([1 + 2j], dtype=torch.complex64), torch.tensor([3 - 4j], dtype=torch.complex128)],
        "float8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "views": [base, base[3:9].view(2, 3).t(), base[8:].view(torch.int16)],
    }
    return Snapshot(model, optimizer, state)


def test_what_was_written_once_is_read() -> None:
    read, written = checkpoint.read(GOLDEN), golden()
    assert same(dict(written.model), read.model)
    assert same(written.optimizer, read.optimizer)
    assert same({**written.state, "ordered": dict(written.state["ordered"])}, read.state)
    assert read.model["embed.weight"].data_ptr() == read.model["head.weight"].data_ptr()
    read.state["views"][0].zero_()
    assert not any(view.any() for view in read.state["views"])


def test_the_same_snapshot_is_still_the_same_bytes(tmp_path: Path) -> None:
    path = checkpoint.commit(tmp_path / "again", golden()).path
    for name in (*FILES, MANIFEST):
        assert (path / name).read_bytes() == (GOLDEN / name).read_bytes(), name
