"""What is sent back: JSON that can always be sent, errors as OpenAI's clients read them, and server-sent events."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from motrt.serve.protocol import ErrorBody, ErrorDetail

# How long a reader may take for one piece, whoever sends it.
READER_SECONDS = 60.0

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


class EventStream(Response):
    """Server-sent events. A reader who takes too long for one piece is given up; others never wait for it.

    Args:
        pieces: what is sent, as it comes.
        give_up: called when nobody listens any more.
        seconds: for one piece to be taken.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: Any, give_up: Callable[[], None], seconds: float = READER_SECONDS) -> None:
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
