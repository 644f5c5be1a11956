"""What the remote logger promises: every line arrives, in order, whatever the service does; training never waits."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamtrain.callbacks.remote_logger import RemoteLogger, asked
from streamtrain.callbacks.sending import Pace
from streamtrain.callbacks.spool import Spool
from streamtrain.errors import ConfigError
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.trainer import Trainer
from tests.engine import Samples, lines, network


class Service:
    """What a real server keeps: one line of each key, in the order of their arrival."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answers: list[int | str] = []
        """How it answers the next requests: a status, or "hang up" before, or "cut" after it took the lines."""
        self.judge: Callable[[list[dict[str, Any]], Any], int] = lambda rows, headers: 204
        """How it answers all others, by their lines and headers."""
        self.retry_after = "0"
        self.arrived = threading.Condition()
        self.port = 0

    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines.values()]

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(condition, timeout=60)

    @contextmanager
    def up(self) -> Iterator[str]:
        """The server while the block lasts; always at the same port."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                rows = [json.loads(line) for line in body.splitlines()]
                answer = service.answers.pop(0) if service.answers else service.judge(rows, self.headers)
                if answer in (204, "cut"):
                    for row in rows:
                        service.lines.setdefault(row["key"], row)
                with service.arrived:
                    service.requests.append(dict(self.headers))
                    service.paths.append(self.path)
                    service.arrived.notify_all()
                if isinstance(answer, str):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer)
                self.send_header("Retry-After", service.retry_after)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.port}/log?token=secret"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def quick(url: str, **options: Any) -> RemoteLogger:
    logger = RemoteLogger(url, **{"every": 0.0, **options})
    logger._pace = Pace(batch=logger._pace.batch, every=logger._pace.every, pause=0.001)
    return logger


def log(step: int) -> Log:
    return Log(step=step, values={"loss": 1.0 / step})


def told(logger: RemoteLogger, folder: Path | None, steps: range, *, start: int = 0) -> None:
    """A life of the logger."""
    logger.on_train_begin(TrainBegin(run_dir=None if folder is None else str(folder), step=start))
    for step in steps:
        logger.on_log(log(step))
    logger.on_train_end(TrainEnd())


def spooled(folder: Path, which: str = "remote-") -> list[int]:
    return [
        json.loads(line)["step"] for file in folder.glob(f"{which}*.jsonl") for line in file.read_text().splitlines()
    ]


async def test_a_fit_sends_the_lines_that_metrics_jsonl_has(tmp_path: Path) -> None:
    service = Service()
    with service.up() as url:
        trainer = Trainer(
            network(), nn.MSELoss(), callbacks=[quick(url)], run_dir=tmp_path, log_every=2, seed=0, device="cpu"
        )
        await trainer.fit(Samples(80), Samples(16, seed=1), max_epochs=2)
    sent = [{k: v for k, v in line.items() if k not in ("run", "key", "time")} for line in service.lines.values()]
    assert sent == lines(tmp_path)
    assert not spooled(tmp_path)
    assert {request["Content-Type"] for request in service.requests} == {"application/x-ndjson"}


@settings(max_examples=20)
@given(answers=st.lists(st.sampled_from([204, 500, 503, 429, "hang up", "cut"]), max_size=12))
def test_whatever_the_service_does_each_line_arrives_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, answers: list[int | str]
) -> None:
    service, folder = Service(), tmp_path_factory.mktemp("run")
    service.answers = list(answers)
    with service.up() as url:
        told(quick(url, batch=3, last=30.0), folder, range(1, 21))
    assert service.steps() == list(range(1, 21))
    assert not spooled(folder)


def test_lines_wait_in_a_file_while_the_service_is_away_and_go_first_once_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    with service.up() as url:
        told(quick(url), tmp_path, range(1, 4))
    logger = quick(url, last=0.0, batch=2)
    told(logger, tmp_path, range(4, 9), start=3)
    assert spooled(tmp_path) == [4, 5, 6, 7, 8]
    assert caplog.text.count("takes no lines of the log now") == 1
    assert "secret" not in caplog.text
    later = quick(url, last=30.0)
    with service.up():
        told(later, tmp_path, range(9, 12), start=8)
    assert service.steps() == list(range(1, 12))
    assert not spooled(tmp_path)


def test_a_service_that_dies_and_comes_back_within_a_life_misses_nothing(tmp_path: Path) -> None:
    service = Service()
    logger = None
    with service.up() as url:
        logger = quick(url, last=30.0)
        logger.on_train_begin(TrainBegin(run_dir=str(tmp_path)))
        logger.on_log(log(1))
        service.wait(lambda: service.steps() == [1])
    for step in range(2, 30):
        logger.on_log(log(step))
    with service.up():
        service.wait(lambda: len(service.lines) == 29)
        logger.on_log(log(30))
        logger.on_train_end(TrainEnd())
    assert service.steps() == list(range(1, 31))


def test_steps_that_a_resumed_life_makes_again_have_the_same_keys(tmp_path: Path) -> None:
    service = Service()
    with service.up() as url:
        first = quick(url)
        first.on_train_begin(TrainBegin(run_dir=str(tmp_path)))
        for step in range(1, 4):
            first.on_log(log(step))
        state = json.loads(json.dumps(first.state_dict()))
        for step in range(4, 7):
            first.on_log(log(step))
        first.on_train_end(TrainEnd())
        second = quick(url)
        second.load_state_dict(state)
        told(second, tmp_path, range(4, 9), start=3)
        fresh = quick(url)
        fresh.load_state_dict(state)
        told(fresh, tmp_path, range(1, 2))
    assert service.steps() == [*range(1, 9), 1]
    assert len({line["run"] for line in service.lines.values()}) == 2


def test_lines_that_a_kill_took_from_memory_come_back_with_the_checkpoint(tmp_path: Path) -> None:
    service = Service()
    service.answers = [503] * 1000
    with service.up() as url:
        first = RemoteLogger(url, every=1000.0, last=0.0)
        first.on_train_begin(TrainBegin())
        for step in range(1, 4):
            first.on_log(log(step))
        state = json.loads(json.dumps(first.state_dict()))
        first.on_train_end(TrainEnd())
        service.answers.clear()
        second = quick(url, last=30.0)
        second.load_state_dict(state)
        told(second, tmp_path, range(4, 5), start=3)
    assert service.steps() == [1, 2, 3, 4]


@settings(max_examples=25)
@given(
    bad=st.sets(st.integers(1, 20), max_size=6), batch=st.integers(1, 30), status=st.sampled_from([400, 409, 413, 422])
)
def test_only_the_lines_that_are_refused_alone_are_put_aside(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], batch: int, status: int
) -> None:
    service, folder = Service(), tmp_path_factory.mktemp("run")
    service.judge = lambda rows, headers: status if bad & {row["step"] for row in rows} else 204
    with service.up() as url:
        told(quick(url, batch=batch, last=30.0), folder, range(1, 21))
    assert service.steps() == [step for step in range(1, 21) if step not in bad]
    assert spooled(folder, "refused-") == sorted(bad)
    assert not spooled(folder)


def test_what_is_put_aside_is_said_once_and_sent_again_from_the_other_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    service.answers = [400, 422]
    with service.up() as url:
        told(quick(url, batch=1, last=30.0), tmp_path, range(1, 5))
        (aside,) = tmp_path.glob("refused-*")
        assert caplog.text.count(f"refuses lines of the log, which are put aside in {aside}: 400") == 1
        assert caplog.text.count("put aside") == 1
        assert service.steps() == [3, 4]
        aside.rename(aside.with_name(aside.name.removeprefix("refused-")))
        told(quick(url, last=30.0), tmp_path, range(5, 6), start=4)
    assert service.steps() == [3, 4, 1, 2, 5]


def test_what_is_too_large_goes_in_smaller_batches_that_stay_so(tmp_path: Path) -> None:
    service = Service()
    service.judge = lambda rows, headers: 204 if len(rows) < 4 else 413
    with service.up() as url:
        logger = quick(url, batch=20, every=1000.0, last=30.0)
        told(logger, tmp_path, range(1, 21))
    assert service.steps() == list(range(1, 21))
    assert len(service.requests) == 3 + 10  # 20, 10 and 5 are too many, 2 are not
    assert not spooled(tmp_path, "refused-")


@pytest.mark.parametrize("status", [401, 403, 404, 405, 302])
def test_what_wants_somebody_to_see_to_it_is_said_once_and_costs_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    service = Service()
    service.judge = lambda rows, headers: 204 if headers["Authorization"] == "Bearer new" else status
    with service.up() as url:
        first = quick(url, headers={"Authorization": "Bearer old"}, last=0.0)
        first.on_train_begin(TrainBegin(run_dir=str(tmp_path)))
        first.on_log(log(1))
        service.wait(lambda: len(service.requests) > 3)
        first.on_log(log(2))
        first.on_train_end(TrainEnd())
        assert spooled(tmp_path) == [1, 2]
        assert caplog.text.count(f"takes no lines of the log until that is seen to; they wait: {status}") == 1
        assert ("the service is at '/elsewhere', which url= should be" in caplog.text) == (status == 302)
        (file,) = tmp_path.glob("remote-*")
        assert f"wait in {file}: the next fit in this folder sends them" in caplog.text
        told(quick(url, headers={"Authorization": "Bearer new"}, last=30.0), tmp_path, range(3, 4), start=2)
    assert service.steps() == [1, 2, 3]
    assert not spooled(tmp_path)


def test_a_service_is_left_alone_for_as_long_as_it_asks(tmp_path: Path) -> None:
    service = Service()
    service.answers = [429, 503, 401]
    with service.up() as url:
        logger = RemoteLogger(url, every=0.0, last=30.0)
        logger._pace = Pace(batch=9, every=0.0, pause=1000.0)  # what it does without being asked
        told(logger, tmp_path, range(1, 4))
    assert service.steps() == [1, 2, 3]


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("7", 7.0),
        ("9999999", 3600.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wed, 21 Oct 2035 07:27:00 GMT", 3600.0),
        *(("soon", None), ("-3", None), ("", None), ("Wed, 21 Oct 2015 07:28:30 -0000", None)),
    ],
)
def test_what_a_service_asks_for_is_read(told: str, seconds: float | None) -> None:
    headers = Message()
    headers["Retry-After"] = told
    headers["Date"] = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert asked(headers) == seconds


def test_without_a_folder_what_is_refused_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    service.answers = [400, 400]
    with service.up() as url:
        told(quick(url, batch=1, last=30.0), None, range(1, 5))
    assert service.steps() == [3, 4]
    assert caplog.text.count("refuses lines of the log, which are left out: 400") == 1


@pytest.mark.parametrize(("user", "told"), [("me:p%40ss", "me:p@ss"), ("me", "me:"), ("", ":")])
def test_a_user_in_the_address_goes_as_a_header(tmp_path: Path, user: str, told: str) -> None:
    """It was looked up as a part of the host's name, and no line ever arrived."""
    service = Service()
    with service.up() as url:
        told_to = quick(url.replace("://", f"://{user}@"), last=30.0)
        _sent(told_to, tmp_path)
        given = quick(url.replace("://", f"://{user}@"), last=30.0, headers={"Authorization": "Bearer x"})
        _sent(given, tmp_path)
    assert service.steps() == [1, 1]
    basic, bearer = (request["Authorization"] for request in service.requests)
    assert base64.b64decode(basic.removeprefix("Basic ")).decode() == told
    assert bearer == "Bearer x"
    assert all("@" not in request["Host"] for request in service.requests)


def test_a_token_read_with_its_line_break_is_sent_without(tmp_path: Path) -> None:
    """The thread that sends ended at it, and no line ever arrived."""
    service = Service()
    with service.up() as url:
        _sent(quick(url, last=30.0, headers={"Authorization": "Bearer x\n"}), tmp_path)
    assert service.steps() == [1]
    assert service.requests[0]["Authorization"] == "Bearer x"


def test_letters_beyond_ascii_in_an_address_arrive_as_utf_8(tmp_path: Path) -> None:
    service = Service()
    with service.up() as url:
        address = url.replace("://", "://ä:ö@").replace("/log", "/l\u00f6g%20/") + "&x=\u00e4#part"
        _sent(quick(address, last=30.0), tmp_path)
    assert service.paths == ["/l%C3%B6g%20/?token=secret&x=%C3%A4"]
    assert base64.b64decode(service.requests[0]["Authorization"].removeprefix("Basic ")).decode() == "ä:ö"


def test_what_no_request_can_be_made_of_is_said_and_costs_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def open(self, request: Any, timeout: float) -> Any:
            raise ValueError("no such request")

    with monkeypatch.context() as patch:
        patch.setattr("streamtrain.callbacks.remote_logger._OPENER", Broken())
        told(quick("http://host", last=0.05), tmp_path, range(1, 3))
    assert caplog.text.count("until that is seen to; they wait: ValueError: no such request") == 1
    assert spooled(tmp_path) == [1, 2]


def _sent(logger: RemoteLogger, folder: Path) -> None:
    """One line, with a key of its own."""
    told(logger, folder, range(1, 2))


def test_without_a_folder_memory_is_bounded_and_what_is_lost_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        logger = quick(f"http://127.0.0.1:{taken.getsockname()[1]}", memory=10, last=0.0)
        logger.on_train_begin(TrainBegin())
        for step in range(1, 1001):
            logger.on_log(log(step))
        unsent: list[str] = logger.state_dict()["unsent"]
        assert [json.loads(line)["step"] for line in unsent] == list(range(991, 1001))
        logger.on_train_end(TrainEnd())
    assert "1000 lines of the log never reached http://127.0.0.1" in caplog.text
    assert "without a run_dir they are kept nowhere" in caplog.text


def test_a_service_that_answers_never_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        logger = quick(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2, last=0.0)
        told(logger, tmp_path, range(1, 201))
    assert spooled(tmp_path) == list(range(1, 201))
    assert "timed out" in caplog.text


@given(st.lists(st.one_of(st.none(), st.integers(1, 5)), max_size=60), st.integers(1, 6))
@settings(max_examples=60)
def test_a_spool_is_a_queue_wherever_its_lines_lie(
    tmp_path_factory: pytest.TempPathFactory, moves: list[int | None], memory: int
) -> None:
    """None puts a line; a number takes so many, and between the look and the word a line may be stowed."""
    path = tmp_path_factory.mktemp("spool") / "spool.jsonl"
    spool, made = Spool(path, memory=memory, disk=1 << 20), 0
    model: list[str] = []
    for move in moves:
        if move is None:
            made += 1
            spool.put(f"{made}\n")
            model.append(f"{made}\n")
        else:
            taken = spool.head(move)
            assert taken == model[: len(taken)]
            assert bool(taken) == bool(model)
            if move % 2:
                spool.stow()
            spool.delivered(taken)
            del model[: len(taken)]
    assert spool.waiting <= memory
    left: list[str] = []
    while taken := spool.head(7):
        left += taken
        spool.delivered(taken)
    assert left == model
    assert not path.exists()


def test_a_disk_that_is_full_costs_lines_that_are_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", memory=2, disk=6)
    for number in range(10):
        spool.put(f"{number}\n")
    assert spool.head(99) == ["0\n", "1\n", "2\n"]
    assert spool.unsent() == ["8\n", "9\n"]
    assert spool.dropped == 5


def test_a_line_that_a_kill_tore_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.write_text("a\nb\nc")
    spool = Spool(path, memory=2, disk=100)
    spool.put("d\n")
    spool.stow()
    assert spool.head(5) == ["a\n", "b\n", "d\n"]


@pytest.mark.parametrize(
    "options",
    [
        *({"url": url} for url in ("ftp://x", "host/path", "http://", 3, "http://[x")),
        *({"url": url} for url in ("http://host/a b", "http://host/a\n", f"http://{'a' * 64}.net")),
        *({"headers": header} for header in ({"X A": "b"}, {"": "b"}, {"X-A": "a\nb"}, {"X-A": "\u20ac"})),
        *({"batch": 0}, {"every": -1}, {"timeout": 0}, {"memory": "x"}, {"last": -1}, {"disk": 0}),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"RemoteLogger: {next(iter(options))}"):
        RemoteLogger(**{"url": "http://host", **options})
