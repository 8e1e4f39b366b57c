"""The record of each request: its id, one line of a log, its span; and the headers that every answer carries.

Nothing of what a client said is logged, but for an id that is short and safe. This file knows no engine.
"""

import importlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

requests = logging.getLogger("motrt.serve.requests")

# Where a request's record lies in the ASGI scope's state, beside what an application around this one keeps there.
RECORD = "motrt_record"

# Of every answer: no other site shows it in a frame, no browser takes it for another kind of file or tells where it was.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/health/live", "/health/ready", "/metrics", "/v1/engine")


@dataclass
class Record:
    """What is told of a request once it is over.

    Attributes:
        client: whose request it is, for limits: an address, or a key's number.
        status: of the answer; 0 until it begins.
        is_refused: whether the guard answered, and the application was not asked.
        facts: filled by whoever knows them: finish, tokens, seconds.
    """

    id: str
    started: float = field(default_factory=time.monotonic)
    client: str = "unknown"
    status: int = 0
    is_refused: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Outermost: gives every request an id and every answer its headers, and tells of it when it is over.

    Args:
        app: what answers.
        responded: told the route and the status of every answer.
        arrived: called for every request, before it is looked at.
    """

    def __init__(self, app: ASGIApp, responded: Callable[[str, int], None], arrived: Callable[[], None]) -> None:
        self.app, self.responded, self.arrived = app, responded, arrived
        self._tracer = find_tracer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.arrived()
        said = Headers(scope=scope)
        came = said.get("x-request-id", "")
        record = Record(came if _SAFE_ID.fullmatch(came) else secrets.token_hex(16))
        scope.setdefault("state", {})[RECORD] = record
        outer = scope.get("route")  # of an application that this one is mounted in
        span = None if self._tracer is None else self._tracer.start(said)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", record.id.encode()), *HEADERS]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except BaseException:
            record.status = record.status or 500
            raise
        finally:
            route = scope.get("route")
            self._tell(scope["method"], None if route is outer else getattr(route, "path", None), record, span)

    def _tell(self, method: str, path: str | None, record: Record, span: Any) -> None:
        route = "guard" if record.is_refused else path or "unknown"
        facts = {
            "id": record.id,
            "method": method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other",
            "route": route,
            "status": record.status,
            "total_seconds": round(time.monotonic() - record.started, 6),
            **record.facts,
        }
        self.responded(route, record.status)
        requests.log(logging.DEBUG if route in _QUIET else logging.INFO, "request", extra={"facts": facts})
        if span is not None:
            span.update_name(f"{facts['method']} {route}")
            span.set_attributes({f"motrt.{name}": value for name, value in flat(facts)})
            span.end()


def flat(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Values that a span can hold; counts by modality as names with a dot."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += [(f"{name}.{part}", one) for part, one in value.items()]
        elif value is not None:
            found.append((name, value))
    return found


class _Tracer:
    """OpenTelemetry's, where that is installed; the client's trace goes on where it sent one."""

    def __init__(self, trace: Any, propagate: Any) -> None:
        self._trace, self._propagate = trace, propagate

    def start(self, headers: Headers) -> Any:
        context = self._propagate.extract(dict(headers))
        tracer = self._trace.get_tracer("motrt.serve")
        return tracer.start_span("request", context=context, kind=self._trace.SpanKind.SERVER)


def find_tracer() -> _Tracer | None:
    try:
        return _Tracer(importlib.import_module("opentelemetry.trace"), importlib.import_module("opentelemetry.propagate"))
    except ImportError:
        return None


class JsonLines(logging.Formatter):
    """A log in which every line is one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)
