"""The log for a service elsewhere: its lines POSTed as JSON lines, in their order, each once.

Its law: training never waits for the network. Each line has a key made of the run and of what it tells, so that a
service which was cut off before it could answer, and is told again, knows it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.json_logger import finite, json_line
from streamtrain.callbacks.lines import FIXED
from streamtrain.callbacks.sending import ASKED, Away, Pace, Refused, Sender
from streamtrain.callbacks.spool import Spool
from streamtrain.errors import ConfigError
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.options import at_least, count

_ASCII = "".join(map(chr, range(0x21, 0x7F)))
LATER = frozenset({408, 425, 429})
"""What a service answers, besides 5xx, that wants the same again later (RFC 9110, 8470, 6585)."""
LARGE = 413
LINES = frozenset({400, 409, LARGE, 422})
"""What it answers that is about the lines themselves; all else, as 401 or 404, is about who asks, and where."""


class RemoteLogger(Callback):
    """POSTs the lines of the log to `url` as `application/x-ndjson`: those of metrics.jsonl with `run` and `key`.

    `headers` go with each request, without white space around them, as does a `user:password@` of the address; a token
    belongs into the program, not into a configuration that the run keeps. Redirections are not followed. Up to `batch`
    lines go together, `every` seconds after the first at the latest; a request has `timeout` seconds.

    What can't be reached, or answers 5xx, 408, 425 or 429, is tried again after pauses that double from half a second
    to a minute, or as `Retry-After` says (an hour at most); so is what wants somebody to see to it, as by 401, 403 or
    404, or by a redirection. The lines lie in `remote-<digest>.jsonl` in the run's folder meanwhile, `disk` bytes at
    most. Of a batch that is refused for what it holds (400, 409, 413, 422) only the lines that are refused alone are
    put aside, in `refused-remote-<digest>.jsonl` beside it; appended to the other file they are sent again. Each is
    said once. At the end there are `last` seconds; what is left then is sent by the next fit in this folder. Without a
    folder `memory` lines wait, and the oldest give way; what is refused is left out.

    A line's `key` is the same whenever it is sent or made again: a service that keeps one line of each key has each
    step once, after a resume too. The header `Idempotency-Key` is the batch's.
    """

    writes_lines = True

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        batch: int = 100,
        every: float = 1.0,
        timeout: float = 10.0,
        memory: int = 1000,
        disk: int = 1 << 28,
        last: float = 5.0,
    ) -> None:
        self._where = _named(url)
        self._url, authorization = _without_user(url)
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:8]
        self.state_key, self.writes = f"{self._where} {digest}", f"remote-{digest}.jsonl"
        self._headers = {**authorization, **dict(_header(name, value) for name, value in (headers or {}).items())}
        self._memory, self._disk = count(memory, "RemoteLogger: memory"), count(disk, "RemoteLogger: disk")
        every = at_least(every, 0.0, "RemoteLogger: every")
        self._pace = Pace(batch=count(batch, "RemoteLogger: batch"), every=every, pause=0.5)
        self._timeout = at_least(timeout, 0.001, "RemoteLogger: timeout")
        self._last = at_least(last, 0.0, "RemoteLogger: last")
        self._run = ""
        self._sender: Sender | None = None
        self._missing: list[str] = []

    def on_train_begin(self, event: TrainBegin) -> None:
        """Start to send, first what earlier lives left."""
        if not (event.step and self._run):
            self._run, self._missing = uuid.uuid4().hex, []
        path = None if event.run_dir is None else Path(event.run_dir, self.writes)
        missing, self._missing = self._missing, []
        self._sender = Sender(Spool(path, memory=self._memory, disk=self._disk), self._post, self._where, self._pace)
        for line in missing:
            self._sender.put(line)

    def on_log(self, event: Log) -> None:
        """Hand the line over."""
        if self._sender is None:
            return
        names = hashlib.sha256("\0".join(sorted(event.values)).encode(errors="replace")).hexdigest()[:12]
        when = f"/{event.time:.3f}" if event.split == "resource" else ""  # of these a step has several
        place = [event.step, event.epoch, event.samples, round(event.time, 6), event.split]
        about = {"run": self._run, "key": f"{self._run}/{event.split}/{event.step}/{names}{when}"}
        values = {name: value for name, value in event.values.items() if name not in (*FIXED, "run", "key")}
        self._sender.put(json_line({**about, **dict(zip(FIXED, place, strict=True)), **finite(values)}))

    def on_train_end(self, event: TrainEnd) -> None:
        """Send the rest; what can't be sent now waits in the file."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.end(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The run's name, and the lines that only memory holds."""
        return {"run": self._run, "unsent": self._missing if self._sender is None else self._sender.spool.unsent()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back: lines that were delivered after all are known by their keys."""
        self._run = str(state.get("run", ""))
        self._missing = [str(line) for line in state.get("unsent", ())]

    def _post(self, lines: Sequence[str]) -> None:
        """One request, in the sender's thread. Raises Away or Refused."""
        body = "".join(lines).encode("ascii")
        keys = {"Content-Type": "application/x-ndjson", "Idempotency-Key": hashlib.sha256(body).hexdigest()[:32]}
        request = urllib.request.Request(self._url, body, {**keys, **self._headers}, method="POST")
        try:
            with _OPENER.open(request, timeout=self._timeout) as answer:
                answer.read(1 << 16)
        except urllib.error.HTTPError as error:
            with error:
                _answered(error)
        except ValueError as error:  # of what no request can be made, above all: somebody has to see to that
            raise Away(f"{type(error).__name__}: {error}", human=type(error).__name__) from error
        except (OSError, HTTPException) as error:  # urllib's own are OSErrors
            raise Away(str(getattr(error, "reason", None) or error) or type(error).__name__) from error


def _answered(error: urllib.error.HTTPError) -> NoReturn:
    there = error.headers.get("Location", "") if 300 <= error.code < 400 else ""
    said = f"the service is at {there!r}, which url= should be" if there else _said(error)
    text = f"{error.code} {error.reason}: {said}"
    if error.code in LINES:
        raise Refused(text, large=error.code == LARGE)
    passes = error.code >= 500 or error.code in LATER
    raise Away(text, after=asked(error.headers), human="" if passes else str(error.code))


def _said(error: urllib.error.HTTPError) -> str:
    with suppress(OSError, HTTPException):
        return repr(error.read(200).decode(errors="replace"))
    return "''"


def asked(headers: Message) -> float | None:
    """Seconds that `Retry-After` tells, as a number or a date (RFC 9110, 10.2.3)."""
    told = headers.get("Retry-After", "").strip()
    if told.isdecimal():
        return min(float(told), ASKED)
    try:
        until = parsedate_to_datetime(told)
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return min(max((until - now).total_seconds(), 0.0), ASKED)
    except (ValueError, TypeError):
        return None


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """The address without `user:password@`, and the header that tells it instead (RFC 7617): urllib takes it for a part
    of the host's name. Letters that no request line has stand there as their UTF-8 (RFC 3987, 3.1)."""
    parts = urllib.parse.urlsplit(url)
    if not url.isascii():
        beyond = {name: urllib.parse.quote(getattr(parts, name), safe=_ASCII) for name in ("path", "query")}
        parts = parts._replace(**beyond, fragment="")
        url = parts.geturl()
    if "@" not in parts.netloc:
        return url, {}
    user, _, host = parts.netloc.rpartition("@")
    told = base64.b64encode(urllib.parse.unquote_to_bytes(user if ":" in user else f"{user}:")).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {told}"}


_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A header's name (RFC 9110, 5.6.2)."""
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
"""What may stand in its value (RFC 9110, 5.5), in Latin-1."""


def _header(name: object, value: object) -> tuple[str, str]:
    """As a request takes it; the value itself, which may be secret, is in no message. Raises ConfigError."""
    plain, text = str(name), str(value).strip()
    if not _NAME.fullmatch(plain):
        raise ConfigError(f"RemoteLogger: headers: {plain!r:.80} is no name of a header")
    if not _VALUE.fullmatch(text):
        raise ConfigError(
            f"RemoteLogger: headers: what {plain} is to say has line breaks or signs that no header takes",
            hint="Latin letters, digits and signs, on one line.",
        )
    return plain, text


def _named(url: str) -> str:
    """The service as messages name it: the rest of an address may hold secrets. Raises ConfigError."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
        whole = not re.search(r"[\x00-\x20\x7f]", url)
    except (ValueError, AttributeError, TypeError):
        pass
    else:
        if parts.scheme in ("http", "https") and host and whole:
            return f"{parts.scheme}://{host}" + (f":{port}" if port else "")
    raise ConfigError("RemoteLogger: url must be an address such as https://host/path", hint="Check its beginning.")


class _Here(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would become a GET: it is an answer like any other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Here)
