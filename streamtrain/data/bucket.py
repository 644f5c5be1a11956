"""S3, GCS, Azure and HTTP through obstore: what a URL names, and how bytes of its objects are asked for.

The only file that knows obstore (extra `cloud`). Its law: nothing connects before a request, and `close` drops the
clients with their connections; a later request makes new ones. Credentials and endpoints come from the environment
variables that each provider's own tools read, then from `storage_options`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from zarr.abc.store import Store
from zarr.storage import ObjectStore

from streamtrain.data.fetch import DATED, FIRST_PAUSE, LONGEST_PAUSE, Heading, Range, one_line
from streamtrain.data.filters import Bytes
from streamtrain.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
CLIENT_OPTIONS = frozenset(
    {"allow_http", "allow_invalid_certificates", "connect_timeout", "default_headers", "http1_only", "http2_only"}
    | {"pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "timeout", "user_agent"}
)
"""Options of the connection; all others are the store's own, as obstore names them."""
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "GOOGLE_BASE_URL", "AZURE_ENDPOINT")
NEVER = "86400 seconds"
"""obstore's own time limit for a request; ours is `read_timeout`."""


def is_url(text: str) -> bool:
    """Whether this names a store elsewhere."""
    return "://" in text and not text.startswith("file://")


class Bucket:
    """The objects below one URL."""

    lane = "obstore"

    def __init__(self, url: str, options: Mapping[str, str] | None = None, *, retries: int = 3) -> None:
        """Raises ConfigError for a URL or options that can't be, EnvironmentProblem where obstore is not installed."""
        scheme = url.partition("://")[0].lower()
        if scheme not in SCHEMES:
            raise ConfigError(
                f"store {url!r}: no store is known by {scheme}://", hint=f"known: {', '.join(SCHEMES)}, or a path"
            )
        self._url, self._options = url.rstrip("/"), dict(options or {})
        self._clients: dict[int, Client] = {}
        self.retries = retries
        self._made(0)  # what is wrong with the options is said now

    def _made(self, retries: int) -> Client:
        """A client that asks again by itself so often: never for our own requests, which do that themselves."""
        client = self._clients.get(retries)
        if client is None:
            client = self._clients[retries] = connect(self._url, self._options, retries)
        return client

    @property
    def zarr_store(self) -> Store:
        """The same objects for zarr's own API, which reads metadata, and what our lanes don't know."""
        return LateStore(lambda: self._made(self.retries))

    @property
    def identity(self) -> Hashable:
        """Equal for those that ask the same server, in the same way, for the same objects."""
        return self._url, tuple(sorted(self._options.items()))

    def close(self) -> None:
        """Drop the clients and their connections."""
        self._clients.clear()

    async def get(self, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
        """As `ByteSource.get` says."""
        return await get(self._made(0), key, wanted, headed)

    def transient(self, error: Exception) -> bool:
        """As `ByteSource.transient` says."""
        return transient(error)

    def url(self, key: str) -> str:
        """As `ByteSource.url` says."""
        return f"{self._url}/{key}"


class LateStore(ObjectStore[Any]):
    """zarr's store over a client that is made when it is needed, and may be dropped in between."""

    def __init__(self, make: Callable[[], Client]) -> None:
        Store.__init__(self, read_only=True)
        self._make = make

    @property
    def store(self) -> Client:
        """The client."""
        return self._make()

    def with_read_only(self, read_only: bool = False) -> LateStore:
        """Itself: it is read and nothing else."""
        return self


class Owned:
    """The objects of a store that the user has made: his to close, with the settings that he gave it."""

    lane = "obstore"

    def __init__(self, client: Client) -> None:
        self._client, self._name = client, repr(client)

    async def get(self, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
        """As `ByteSource.get` says."""
        return await get(self._client, key, wanted, headed)

    def transient(self, error: Exception) -> bool:
        """As `ByteSource.transient` says."""
        return transient(error)

    def url(self, key: str) -> str:
        """As `ByteSource.url` says."""
        return f"{key} of {self._name}"


async def get(client: Client, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
    """The bytes of an object, or a part of them. Raises FileNotFoundError, or what obstore raises."""
    import obstore

    options: Any = {}
    if isinstance(wanted, tuple):
        options = {"range": wanted}
    elif wanted is not None:
        options = {"range": {"suffix": wanted}}
    try:
        try:
            answer = await obstore.get_async(client, key, options=options)
        except obstore.exceptions.NotSupportedError:  # Azure knows no "the last so many bytes"
            assert isinstance(wanted, int)
            size = (await obstore.head_async(client, key))["size"]
            answer = await obstore.get_async(client, key, options={"range": (max(0, size - wanted), size)})
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            raise NoBucket(str(error)) from error
        raise
    (start, stop), about = answer.range, answer.meta
    version = about["e_tag"]
    if version is None and about["last_modified"].timestamp() > 0:  # 1970 stands for a server that tells no date either
        version = f"{DATED}{about['last_modified']:%Y-%m-%d %H:%M:%S} UTC"
    headed(Heading(stop - start, about["size"], version))
    return np.frombuffer(await answer.bytes_async(), dtype=np.uint8)  # type: ignore[call-overload,no-any-return]


class NoBucket(Exception):
    """Not an object is missing but the place where it would be: no answer that means "left out"."""


def transient(error: Exception) -> bool:
    """Whether the same request may succeed later: lost connections, time-outs, 5xx, "too many requests"."""
    from obstore.exceptions import GenericError

    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if not isinstance(error, GenericError):
        return False
    status = re.search(r"status code: (\d{3})", str(error))
    return status is None or int(status[1]) >= 500 or int(status[1]) in (408, 425, 429)


def connect(url: str, options: Mapping[str, str], retries: int) -> Client:
    """A client for the objects below `url`; it connects when something is asked for.

    Raises ConfigError for options that this kind of store does not know, EnvironmentProblem without obstore.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ImportError as error:
        raise EnvironmentProblem(
            f"store {url!r} is read through obstore, which is not installed", hint="pip install 'streamtrain[cloud]'"
        ) from error
    link: dict[str, Any] = {key: value for key, value in options.items() if key in CLIENT_OPTIONS}
    own: dict[str, Any] = {key: value for key, value in options.items() if key not in CLIENT_OPTIONS}
    link.setdefault("timeout", NEVER)
    if any(value.startswith("http://") for value in (url, *options.values(), *map(os.environ.get, ENDPOINTS)) if value):
        link.setdefault("allow_http", "true")  # who writes http:// means it
    again: Any = {
        "max_retries": retries,
        "retry_timeout": timedelta(days=1),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE),
            "max_backoff": timedelta(seconds=LONGEST_PAUSE),
            "base": 2,
        },
    }
    try:
        if url.startswith(("http://", "https://")):
            if own:
                raise ConfigError(f"storage_options: {', '.join(own)} is nothing that a store by HTTP takes")
            return HTTPStore.from_url(url, client_options=cast(Any, link), retry_config=again)
        return from_url(url, config=cast(Any, own), client_options=cast(Any, link), retry_config=again)
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigError(
            f"store {url!r} can't be opened with these storage_options: {one_line(error)}",
            hint="keys and values are strings, named as obstore names them: endpoint, region, skip_signature, ...",
        ) from error
