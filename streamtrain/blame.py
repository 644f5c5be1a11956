"""Whose fault it is: turns what came up inside a step into an error that names rows, columns and values.

Its law: it is only called once something has gone wrong, so it may look at everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import available_memory, format_bytes
from streamtrain.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    NonFiniteError,
    StreamtrainError,
    UserCodeError,
    named,
    words,
)

FIRST = 8
"""Rows of a batch that are remembered."""
LESS = "Lower batch_size (and raise accumulate_grad_batches), or the stream's memory."


@dataclass(frozen=True, slots=True)
class Culprit:
    """Which batch was computed when an error came up: what is known of it once it is let go."""

    step: int
    """The update that it was part of."""
    cursor: Cursor
    rows: int
    index: list[int]
    """The first of its samples' numbers; empty where the source numbers none."""

    @classmethod
    def of(cls, batch: Batch | None, step: int) -> Culprit | None:
        """None for none."""
        if batch is None:
            return None
        try:
            return cls.gone(batch.index, batch.cursor, len(batch), step)
        except Exception:  # a batch so odd that it may be the very error
            return cls(step, batch.cursor, 0, [])

    @classmethod
    def gone(cls, index: Any, cursor: Cursor, rows: int, step: int) -> Culprit:
        """The same of what was kept of a batch: its samples' numbers, if it has any, its position, its rows."""
        return cls(step, cursor, rows, [] if index is None else [int(number) for number in index[:FIRST]])


class OutOfMemory(EnvironmentProblem):
    """Memory that the machine does not have, with the sizes of what was held."""


def exhausted(error: Exception, statistics: Any) -> Exception:
    """`error`, and where it is that memory ran out: the same with what the stream and the process held.

    `statistics`: of the stream, while its pass lives; what it does not tell is left out.
    """
    if isinstance(error, OutOfMemory) or not _of_memory(error):
        return error
    held = []
    for name in ("queue", "cache"):
        size = getattr(getattr(statistics, name, None), "bytes", None)
        held += [] if size is None else [f"its {name} {format_bytes(size)}"]
    budget = getattr(statistics, "budget", None)
    if budget is not None:
        held.insert(0, f"the stream holds {format_bytes(budget.used)} of its memory of {format_bytes(budget.total)}")
    held.append(f"the process {format_bytes(psutil.Process().memory_info().rss)} of {format_bytes(available_memory())}")
    text = words(error).partition("\n")[0] or type(error).__name__
    said = text if "out of memory" in text else f"out of memory: {text}"
    made = OutOfMemory(f"{said}; {', '.join(held)}", hint=LESS)
    made.__cause__ = error
    return made


def _of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in what this error came of."""
    one: BaseException | None = error
    seen: set[int] = set()  # `raise error from error` makes an error its own cause
    while one is not None and id(one) not in seen:
        if isinstance(one, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in words(one):
            return True
        seen.add(id(one))
        one = one.__cause__
    return False


def explained(
    error: BaseException, batch: Batch | None, where: str, *, who: str = "the model, loss or step"
) -> StreamtrainError:
    """`error`, raised by `who` while `batch` was computed, as one of ours; the original is its cause."""
    if isinstance(error, StreamtrainError):
        return error
    made = _made(error, batch, where, who)
    made.__cause__ = error
    return made


def _made(error: BaseException, batch: Batch | None, where: str, who: str) -> StreamtrainError:
    text = words(error).partition("\n")[0]
    if _of_memory(error):
        size = "" if batch is None else f" with a batch of {format_bytes(_bytes(batch))}"
        return EnvironmentProblem(f"{where}: out of memory{size}{text and f': {text}'}", hint=LESS)
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return _uncompiled(error, where)
    if batch is not None and isinstance(error, IndexError | RuntimeError) and "out of bounds" in text:
        found = _label(batch, text)
        if found is not None:
            return DataError(f"{where}: {found}", hint="Mend the data, or give the model an output for each class.")
    return UserCodeError(
        f"{where}: {who} raised {named(error)}",
        hint="The traceback (--debug) shows the line.",
    )


def _uncompiled(error: BaseException, where: str) -> StreamtrainError:
    """A model that could not be compiled: the machine's fault, or the forward's (torch._dynamo's own errors)."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    machine = type(error).__name__ == "BackendCompilerFailed" or "torch._inductor" in type(error).__module__
    kind = EnvironmentProblem if machine else UserCodeError
    return kind(
        f"{where}: the model could not be compiled: {type(error).__name__}: {text:.300}",
        hint="Leave compile out to run it as it is; the traceback (--debug) shows more.",
    )


def non_finite(
    batch: Batch | None,
    indices: Sequence[Any],
    losses: Sequence[float],
    step: int,
    *,
    at: int = -1,
    scale: float | None = None,
) -> StreamtrainError:
    """The error for an update that was not made; a DataError where the batch itself holds what is not finite.

    `batch`, `at`: one batch of the group (its last), and which one; `indices`, `losses`: of each. The data are
    looked at only here, for NaN in them is no fault by itself: that of masked values, which a loss leaves out, is said
    to be what it may be. Where another batch of the group has the bad loss, this one is not blamed. `scale`: of fp16's
    loss, where there is one.
    """
    bad_losses = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    looked = batch is not None and (not bad_losses or at % len(losses) in bad_losses)
    if batch is not None and looked:
        infinite = bool(bad_losses) and math.isinf(losses[at])
        found = [told for name, tensor in _tensors(batch) if (told := _bad(batch, name, tensor, infinite=infinite))]
        if found:
            what = "a gradient is not finite" if not bad_losses else f"the loss is {losses[at]}"
            return DataError(
                f"step {step}: {'; '.join(found)}; {what}; the weights are those of step {step - 1}",
                hint="Mend the data, filter it in a transform, or give nonfinite='skip'. If these values are masked: "
                "fill them before the loss (torch.nan_to_num), since nan times 0 is nan.",
            )
    if bad_losses and len(indices) == len(losses):
        indices = [indices[number] for number in bad_losses]
    rows = [row for index in indices if index is not None for row in torch.as_tensor(index).tolist()]
    shown = f", rows {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}" if rows else ""
    bad_loss = next((loss for loss in losses if loss != loss or abs(loss) == float("inf")), None)
    down = "" if scale is None else f", though the loss's scale is down to {scale:g}"
    what = f"a gradient is not finite{down}" if bad_loss is None else f"the loss is {bad_loss}"
    gone = "Look for NaN in the data of these rows, whose batch is gone. " if bad_losses and not looked else ""
    return NonFiniteError(
        f"step {step}{shown}: {what}; the weights are those of step {step - 1}, the last good one",
        hint=f"{gone if rows else ''}Lower the learning rate, give gradient_clip_norm, or nonfinite='skip'.",
    )


def no_loss(error: BaseException, loss: Any) -> ConfigError | None:
    """The error for what is no loss, found when it was asked for its gradient; None if that is not what went wrong."""
    if loss is None or isinstance(error, StreamtrainError):
        return None
    if not isinstance(loss, Tensor):
        return ConfigError(
            f"the loss is a {type(loss).__name__}, not a tensor",
            hint="Have step= return the loss, or a dict with a 'loss'.",
        )
    if loss.numel() != 1:
        return ConfigError(
            f"the loss must be one number, but has the shape {tuple(loss.shape)}", hint="Average it: loss.mean()."
        )
    if not loss.requires_grad:
        return ConfigError(
            "the loss does not depend on any parameter that requires a gradient",
            hint="Was it detached, or computed under no_grad?",
        )
    return None


def _label(batch: Batch, text: str) -> str | None:
    """Which integer target the loss refused, if its value is named in the error."""
    for name, tensor in _tensors(batch):
        if not name.startswith("targets") or tensor.is_floating_point():
            continue
        digits = [int(word) for word in text.replace(",", " ").replace(".", " ").split() if word.lstrip("-").isdigit()]
        for value in digits:
            found = (tensor == value).nonzero()
            if len(found):
                at = tuple(found[0].tolist())
                return f"{name} hold {value} at {_place(batch, at)}, which is out of range for the loss"
    return None


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for name, part in (("inputs", batch.inputs), ("targets", batch.targets)):
        yield from _named(name, part)


def _named(name: str, part: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from _named(f"{name} {key!r}", value)
    elif isinstance(part, list | tuple):
        for number, value in enumerate(part):
            yield from _named(f"{name}[{number}]", value)


def _bad(batch: Batch, name: str, tensor: Tensor, *, infinite: bool) -> str:
    """What of an array is not finite: the first value, where it is, and in how many rows there are more.

    `infinite`: look for infinities alone. The loss is one, which no NaN can make of it.
    """
    if not tensor.is_floating_point():
        return ""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    bad = tensor.isinf() if infinite else ~tensor.isfinite()
    found = bad.nonzero()
    if not len(found):
        return ""
    at = tuple(int(i) for i in found[0])
    rows = int(bad.reshape(len(bad), -1).any(dim=1).sum()) if bad.ndim else 1
    more = f" ({len(found)} values in {rows} of {len(bad)} rows)" if len(found) > 1 else ""
    return f"{name} hold {float(tensor[at])} at {_place(batch, at)}{more}"


def _place(batch: Batch, at: tuple[int, ...]) -> str:
    row = f"row {at[0]} of the batch" if batch.index is None else f"row {int(batch.index[at[0]])}"
    return row if len(at) < 2 else f"{row}, column {', '.join(map(str, at[1:]))}"


def _bytes(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.itemsize for _, tensor in _tensors(batch))
