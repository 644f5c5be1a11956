"""What a fit takes, made a stream; its law: what is a stream already is taken as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamtrain.data.iterable import IterableStream, as_stream, is_stream
from streamtrain.data.source import Stream
from streamtrain.errors import ConfigError
from streamtrain.overfitting import SameBatches

Streams = Any
"""A Stream, anything that `from_iterable` takes, or (for validation) a dict of them by name."""


def named_streams(streams: Streams) -> dict[str, Stream]:
    """Streams by name; one that stands alone has the name ""."""
    if streams is None:
        return {}
    if isinstance(streams, Mapping):
        return {str(name): as_stream(stream) for name, stream in streams.items()}
    if isinstance(streams, list | tuple) and any(is_stream(stream) for stream in streams):
        raise ConfigError("several validation streams have no names", hint='Give a dict: {"near": ..., "far": ...}.')
    return {"": as_stream(streams)}


def behind(stream: Stream) -> object:
    """What a stream was made of; itself where it was given as one."""
    source = stream.source if isinstance(stream, IterableStream) else stream
    return source.source if isinstance(source, SameBatches) else source


def serves_one_epoch(stream: Stream) -> bool:
    """Whether it is an iterator, which can't start over."""
    return bool(getattr(stream, "one_epoch", False))


def length(stream: Stream) -> int | None:
    """Batches of an epoch; None where nobody knows."""
    try:
        return len(stream)
    except TypeError:
        return None


def least(*values: int | None) -> int | None:
    """The smallest of those that are known."""
    return min((value for value in values if value is not None), default=None)
