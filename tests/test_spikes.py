"""What is said of gradient norms: the ones that stand out, seldom enough, and the norm in each line of the log."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamtrain.data.batch import Batch
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import ConfigError
from streamtrain.spikes import Spikes
from streamtrain.trainer import Trainer
from tests.engine import Samples, bare_loop, lines, network, pairs, same


def test_a_norm_of_ten_times_the_median_is_said_once_in_a_hundred_steps(caplog: pytest.LogCaptureFixture) -> None:
    spikes = Spikes()
    spikes.offer(1, [1.0, 2.0, 3.0] * 10)
    spikes.offer(31, [20.5, 30.0, float("nan"), 1.0])
    assert [record.getMessage() for record in caplog.records] == [
        "step 31: the gradient's norm is 20.5, 10 times the median of the last 30 (2)"
    ]
    spikes.offer(131, [1.0, 99.0])
    assert caplog.records[-1].getMessage().startswith("step 132: the gradient's norm is 99, 50 times")
    assert caplog.records[-1].getMessage().endswith("; 1 more since step 31")


@given(norms=st.lists(st.sampled_from([1.0, 1.0, 2.0, 50.0]), max_size=250), cuts=st.lists(st.integers(0, 250)))
def test_pieces_and_a_resume_make_no_difference(norms: list[float], cuts: list[int]) -> None:
    whole, spikes, at = Spikes(), Spikes(), 0
    whole.offer(1, norms)
    for cut in [*sorted(cuts), len(norms)]:
        spikes.offer(at + 1, norms[at:cut])
        at, state = max(at, min(cut, len(norms))), spikes.state_dict()
        spikes = Spikes()
        spikes.load_state_dict(state)
    assert spikes.state_dict() == whole.state_dict()


def scaled(model: nn.Module, batch: Batch) -> Any:
    loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
    return loss * 1000 if batch.cursor.epoch == 2 and batch.cursor.position == 40 else loss


async def test_the_norm_is_logged_and_a_spike_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fitted = Trainer(
        network(), step=scaled, seed=5, device="cpu", gradient_clip_norm=0.5, log_every=5, run_dir=tmp_path
    )
    result = await fitted.fit(Samples(), max_epochs=3)
    assert "step 31: the gradient's norm is" in caplog.text
    rows = [row for row in lines(tmp_path) if row["split"] == "train"]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[6]["grad_norm"] > 10 * statistics.median(row["grad_norm"] for row in rows)
    assert "grad_norm" in result.metrics


async def test_the_norm_is_known_as_a_monitor_only_where_it_is_taken(tmp_path: Path) -> None:
    watching: dict[str, Any] = {"callbacks": [EarlyStopping("grad_norm")], "seed": 5, "device": "cpu"}
    await Trainer(network(), nn.MSELoss(), gradient_clip_norm=0.5, **watching).fit(Samples())
    with pytest.raises(ConfigError, match="nothing logs 'grad_norm'"):
        await Trainer(network(), nn.MSELoss(), run_dir=tmp_path / "run", **watching).fit(Samples())
    assert not (tmp_path / "run").exists()


async def test_telling_changes_no_weights() -> None:
    fitted = Trainer(network(), nn.MSELoss(), seed=5, device="cpu", gradient_clip_norm=0.5)
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 2), seed=5, clip=0.5))
