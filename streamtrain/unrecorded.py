"""An optimizer's `step` and `zero_grad`, without the records that torch's wrappers write for a profiler at each call.

Its law: what is done is what torch's own would do, hooks and subclasses and all. Nothing but the record is left out,
and only while no profiler runs: on a CPU the two take a tenth of a step of half a millisecond. (An observer that is
registered beside torch's profilers, as ExecutionTraceObserver without one, is not seen, and misses these records.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as module

_wrapped: Any = Optimizer.profile_hook_step(lambda *_: None)
WRAPPER = _wrapped.__code__
"""What torch's wrapper does, whatever step it is around. Its mark `hooked` is no proof: `functools.wraps` copies it."""


def make_update(optimizer: Optimizer) -> None:
    """`optimizer.step()`."""
    step: Any = type(optimizer).step
    if (
        "step" in vars(optimizer)  # a torch scheduler's count of the updates, or the user's own
        or getattr(step, "__code__", None) is not WRAPPER
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or module._global_optimizer_pre_hooks
        or module._global_optimizer_post_hooks
        or _profiled()
    ):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)  # what torch's wrapper calls between record and hooks
        optimizer._optimizer_step_code()


def drop_gradients(optimizer: Optimizer, parameters: Iterable[Any]) -> None:
    """`optimizer.zero_grad()`; `parameters`: all of its groups."""
    zero_grad: Any = optimizer.zero_grad
    torchs = getattr(zero_grad, "__func__", None) is Optimizer.zero_grad and zero_grad.__self__ is optimizer
    if torchs and not _profiled():
        for parameter in parameters:
            parameter.grad = None
    else:
        zero_grad(set_to_none=True)


def _profiled() -> bool:
    profiled: bool = torch.autograd.profiler._is_profiler_enabled or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return profiled
