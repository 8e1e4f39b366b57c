"""The process that serves: uvicorn around the application, logs as JSON lines, and an end that lets requests finish.

The first SIGTERM or SIGINT makes the server refuse completions (503) and be not ready, while those that run go on for up to
``drain_seconds``; then it ends with exit code 0. A second one ends it at once.
"""

import asyncio
import errno
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from motrt.errors import BackendError
from motrt.serve.app import create_app
from motrt.serve.connections import (
    Connection,
    address_told,
    is_beyond_this_machine,
    listen,
    longest_waited_for,
    most_connections,
)
from motrt.serve.options import ServeOptions
from motrt.serve.recorder import JsonLines
from motrt.serve.service import Service, loader_of

logger = logging.getLogger(__name__)

# For the last bytes of answers to leave, once the engine is done; and for a load that nobody waits for any more to end.
GOODBYE_SECONDS = 3

# Between two tries to take a connection, after one that failed; and between two lines of the log that say so.
RETRY_SECONDS, TELL_SECONDS = 0.1, 60.0

# What a connection that is given up may give back.
OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def config_of(app: FastAPI, options: ServeOptions) -> uvicorn.Config:
    """How uvicorn serves ``app``: where it listens is ``Server.run``'s to be told."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(options.trusted_proxies),  # uvicorn's own choice believes whatever this machine's programs say
        forwarded_allow_ips=list(options.trusted_proxies),
        timeout_keep_alive=options.keep_alive_seconds,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )


class Server(uvicorn.Server):
    """Uvicorn's server, which takes connections as they can be held, and goes on answering while it drains."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.most_connections = most_connections(service.options.max_connections)
        self._draining: threading.Thread | None = None
        self._taking: list[asyncio.Task[None]] = []
        self._told = -TELL_SECONDS

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            logging.shutdown()
            os._exit(128 + sig)
        self.service.is_draining = True
        self._draining = threading.Thread(target=self.service.drain, name="motrt-drain", daemon=True)
        self._draining.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._taking = [asyncio.create_task(self._take_connections(one)) for one in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for one in self._taking:
            one.cancel()
        await asyncio.gather(*self._taking, return_exceptions=True)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        is_over = await super().on_tick(counter)
        self._end_overdue()
        for one in self._taking:
            if one.done():
                one.result()  # raises: without it nobody would be answered, nor told why
        is_drained = self._draining is not None and not self._draining.is_alive()
        return is_over or is_drained or self.service.load_failure is not None

    def _end_overdue(self) -> None:
        now, seconds = asyncio.get_running_loop().time(), self.service.options.header_seconds
        for one in list(self.server_state.connections):
            if isinstance(one, Connection) and one.is_overdue(seconds, now):
                one.give_up()

    async def _take_connections(self, listener: socket.socket) -> None:
        while True:
            failure = await self._take_one(listener)
            if failure is not None:
                self._tell(failure)
                await (self._give_one_up() if failure.errno in OUT_OF else asyncio.sleep(RETRY_SECONDS))

    async def _take_one(self, listener: socket.socket) -> OSError | None:
        """What stood in the way: no descriptors, no memory, a client that has left again."""
        loop = asyncio.get_running_loop()
        try:
            taken, _ = await loop.sock_accept(listener)
            try:
                await self._make_room()
                await loop.connect_accepted_socket(self._connection, taken)
            except BaseException:
                taken.close()
                raise
        except OSError as failure:
            return failure
        return None

    def _connection(self) -> Connection:
        return Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _make_room(self) -> None:
        """Give up whoever has kept the server waiting longest; where all are at work, wait for one of them to end."""
        while len(self.server_state.connections) >= self.most_connections:
            await self._give_one_up()

    async def _give_one_up(self) -> None:
        one = longest_waited_for(self.server_state.connections)
        if one is not None:
            one.give_up()
        await asyncio.sleep(RETRY_SECONDS if one is None else 0)

    def _tell(self, failure: OSError) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            logger.warning("a connection could not be taken (%s); said once a minute at most", failure)


def serve(bundle: Path, options: ServeOptions) -> None:
    """Serve ``bundle`` until a signal comes; returns when the server has drained.

    Raises:
        MotrtError: when the bundle can not be loaded, or does not give its known answer.
        BackendError: when the address can not be had; nothing has been loaded then.
    """
    log_json_lines()
    app = create_app(loader_of(bundle, options), options)
    service: Service = app.state.service
    server = Server(config_of(app, options), service)
    listeners = listen(options.host, options.port)
    try:
        _tell_where(listeners, options)
        server.run(listeners)
    except SystemExit:
        if server.started:
            raise
        raise BackendError("the server could not be started: its log says why") from None
    finally:
        for one in listeners:
            one.close()
    service.wait(GOODBYE_SECONDS)
    if service.load_failure is not None:
        raise service.load_failure
    if service.is_loading:  # and nobody waits for it: a bundle may take minutes
        logging.shutdown()
        os._exit(0)


def _tell_where(listeners: list[socket.socket], options: ServeOptions) -> None:
    logger.info("listening at %s", ", ".join(address_told(one) for one in listeners))
    if options.api_key_file is None and is_beyond_this_machine(listeners):
        logger.warning("others than this machine can ask, and no key is asked for: give --api-key-file, or --host 127.0.0.1")
    if options.api_key_file is None and "*" in options.cors_origins:
        logger.warning(
            "every page that is open in a browser here can ask, and no key is asked for: name the sites instead of *"
        )


def log_json_lines() -> None:
    """Everything that is logged goes to standard error, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
