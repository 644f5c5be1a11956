"""The one door from numpy to torch: arrays become tensors that share their memory, whatever holds them.

Only what torch can't take as it is gets copied: foreign byte order and memory that must not be written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamtrain.data.batch import Batch
from streamtrain.data.ragged import SparseRows
from streamtrain.errors import DataError


def to_tensor(array: Any) -> Tensor:
    """A tensor over the memory of a numpy array of any shape and of a number or bool dtype.

    Raises DataError for dtypes that torch does not have.
    """
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    elif not array.flags.writeable:
        array = array.copy()
    # Of the package ml_dtypes, which torch does not know. A name costs more than all else here: the kind comes first.
    if array.dtype.kind == "V" and array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"torch has no dtype for {array.dtype}", hint="Cast it: dtype=..., or select it away in a transform."
        ) from error


def to_sparse(rows: SparseRows) -> Tensor:
    """A tensor of layout `sparse_csr` over the memory of these rows."""
    indptr, indices, data = (to_tensor(array) for array in (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(indptr, indices, data, rows.shape, check_invariants=False)


def any_tensor(part: Any) -> Tensor:
    """A tensor of an array, or of sparse rows."""
    return to_sparse(part) if isinstance(part, SparseRows) else to_tensor(part)


def map_tree(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` of each leaf of nested dicts, lists and tuples, in the same nest."""
    if isinstance(tree, dict):
        return {key: map_tree(fn, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(fn, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tree(fn, value) for value in tree)
    return fn(tree)


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _learnable(value)
    if isinstance(value, np.ndarray):
        return to_tensor(value)
    if isinstance(value, np.generic):
        return torch.as_tensor(value.item())
    return value


def tensors(tree: Any) -> Any:
    """Nested dicts, lists and tuples with each numpy array as a tensor; all else as it is."""
    if isinstance(tree, SparseRows):
        return to_sparse(tree)
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    if isinstance(tree, Tensor):
        return _learnable(tree)
    return None if tree is None else map_tree(_leaf, tree)


def _learnable(tensor: Tensor) -> Tensor:
    """A copy of one that was made while some neighbour on the event loop was in `torch.inference_mode()`: autograd
    takes none of those."""
    return tensor.clone() if tensor.is_inference() else tensor


def tensor_batch(batch: Batch) -> Batch:
    """The batch with tensors in place of arrays, none of them of the inference mode; itself if it has no others."""
    inputs, targets, index = batch.inputs, batch.targets, batch.index
    plain = isinstance(inputs, Tensor) and (targets is None or isinstance(targets, Tensor))
    plain = plain and not inputs.is_inference()
    if plain and (index is None or isinstance(index, Tensor)):  # written out: this is asked for every batch
        return batch
    return replace(batch, inputs=tensors(inputs), targets=tensors(targets), index=tensors(index))
