"""Weights that others have saved: a `.pt` of torch, Lightning, DDP or Hugging Face, or `.safetensors`, brought in.

Its law: tensors alone come in. Whatever else a pickle would have made is refused by its name, and nothing of it is run.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamtrain import tensor_file
from streamtrain.errors import CheckpointError
from streamtrain.state import Snapshot

logger = logging.getLogger(__name__)

BELOW = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Keys under which others keep a model's state beside an optimizer's and more, the first that is there counts."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What wrappers put in front of each name: DDP and FSDP, torch.compile, Lightning's usual attribute."""
EXPANSION = 16
"""How often the bytes of a file may be what is in it, where that is more than `SMALL`: torch.save packs nothing."""
SMALL = 64 << 20
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as it has them, but for what wrappers put around or in front of all of them.

    Raises CheckpointError: for what is no such file, holds no tensors, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = _safetensors(path)
        else:
            _refuse_a_bomb(path)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except tensor_file.Malformed as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read: {error.strerror or error}", hint="Give the path of a .pt."
        ) from None
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is no file of torch.save: {text:.200}", hint="Was it cut short?") from None
    return bare(tensors_in(found, path))


def _safetensors(path: Path) -> dict[str, Tensor]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return tensor_file.read(lambda into, offset: os.preadv(descriptor, [into], offset), size)
    finally:
        os.close(descriptor)


def _refuse_a_bomb(path: Path) -> None:
    """Raise CheckpointError for a zip that would take far more memory than it has bytes, or that has lost its end.

    It is asked by its directory alone, before anything is unpacked: deflate makes 4 GiB of 4 MiB.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        size = os.fstat(file.fileno()).st_size
        try:
            unpacked = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
            text = f"{path} is no file of torch.save: {error}"
            raise CheckpointError(text, hint="Was it cut short?") from None
    if unpacked > max(SMALL, EXPANSION * size):
        raise CheckpointError(
            f"{path} is not read: it is packed, and its {size:,} bytes would become {unpacked:,}",
            hint="torch.save packs nothing. Where you trust it, unzip it, and zip it again without compression.",
        )


def _refused(path: Path, text: str) -> CheckpointError:
    """For what the unpickler of weights alone refuses."""
    named = _GLOBAL.search(text)
    what = (
        "it is no pickle of tensors alone, as torch.save writes it"
        if named is None
        else f"it wants {named[1]}, which is no tensor"
    )
    return CheckpointError(
        f"{path} is not read: {what}",
        hint="Only weights are taken from a pickle, and nothing in it is run. Where you trust it, load it yourself and "
        "save the model's state alone: torch.save(model.state_dict(), 'weights.pt').",
    )


def tensors_in(found: Any, path: Path) -> dict[str, Tensor]:
    """The table of tensors in what a file holds: itself, or under one of the usual keys. Raises CheckpointError."""
    where: Any = found
    for _ in range(4):
        if not isinstance(where, Mapping):
            break
        key = next((key for key in BELOW if isinstance(where.get(key), Mapping)), None)
        if key is None:
            break
        if others := [str(other) for other, value in where.items() if other != key and _named(value)]:
            logger.warning("%s: the weights under %r are taken, and left are those of %s", path, key, ", ".join(others))
        where = where[key]
    tensors = {str(name): value for name, value in where.items() if isinstance(value, Tensor)} if _named(where) else {}
    if not tensors:
        held = f"{', '.join(map(str, list(where)[:8]))}" if isinstance(where, Mapping) else type(found).__name__
        raise CheckpointError(
            f"{path} holds no weights by name: it holds {held or 'nothing'}",
            hint="Save model.state_dict(), or a dict with it under 'state_dict'.",
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _named(where: Any) -> bool:
    return isinstance(where, Mapping) and any(isinstance(value, Tensor) for value in where.values())


def bare(tensors: dict[str, Tensor], known: set[str] | None = None) -> dict[str, Tensor]:
    """Without what wrappers put in front of names; `known`: names of a model, of which more are met then.

    Without `known` only what no model itself has in front goes, and of all names: `model.` may be the model's own. With
    it others may lie beside: Lightning keeps what a loss or a metric learns next to `model.`.
    """
    while True:
        for prefix in WRAPPERS if known is not None else WRAPPERS[:2]:
            if known is None and not all(name.startswith(prefix) for name in tensors):
                continue
            shorter = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            if len(shorter) < len(tensors):
                continue  # two would have one name
            if known is None or len(shorter.keys() & known) > len(tensors.keys() & known):
                tensors = shorter
                break
        else:
            return tensors


def as_snapshot(weights: dict[str, Tensor], source: Path) -> Snapshot:
    """What is committed of them: a checkpoint from which a run can begin, but not go on."""
    return Snapshot(weights, {}, {"weights_only": True, "source": source.name, "step": 0})


def refuse_to_go_on(state: Any, path: Path) -> None:
    """Raise CheckpointError where a checkpoint holds weights alone."""
    if isinstance(state, Mapping) and state.get("weights_only"):
        raise CheckpointError(
            f"checkpoint {path} holds weights alone (of {state.get('source')}): there is no run to go on with",
            hint="Begin with them: load_weights(path), or [model] weights = 'path' (--model-weights).",
        )
