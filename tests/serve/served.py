"""A real uvicorn on a free port, in a thread of this process, and how tests ask it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from motrt.runtime.engine import Engine
from motrt.serve.app import create_app
from motrt.serve.connections import listen
from motrt.serve.options import ServeOptions
from motrt.serve.server import Server, config_of
from motrt.serve.service import Service

POST = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
ASK: dict[str, Any] = {"model": "tiny", "prompt": [1, 2, 3], "temperature": 0}


@dataclass
class Served:
    """A server that is up: where it listens, and what it serves."""

    port: int
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        assert self.service.engine is not None
        return self.service.engine

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **options)

    def ask(self, headers: dict[str, str] | None = None, **values: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={**ASK, **values}, headers=headers, timeout=20)

    def raw(self, sent: bytes) -> socket.socket:
        """A connection of one's own, with something said on it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(sent)
        return connection


Serve = Callable[..., Any]


def eventually(is_so: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it is so within a while; how long that took is the machine's affair."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def running(source: Any, options: ServeOptions) -> Iterator[Served]:
    """A server in a thread; its end is waited for."""
    app = create_app(source, options)
    (listener,) = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(config_of(app, options), app.state.service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield Served(port, app.state.service)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
