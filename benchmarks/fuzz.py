"""Requests of every sort against a server: is each answered as it should be, and do the streams beside them notice?

    .venv/bin/motrt init model --preset tiny && .venv/bin/motrt export model bundle
    .venv/bin/python benchmarks/fuzz.py bundle --count 10000

Hypothesis makes the requests: half of them whole and in order, so that they reach the engine; the others with one or two
values of any kind in any field, or a body that is no JSON at all. They come at once, in pieces, slowly, chunked, or break off,
and some clients leave in the middle of the answer. Whatever is answered must be 200 with an answer that is whole, or 4xx with a
sentence. Meanwhile other clients ask the same two things over and over, and must hear what they heard before all that, token by
token. A request that is answered otherwise is made as small as it can be and printed. The exit code is 1 then.
"""

import json
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisDeprecationWarning

import motrt
from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.load import MODEL, served
from motrt.model_def.config import ModelConfig
from motrt.runtime.bundle import open_bundle

SECONDS = 30.0
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"

# What a client may be told; 503 is for a server that is not ready, and this one is.
REFUSALS = (400, 404, 408, 413, 429)


@dataclass(frozen=True)
class Sent:
    """One request: its body's bytes, and how they travel.

    Attributes:
        manner: ``whole``, ``pieces``, ``slowly``, ``chunked``, ``cut`` (breaks off), ``leaves`` (in the middle of the answer).
        after: bytes after which the body breaks off, or the client leaves.
    """

    body: bytes
    manner: str
    after: int = 0


def odd_values() -> st.SearchStrategy[Any]:
    """What nobody should send, as JSON can carry it."""
    single = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from(
            [-(2**63), 2**31, 2**63, 10**30, 10**400, -1, 1e308, -0.0, 5e-324, "NaN", "", "0", "null", "text:", "../x"]
        ),
        st.floats(),
        st.text(st.characters(), max_size=12),
    )
    return st.recursive(
        single, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    )


def right_values(config: ModelConfig) -> dict[str, st.SearchStrategy[Any]]:
    """Each field within its bounds; together they may still contradict each other."""
    names = config.modality_names
    schedules = [f"{name}:{count}" for name in names for count in (1, 4)] + [
        ",".join(f"{name}:2" for name in names),
        "text:3000",
    ]
    ids = st.integers(0, config.vocab_size - 1)
    return {
        "prompt": st.lists(ids, min_size=1, max_size=20),
        "max_tokens": st.integers(0, 8),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(1, 200),
        "min_p": st.floats(0, 0.99),
        "repetition_penalty": st.floats(0.01, 100),
        "seed": st.integers(0, 2**63 - 1),
        "stream": st.booleans(),
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
        "schedule": st.sampled_from(schedules),
        "audio_frames": st.integers(1, 3),
        "stop_ids": st.lists(ids, max_size=5),
        "priority": st.integers(-100, 100),
        "timeout_seconds": st.floats(1e-6, 5),
        "user": st.text(max_size=20),
    }


@st.composite
def requests(draw: st.DrawFn, config: ModelConfig, model: str) -> Sent:
    """Half in order, half not."""
    right = right_values(config)
    optional = draw(st.sets(st.sampled_from([name for name in right if name != "prompt"]), max_size=6))
    values = {"model": model} | {name: draw(right[name]) for name in sorted({"prompt", *optional})}
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        name = draw(st.sampled_from([*right, "model", "n", "echo", "stop", "logit_bias", "nonsense"]))
        values[name] = draw(odd_values())
    body = json.dumps(values, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    body = draw(st.sampled_from([body] * 9 + [b""])) if draw(st.integers(0, 7)) else draw(spoilt(body))
    manner = draw(st.sampled_from(["whole"] * 10 + ["pieces", "slowly", "chunked", "chunked", "cut", "leaves", "leaves"]))
    return Sent(body, manner, draw(st.integers(0, max(1, len(body) - 1))))


def spoilt(body: bytes) -> st.SearchStrategy[bytes]:
    """No JSON object any more, or hardly."""
    return st.one_of(
        st.integers(0, len(body)).map(lambda at: body[:at]),
        st.binary(max_size=40),
        st.sampled_from(
            [body * 2, b"[" * 5000, b'{"a":' * 3000, body.decode("utf-8", "ignore").encode("utf-16"), b"null", b"[]", b"1e999"]
        ),
        st.tuples(st.integers(0, len(body)), st.binary(min_size=1, max_size=3)).map(
            lambda change: body[: change[0]] + change[1] + body[change[0] :]
        ),
    )


@dataclass
class Answer:
    """What came back; a status of 0 where the client did not stay to hear it."""

    status: int
    body: bytes = b""


def send(port: int, sent: Sent) -> Answer:
    """Say it, and hear the answer.

    Raises:
        ConnectionError: when the server ends the connection without one.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        try:
            for piece in pieces(sent):
                connection.sendall(piece)
                if sent.manner in ("pieces", "slowly"):
                    time.sleep(0.01 if sent.manner == "slowly" else 0)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before the body was read: the answer is there all the same
        if sent.manner == "cut":
            return Answer(0)
        return hear(connection, sent.after if sent.manner == "leaves" else None)


def pieces(sent: Sent) -> Iterator[bytes]:
    if sent.manner == "chunked":
        yield (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode()
        for part in (sent.body[: sent.after], sent.body[sent.after :]):
            if part:
                yield f"{len(part):x}\r\n".encode() + part + b"\r\n"
        yield b"0\r\n\r\n"
        return
    yield (HEAD + f"Content-Length: {len(sent.body)}\r\n\r\n").encode()
    if sent.manner == "cut":
        yield sent.body[: min(sent.after, len(sent.body) - 1)] if sent.body else b""
    elif sent.manner in ("pieces", "slowly"):
        third = max(1, len(sent.body) // 3)
        yield from (sent.body[at : at + third] for at in range(0, len(sent.body), third))
    else:
        yield sent.body


def hear(connection: socket.socket, most: int | None) -> Answer:
    came = b""
    while most is None or len(came) < most:
        piece = connection.recv(1 << 16)
        if not piece:
            break
        came += piece
    if most is not None:
        return Answer(0)
    head, found, body = came.partition(b"\r\n\r\n")
    if not found:
        raise ConnectionError(f"no answer, but {came[:80]!r}")
    if b"transfer-encoding: chunked" in head.lower():
        body = unchunked(body)
    return Answer(int(head.split(b" ", 2)[1]), body)


def unchunked(body: bytes) -> bytes:
    """Raises ConnectionError where the last chunk is missing."""
    parts: list[bytes] = []
    while True:
        size, found, body = body.partition(b"\r\n")
        if not found:
            raise ConnectionError("the answer broke off")
        if not int(size, 16):
            return b"".join(parts)
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]


def problem_of(answer: Answer) -> str | None:
    """What is wrong with an answer; None where nothing is."""
    if answer.status == 0:
        return None
    text = answer.body.decode()
    if answer.status == 200:
        if not text.startswith("data: "):
            return None if json.loads(text)["usage"]["prompt_tokens"] else "no usage"
        return (
            None if text.endswith("data: [DONE]\n\n") and '"error"' not in text else f"a stream that ends with {text[-200:]!r}"
        )
    if answer.status not in REFUSALS:
        return f"status {answer.status}: {text[:300]}"
    error = json.loads(text)["error"]
    is_sentence = isinstance(error["message"], str) and len(error["message"].split()) >= 3
    return None if is_sentence else f"no sentence: {text[:300]}"


@dataclass
class Beside:
    """Clients that know what they will hear, and listen to nothing else.

    Attributes:
        heard: answers that were as expected.
        problems: others.
    """

    port: int
    model: str
    heard: int = 0
    problems: list[str] = field(default_factory=list)

    def body(self, number: int) -> bytes:
        said = {"prompt": [1, 2, 3], "schedule": "text:6"} if number else {"prompt": [3, 2, 1], "audio_frames": 2}
        return json.dumps({"model": self.model, "temperature": 0.9, "seed": 7, "priority": 100, **said}).encode()

    def ids(self, number: int) -> list[int]:
        answer = send(self.port, Sent(self.body(number), "whole"))
        if answer.status != 200:
            raise ConnectionError(f"{answer.status}: {answer.body[:300]!r}")
        found: list[int] = json.loads(answer.body)["choices"][0]["token_ids"]
        return found

    @contextmanager
    def asking(self) -> Iterator[None]:
        expected, is_over = [self.ids(0), self.ids(1)], threading.Event()

        def ask(number: int) -> None:
            while not is_over.wait(0.05):
                try:
                    found = self.ids(number)
                except (OSError, ValueError, KeyError) as failure:
                    self.problems.append(repr(failure))
                    continue
                if found == expected[number]:
                    self.heard += 1
                else:
                    self.problems.append(f"{found} instead of {expected[number]}")

        threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
        for one in threads:
            one.start()
        try:
            yield
        finally:
            is_over.set()
            for one in threads:
                one.join()


def fuzz(port: int, config: ModelConfig, model: str, count: int, chance: int) -> tuple[Counter[str], Beside]:
    """``count`` requests of every sort.

    Returns:
        How many were answered with which status ("left" where the client did not stay), and who asked beside them.

    Raises:
        AssertionError: for an answer that is none, with the smallest request that has it.
    """
    seen: Counter[str] = Counter()
    beside = Beside(port, model)

    @seed(chance)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(config, model))
    def each(sent: Sent) -> None:
        answer = send(port, sent)
        seen[str(answer.status or "left")] += 1
        problem = problem_of(answer)
        assert problem is None, f"{problem}, for {sent}"

    with beside.asking(), warnings.catch_warnings():
        # Threads of this process may use `random` while a request is made, which hypothesis takes for the strategy's doing.
        warnings.simplefilter("ignore", HypothesisDeprecationWarning)
        each()
    return seen, beside


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True)
@click.option("--seed", "chance", type=int, default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, count: int, chance: int, json_file: Path | None) -> None:
    """Requests of every sort against a server of BUNDLE that is started here; statuses, and what the others heard."""
    try:
        config = open_bundle(bundle).config
    except motrt.MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    started = time.perf_counter()
    with served(bundle, 8, 64, ("--max-priority", "100")) as (target, process):
        seen, beside = fuzz(target.port, config, MODEL, count, chance)
        is_alive = process.poll() is None
    found = {
        "machine": machine("motrt", "hypothesis", "fastapi", "uvicorn"),
        "seed": chance,
        "requests": seen.total(),
        "seconds": round(time.perf_counter() - started, 1),
        "answers": dict(sorted(seen.items())),
        "heard_beside": beside.heard,
        "problems_beside": beside.problems[:20],
        "server_alive": is_alive,
    }
    for status, number in sorted(seen.items()):
        click.echo(f"{status:>5}  {number:6}  {number / seen.total():.1%}")
    click.echo(f"beside them {beside.heard} answers as they should be, {len(beside.problems)} not")
    leave(found, json_file)
    sys.exit(0 if is_alive and beside.heard and not beside.problems else 1)


if __name__ == "__main__":
    main()
