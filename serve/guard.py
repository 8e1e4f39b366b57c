"""What stands between a client and the application, as plain ASGI: who may ask, how often, how much, how slowly.

This file knows no engine, and no connections: an application of another server, or mounted in another application, is guarded
likewise.
"""

import asyncio
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motrt.serve.hosts import Hosts, address_of
from motrt.serve.options import ApiKeys, ServeOptions
from motrt.serve.recorder import RECORD, Record
from motrt.serve.replies import error

logger = logging.getLogger(__name__)

# Asked without a key; and what the limit of requests a minute counts.
_OPEN = ("/", "/openapi.json", "/health/live", "/health/ready")
_LIMITED = ("/v1/completions",)

# Clients whose rates are remembered; the one heard of longest ago is forgotten for a new one.
_MOST_CLIENTS = 10_000

# What one owner of IPv6 addresses usually has is one client.
_IPV6_PREFIX = 64


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


def route_path(scope: Scope) -> str:
    """The path within this application, as its routes match it: without the server's root path, or what it is mounted at.

    Servers differ in whether ``path`` holds the root path, and so do proxies; the routes take both, and so does this.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    inside = path.removeprefix(root)
    return inside if inside == "" or inside.startswith("/") else path


def client_of(scope: Scope) -> str:
    """Whose request it is where there are no keys: an address, or the network that one client has of them."""
    said = str((scope.get("client") or ("unknown",))[0])
    address = address_of(said)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address), _IPV6_PREFIX), strict=False))
    return said if address is None else str(address)


class Guard:
    """Refuses who calls another host, has no key, or asks too often, and then what is too much or too slow to be read.

    Args:
        app: what is guarded.
        options: of the server.
        keys: None: none is asked for.
        refused: told the code of every refusal.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: ApiKeys | None, refused: Callable[[str], None]) -> None:
        self.app, self.options, self.keys, self.refused = app, options, keys, refused
        # A page that another site's name leads here knows no key: nothing but what is open to all could be read by it.
        is_checked = keys is None or bool(options.allowed_hosts)
        self._hosts = Hosts(options.allowed_hosts, options.host) if is_checked else None
        self._rates = Rates(options.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.options.root_path and not scope.get("root_path"):
            scope["root_path"] = self.options.root_path
        record: Record = scope["state"][RECORD]
        body = self._refusal(scope, record) or await self._body_in_time(scope, receive)
        if isinstance(body, Response):
            record.is_refused = True
            await body(scope, receive, send)
        elif body is not None:
            await self._ask(record, scope, _once(body, receive), send)

    def _refusal(self, scope: Scope, record: Record) -> Response | None:
        # In this order: who asks is known before it is counted.
        return self._misled(scope) or self._misread(scope) or self._stranger(scope, record) or self._too_often(scope, record)

    async def _ask(self, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's answer; a fault of its own has one, too, where none has begun."""
        try:
            await self.app(scope, receive, send)
        except Exception:
            if record.status:
                raise
            logger.exception("request %s met a fault of the server", record.id)
            response = error(500, "the server met a fault of its own; its log says more", "internal_error")
            await response(scope, receive, send)

    def _misled(self, scope: Scope) -> Response | None:
        if self._hosts is None or self._hosts.allow(scope):
            return None
        said = "this server does not go by that Host: ask by an address that it listens at, or allow the name by --allowed-host"
        return self._refuse(421, said, "host_not_allowed")

    def _misread(self, scope: Scope) -> Response | None:
        """Two servers in a row could take different bytes for the end of such a request, and the rest for another one."""
        headers = Headers(scope=scope)
        if "transfer-encoding" not in headers or not ("content-length" in headers or scope["http_version"] == "1.0"):
            return None
        said = "a body has a Content-Length or, in HTTP/1.1, a Transfer-Encoding: this request says where it ends in two ways"
        return self._refuse(400, said, "ambiguous_length")

    def _stranger(self, scope: Scope, record: Record) -> Response | None:
        record.client = client_of(scope)
        if self.keys is None or route_path(scope) in _OPEN:
            return None
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        number = self.keys.number_of(key.strip().encode("latin-1")) if kind.lower() == "bearer" else None
        if number is None:
            said = "this server asks for a key: send it as 'Authorization: Bearer KEY'"
            return self._refuse(401, said, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        record.client = f"key {number}"
        return None

    def _too_often(self, scope: Scope, record: Record) -> Response | None:
        if route_path(scope) not in _LIMITED:
            return None
        wait = self._rates.seconds_to_wait(record.client, time.monotonic())
        if not wait:
            return None
        said = f"more than {self.options.requests_per_minute} requests a minute: try again in {wait:.1f} seconds"
        return self._refuse(429, said, "rate_limit_exceeded", {"Retry-After": str(max(1, round(wait + 0.5)))})

    async def _body_in_time(self, scope: Scope, receive: Receive) -> bytes | Response | None:
        """The body, or why it is refused; None where the client has left."""
        try:
            return await asyncio.wait_for(self._body(scope, receive), self.options.body_seconds)
        except asyncio.TimeoutError:
            said = f"the body did not come within {self.options.body_seconds:g} seconds: send it faster"
            return self._refuse(408, said, "body_too_slow")

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
