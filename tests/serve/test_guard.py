"""Who may ask, under whatever path and by whatever name; and what a browser is told of every answer."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from motrt.errors import EngineClosedError, InputError
from motrt.runtime.engine import Engine
from motrt.runtime.load import load
from motrt.runtime.session import Session
from motrt.serve.app import create_app
from motrt.serve.guard import client_of, route_path
from motrt.serve.hosts import Hosts
from motrt.serve.options import ServeOptions
from motrt.tests.serve.served import ASK, POST, Serve, Served, eventually

KEY = "a-key-of-sixteen-characters"
BEARER = {"Authorization": f"Bearer {KEY}"}
ONE = {**ASK, "max_tokens": 1}


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with load(tiny_bundle, num_threads=1) as session, Engine(session) as opened:
        yield opened


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    return tmp_path / "keys"


def mounted(app: FastAPI, at: str) -> Starlette:
    """``app`` in another application, which knows nothing of its lifespan."""
    return Starlette(routes=[Mount(at, app)])


# Paths.


async def statuses(app: Any, before: str, root_path: str = "") -> dict[str, Any]:
    """What each kind of path is answered with, asked with ``before`` in front of it."""
    transport = httpx.ASGITransport(app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        while (await client.get(f"{before}/health/ready")).status_code == 503:
            await asyncio.sleep(0.01)
        paths = (
            "/health/live",
            "/health/ready",
            "/openapi.json",
            "/",
            "/metrics",
            "/v1/models",
            "/v1/engine",
            "/health/x",
            "/x",
        )
        found: dict[str, Any] = {path: (await client.get(before + path)).status_code for path in paths}
        found["asked"] = [
            (await client.post(f"{before}/v1/completions", json=ONE, headers=BEARER)).status_code for _ in range(4)
        ]
        found["counted"] = re.findall(
            r'motrt_responses_total{route="(?!guard)(\S+)",status="200"}',
            (await client.get(f"{before}/metrics", headers=BEARER)).text,
        )
        return found


@pytest.mark.parametrize("way", ["server", "server, and a proxy that leaves it", "option", "option, left", "mount", "both"])
def test_answers_under_a_path_are_those_without_one(way: str, engine: Engine, keys: Path) -> None:
    options: dict[str, Any] = {"model_name": "tiny", "api_key_file": keys, "requests_per_minute": 2}
    plain = asyncio.run(statuses(create_app(engine, ServeOptions(**options)), ""))
    assert plain["asked"] == [200, 200, 429, 429] and plain["/metrics"] == 401 and plain["/health/live"] == 200
    root_path = "/llm" if way.startswith("option") else ""
    app: Any = create_app(engine, ServeOptions(**options, root_path=root_path))
    if way in ("mount", "both"):
        app = mounted(app, "/llm")
    before = {"server": "/llm", "option, left": "/llm", "mount": "/llm", "both": "/site/llm"}.get(way, "")
    server = {"server": "/llm", "server, and a proxy that leaves it": "/llm", "both": "/site"}.get(way, "")
    assert asyncio.run(statuses(app, before, server)) == plain


@pytest.mark.parametrize(
    ("path", "root", "inside"),
    [
        ("/v1/x", "", "/v1/x"),
        ("/llm/v1/x", "/llm", "/v1/x"),
        ("/v1/x", "/llm", "/v1/x"),
        ("/llmx/v1", "/llm", "/llmx/v1"),
        ("/llm", "/llm", ""),
        ("/llm//v1/x", "/llm/", "/v1/x"),
        ("/llm/llm/v1/x", "/llm", "/llm/v1/x"),
    ],
)
def test_the_path_that_is_guarded_is_the_one_that_is_routed(path: str, root: str, inside: str) -> None:
    from starlette._utils import get_route_path

    scope = {"path": path, "root_path": root}
    assert route_path(scope) == inside == get_route_path(scope)


def test_the_document_under_a_path_says_where_it_is(engine: Engine) -> None:
    async def servers(app: Any) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get("/llm/openapi.json")).json().get("servers")

    assert asyncio.run(servers(create_app(engine, ServeOptions(root_path="/llm")))) == [{"url": "/llm"}]
    assert asyncio.run(servers(mounted(create_app(engine), "/llm"))) == [{"url": "/llm"}]


def test_an_application_whose_lifespan_is_not_run_loads_with_the_first_request_and_says_so(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[Session] = []

    def open_it() -> Session:
        opened.append(load(tiny_bundle, num_threads=1))
        return opened[-1]

    app = create_app(open_it, ServeOptions(model_name="tiny", drain_seconds=0))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(mounted(app, "/a")), base_url="http://localhost") as client:
            assert [(await client.get("/a/health/ready")).status_code for _ in range(3)] == [503] * 3
            assert await asyncio.to_thread(app.state.service.wait, 20)
            return (await client.post("/a/v1/completions", json=ONE)).status_code

    assert asyncio.run(ask()) == 200
    assert len(opened) == 1 and "lifespan was not run" in caplog.text
    app.state.service.close()


def test_an_application_whose_lifespan_is_run_by_the_outer_one_says_nothing(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(lambda: load(tiny_bundle, num_threads=1), ServeOptions(model_name="tiny", drain_seconds=0))

    @asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    async def ask() -> int:
        outer = Starlette(routes=[Mount("/a", app)], lifespan=lifespan)
        async with outer.router.lifespan_context(outer):
            assert await asyncio.to_thread(app.state.service.wait, 20)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://localhost") as client:
                return (await client.post("/a/v1/completions", json=ONE)).status_code

    assert asyncio.run(ask()) == 200
    assert "lifespan" not in caplog.text


# Names.


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/health/live", "/v1/models", "/v1/engine", "/metrics", "/metrics/"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "@"]
)
def test_a_host_that_is_not_the_servers_is_refused(host: str, path: str, served: Served) -> None:
    answer = served.get(path, headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "host_not_allowed")
    assert "location" not in answer.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8000"])
def test_this_machines_own_names_are_answered(host: str, served: Served) -> None:
    assert served.get("/v1/models", headers={"Host": host}).status_code == 200


def test_an_old_client_that_names_no_host_is_answered(served: Served) -> None:
    with served.raw(b"GET /health/live HTTP/1.0\r\n\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("allowed", "listening", "host", "is_allowed"),
    [
        ((), "127.0.0.1", "10.0.0.7", False),
        ((), "10.0.0.7", "10.0.0.7:8000", True),
        ((), "10.0.0.7", "10.0.0.8", False),
        ((), "0.0.0.0", "10.0.0.8", True),
        ((), "::", "[2001:db8::1]", True),
        ((), "0.0.0.0", "evil.example", False),
        ((), "motrt.example", "motrt.example", True),
        (("motrt.example",), "0.0.0.0", "MOTRT.example:80", True),
        (("motrt.example",), "0.0.0.0", "x.motrt.example", False),
        (("2001:DB8::1",), "127.0.0.1", "[2001:db8:0::1]", True),
        (("*",), "127.0.0.1", "anything at all", True),
        ((), "127.0.0.1", "192.0.2.1", True),  # which the client connected to, below
        ((), "127.0.0.1", "::1", False),
        ((), "127.0.0.1", "localhost:99999999", False),
    ],
)
def test_a_host_is_known_by_what_the_server_listens_at_and_what_was_allowed(
    allowed: tuple[str, ...], listening: str, host: str, is_allowed: bool
) -> None:
    scope = {"type": "http", "headers": [(b"host", host.encode())], "server": ("192.0.2.1", 8000)}
    assert Hosts(allowed, listening).allow(scope) is is_allowed


def test_where_keys_are_asked_for_any_name_will_do_unless_some_are_allowed(serve: Serve, keys: Path) -> None:
    other = {"Host": "motrt.example", **BEARER}
    with serve(api_key_file=keys) as served:
        assert served.get("/v1/models", headers=other).status_code == 200
        slashed = served.get("/metrics/", headers=other)
        assert slashed.status_code == 404 and "location" not in slashed.headers
    with serve(api_key_file=keys, allowed_hosts=("other.example",)) as served:
        assert served.get("/v1/models", headers=other).status_code == 421
        assert served.get("/v1/models", headers={**other, "Host": "other.example"}).status_code == 200


def test_a_page_of_another_site_can_not_ask_without_asking_first(served: Served) -> None:
    """A form, or a script that may not read the answer, can send these types and none without a preflight; JSON is not one."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
        headers = {"Origin": "https://evil.example", **({} if kind is None else {"Content-Type": kind})}
        answer = httpx.post(f"{served.url}/v1/completions", content=json.dumps(ONE), headers=headers, timeout=20)
        assert answer.status_code == 400, kind
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{served.url}/v1/completions", headers=asked, timeout=20)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


# Headers.


def test_every_answer_is_shown_in_no_frame_and_taken_for_nothing_else(
    serve: Serve, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise ZeroDivisionError

    with serve(api_key_file=keys, requests_per_minute=2, max_body_bytes=1000, allowed_hosts=("localhost",)) as served:
        monkeypatch.setattr(served.engine, "state", fails)
        answers = [served.get(path, headers=BEARER) for path in ("/", "/openapi.json", "/health/ready", "/v1/models", "/none")]
        answers += [served.get("/v1/models"), served.get("/v1/engine", headers=BEARER), served.ask(BEARER, n=2)]
        answers += [served.ask(BEARER, stream=True), served.ask(BEARER), served.get("/", headers={"Host": "evil.example"})]
        answers += [httpx.post(f"{served.url}/v1/models", content=b" " * 2000, headers=BEARER, timeout=20)]
    assert [one.status_code for one in answers] == [200, 200, 200, 200, 404, 401, 500, 400, 200, 429, 421, 413]
    for one in answers:
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["content-security-policy"] == "frame-ancestors 'none'"
        assert one.headers["x-frame-options"] == "DENY"
        assert one.headers["x-request-id"]
    assert answers[6].json()["error"]["code"] == "internal_error"


def test_what_is_no_http_is_told_so_in_the_same_form(served: Served) -> None:
    for sent in (b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
        with served.raw(sent) as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"x-content-type-options: nosniff" in head
        assert json.loads(body)["error"]["code"] == "invalid_http"


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(4096):
        parts.append(part)
    return b"".join(parts)


# Two lengths.


@pytest.mark.parametrize(
    "more",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
        "transfer-encoding: CHUNKED\r\ncontent-length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: +5\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
    ],
)
def test_a_request_that_says_in_two_ways_where_it_ends_is_refused_and_nothing_after_it_is_read(
    more: str, served: Served
) -> None:
    smuggled = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served.raw(f"{POST}Content-Type: application/json\r\n{more}\r\n".encode() + b"0\r\n\r\n" + smuggled) as connection:
        said = read_all(connection)
    assert said.startswith(b"HTTP/1.1 400") and said.count(b"HTTP/1.1 ") == 1


def test_a_transfer_encoding_of_a_version_that_has_none_is_refused(served: Served) -> None:
    head = POST.replace("HTTP/1.1", "HTTP/1.0").encode() + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with served.raw(head) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 400")


# Who is counted.


def test_what_a_client_says_of_its_own_address_changes_nothing(serve: Serve) -> None:
    with serve(requests_per_minute=2) as served:
        said = [
            {"X-Forwarded-For": f"10.0.0.{one}", "Forwarded": f"for=10.0.0.{one}", "X-Real-IP": f"10.0.0.{one}"}
            for one in range(4)
        ]
        assert [served.ask(one, max_tokens=1).status_code for one in said] == [200, 200, 429, 429]


def test_a_proxy_that_is_trusted_says_whose_request_it_is_and_its_clients_can_not(serve: Serve) -> None:
    with serve(requests_per_minute=1, trusted_proxies=("127.0.0.0/8",)) as served:

        def ask(said: str) -> int:
            return int(served.ask({"X-Forwarded-For": said}, max_tokens=1).status_code)

        assert [ask("10.0.0.1"), ask("10.0.0.2"), ask("10.0.0.1")] == [200, 200, 429]
        assert ask("10.0.0.99, 10.0.0.1") == 429, "the last is what the proxy saw; what stands before it is its client's word"


def test_the_environment_makes_nobody_trusted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with serve(requests_per_minute=1) as served:
        assert [served.ask({"X-Forwarded-For": one}, max_tokens=1).status_code for one in ("10.0.0.1", "10.0.0.2")] == [
            200,
            429,
        ]


def test_the_addresses_of_one_network_are_one_client() -> None:
    def of(address: str) -> str:
        return client_of({"client": (address, 1)})

    assert of("2001:db8::1") == of("2001:db8::ffff:2") != of("2001:db8:0:1::1")
    assert of("::ffff:10.0.0.1") == of("10.0.0.1") != of("10.0.0.2")
    assert client_of({}) == client_of({"client": None}) == "unknown"


def test_nobody_has_a_higher_priority_than_the_server_allows(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def order(**options: Any) -> list[int]:
        with serve(max_batch=1, **options) as served:
            priorities: list[int] = []
            submit = served.engine.submit

            def noted(*args: Any, **kwargs: Any) -> Any:
                priorities.append(kwargs["priority"])
                return submit(*args, **kwargs)

            monkeypatch.setattr(served.engine, "submit", noted)
            for asked in (100, 5, 0, -7):
                assert served.ask(priority=asked, max_tokens=1).status_code == 200
            return priorities

    assert order() == [0, 0, 0, -7]
    assert order(max_priority=5) == [5, 5, 0, -7]
    assert order(max_priority=-1) == [-1, -1, -1, -7]


# Browsers.


def test_a_page_of_a_site_that_is_named_may_ask_with_a_key(serve: Serve, keys: Path) -> None:
    site = "https://site.example"
    with serve(api_key_file=keys, cors_origins=(site,), requests_per_minute=2) as served:
        asked = {
            "Origin": site,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        first = httpx.options(f"{served.url}/v1/completions", headers=asked, timeout=20)
        assert first.status_code == 200 and first.headers["access-control-allow-origin"] == site
        assert {"authorization", "x-stainless-os"} <= set(
            re.split(r", ?", first.headers["access-control-allow-headers"].lower())
        )
        answers = [served.ask({"Origin": site, **BEARER}, max_tokens=1) for _ in range(3)] + [served.ask({"Origin": site})]
        assert [one.status_code for one in answers] == [200, 200, 429, 401]
        for one in answers:
            assert one.headers["access-control-allow-origin"] == site
            assert {"X-Request-Id", "Retry-After"} <= set(one.headers["access-control-expose-headers"].split(", "))
            assert "Origin" in one.headers["vary"]
        for other in ("https://evil.example", "https://site.example.evil.example", "http://site.example", "null"):
            refused = httpx.options(f"{served.url}/v1/completions", headers={**asked, "Origin": other}, timeout=20)
            assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
            assert "access-control-allow-origin" not in served.get("/health/live", headers={"Origin": other}).headers
        assert not [one for one in (*answers, first) if "access-control-allow-credentials" in one.headers]


def test_every_site_may_ask_where_that_was_said_and_none_brings_its_cookies(serve: Serve) -> None:
    with serve(cors_origins=("*",)) as served:
        answer = served.get("/v1/models", headers={"Origin": "https://any.example", "Cookie": "a=b"})
        assert answer.headers["access-control-allow-origin"] in ("*", "https://any.example")  # so Starlette, before 1.0
        assert "access-control-allow-credentials" not in answer.headers


# Health.


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_the_head_of_the_health_is_that_of_its_answer(path: str, serve: Serve, keys: Path) -> None:
    with serve(api_key_file=keys) as served:
        for is_well in (True, False):
            got = served.get(path)
            with served.raw(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()) as connection:
                head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {got.status_code}".encode()) and body == b""
            assert f"content-length: {len(got.content)}".encode() in head
            assert got.status_code == (200 if is_well else 503)
            served.engine.failure = "broken"


def test_a_server_whose_engines_thread_has_ended_says_so(serve: Serve) -> None:
    with serve() as served:
        assert served.get("/health/live").status_code == served.get("/health/ready").status_code == 200
        served.engine.close()
        assert not served.engine.is_alive and not served.engine.failure
        assert served.get("/health/live").status_code == served.get("/health/ready").status_code == 503
        assert "thread has ended" in served.get("/health/ready").json()["error"]["message"]
        assert served.ask().status_code == 503
        assert "motrt_engine_broken 1.0" in served.get("/metrics").text
        with pytest.raises(EngineClosedError, match="thread has ended"):
            served.service.ready_engine()


def test_the_end_of_a_drained_engine_is_no_fault(serve: Serve) -> None:
    with serve() as served:
        served.service.drain()
        assert eventually(lambda: not served.engine.is_alive)
        assert served.get("/health/live").status_code == 200
        assert "shutting down" in served.get("/health/ready").json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("root_path", "llm"),
        ("root_path", "/llm/"),
        ("root_path", "/"),
        ("root_path", "/a//b"),
        ("root_path", "/a?b"),
        ("allowed_hosts", ("http://a",)),
        ("allowed_hosts", ("a:80",)),
        ("allowed_hosts", "a"),
        ("allowed_hosts", ("",)),
        ("trusted_proxies", ("*",)),
        ("trusted_proxies", ("proxy.example",)),
        ("trusted_proxies", ("10.0.0.1/8",)),
        ("cors_origins", ("site.example",)),
        ("cors_origins", ("https://site.example/",)),
        ("cors_origins", ("null",)),
        ("host", ""),
        ("host", " "),
        ("host", "*"),
        ("host", None),
        ("max_priority", 101),
        ("max_connections", 0),
        ("header_seconds", 0),
        ("keep_alive_seconds", 0),
    ],
)
def test_an_address_or_a_limit_that_can_not_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        ServeOptions(**{name: value})
