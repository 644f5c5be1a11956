"""Where the model runs, in which precision, and how a batch gets there: on the CPU nothing is moved, nothing copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError, EnvironmentProblem, UserCodeError
from streamtrain.tensors import map_tree, tensor_batch

MoveBatch = Callable[[Batch], Batch]


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises ConfigError for what is no device, EnvironmentProblem for one that this machine or torch build lacks.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(device)!r} is not supported yet", hint="Use 'auto', 'cpu' or 'cuda'.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or "no CUDA"
            raise EnvironmentProblem(
                f"device {str(device)!r}: this torch ({torch.__version__}) is built with {built} and sees no GPU",
                hint="Use device='cpu' or 'auto', or install a CUDA build of torch and a driver.",
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise EnvironmentProblem(f"device {str(device)!r}: there are {count} GPUs, numbered from 0")
        torch.cuda.init()  # type: ignore[no-untyped-call]  # a random state that is captured before has none of its own
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def mover(device: torch.device, transform: Callable[[Batch], Any] | None = None) -> MoveBatch:
    """A function that turns arrays into tensors, brings a batch to `device`, and applies the `device_transform=`."""

    def move(batch: Batch) -> Batch:
        batch = tensor_batch(batch)
        if device.type == "cpu":
            return batch

        def leaf(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(batch, inputs=map_tree(leaf, batch.inputs), targets=map_tree(leaf, batch.targets))

    if transform is None:
        return move

    def move_and_transform(batch: Batch) -> Batch:
        moved = move(batch)
        made = transform(moved)
        if isinstance(made, Batch):
            return made
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise UserCodeError(
                f"device_transform returned {type(made).__name__}, not a Batch or (inputs, targets)",
                hint="Return (batch.inputs, batch.targets), changed or not.",
            )
        inputs, targets = made
        return replace(moved, inputs=inputs, targets=targets)

    return move_and_transform


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What the forward pass and the loss run under."""
    if precision == "32":
        nothing: AbstractContextManager[Any] = nullcontext()
        return lambda: nothing
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def generators(device: torch.device) -> list[torch.Generator]:
    """Those of torch that a step may draw from."""
    here = [torch.default_generator]
    if device.type == "cuda":
        here.append(torch.cuda.default_generators[device.index or 0])
    return here


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Have torch take deterministic kernels alone, and put back what was chosen before."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


CUBLAS, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The environment variable without which torch refuses each matrix product on CUDA under deterministic kernels, and
the values that do."""


def check_deterministic(device: torch.device) -> None:
    """Raise EnvironmentProblem if this process can't have deterministic kernels there: the first layer would."""
    if device.type == "cuda" and os.environ.get(CUBLAS) not in WORKSPACES:
        raise EnvironmentProblem(
            f"deterministic on {device}: cuBLAS is deterministic only with {CUBLAS} in the environment",
            hint=f"Start the process with {CUBLAS}={WORKSPACES[0]}, or leave deterministic out.",
        )
