"""How a tensor's elements lie in memory; its law: arithmetic on shape and strides, which asks no tensor anything."""

from __future__ import annotations

from collections.abc import Sequence


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill their extent without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True
