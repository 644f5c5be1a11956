"""The model's forward compiled by torch, when it is first called: in the first burst, on the train thread.

Its law: the model stays what it is. Its call is replaced as `nn.Module.compile` does, so that names in checkpoints,
copies and what the user holds are the model's own; and of a forward that is compiled again and again it is said why.
"""

from __future__ import annotations

import logging
import shutil
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from streamtrain.errors import ConfigError, EnvironmentProblem

logger = logging.getLogger(__name__)

CompileSpec = bool | str | Mapping[str, Any] | None
"""True, a mode of `torch.compile`, or its keywords."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
USUAL = 4
"""Variants that a run needs: training and validation, full batches and a shorter last one."""


def parse_compile(spec: CompileSpec, device: torch.device) -> dict[str, Any] | None:
    """The keywords of `torch.compile`, or None. Raises ConfigError."""
    if spec is None or spec is False:
        return None
    if isinstance(spec, str) and spec not in MODES:
        raise ConfigError(f"compile: unknown mode {spec!r}", hint=f"Known: {', '.join(MODES)}; or true.")
    if not isinstance(spec, bool | str | Mapping):
        raise ConfigError(f"compile must be true, false, a mode or a table of torch.compile's keywords, not {spec!r}")
    options = {"mode": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    for key in options:
        if key not in ("mode", "backend", "dynamic", "fullgraph", "options"):
            raise ConfigError(
                f"compile: unknown key {key!r}", hint="Known: mode, backend, dynamic, fullgraph, options."
            )
    return options


def runs_in_graphs(options: Mapping[str, Any] | None) -> bool:
    """Whether CUDA graphs are asked for: then what the model gives lies in memory that its next call writes again."""
    if options is None:
        return False
    own = (options.get("options") or {}).get("triton.cudagraphs")
    return options.get("mode") in ("reduce-overhead", "max-autotune") if own is None else bool(own)


def _in_this_thread(options: dict[str, Any]) -> dict[str, Any]:
    """Have torch start no threads to compile in, which it would leave behind. It takes a mode or options, not both."""
    from torch._inductor import list_mode_options

    mode = list_mode_options(options.pop("mode")) if "mode" in options else {}
    return {**options, "options": {"compile_threads": 1, **mode, **options.get("options", {})}}


def find_compiler(options: Mapping[str, Any] | None, device: torch.device) -> None:
    """Raise EnvironmentProblem if torch will need a C++ compiler and there is none. Looks at the disk."""
    if options is None or device.type != "cpu" or options.get("backend", "inductor") != "inductor":
        return
    from torch._inductor import config

    names: Any = config.cpp.cxx
    known = [name for name in ([names] if isinstance(names, str) else names) if name]
    if not any(map(shutil.which, known)):
        raise EnvironmentProblem(
            f"compile: torch compiles for the CPU with a C++ compiler, and there is no {' or '.join(known)}",
            hint="Install one (apt-get install g++), name it in the environment variable CXX, or leave compile out.",
        )


class Compiled:
    """A model whose calls are compiled."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any], device: torch.device) -> None:
        self._count, self._said = 0, False
        self._call = _call_of(model)

        def first(*args: Any, **kwargs: Any) -> Any:
            alone = device.type == "cpu" and options.get("backend", "inductor") == "inductor"
            compiled = torch.compile(self._call, **(_in_this_thread(dict(options)) if alone else options))
            model._compiled_call_impl = compiled
            return compiled(*args, **kwargs)

        model._compiled_call_impl = first  # not now: torch reads its configuration from the disk

    def grown(self) -> bool:
        """Whether it was compiled since this was last asked; said once when it is more often than is usual."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        before, self._count = self._count, len(_debug_get_cache_entry_list(self._call.__code__))
        if self._count > USUAL and not self._said:
            self._said = True
            config: Any = torch._dynamo.config
            limit = config.recompile_limit if hasattr(config, "recompile_limit") else config.cache_size_limit  # 2.6
            logger.warning(
                "the model was compiled %d times so far, each for other shapes, dtypes or modes (TORCH_LOGS=recompiles "
                "names them): give batches of one shape, drop_last=True or compile={'dynamic': True}; after %d torch "
                "runs it uncompiled",
                self._count,
                limit,
            )
        return self._count > before


def _call_of(model: nn.Module) -> Callable[..., Any]:
    """Its call as a function of ours: torch does not look into those of its own modules. (`nn.Sequential.compile` does
    nothing.) Each has code of its own, by which torch counts how often it was compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    code = call.__code__.replace(co_name=f"call_{type(model).__name__}")
    return types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
