"""Connections, before there is a request: where the server listens, how many it holds, and how long each may keep it waiting.

Of uvicorn's own limits one ends connections that say nothing after an answer, and one counts connections only to refuse
requests. None ends a connection that never asks, and asyncio's servers take connections until there are no descriptors, then
log each failure to take another one. So connections are taken one by one here. Knows no application.
"""

import ipaddress
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from motrt.errors import BackendError
from motrt.serve.recorder import HEADERS
from motrt.serve.replies import READER_SECONDS, error

logger = logging.getLogger(__name__)

# Descriptors that are left to everything else: the bundle's files while it is opened, the event loop, a log.
SPARE_FILES = 64

# Connections that the system keeps until they are taken.
BACKLOG = 1024


class Connection(H11Protocol):
    """One client's connection, which knows since when it keeps the server waiting, and for what."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.since = self.loop.time()  # when it opened, or the newest request began to come
        self._stuck_since: float | None = None

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:
            self.since = self.loop.time()
        super().data_received(data)

    def resume_writing(self) -> None:
        self._stuck_since = None
        super().resume_writing()

    @property
    def owes(self) -> str:
        """What the server waits for: a request, the rest of its body, or nothing."""
        if self.transport.is_closing():
            return ""
        if self.cycle is None or self.cycle.response_complete:
            return "request"
        return "body" if self.cycle.more_body and not self.cycle.response_started else ""

    def is_overdue(self, header_seconds: float, now: float) -> bool:
        """Whether it has taken too long to say what it wants, or to read what it was told. Asked again and again.

        A silence after an answer is uvicorn's to end, and a body that does not come is the guard's.
        """
        if not (self.transport.is_closing() or self.flow.write_paused):
            is_silent = self.timeout_keep_alive_task is not None
            return self.owes == "request" and not is_silent and now - self.since > header_seconds
        if self._stuck_since is None:
            self._stuck_since = now
        return now - self._stuck_since > READER_SECONDS

    def give_up(self) -> None:
        """End it at once, whatever is still unsent."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Tell of a request that is no HTTP in the form of all other errors, and end the connection."""
        response = error(400, "this is no HTTP request that can be read", "invalid_http", {"Connection": "close"})
        head = b"".join(name + b": " + value + b"\r\n" for name, value in (*response.raw_headers, *HEADERS))
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(response.body))
        self.transport.close()


def longest_waited_for(connections: Iterable[Any]) -> Connection | None:
    """The connection to give up for a new one: without a request, else without its body; None where all are at work."""
    found = [one for one in connections if isinstance(one, Connection) and one.owes]
    return min(found, key=lambda one: (one.owes == "body", one.since), default=None)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address that ``host`` has, at one port; 0 takes a free one.

    Raises:
        BackendError: when that can not be had.
    """
    listeners: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ):
            chosen = listeners[0].getsockname()[1] if listeners else port
            listeners.append(_listen_at(family, (address[0], chosen, *address[2:])))
    except (OSError, UnicodeError) as failure:
        for one in listeners:
            one.close()
        reason = getattr(failure, "strerror", None) or str(failure)
        raise BackendError(f"{host}:{port} can not be listened at ({reason}): give another --host or --port") from None
    return listeners


def _listen_at(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def address_told(listener: socket.socket) -> str:
    """Where it listens, as a client writes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_beyond_this_machine(listeners: Sequence[socket.socket]) -> bool:
    """Whether others than this machine's own programs can reach one of them."""
    return any(not ipaddress.ip_address(one.getsockname()[0].partition("%")[0]).is_loopback for one in listeners)


def most_connections(asked: int) -> int:
    """As many as were asked for, or fewer, so that descriptors never run out.

    Raises:
        BackendError: when the process may hardly open any file.
    """
    allowed = _files_allowed()
    if allowed is None:
        return asked
    most = allowed - _files_open() - SPARE_FILES
    if most < 1:
        raise BackendError(f"this process may open {allowed} files, which leaves none for connections: raise `ulimit -n`")
    if most < asked:
        logger.warning(
            "at most %d connections at once, not %d: this process may open %d files (`ulimit -n`)", most, asked, allowed
        )
    return min(asked, most)


def _files_allowed() -> int | None:
    try:
        import resource
    except ImportError:  # no such limit is known here
        return None
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if allowed == resource.RLIM_INFINITY else allowed


def _files_open() -> int:
    try:
        return len(list(Path("/proc/self/fd").iterdir()))
    except OSError:  # not Linux: about what an interpreter has
        return 16
