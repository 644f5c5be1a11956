"""A stream through the model, for what comes out: given batch by batch, or written to a Zarr store without holding it.

Its law: outputs are in the data's own units, given or written; nothing waits on the event loop but for the next burst,
and the writing of one burst goes on beside the computing of the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamtrain.data.batch import Batch
from streamtrain.data.canvas import Part, same_shape
from streamtrain.data.predicted import PredictedStore
from streamtrain.data.source import Stream
from streamtrain.data.stream import ZarrStream
from streamtrain.data.values import Normalization
from streamtrain.ending import to_its_end
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.evaluation import Evaluator
from streamtrain.file_thread import file_thread
from streamtrain.outcome import Compute, Outcome
from streamtrain.rng import Rng
from streamtrain.threads import TrainThread

NAME = "prediction"
"""The array of a model that gives one tensor; of a list or tuple they are numbered."""
Arrays = dict[str, NDArray[Any]]
Rows = tuple[NDArray[np.int64] | None, Arrays, int]
"""Numbers of samples, their outputs by name, and how many they are."""


class Predictions(AsyncGenerator[Any, None], Coroutine[Any, Any, Path]):
    """`async for outputs in predictions`; or, where they are written, `path = await predictions`.

    It is a coroutine too, so that `asyncio.run` and `asyncio.create_task` take it.
    """

    def __init__(self, make: Callable[[bool], AsyncGenerator[Any, None]], out: Path | None) -> None:
        """`make`: begins the prediction; it is told whether somebody takes the outputs."""
        self._make, self._out = make, out
        self._begun: AsyncGenerator[Any, None] | None = None
        self._awaited: Coroutine[Any, Any, Path] | None = None

    @property
    def _outputs(self) -> AsyncGenerator[Any, None]:
        if self._begun is None:
            self._begun = self._make(True)
        return self._begun

    def __await__(self) -> Generator[Any, None, Path]:
        """Write them all, and return where. Raises ConfigError without out=."""
        return self._all().__await__()

    async def _all(self) -> Path:
        if self._out is None:
            raise ConfigError(
                "await predict(stream) needs a place to write to",
                hint="Give out='p.zarr', or take the outputs: async for outputs in trainer.predict(stream).",
            )
        self._begun = self._begun or self._make(False)
        async with aclosing(self._begun) as outputs:
            async for _ in outputs:
                pass
        return self._out

    @property
    def _writing(self) -> Coroutine[Any, Any, Path]:
        if self._awaited is None:
            self._awaited = self._all()
        return self._awaited

    def send(self, value: Any) -> Any:
        """As a coroutine has it."""
        return self._writing.send(value)

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        """As a coroutine has it."""
        return self._writing.throw(typ, val, tb)  # type: ignore[arg-type]

    def close(self) -> None:
        """As a coroutine has it."""
        if self._awaited is not None:
            self._awaited.close()

    async def __anext__(self) -> Any:
        return await self._outputs.__anext__()

    async def asend(self, value: None) -> Any:
        """As a generator has it."""
        return await self._outputs.asend(value)

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        """As a generator has it."""
        return await self._outputs.athrow(typ, val, tb)  # type: ignore[arg-type]

    async def aclose(self) -> None:
        """End; what was being written vanishes."""
        await self._outputs.aclose()


@dataclass(frozen=True)
class Prediction:
    """How a stream goes through a model."""

    evaluator: Evaluator
    thread: TrainThread
    rng: Rng
    compute: Compute

    async def given(self, stream: Stream) -> AsyncGenerator[Any, None]:
        """The outputs of each batch, in order, as the model gives them; what is normalised, as it was before."""
        undo = _undoing(stream)

        def keep(batch: Batch, outcome: Outcome) -> Any:
            return undo(outcome.outputs)

        async with aclosing(self.evaluator.each(stream, self.thread, self.rng, self.compute, keep)) as bursts:
            async for outputs in bursts:
                while outputs:
                    yield outputs.pop(0)  # one that was given is not kept here: it may hold a batch of the stream

    async def written(self, stream: Stream, out: Path, *, overwrite: bool, give: bool) -> AsyncGenerator[Any, None]:
        """The same, written to a store, which is there at the end; the outputs are given too, or None for each."""
        undo, ground = _undoing(stream), stream.ground() if isinstance(stream, ZarrStream) else None
        numbered = stream.num_samples is not None  # a mix, or what is merely iterated, has no numbers of its own
        expected = (stream.num_samples or 0) if numbered else 0
        store = PredictedStore(out, ground, overwrite=overwrite, expected=expected)

        def keep(batch: Batch, outcome: Outcome) -> tuple[Any, NDArray[np.int64] | None, Arrays, int]:
            outputs = undo(outcome.outputs)
            return outputs if give else None, _numbers(batch) if numbered else None, _arrays(outputs), len(batch)

        made = self.evaluator.each(stream, self.thread, self.rng, self.compute, keep)
        async with _writing(store) as write, aclosing(made) as bursts:
            async for burst in bursts:
                await write([(index, arrays, samples) for _, index, arrays, samples in burst])
                while burst:
                    yield burst.pop(0)[0]


@asynccontextmanager
async def _writing(store: PredictedStore) -> AsyncGenerator[Callable[[Sequence[Rows]], Any], None]:
    """Opens a store, takes rows for it (the call returns when those before are in), and commits it; or gives it up."""
    async with file_thread() as files:
        last: asyncio.Task[None] | None = None

        def add(batches: Sequence[Rows]) -> None:
            for numbers, arrays, samples in batches:
                store.add(numbers, arrays, samples)

        async def write(batches: Sequence[Rows]) -> None:
            nonlocal last
            if last is not None:
                await last
            last = asyncio.create_task(files(partial(add, batches)), name="streamtrain-predict")

        async def close() -> None:
            if last is not None:
                await asyncio.gather(last, return_exceptions=True)
            await files(store.close)

        try:
            await files(store.open)
            yield write
            if last is not None:
                await last
            await files(store.commit)
        finally:
            await to_its_end(close(), "streamtrain-predict-end")


def _undoing(stream: Stream) -> Callable[[Any], Any]:
    """What brings outputs of the shape of a normalised target (of an input, without targets) back to its units; axes of
    length 1 make no other shape."""
    parts = stream.parts() if isinstance(stream, ZarrStream) else ()
    if not any(part.normal is not None for part in parts):
        return lambda outputs: outputs
    return lambda outputs: _undone(outputs, parts, "")


def _undone(outputs: Any, parts: Sequence[Part], name: str) -> Any:
    if isinstance(outputs, Mapping):
        return {key: _undone(value, parts, str(key)) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return [_undone(value, parts, name) for value in outputs]
    if not isinstance(outputs, Tensor) or not outputs.ndim:
        return outputs
    part = same_shape(tuple(outputs.shape[1:]), parts, name)
    return outputs if part is None or part.normal is None else _restored(outputs, part.normal, part.site.row_shape)


def _restored(outputs: Tensor, normal: Normalization, row_shape: tuple[int, ...]) -> Tensor:
    """`x * std + mean` in float64, as float32, or float64 where the outputs are; they may have axes of length 1 more
    than the array's samples, or fewer."""
    shape = tuple(outputs.shape[1:])

    def beside(figures: NDArray[np.float64]) -> Tensor:
        if figures.size == 1:
            figures = figures.reshape(())
        elif shape != row_shape:
            figures = np.broadcast_to(figures, row_shape).reshape(shape).copy()
        return torch.from_numpy(figures).to(outputs.device)

    mean, std = beside(normal.mean), beside(normal.std)
    dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    return outputs.double().mul_(std).add_(mean).to(dtype)


def _arrays(outputs: Any) -> Arrays:
    """Outputs by name, in memory of their own; on the train thread. Raises UserCodeError."""
    if isinstance(outputs, Mapping):
        return {str(name): _array(value, str(name)) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return {f"{NAME}_{n}": _array(value, f"{NAME}_{n}") for n, value in enumerate(outputs)}
    return {NAME: _array(outputs, NAME)}


def _numbers(batch: Batch) -> NDArray[np.int64]:
    """Which samples these are. Raises UserCodeError where a transform left rows out and does not tell which."""
    if batch.index is None:
        raise UserCodeError(
            "predict(out=...): a transform dropped rows and does not tell which are left: they have no place",
            hint="Return the numbers as well: dataclasses.replace(batch, inputs=..., index=batch.index[keep]).",
        )
    return _array(torch.as_tensor(batch.index), "index")


def _array(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value.copy()
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        what = f"a {value.layout} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserCodeError(
            f"predict: {name} is {what}, which can't be written",
            hint="Give a tensor, or a dict or tuple of them; predict_step can choose.",
        )
    if value.dtype == torch.bfloat16:  # numpy has no such dtype
        value = value.float()
    # A copy: a model may give back what it was given, which the stream wants back before all is written.
    made: NDArray[Any] = value.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous().numpy()
    return made
