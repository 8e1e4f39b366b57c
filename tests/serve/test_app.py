"""What a client sees: answers, streams, refusals, stages of readiness, and what is counted and logged of it."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models

import motrt
from motrt.errors import BackendError, ParityError
from motrt.model_def.config import ModelConfig
from motrt.runtime.engine import Engine, EngineOptions
from motrt.runtime.load import load
from motrt.runtime.session import Session
from motrt.serve.guard import Rates
from motrt.serve.options import ServeOptions
from motrt.serve.recorder import JsonLines
from motrt.serve.replies import EventStream
from motrt.tests.serve.served import ASK, POST, Serve, Served, eventually, running

Slowly = Callable[[Engine, float], None]
LONG = {"schedule": "text", "max_tokens": 120, "stream": True}
KEY = "a-key-of-sixteen-characters"


def pieces_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert {"message", "type", "code"} <= error.keys()
    return str(error["message"])


def is_idle(served: Served) -> bool:
    state = served.engine.state()
    return state.running == state.reading == state.waiting == 0


# Answers.


def test_an_answer_is_what_the_session_generates(served: Served, tiny_bundle: Path) -> None:
    said = served.ask(schedule="text:3,audio:2f").json()
    with load(tiny_bundle, num_threads=1) as session:
        steps = list(session.generate([1, 2, 3], schedule=motrt.then("text", tokens=3).then("audio", frames=2)))
    (choice,) = said["choices"]
    assert choice["token_ids"] == [step.token_id for step in steps]
    assert choice["audio"] == {"modality": "audio", "frames": [list(step.frame.codes) for step in steps if step.frame]}
    assert (choice["finish_reason"], choice["finish_detail"]) == ("stop", "schedule")
    assert said["usage"]["completion_tokens_details"] == {"text_tokens": 3, "audio_tokens": 8}
    assert said["usage"]["total_tokens"] == 14


def test_a_stream_says_the_same_and_ends_with_its_usage(served: Served) -> None:
    asked: dict[str, Any] = {"schedule": "text:3,audio:2f", "temperature": 0.9, "seed": 5}
    whole = served.ask(**asked).json()["choices"][0]
    *pieces, last = pieces_of(served.ask(**asked, stream=True, stream_options={"include_usage": True}))
    choices = [piece["choices"][0] for piece in pieces]
    assert [token for one in choices for token in one["token_ids"]] == whole["token_ids"]
    assert [frame for one in choices if one["audio"] for frame in one["audio"]["frames"]] == whole["audio"]["frames"]
    assert [one["finish_reason"] for one in choices] == [None] * 10 + ["stop"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 11


def test_sixteen_tokens_where_nothing_says_how_many_and_the_schedules_own_where_it_does(served: Served) -> None:
    assert served.ask().json()["usage"]["completion_tokens"] == 16
    assert served.ask(schedule="interleave:text=1,audio=4").json()["usage"]["completion_tokens"] == 16
    assert served.ask(audio_frames=10).json()["usage"]["completion_tokens"] == 40
    assert served.ask(audio_frames=10, max_tokens=2).json()["choices"][0]["finish_detail"] == "length"


def test_nothing_asked_is_nothing_said(served: Served) -> None:
    assert served.ask(max_tokens=0).json()["choices"][0]["token_ids"] == []
    (piece,) = pieces_of(served.ask(max_tokens=0, stream=True))
    assert piece["choices"][0]["finish_reason"] == "length"


def test_an_id_to_stop_at_ends_an_answer(served: Served) -> None:
    first = served.ask(max_tokens=1).json()["choices"][0]["token_ids"][0]
    said = served.ask(stop_ids=[first]).json()["choices"][0]
    assert (said["token_ids"], said["finish_reason"], said["finish_detail"]) == ([first], "stop", "stop")


def test_when_time_is_up_what_has_come_is_the_answer(serve: Serve, slowly: Slowly) -> None:
    with serve() as served:
        slowly(served.engine, 0.02)
        said = served.ask(max_tokens=100, timeout_seconds=0.2).json()["choices"][0]
    assert (said["finish_reason"], said["finish_detail"]) == ("length", "deadline")
    assert 0 < len(said["token_ids"]) < 100


def test_when_time_is_up_the_text_is_that_of_all_ids(serve: Serve, slowly: Slowly) -> None:
    """Every id is a byte, and no run of them is over before the time is."""
    made = Tokenizer(models.WordLevel({f"<0x{byte:02X}>": byte for byte in range(96)}, unk_token="<0x00>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    with serve() as served:
        slowly(served.engine, 0.02)
        served.engine.session.tokenizer = made
        asked: dict[str, Any] = {"schedule": "text", "max_tokens": 100, "timeout_seconds": 0.2}
        whole = served.ask(**asked).json()["choices"]
        pieces = [one["choices"][0] for one in pieces_of(served.ask(**asked, stream=True))]
    for said in (whole, pieces):
        ids = [one for choice in said for one in choice["token_ids"]]
        assert said[-1]["finish_detail"] == "deadline" and 0 < len(ids) < 100
        assert "".join(choice["text"] for choice in said) == made.decode(ids) != ""


def test_text_that_the_tokenizer_can_not_encode_is_the_clients(serve: Serve) -> None:
    with serve() as served:
        served.engine.session.tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
        error_of(served.ask(prompt="b"), 400, "invalid_value")
        assert served.ask(prompt="a", max_tokens=1).status_code == 200


def test_the_models_are_the_one_that_is_served(served: Served) -> None:
    assert [one["id"] for one in served.get("/v1/models").json()["data"]] == ["tiny"]
    assert served.get("/v1/models/tiny").json()["object"] == "model"
    error_of(served.get("/v1/models/gpt"), 404, "model_not_found")


def test_the_engine_tells_how_it_stands(served: Served) -> None:
    facts = served.get("/v1/engine").json()
    assert [(one["name"], one["first_id"], one["end_id"]) for one in facts["modalities"]] == [
        (name, ids.start, ids.stop)
        for name, ids in zip(ModelConfig.tiny().modality_names, ModelConfig.tiny().id_ranges, strict=True)
    ]
    assert facts["options"] == {"max_batch": 8, "max_queue": 64, "prefill_chunk": 64}
    assert (facts["ready"], facts["has_tokenizer"], facts["state"]["running"]) == (True, False, 0)


# Refusals.


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"model": "gpt"}, "model_not_found"),
        ({"prompt": "text without a tokenizer"}, "invalid_value"),
        ({"prompt": [5000]}, "invalid_value"),
        ({"prompt": [1] * 128}, "context_length_exceeded"),
        ({"max_tokens": 1000}, "context_length_exceeded"),
        ({"schedule": "text:2,__import__('os')"}, "invalid_value"),
        ({"schedule": "smell:2"}, "invalid_value"),
        ({"stop_ids": [5000]}, "invalid_value"),
        ({"n": 2}, "invalid_value"),
        ({"\ud800": 1}, "invalid_value"),
    ],
)
def test_what_can_not_be_is_refused_with_a_sentence(values: dict[str, Any], code: str, served: Served) -> None:
    response = httpx.post(
        f"{served.url}/v1/completions",
        content=json.dumps({**ASK, **values}),
        headers={"Content-Type": "application/json"},
        timeout=20,
    )
    assert " " in error_of(response, 404 if code == "model_not_found" else 400, code)
    assert is_idle(served)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b'"x"', b"[" * 100_000, b"\xff\xfe", b'{"max_tokens":' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(body: bytes, served: Served) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{served.url}/v1/completions", content=body, headers=headers, timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_other_paths_and_methods_are_refused_in_the_same_form(served: Served) -> None:
    error_of(served.get("/etc/passwd"), 404, "invalid_request")
    response = served.get("/v1/completions")
    error_of(response, 405, "invalid_request")
    assert response.headers["allow"] == "POST"


def test_limits_of_the_server_are_below_those_of_the_model(serve: Serve) -> None:
    with serve(max_prompt_tokens=4, max_tokens=8) as served:
        assert served.ask().json()["usage"]["completion_tokens"] == 8
        assert "4 tokens" in error_of(served.ask(prompt=[1] * 5), 400, "context_length_exceeded")
        assert "8 tokens" in error_of(served.ask(max_tokens=9), 400, "context_length_exceeded")


def test_a_body_that_is_too_large_is_not_read_to_its_end(serve: Serve) -> None:
    with serve(max_body_bytes=1000) as served:
        error_of(served.ask(prompt=[1] * 1000), 413, "body_too_large")
        head = POST.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
        with served.raw(head + b"400\r\n" + b" " * 0x400 + b"\r\n") as connection:  # and no end of it
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")
        assert served.ask().status_code == 200


def test_a_body_that_comes_too_slowly_is_given_up(serve: Serve) -> None:
    with serve(body_seconds=0.2) as served:
        head = POST.encode() + b"Content-Length: 10\r\n\r\n{"
        with served.raw(head) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert served.ask().status_code == 200


def test_a_key_is_asked_for_everywhere_but_at_the_health(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"another-key-of-sixteen\n{KEY}\n")
    with serve(api_key_file=tmp_path / "keys") as served:
        for path in ("/metrics", "/v1/models", "/v1/engine"):
            assert served.get(path).headers["www-authenticate"] == "Bearer"
            error_of(served.get(path), 401, "invalid_api_key")
            assert served.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert served.get("/health/ready").status_code == served.get("/openapi.json").status_code == 200
        for wrong in (b"Bearer", b"Basic " + KEY.encode(), b"Bearer x" + KEY.encode(), b"Bearer \xe9"):
            response = httpx.post(f"{served.url}/v1/completions", json=ASK, headers={b"Authorization": wrong}, timeout=20)
            error_of(response, 401, "invalid_api_key")
        assert served.ask({"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_who_asks_too_often_waits_and_the_other_does_not(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"another-key-of-sixteen\n{KEY}\n")
    with serve(requests_per_minute=2, api_key_file=tmp_path / "keys") as served:
        mine, others = ({"Authorization": f"Bearer {key}"} for key in (KEY, "another-key-of-sixteen"))
        assert [served.ask(mine, max_tokens=1).status_code for _ in range(2)] == [200, 200]
        refused = served.ask(mine)
        error_of(refused, 429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert served.ask(others, max_tokens=1).status_code == 200


def test_a_full_queue_is_told_at_once(serve: Serve, slowly: Slowly) -> None:
    with serve(max_batch=1, max_queue=0) as served:
        slowly(served.engine, 0.02)
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**ASK, **LONG}, timeout=20):
            refused = served.ask()
            error_of(refused, 429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            assert 'motrt_refusals_total{reason="queue_full"} 1.0' in served.get("/metrics").text
        assert eventually(lambda: is_idle(served))


# Clients that leave, and clients that are slow.


def test_the_row_of_a_client_that_leaves_mid_stream_is_free(serve: Serve, slowly: Slowly) -> None:
    with serve() as served:
        slowly(served.engine, 0.02)
        with httpx.stream("POST", f"{served.url}/v1/completions", json={**ASK, **LONG}, timeout=20) as response:
            next(response.iter_lines())
            assert eventually(lambda: served.engine.state().running == 1)  # the first token may come before its row is seated
        assert eventually(lambda: is_idle(served))
        assert served.engine.state().steps < 100
        assert eventually(lambda: 'motrt_requests_total{finish="cancelled"} 1.0' in served.get("/metrics").text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_is_not_waited_for(stream: bool, serve: Serve, slowly: Slowly) -> None:
    body = json.dumps({**ASK, **LONG, "stream": stream}).encode()
    head = f"{POST}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with serve(max_batch=1) as served:
        slowly(served.engine, 0.03)
        connections = [served.raw(head.encode() + body) for _ in range(3)]  # one runs, two wait
        assert eventually(lambda: served.engine.state().waiting == 2)
        for connection in connections:
            connection.close()
        assert eventually(lambda: is_idle(served))
        assert served.engine.state().steps < 100


def test_a_reader_that_reads_nothing_delays_nobody(serve: Serve) -> None:
    body = json.dumps({**ASK, **LONG}).encode()
    head = f"{POST}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with serve() as served, served.raw(head.encode() + body):
        assert served.ask(max_tokens=50).json()["usage"]["completion_tokens"] == 50
        assert eventually(lambda: is_idle(served))


def test_a_reader_that_takes_too_long_for_one_piece_is_given_up() -> None:
    given_up, is_closed = [], []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            is_closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    stream = EventStream(pieces(), lambda: given_up.append(True), seconds=0.05)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))
    assert given_up == [True] and is_closed == [True]


# Stages.


def test_a_server_is_ready_when_it_has_loaded_and_not_before(tiny_bundle: Path) -> None:
    may_load = threading.Event()

    def slow() -> Session:
        assert may_load.wait(20)
        return load(tiny_bundle, check="answer", num_threads=1)

    with running(slow, ServeOptions(model_name="tiny", drain_seconds=0)) as served:
        assert served.get("/health/live").status_code == 200
        assert "being loaded" in error_of(served.get("/health/ready"), 503, "not_ready")
        assert served.ask().headers["retry-after"]
        assert served.get("/v1/engine").status_code == 503
        may_load.set()
        assert served.service.wait(20)
        assert served.get("/health/ready").json() == {"status": "ready"}
        assert served.engine.state().steps > 0, "a warm-up was done"
        served.service.is_draining = True
        assert "shutting down" in error_of(served.get("/health/ready"), 503, "not_ready")
        assert served.get("/health/live").status_code == 200
        error_of(served.ask(), 503, "not_ready")


def test_a_bundle_that_gives_another_answer_is_never_served(tiny_bundle: Path) -> None:
    def refuse() -> Session:
        raise ParityError("does not give the known answer")

    with running(refuse, ServeOptions(model_name="tiny")) as served:
        assert eventually(lambda: served.service.load_failure is not None)
        assert isinstance(served.service.load_failure, ParityError)


def test_an_engine_of_ones_own_is_served_and_left_open(tiny_bundle: Path) -> None:
    with load(tiny_bundle, num_threads=1) as session, Engine(session, EngineOptions(max_batch=2)) as engine:
        with running(engine, ServeOptions(model_name="tiny")) as served:
            assert served.service.wait(20)
            assert served.ask().status_code == 200
        assert len(list(engine.generate([1, 2], max_tokens=3))) == 3


# Faults.


def test_a_step_that_fails_ends_its_requests_and_the_next_is_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as served:
        step, failures = served.engine.session.decode_step, iter([True, True])

        def fails_twice(*args: Any, **kwargs: Any) -> Any:
            if next(failures, False):
                raise BackendError("the device fell over")
            return step(*args, **kwargs)

        monkeypatch.setattr(served.engine.session, "decode_step", fails_twice)
        assert "fell over" in error_of(served.ask(), 503, "step_failed")
        (_, failure) = pieces_of(served.ask(stream=True))
        assert failure["error"]["code"] == "step_failed"
        assert served.ask().status_code == 200
        assert served.get("/health/ready").status_code == 200


def test_three_failing_steps_in_a_row_make_the_server_not_ready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    with serve() as served:
        monkeypatch.setattr(served.engine.session, "decode_step", fails)
        monkeypatch.setattr(served.engine.session, "prefill_chunk", fails)
        assert [served.ask().status_code for _ in range(4)] == [503] * 4
        assert "failed 3 times in a row" in error_of(served.get("/health/ready"), 503, "not_ready")
        assert served.get("/health/live").status_code == 503, "only another start helps"
        assert "motrt_engine_broken 1.0" in served.get("/metrics").text


# What is told of it.


def test_the_metrics_have_these_names(served: Served) -> None:
    served.ask(schedule="text:2,audio:1f")
    text = served.get("/metrics").text
    for name in (
        "motrt_queue_depth",
        "motrt_running_rows",
        "motrt_batch_occupancy",
        "motrt_cache_positions",
        "motrt_cache_filled",
        "motrt_time_to_first_token_seconds_bucket",
        "motrt_inter_token_seconds_bucket",
        "motrt_decode_step_seconds_bucket",
        "motrt_batch_rows_bucket",
        'motrt_tokens_total{modality="text"}',
        'motrt_tokens_total{modality="audio"}',
        "motrt_prompt_tokens_total",
        'motrt_requests_total{finish="schedule"}',
        'motrt_responses_total{route="/v1/completions",status="200"}',
    ):
        assert name in text


def test_a_safe_request_id_comes_back_and_another_is_replaced(served: Served) -> None:
    assert served.ask({"X-Request-Id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for unsafe in ("a b", "x" * 65, "<script>", ""):
        made = served.ask({"X-Request-Id": unsafe}).headers["x-request-id"]
        assert len(made) == 32
        assert made != unsafe


def test_a_request_is_one_line_of_json_and_no_prompt_is_in_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        served.ask({"X-Request-Id": "mine"}, prompt=[77, 78, 79], schedule="text:2,audio:1f")
        served.ask({"X-Request-Id": "secret"}, prompt="a secret")
        assert eventually(lambda: len([one for one in caplog.records if one.name == "motrt.serve.requests"]) >= 2)
    lines = [json.loads(JsonLines().format(one)) for one in caplog.records if one.name == "motrt.serve.requests"]
    (told,) = (line for line in lines if line["id"] == "mine")
    assert (told["status"], told["finish"], told["prompt_tokens"]) == (200, "schedule", 3)
    assert told["completion_tokens"] == {"text": 2, "audio": 4}
    assert 0 <= told["queue_seconds"] <= told["first_token_seconds"] <= told["total_seconds"]
    everything = "\n".join(JsonLines().format(one) for one in caplog.records)
    assert "a secret" not in everything
    assert "77, 78" not in everything


def test_a_request_is_a_span_where_opentelemetry_is_installed(tiny_bundle: Path) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    from opentelemetry import trace as api

    exporter, provider = memory.InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    api.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(lambda: load(tiny_bundle, num_threads=1), ServeOptions(model_name="tiny")) as served:
        assert served.service.wait(20)
        served.ask({"traceparent": parent}, max_tokens=2)
        assert eventually(lambda: bool(exporter.get_finished_spans()))
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/completions"
    assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
    assert span.attributes["motrt.completion_tokens.text"] == 2
    assert span.attributes["motrt.finish"] == "length"


def test_several_applications_have_metrics_of_their_own(serve: Serve) -> None:
    with serve() as one, serve() as other:
        one.ask(max_tokens=3)
        assert 'motrt_tokens_total{modality="text"} 3.0' in one.get("/metrics").text
        assert "motrt_tokens_total{" not in other.get("/metrics").text


def test_rates_refill_evenly_and_forget_nobody_too_soon() -> None:
    rates = Rates(60)
    assert [rates.seconds_to_wait("me", 100.0) for _ in range(61)] == [0.0] * 60 + [1.0]
    assert rates.seconds_to_wait("me", 101.0) == 0
    assert rates.seconds_to_wait("me", 101.0) > 0
