"""What stands between a client and the application, as plain ASGI: who may ask, how often, how much, how slowly.

Also the record of each request: its id, one line of a log, its span. Nothing of what a client said is logged, but for an id
that is short and safe. This file knows no engine.
"""

import asyncio
import importlib
import json
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motrt.serve.options import ApiKeys, ServeOptions
from motrt.serve.protocol import ErrorBody, ErrorDetail

requests = logging.getLogger("motrt.serve.requests")

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/", "/openapi.json")
_QUIET = ("/health/live", "/health/ready", "/metrics", "/v1/engine")
_LIMITED = ("/v1/completions",)

# Clients whose rates are remembered; the one heard of longest ago is forgotten for a new one.
_MOST_CLIENTS = 10_000

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class JsonResponse(Response):
    """JSON in ASCII: whatever came from a client, it can be sent back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorBody(error=ErrorDetail(message=message, type=kind, code=code, param=param)).model_dump()


def error(status: int, message: str, code: str, headers: dict[str, str] | None = None, param: str | None = None) -> Response:
    return JsonResponse(error_body(status, message, code, param), status, headers)


@dataclass
class Record:
    """What is told of a request once it is over.

    Attributes:
        facts: filled by whoever knows them: finish, tokens, seconds.
    """

    id: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Outermost: gives every request an id, and tells of it when it is over."""

    def __init__(self, app: ASGIApp, responded: Callable[[str, int], None]) -> None:
        self.app, self.responded = app, responded
        self._tracer = find_tracer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        came = headers.get("x-request-id", "")
        record = Record(came if _SAFE_ID.fullmatch(came) else secrets.token_hex(16))
        scope.setdefault("state", {})["record"] = record
        span = None if self._tracer is None else self._tracer.start(scope["method"], headers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", record.id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except BaseException:
            record.status = record.status or 500
            raise
        finally:
            self._tell(scope, record, span)

    def _tell(self, scope: Scope, record: Record, span: Any) -> None:
        route = getattr(scope.get("route"), "path", None) or ("guard" if record.status in (401, 408, 413, 429) else "unknown")
        facts = {
            "id": record.id,
            "method": scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
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

    def start(self, method: str, headers: Headers) -> Any:
        context = self._propagate.extract(dict(headers))
        tracer = self._trace.get_tracer("motrt.serve")
        return tracer.start_span("request", context=context, kind=self._trace.SpanKind.SERVER)


def find_tracer() -> _Tracer | None:
    try:
        return _Tracer(importlib.import_module("opentelemetry.trace"), importlib.import_module("opentelemetry.propagate"))
    except ImportError:
        return None


class Rates:
    """So many requests a minute for each client: a bucket that fills evenly, and holds a minute's worth."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def seconds_to_wait(self, client: str, now: float) -> float:
        """0 where the client may go on, and one request is then counted."""
        if not self.per_minute:
            return 0.0
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute
        self._buckets[client] = (left if wait else left - 1, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return wait


class Guard:
    """Refuses before anything is read who has no key, or asks too often; and then bodies that are too large or too slow."""

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: ApiKeys | None, refused: Callable[[str], None]) -> None:
        self.app, self.options, self.keys, self.refused = app, options, keys, refused
        self._rates = Rates(options.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = self._stranger(scope) or self._too_often(scope)
        if response is None:
            try:
                body = await asyncio.wait_for(self._body(scope, receive), self.options.body_seconds)
            except asyncio.TimeoutError:
                response = self._refuse(
                    408, f"the body did not come within {self.options.body_seconds:g} seconds: send it faster", "body_too_slow"
                )
            else:
                if body is None:
                    return  # the client left
                if isinstance(body, bytes):
                    await self.app(scope, _once(body, receive), send)
                    return
                response = body
        await response(scope, receive, send)

    def _stranger(self, scope: Scope) -> Response | None:
        scope["state"]["client"] = (scope.get("client") or ("unknown",))[0]
        if self.keys is None or scope["path"] in _OPEN or scope["path"].startswith("/health/"):
            return None
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        number = self.keys.number_of(key.strip().encode("latin-1")) if kind.lower() == "bearer" else None
        if number is None:
            said = "this server asks for a key: send it as 'Authorization: Bearer KEY'"
            return self._refuse(401, said, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        scope["state"]["client"] = f"key {number}"
        return None

    def _too_often(self, scope: Scope) -> Response | None:
        if scope["path"] not in _LIMITED:
            return None
        wait = self._rates.seconds_to_wait(scope["state"]["client"], time.monotonic())
        if not wait:
            return None
        said = f"more than {self.options.requests_per_minute} requests a minute: try again in {wait:.1f} seconds"
        return self._refuse(429, said, "rate_limit_exceeded", {"Retry-After": str(max(1, round(wait + 0.5)))})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Response | None:
        most = self.options.max_body_bytes
        too_large = f"the body is larger than the {most} bytes that this server reads: shorten the prompt"
        claimed = Headers(scope=scope).get("content-length", "0")
        if not claimed.isdecimal() or len(claimed) > 18 or int(claimed) > most:
            return self._refuse(413, too_large, "body_too_large")
        parts, size, is_more = [], 0, True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                return self._refuse(413, too_large, "body_too_large")
            is_more = message.get("more_body", False)
        return b"".join(parts)

    def _refuse(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
        """What is not read of the body is not waited for: the connection ends."""
        self.refused(code)
        return error(status, message, code, {"Connection": "close", **(headers or {})})


def _once(body: bytes, receive: Receive) -> Receive:
    """The body as one message; after it, whatever the connection says."""
    is_told = False

    async def replay() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


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


class EventStream(Response):
    """Server-sent events. A reader who takes too long for one piece is given up; others never wait for it.

    Args:
        pieces: what is sent, as it comes.
        give_up: called when nobody listens any more.
        seconds: for one piece to be taken.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: Any, give_up: Callable[[], None], seconds: float = 60.0) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces, self._give_up, self._seconds = pieces, give_up, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._pieces:
                with anyio.fail_after(self._seconds):  # asyncio's own, before Python 3.12, makes a task for each piece
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # TimeoutError among them: nobody listens
            pass
        finally:
            self._give_up()
            with suppress(RuntimeError):
                await self._pieces.aclose()
