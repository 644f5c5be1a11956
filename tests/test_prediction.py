"""What `predict` promises beside its store: outputs in the data's units, a loop that stays free, nothing left."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn

from streamtrain import Batch, Trainer, ZarrStream, from_iterable, mix
from streamtrain.errors import ConfigError, UserCodeError
from tests.data.test_predicted import climate, known, opened, values
from tests.engine import Samples, network, samples

Values = NDArray[Any]


class Same(nn.Module):
    """Gives back what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Any) -> Any:
        return inputs


def stream(store: Path, **keywords: Any) -> ZarrStream:
    return ZarrStream(store, **{"inputs": "t2m", "batch_size": 7, "memory": "16MiB", **keywords})


async def made(make: Any, *arguments: Any, **keywords: Any) -> Any:
    """What blocks, off the loop."""
    return await asyncio.to_thread(make, *arguments, **keywords)


async def test_awaited_it_writes_and_iterated_it_gives_each_batch_too(tmp_path: Path) -> None:
    field = await made(climate, tmp_path / "s")
    trainer = Trainer(Same(), loss="mse")
    async with stream(tmp_path / "s") as source:
        assert await trainer.predict(source, out=tmp_path / "p") == tmp_path / "p"
        outputs = [output async for output in trainer.predict(source, out=str(tmp_path / "q"))]
        plain = [output async for output in trainer.predict(source)]
    np.testing.assert_array_equal(torch.cat(outputs), field)
    np.testing.assert_array_equal(torch.cat(plain), field)
    for name in ("p", "q"):
        np.testing.assert_array_equal(await made(values, tmp_path / name), field)


def test_asyncio_takes_it_as_a_coroutine(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    trainer = Trainer(Same(), loss="mse")
    assert asyncio.run(trainer.predict(stream(tmp_path / "s"), out=tmp_path / "p")) == tmp_path / "p"
    np.testing.assert_array_equal(values(tmp_path / "p"), field)

    async def cancelled() -> None:
        task = asyncio.create_task(trainer.predict(stream(tmp_path / "s"), out=tmp_path / "q"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not (tmp_path / "q").exists()


async def test_awaited_without_a_place_it_says_so() -> None:
    with pytest.raises(ConfigError, match=r"await predict\(stream\) needs a place to write to"):
        await Trainer(network(), loss="mse").predict(Samples())


async def test_a_store_elsewhere_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="only folders of this machine are written to"):
        Trainer(network(), loss="mse").predict(Samples(), out="s3://bucket/p.zarr")


async def test_one_that_is_left_early_or_cancelled_leaves_nothing(tmp_path: Path) -> None:
    await made(climate, tmp_path / "s")
    trainer, source = Trainer(Same(), loss="mse"), stream(tmp_path / "s")
    predictions = trainer.predict(source, out=tmp_path / "p")
    async for _ in predictions:
        break
    await predictions.aclose()
    await source.aclose()
    gated = Samples(50, 8)
    gated.gates[24] = asyncio.Event()
    predictions = trainer.predict(gated, out=tmp_path / "p")
    await anext(predictions)
    task = asyncio.ensure_future(predictions)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [path.name for path in await made(lambda: list(tmp_path.iterdir()))] == ["s"]


async def test_an_existing_target_is_refused_and_replaced_only_when_asked(tmp_path: Path) -> None:
    field = await made(climate, tmp_path / "s")
    trainer, source = Trainer(Same(), loss="mse"), stream(tmp_path / "s")
    await trainer.predict(source, out=tmp_path / "p")
    with pytest.raises(ConfigError, match="exists already and is complete"):
        await trainer.predict(source, out=tmp_path / "p")
    halves = stream(tmp_path / "s", transform=lambda batch: (batch.inputs / 2, None))
    await trainer.predict(halves, out=tmp_path / "p", overwrite=True)
    np.testing.assert_array_equal(await made(values, tmp_path / "p"), field / 2)
    await source.aclose()
    await halves.aclose()


@pytest.mark.parametrize("targets", [None, "t2m"])
async def test_what_is_normalised_comes_back_in_its_units(tmp_path: Path, targets: str | None) -> None:
    field = await made(climate, tmp_path / "s")
    said: dict[str, Any] = {"normalize": {"t2m": (280.0, 20.0)}}
    if targets is not None:
        said |= {"targets": targets, "window": {"time": 3}, "horizon": 1}
    trainer = Trainer(Same(), loss="mse", step=lambda model, batch: model(batch.inputs).mean())
    trainer.predict_step = lambda model, batch: batch.inputs if targets is None else batch.targets  # type: ignore[method-assign]
    async with stream(tmp_path / "s", **said) as source:
        plain = torch.cat([output async for output in trainer.predict(source)])
        await trainer.predict(source, out=tmp_path / "p")
    written, begin = await made(values, tmp_path / "p"), 0 if targets is None else 3
    np.testing.assert_allclose(written[begin:], field[begin:], rtol=1e-6)
    np.testing.assert_array_equal(plain, written[begin:])


async def test_statistics_by_channel_are_undone_of_a_target_and_of_nothing_else(tmp_path: Path) -> None:
    field = await made(climate, tmp_path / "s")
    mean, std = np.linspace(270, 290, 9), np.linspace(5, 25, 9)
    said: dict[str, Any] = {"normalize": {"t2m": (mean, std, 1)}, "targets": "t2m", "inputs": ["rain"]}
    trainer = Trainer(Same(), loss="mse")
    trainer.predict_step = lambda model, batch: {"field": batch.targets, "rain": batch.inputs["rain"]}  # type: ignore[method-assign]
    async with stream(tmp_path / "s", **said) as source:
        await trainer.predict(source, out=tmp_path / "p")
    np.testing.assert_allclose(await made(values, tmp_path / "p", "field"), field, rtol=1e-6)
    np.testing.assert_array_equal(await made(values, tmp_path / "p", "rain"), field[:, 0, 0])


@pytest.mark.parametrize("windows", [{}, {"window": {"time": 3}, "horizon": 1, "target_window": 1}])
async def test_outputs_with_an_axis_of_length_1_more_or_less_than_the_target_are_in_its_units_too(
    tmp_path: Path, windows: dict[str, Any]
) -> None:
    field = await made(climate, tmp_path / "s")
    said: dict[str, Any] = {"normalize": {"t2m": (np.linspace(270, 290, 9), np.linspace(5, 25, 9), 1)}, **windows}
    trainer = Trainer(Same(), loss="mse")
    trainer.predict_step = (  # type: ignore[method-assign]
        lambda model, batch: batch.targets[:, 0] if windows else batch.targets[:, None]
    )
    async with stream(tmp_path / "s", targets="t2m", **said) as source:
        plain = torch.cat([output async for output in trainer.predict(source)])
        await trainer.predict(source, out=tmp_path / "p")
    wanted = field[3 : 3 + len(plain)] if windows else field[:, None]
    np.testing.assert_allclose(plain, wanted, rtol=1e-6)
    np.testing.assert_array_equal((await made(values, tmp_path / "p"))[: len(plain)], plain)


async def test_scores_of_shape_b_1_beside_a_target_of_one_axis_have_its_units_and_its_attributes(
    tmp_path: Path,
) -> None:
    await made(climate, tmp_path / "s")
    rain = (await made(known, tmp_path / "s")).rain
    trainer = Trainer(Same(), loss="mse")
    trainer.predict_step = lambda model, batch: batch.targets[:, None]  # type: ignore[method-assign]
    async with stream(tmp_path / "s", targets="rain", normalize={"rain": (280.0, 20.0)}) as source:
        await trainer.predict(source, out=tmp_path / "p")
    found = (await made(opened, tmp_path / "p")).prediction
    np.testing.assert_allclose(found[:, 0], rain, rtol=1e-5)
    assert found.attrs["units"] == "mm"


async def test_modes_are_put_back_and_the_model_predicts_in_its_evaluation_mode(tmp_path: Path) -> None:
    model = network()
    model[3].eval()  # type: ignore[index]
    trainer, source = Trainer(model, loss="mse"), Samples(50, 8)
    await trainer.predict(source, out=tmp_path / "p")
    assert [module.training for module in model.children()] == [True, True, True, False, True]
    model.eval()
    with torch.no_grad():
        expected = model(source.inputs)
    np.testing.assert_allclose(await made(values, tmp_path / "p"), expected, rtol=1e-5, atol=1e-6)


async def test_batches_without_numbers_are_rows_in_the_order_in_which_they_come(tmp_path: Path) -> None:
    inputs, _ = samples(40)
    trainer = Trainer(Same(), loss="mse")
    await trainer.predict(from_iterable(list(torch.split(inputs, 8))), out=tmp_path / "p")
    np.testing.assert_array_equal(await made(values, tmp_path / "p"), inputs)
    await made(climate, tmp_path / "s")
    both = mix([stream(tmp_path / "s"), stream(tmp_path / "s")], stop=4)
    await trainer.predict(both, out=tmp_path / "q")
    await both.aclose()
    assert (await made(values, tmp_path / "q")).shape == (28, 9, 11)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (lambda inputs: (inputs, inputs[:, :1]), {"prediction_0": (50, 4), "prediction_1": (50, 1)}),
        (lambda inputs: {"a": inputs, "b": inputs.sum(1)}, {"a": (50, 4), "b": (50,)}),
        (lambda inputs: inputs.bfloat16(), {"prediction": (50, 4)}),
        (lambda inputs: inputs.numpy(), {"prediction": (50, 4)}),
        (lambda inputs: inputs.requires_grad_() * 1, {"prediction": (50, 4)}),
    ],
)
async def test_an_array_for_each_output(tmp_path: Path, output: Any, names: dict[str, tuple[int, ...]]) -> None:
    trainer, source = Trainer(Same(), loss="mse"), Samples(50, 8)
    trainer.predict_step = lambda model, batch: output(batch.inputs)  # type: ignore[method-assign]
    await trainer.predict(source, out=tmp_path / "p")
    group = await made(zarr.open_group, tmp_path / "p", mode="r")
    assert {name: array.shape for name, array in await made(lambda: list(group.arrays()))} == names


async def test_outputs_that_lie_along_one_axis_of_the_source_share_it(tmp_path: Path) -> None:
    """A field and a number of each time had two axes of time, and the second one no name of the source's."""
    await made(climate, tmp_path / "s")
    trainer = Trainer(Same(), loss="mse")
    trainer.predict_step = lambda model, batch: {  # type: ignore[method-assign]
        "field": batch.inputs,
        "mean": batch.inputs.flatten(1).mean(1),
    }
    async with stream(tmp_path / "s") as source:
        await trainer.predict(source, out=tmp_path / "p")
    found = await made(opened, tmp_path / "p")
    assert (found.field.dims, found["mean"].dims) == (("time", "lat", "lon"), ("time",))
    np.testing.assert_allclose(found["mean"], found.field.mean(("lat", "lon")), rtol=1e-5)


async def test_what_can_t_be_written_is_named(tmp_path: Path) -> None:
    trainer = Trainer(Same(), loss="mse")
    for output in ("text", None, torch.eye(8).to_sparse()):
        trainer.predict_step = lambda model, batch, made=output: made  # type: ignore[method-assign,misc]
        with pytest.raises(UserCodeError, match=r"prediction is a .* which can't be written"):
            await trainer.predict(Samples(50, 8), out=tmp_path / "p")
    assert not await made((tmp_path / "p").exists)


async def test_a_budget_that_holds_hardly_more_than_a_batch_is_enough(tmp_path: Path) -> None:
    data = await made(lambda: np.random.default_rng(0).standard_normal((512, 4096)).astype("f4"))
    await made(zarr.create_array, tmp_path / "s", data=data, chunks=(64, 4096))
    trainer = Trainer(Same(), loss="mse")
    least = ZarrStream(tmp_path / "s", batch_size=64, shuffle="block", shuffle_blocks=1, memory="5240KiB", threads=1)
    await trainer.predict(least, out=tmp_path / "p")
    await least.aclose()
    np.testing.assert_array_equal(await made(values, tmp_path / "p"), data)


async def test_the_loop_turns_while_predictions_are_written(tmp_path: Path) -> None:
    field = await made(climate, tmp_path / "s", times=2000)
    beats = 0

    async def heart() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.002)
            beats += 1

    trainer, beating = Trainer(Same(), loss="mse"), asyncio.create_task(heart())
    async with stream(tmp_path / "s", window={"lat": 3, "lon": 3}, stride=1, batch_size=63) as source:
        await trainer.predict(source, out=tmp_path / "p")
    beating.cancel()
    assert beats > 20
    np.testing.assert_array_equal(await made(values, tmp_path / "p"), field)


async def test_rows_that_a_filter_left_without_their_numbers_are_not_put_anywhere(tmp_path: Path) -> None:
    await made(climate, tmp_path / "s")
    async with stream(tmp_path / "s", transform=lambda batch: (batch.inputs[::2], None)) as source:
        with pytest.raises(UserCodeError, match=r"dropped rows and does not tell which"):
            await Trainer(Same(), loss="mse").predict(source, out=tmp_path / "p")
    assert not await made((tmp_path / "p").exists)


async def test_rows_that_a_filter_left_stand_at_the_numbers_that_it_tells(tmp_path: Path) -> None:
    field = await made(climate, tmp_path / "s")
    source = stream(tmp_path / "s", transform=lambda b: replace(b, inputs=b.inputs[::2], index=b.index[::2]))
    await Trainer(Same(), loss="mse").predict(source, out=tmp_path / "p")
    await source.aclose()
    written = await made(values, tmp_path / "p")
    there = ~np.isnan(written).all(axis=(1, 2))
    assert 0 < there.sum() < len(field)
    np.testing.assert_array_equal(written[there], field[there])


async def test_an_empty_stream_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await made(climate, tmp_path / "s")
    dropped = stream(tmp_path / "s", transform=lambda batch: Batch(batch.inputs[:0], None, batch.index[:0]))
    with pytest.raises(Exception, match="gave no batch"):
        await Trainer(Same(), loss="mse").predict(dropped, out=tmp_path / "p")
    await dropped.aclose()
    assert [path.name for path in await made(lambda: list(tmp_path.iterdir()))] == ["s"]


async def test_a_model_that_was_fit_predicts_in_the_coordinates_of_its_data(tmp_path: Path) -> None:
    """From a climate's store to a store that xarray lays beside it."""
    await made(climate, tmp_path / "s", times=200)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(99, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            made: Tensor = self.layer(inputs.flatten(1)).flatten()
            return made

    normal = {"t2m": (280.0, 20.0), "rain": (280.0, 20.0)}
    said: dict[str, Any] = {"targets": "rain", "normalize": normal, "batch_size": 16}
    trainer = Trainer(Net(), loss="mse", lr=1e-2, seed=0)
    async with stream(tmp_path / "s", shuffle="block", **said) as train:
        await trainer.fit(train, max_epochs=15)
    async with stream(tmp_path / "s", split=(0.5, 1.0), **said) as rest:
        await trainer.predict(rest, out=tmp_path / "p")
    source, found = await made(known, tmp_path / "s"), await made(opened, tmp_path / "p")
    assert found.prediction.dims == ("time",)
    assert found.prediction.attrs["units"] == source.rain.attrs["units"] == "mm"
    assert found.time.equals(source.time)
    error = (found.prediction - source.rain).sel(time=slice(source.time[100], None))
    assert bool(np.isnan(found.prediction[:100]).all())
    assert float(np.abs(error).mean()) < 0.5 * float(source.rain.std())
