"""Connections that only keep a server waiting: each is ended in time, and however many there are, others are answered."""

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from motrt.errors import BackendError
from motrt.runtime.engine import Engine
from motrt.serve import connections, server
from motrt.serve.connections import address_told, is_beyond_this_machine, listen, most_connections
from motrt.tests.serve.served import POST, Serve, Served, eventually

Slowly = Callable[[Engine, float], None]
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"


def is_ended(connection: socket.socket) -> bool:
    """Whether the server ends it; what was answered before is read."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def drip(connection: socket.socket, sent: bytes, seconds: float) -> bool:
    """Whether the server ended the connection while ``sent`` went to it byte by byte."""
    connection.settimeout(seconds)
    return any(is_ended_at(connection, bytes([byte])) for byte in sent)


def is_ended_at(connection: socket.socket, byte: bytes) -> bool:
    try:
        connection.sendall(byte)
        return connection.recv(1 << 16) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.fixture(scope="module")
def hasty(tiny_bundle: Path) -> Iterator[Served]:
    from motrt.runtime.load import load
    from motrt.serve.options import ServeOptions
    from motrt.tests.serve.served import running

    options = ServeOptions(model_name="tiny", drain_seconds=0, header_seconds=0.3, keep_alive_seconds=1, body_seconds=0.3)
    with running(lambda: load(tiny_bundle, num_threads=1), options) as one:
        assert one.service.wait(20)
        yield one


@pytest.mark.parametrize("said", [b"", b"G", GET, b"\r\n"])
def test_a_connection_that_does_not_say_what_it_wants_is_ended(said: bytes, hasty: Served) -> None:
    with hasty.raw(said) as connection:
        assert is_ended(connection)


def test_headers_that_come_a_byte_at_a_time_are_not_waited_for(hasty: Served) -> None:
    with hasty.raw(b"") as connection:
        assert drip(connection, GET * 20, 0.03)


def test_neither_are_those_of_a_later_request(hasty: Served) -> None:
    with hasty.raw(GET + b"\r\n") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert drip(connection, GET * 20, 0.03)


def test_nor_those_that_came_with_a_request_before(hasty: Served) -> None:
    with hasty.raw(GET + b"\r\n" + GET) as connection:
        assert is_ended(connection)


def test_a_body_that_comes_a_byte_at_a_time_is_not_waited_for(hasty: Served) -> None:
    with hasty.raw(f"{POST}Content-Length: 1000\r\n\r\n".encode()) as connection:
        assert drip(connection, b" " * 1000, 0.03)
    with hasty.raw(f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode()) as connection:
        assert drip(connection, b"1\r\n \r\n" * 200, 0.03)


def test_a_connection_that_says_nothing_after_an_answer_is_ended(hasty: Served) -> None:
    with hasty.raw(GET + b"\r\n") as connection:
        assert is_ended(connection)


def test_a_connection_that_asks_again_is_kept(hasty: Served) -> None:
    with httpx.Client(base_url=hasty.url) as client:
        ports = set()
        for _ in range(5):
            answer = client.get("/health/live")
            assert answer.status_code == 200
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(0.1)
        assert len(ports) == 1


def test_a_request_that_is_at_work_is_not_ended_by_these_limits(serve: Serve, slowly: Slowly) -> None:
    with serve(header_seconds=0.05, body_seconds=0.05, keep_alive_seconds=1) as served:
        slowly(served.engine, 0.03)
        assert served.ask(max_tokens=30).json()["usage"]["completion_tokens"] == 30


def test_who_reads_none_of_many_answers_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READER_SECONDS", 0.3)
    page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serve() as served, served.raw(b"") as connection:
        connection.setblocking(False)
        assert eventually(lambda: is_reset(connection, page), 20)
        assert served.get("/health/ready").status_code == 200


def is_reset(connection: socket.socket, said: bytes) -> bool:
    """Whether the server has ended it; until the system takes no more for it, more is said."""
    try:
        connection.send(said)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def test_many_more_connections_than_may_be_and_a_new_client_is_answered(serve: Serve) -> None:
    with serve(max_connections=8) as served, ExitStack() as held:
        for said in (b"", GET, f"{POST}Content-Length: 9\r\n\r\n".encode()) * 20:
            held.enter_context(served.raw(said))
        assert served.get("/health/live").status_code == 200
        assert served.ask(max_tokens=1).status_code == 200


def test_a_request_that_is_at_work_is_not_given_up_for_connections_without_one(serve: Serve, slowly: Slowly) -> None:
    with serve(max_connections=4) as served, ExitStack() as held:
        slowly(served.engine, 0.02)
        body = b'{"model": "tiny", "prompt": [1], "max_tokens": 60, "stream": true}'
        head = f"{POST}Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        asked = held.enter_context(served.raw(head.encode() + body))
        assert eventually(lambda: served.engine.state().running == 1)
        for _ in range(20):
            held.enter_context(served.raw(b""))
        said = b""
        while part := asked.recv(1 << 16):
            said += part
        assert b"data: [DONE]" in said


def test_where_all_connections_are_at_work_a_new_one_waits_for_an_end(serve: Serve, slowly: Slowly) -> None:
    with serve(max_connections=1) as served:
        slowly(served.engine, 0.02)
        body = b'{"model": "tiny", "prompt": [1], "max_tokens": 30}'
        head = f"{POST}Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        with served.raw(head.encode() + body) as asked:
            assert eventually(lambda: served.engine.state().running == 1)
            assert served.get("/health/live").status_code == 200
            assert served.engine.state().running == 0
            assert asked.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_system_out_of_descriptors_is_told_of_once_and_asked_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[float] = []
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.01)
    with serve() as served, served.raw(GET):

        async def fails(loop: Any, listener: Any) -> Any:
            tries.append(loop.time())
            if len(tries) > 50:
                return await taken(loop, listener)
            raise OSError(errno.EMFILE, "Too many open files")

        taken = asyncio.SelectorEventLoop.sock_accept
        monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", fails)
        served.raw(b"").close()  # takes what was asked for before
        assert eventually(lambda: len(tries) > 50)
        assert served.get("/health/live").status_code == 200
    assert len([one for one in caplog.records if "could not be taken" in one.getMessage()]) == 1


# Where it listens.


def test_a_name_is_listened_at_by_all_its_addresses_and_one_port() -> None:
    listeners = listen("localhost", 0)
    try:
        assert len({one.getsockname()[1] for one in listeners}) == 1
        assert not is_beyond_this_machine(listeners)
        assert "http://127.0.0.1:" in " ".join(map(address_told, listeners))
    finally:
        for one in listeners:
            one.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "0"])
def test_what_others_can_reach_is_known_however_it_is_written(host: str) -> None:
    (listener,) = listen(host, 0)
    with listener:
        assert is_beyond_this_machine([listener])


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a" * 300, "300.1.1.1"])
def test_an_address_that_is_not_here_is_refused(host: str) -> None:
    with pytest.raises(BackendError, match="can not be listened at"):
        listen(host, 0)


def test_a_port_that_is_taken_is_refused_and_nothing_is_left_open() -> None:
    (taken,) = listen("127.0.0.1", 0)
    with taken, pytest.raises(BackendError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("allowed", "asked", "most"), [(None, 1000, 1000), (100_000, 1000, 1000), (500, 1000, 416), (500, 5, 5)]
)
def test_there_are_never_more_connections_than_descriptors(
    allowed: int | None, asked: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_files_allowed", lambda: allowed)
    monkeypatch.setattr(connections, "_files_open", lambda: 20)
    assert most_connections(asked) == most


def test_a_process_that_may_open_hardly_any_file_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_files_allowed", lambda: 64)
    with pytest.raises(BackendError, match="ulimit -n"):
        most_connections(1000)
