"""The process that serves: uvicorn around the application, logs as JSON lines, and an end that lets requests finish.

The first SIGTERM or SIGINT makes the server refuse completions (503) and be not ready, while those that run go on for up to
``drain_seconds``; then it ends with exit code 0. A second one ends it at once.
"""

import logging
import os
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from motrt.errors import BackendError
from motrt.serve.app import create_app
from motrt.serve.guard import JsonLines
from motrt.serve.options import ServeOptions
from motrt.serve.service import Service, loader_of

logger = logging.getLogger(__name__)

# For the last bytes of answers to leave, once the engine is done.
GOODBYE_SECONDS = 3


class Server(uvicorn.Server):
    """Uvicorn's server, which goes on answering while it drains."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            logging.shutdown()
            os._exit(128 + sig)
        self.service.is_draining = True
        self._draining = threading.Thread(target=self.service.drain, name="motrt-drain", daemon=True)
        self._draining.start()

    async def on_tick(self, counter: int) -> bool:
        is_over = await super().on_tick(counter)
        is_drained = self._draining is not None and not self._draining.is_alive()
        return is_over or is_drained or self.service.load_failure is not None


def serve(bundle: Path, options: ServeOptions) -> None:
    """Serve ``bundle`` until a signal comes; returns when the server has drained.

    Raises:
        MotrtError: when the bundle can not be loaded, or does not give its known answer.
        BackendError: when the address can not be had.
    """
    log_json_lines()
    app = create_app(loader_of(bundle, options), options)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )
    service: Service = app.state.service
    server = Server(config, service)
    try:
        server.run()
    except SystemExit:
        raise BackendError(f"{options.host}:{options.port} can not be listened at: give another --host or --port") from None
    if service.load_failure is not None:
        raise service.load_failure


def log_json_lines() -> None:
    """Everything that is logged goes to standard error, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
