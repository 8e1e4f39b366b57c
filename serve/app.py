"""The HTTP application: OpenAI's completions and models, health, metrics, and the engine's state.

Routes and what errors become; everything else stands beside it: ``protocol`` what is said, ``completion`` how it becomes
tokens, ``guard`` who may ask, ``recorder`` what is told of it, ``service`` when the model is ready, ``metrics`` what counts.
"""

import asyncio
import importlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

from motrt import __version__
from motrt.errors import BusyError, CapacityError, EngineClosedError, InputError, MotrtError
from motrt.runtime.engine import Engine, Stream
from motrt.serve.completion import Answer, submit
from motrt.serve.guard import Guard
from motrt.serve.metrics import Metrics
from motrt.serve.options import ServeOptions, read_keys
from motrt.serve.protocol import (
    Completion,
    CompletionRequest,
    EngineFacts,
    ErrorBody,
    ModalityFacts,
    Model,
    ModelList,
    problems_of,
)
from motrt.serve.recorder import RECORD, Recorder
from motrt.serve.replies import EventStream, JsonResponse, error, error_body
from motrt.serve.service import Loader, Service

_RETRY_AFTER = {"Retry-After": "5"}


def create_app(source: Engine | Loader, options: ServeOptions | None = None) -> FastAPI:
    """The application.

    Args:
        source: an engine, which stays yours to close and whose observer becomes the app's; or what opens a session, which the
            app opens when it starts and closes when it ends.
        options: limits, names and keys.

    Returns:
        The application; its ``state.service`` tells whether it is ready, and drains it. Mounted in another one, whose
        lifespan does not run this one's, it begins to load with the first request.

    Raises:
        InputError: for a file of keys that can not be used.
    """
    options = options or ServeOptions()
    keys = None if options.api_key_file is None else read_keys(options.api_key_file)
    metrics = Metrics(lambda: service.engine)
    service = Service(source, options, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    # FastAPI's own telemetry would make a second span of each request; its older versions do not know the word, nor mind it.
    quiet: Any = {"telemetry": {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}}
    # A path with a slash too many is no path: to lead on from it would lead to whatever Host the request named.
    plain: Any = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="motrt", version=__version__, lifespan=lifespan, **plain, **quiet)
    app.state.service = service
    app.add_middleware(Guard, options=options, keys=keys, refused=metrics.refused)
    if options.cors_origins:
        _let_pages_ask(app, options)
    app.add_middleware(Recorder, responded=metrics.responded, arrived=service.start_late)
    _say_errors(app)
    _add_health(app, service)
    _add_metrics(app, metrics)
    _add_models(app, options)
    _add_engine(app, service)
    _add_completions(app, service, metrics)
    _add_page(app)
    # The document names the one model: whoever tries what it allows then reaches the engine, and not a 404 alone.
    app.openapi()["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["enum"] = [options.model_name]
    return app


def _let_pages_ask(app: FastAPI, options: ServeOptions) -> None:
    """CORS, before keys are asked for, since a browser asks first without one. Cookies are never taken: there are none."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),  # the client libraries' own vary; each that is asked for is named back
        expose_headers=("X-Request-Id", "Retry-After"),
        allow_credentials=False,
    )


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    told = {
        400: "What was asked for can not be.",
        401: "No key, or a wrong one.",
        404: "There is no such thing.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        421: "The server does not go by that Host.",
        429: "Too many requests.",
        503: "Not ready, shutting down, or a step failed.",
    }
    return {status: {"model": ErrorBody, "description": told[status]} for status in (400, 401, 408, 413, 421, *statuses)}


def status_of(failure: MotrtError) -> tuple[int, str, dict[str, str]]:
    """HTTP's status for an error, its code, and headers."""
    if isinstance(failure, CapacityError):
        return 400, "context_length_exceeded", {}
    if isinstance(failure, InputError):
        return 400, "invalid_value", {}
    if isinstance(failure, BusyError):
        return 429, "queue_full", {"Retry-After": "1"}
    if isinstance(failure, EngineClosedError):
        return 503, "not_ready", _RETRY_AFTER
    return 503, "step_failed", _RETRY_AFTER


def _say_errors(app: FastAPI) -> None:
    @app.exception_handler(MotrtError)
    async def of_ours(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, MotrtError)
        status, code, headers = status_of(failure)
        return error(status, str(failure), code, headers)

    @app.exception_handler(RequestValidationError)
    async def of_a_body(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, RequestValidationError)
        found = failure.errors()
        if any(one["type"] == "json_invalid" for one in found):
            return error(400, "the body is not JSON: send one JSON object, as application/json", "invalid_json")
        sentence, param = problems_of(found)
        return error(400, sentence, "invalid_value", param=param)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, HTTPException)
        said = {404: "there is nothing at this path", 405: "this path does not take this method"}.get(failure.status_code)
        return error(failure.status_code, said or str(failure.detail), "invalid_request", dict(failure.headers or {}))


def _add_health(app: FastAPI, service: Service) -> None:
    answers = _documented(503)

    @app.head("/health/live", include_in_schema=False)  # as load balancers ask
    @app.get("/health/live", responses=answers)
    async def live() -> dict[str, str]:
        """Whether the process can still be of use: 503 where only another start helps."""
        if service.is_lost:
            raise EngineClosedError(service.reason)
        return {"status": "live"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", responses=answers)
    async def ready() -> dict[str, str]:
        """Whether completions are taken; 503 with the reason where they are not."""
        service.ready_engine()
        return {"status": "ready"}


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    plain = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}

    @app.get("/metrics", response_class=Response, responses={200: plain, **_documented()})
    def read_metrics() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_models(app: FastAPI, options: ServeOptions) -> None:
    model = Model(id=options.model_name, created=int(time.time()))

    @app.get("/v1/models", responses=_documented())
    async def list_models() -> ModelList:
        return ModelList(data=[model])

    @app.get("/v1/models/{name}", responses=_documented(404))
    async def get_model(name: str) -> Response:
        return JsonResponse(model.model_dump()) if name == model.id else _no_such_model(options)


def _no_such_model(options: ServeOptions) -> Response:
    return error(404, f"this server serves one model, {options.model_name!r}: ask for that", "model_not_found", param="model")


def _add_engine(app: FastAPI, service: Service) -> None:
    @app.get("/v1/engine", responses=_documented(503))
    def read_engine() -> EngineFacts:
        """The engine at this moment, and what it serves; 503 while it is being loaded."""
        engine = service.engine
        if engine is None:
            raise EngineClosedError(service.reason)
        return engine_facts(engine, service)


def engine_facts(engine: Engine, service: Service) -> EngineFacts:
    session, options = engine.session, service.options
    config, most = session.config, session.config.max_seq_len
    return EngineFacts(
        model=options.model_name,
        backend=session.backend,
        weights=session.weights or session.precision,
        ready=not service.reason,
        reason=service.reason,
        state=asdict(engine.state()),
        options=asdict(engine.options),
        limits={
            "positions": most,
            "max_prompt_tokens": min(options.max_prompt_tokens or most, most),
            "max_tokens": min(options.max_tokens or most, most),
        },
        modalities=[
            ModalityFacts(
                name=one.name,
                first_id=ids.start,
                end_id=ids.stop,
                codes_per_frame=one.codes_per_frame,
                frames_per_second=one.frames_per_second,
            )
            for one, ids in zip(config.modalities, config.id_ranges, strict=True)
        ],
        has_tokenizer=session.tokenizer is not None,
    )


def _add_completions(app: FastAPI, service: Service, metrics: Metrics) -> None:
    stream_content = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": Completion, "description": "The answer, or a stream of its pieces.", **stream_content}
    }

    @app.post("/v1/completions", response_model=Completion, responses={**answers, **_documented(404, 429, 503)})
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Go on from one prompt, in text and audio."""
        if body.model != service.options.model_name:
            return _no_such_model(service.options)
        stream = await asyncio.to_thread(submit, service.ready_engine(), body, service.options)
        metrics.prompted(len(stream.row.prompt))
        answer = Answer(service.options.model_name, stream)
        watch = asyncio.create_task(_cancel_when_gone(request, stream))

        def done() -> None:
            stream.cancel()
            watch.cancel()
            request.scope["state"][RECORD].facts.update(facts_of(answer))

        if body.stream:
            wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return await _streamed(answer, wants_usage, done)
        try:
            async for step in stream.events():
                answer.hear(step)
        finally:
            done()
        return JsonResponse(answer.whole().model_dump())


async def _cancel_when_gone(request: Request, stream: Stream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


async def _streamed(answer: Answer, wants_usage: bool, done: Callable[[], None]) -> Response:
    """The stream, once its first piece is there: what fails before that has a status of its own."""
    pieces = _pieces(answer, wants_usage)
    try:
        first = await anext(pieces)
    except BaseException:
        done()
        raise

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        try:
            async for piece in pieces:
                yield piece
        except MotrtError as failure:
            status, code, _ = status_of(failure)
            yield _event(error_body(status, str(failure), code))
        yield b"data: [DONE]\n\n"

    return EventStream(all_pieces(), done)


async def _pieces(answer: Answer, wants_usage: bool) -> AsyncIterator[bytes]:
    async for step in answer.stream.events():
        yield _event(answer.hear(step).model_dump(exclude={"usage"}))
    if not answer.has_finished:
        yield _event(answer.end().model_dump(exclude={"usage"}))
    if wants_usage:
        yield _event(answer.usage_piece().model_dump())


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def facts_of(answer: Answer) -> dict[str, Any]:
    """What the log says of a completion: counts and seconds, and nothing that was said."""
    stream = answer.stream

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - stream.started, 6)

    return {
        "finish": stream.finish or "cancelled",
        "prompt_tokens": len(stream.row.prompt),
        "completion_tokens": dict(answer.tokens),
        "queue_seconds": since(stream.admitted),
        "first_token_seconds": since(answer.first_token),
    }


def _add_page(app: FastAPI) -> None:
    """The page that shows the batch, where it is installed."""
    try:
        page = importlib.import_module("motrt.serve.page").page
    except ImportError:
        return

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def read_page() -> str:
        return str(page())
