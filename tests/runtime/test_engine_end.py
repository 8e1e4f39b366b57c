"""What ends an engine or its session, and that nobody who listens then waits for ever."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

import motrt
from motrt.errors import BackendError, EngineClosedError, InputError, MotrtError
from motrt.runtime.decoding import Step
from motrt.runtime.engine import MOST_FAILURES, Engine, EngineObserver, EngineOptions, Stream
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.schedule import Progress
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs

TIME = 20.0  # for what must come: a wait without an end is the fault that is looked for


@pytest.fixture
def session(tiny_bundle: Path) -> Iterator[Session]:
    with motrt.load(tiny_bundle, num_threads=1) as opened:
        yield opened


def in_time(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, in a thread of its own."""
    given: list[Any] = []

    def run() -> None:
        try:
            given.append((work(), None))
        except BaseException as failure:
            given.append((None, failure))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIME)
    assert given, "it waits for ever"
    if given[0][1] is not None:
        raise given[0][1]
    return given[0][0]


def tokens(steps: Iterator[Step] | Stream) -> list[int]:
    return [step.token_id for step in steps]


# What a request brings along.


class Panic(BaseException):
    """As native code's panics are in Python: no Exception."""


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        GeneratorExit(),
        Panic(),
        UnspeakableError(),
    ],
)
def test_whatever_a_schedule_raises_ends_its_own_request_alone(failure: BaseException, session: Session) -> None:
    def schedule(progress: Progress) -> str:
        if len(progress.tokens) == 2:
            raise failure
        return "text"

    with Engine(session) as engine:
        beside = engine.submit([1, 2], max_tokens=20)
        broken = engine.submit([3], schedule=schedule, max_tokens=9)
        with pytest.raises(BackendError, match="no token could be chosen"):
            in_time(lambda: tokens(broken))
        assert in_time(lambda: tokens(beside)) == tokens(session.generate([1, 2], max_tokens=20))
        assert in_time(lambda: tokens(engine.submit([1], max_tokens=2))) and engine.is_alive


def test_a_schedule_that_says_what_can_not_be_is_the_askers_fault(session: Session) -> None:
    with Engine(session) as engine, pytest.raises(InputError, match="smell"):
        tokens(engine.submit([1], schedule=lambda progress: "smell" if progress.tokens else "text", max_tokens=9))


def test_an_observer_that_raises_harms_nobody(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    class Raising(EngineObserver):
        def token(self, modality: str) -> None:
            raise SystemExit(1)

        def finished(self, reason: str) -> None:
            raise ValueError(reason)

    with Engine(session, observer=Raising()) as engine:
        assert len(in_time(lambda: tokens(engine.submit([1], max_tokens=3)))) == 3
    assert "the engine's observer failed at token" in caplog.text


# Tokenizers.


def panicking() -> Tokenizer:
    """Its native code panics whatever it decodes, for no token has so many spaces; and it has nothing for unknown words."""
    made = Tokenizer(models.WordLevel({" " * number: number for number in range(96)}, unk_token="[UNK]"))
    made.decoder = decoders.Strip(" ", 0, 100)
    return made


def test_a_tokenizer_that_panics_ends_one_request_with_a_sentence(session: Session) -> None:
    session.tokenizer = panicking()
    with pytest.raises(BackendError, match="the tokenizer failed at turning ids"):
        list(session.generate([1], max_tokens=2))
    with Engine(session) as engine:
        with pytest.raises(BackendError, match="the tokenizer failed at turning ids"):
            in_time(lambda: list(engine.submit([1], max_tokens=2)))
        session.tokenizer = None
        assert len(in_time(lambda: tokens(engine.submit([1], max_tokens=2)))) == 2


@pytest.mark.parametrize("text", ["words that it does not know", "\ud800"])
def test_text_that_a_tokenizer_can_not_encode_is_refused_with_a_sentence(text: str, session: Session) -> None:
    session.tokenizer = panicking()
    with Engine(session) as engine, pytest.raises(InputError, match="the tokenizer failed at turning this text into ids"):
        engine.submit(text)


# The engine's thread.


@pytest.mark.parametrize("failure", [SystemExit(3), KeyboardInterrupt(), Panic("dead"), MemoryError()])
def test_whatever_ends_the_thread_ends_every_request(
    failure: BaseException, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    turns, go_on = [0], threading.Event()
    healthy = Engine._read_prompts

    def read(engine: Engine) -> Any:
        turns[0] += 1
        if turns[0] == 3:
            go_on.wait(TIME)
            raise failure
        return healthy(engine)

    monkeypatch.setattr(Engine, "_read_prompts", read)
    engine = Engine(session, EngineOptions(max_batch=2))
    streams = [engine.submit([1, 2], max_tokens=40) for _ in range(4)]
    go_on.set()
    for stream in streams:
        with pytest.raises(EngineClosedError, match=f"the engine is broken: .*{type(failure).__name__}"):
            in_time(partial(tokens, stream))
        assert stream.wait(TIME)
    in_time(engine._thread.join)
    assert not engine.is_alive
    assert "the engine is broken" in caplog.text
    with pytest.raises(EngineClosedError, match="the engine is broken"):
        engine.submit([1])
    assert "broken" in engine.state().failure
    in_time(lambda: engine.close(drain_seconds=1e6))


def test_an_engine_is_alive_until_it_is_closed(session: Session) -> None:
    engine = Engine(session)
    assert engine.is_alive
    engine.close()
    assert not engine.is_alive


def test_an_engine_whose_backend_only_fails_is_not_alive_and_says_so(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Wrapped):
        def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
            raise SystemExit("planted")

    with Engine(Failing(session)) as engine:
        for _ in range(MOST_FAILURES):
            with pytest.raises(MotrtError):
                in_time(lambda: tokens(engine.submit([1], max_tokens=2)))
        in_time(engine._thread.join)
        assert not engine.is_alive
    assert "the engine takes no more requests: reading a prompt failed 3 times in a row" in caplog.text


def test_a_schedule_may_close_the_engine_and_does_not_wait_for_itself(session: Session) -> None:
    engine = Engine(session)

    def closing(progress: Progress) -> str:
        if progress.tokens:
            engine.close(drain_seconds=1e6)
        return "text"

    stream = engine.submit([1], schedule=closing, max_tokens=9)
    with pytest.raises(EngineClosedError):
        in_time(lambda: tokens(stream))


def test_a_closed_session_takes_no_engine(session: Session) -> None:
    session.close()
    with pytest.raises(BackendError, match="closed"):
        Engine(session)


# Readers.


def test_a_stream_that_has_ended_ends_for_everybody_who_reads_it_again(session: Session) -> None:
    with Engine(session) as engine:
        stream = engine.submit([1], max_tokens=3)
        assert len(in_time(lambda: tokens(stream))) == 3
        assert in_time(lambda: tokens(stream)) == []
        assert in_time(lambda: asyncio.run(heard(stream))) == []


async def heard(stream: Stream) -> list[int]:
    return [step.token_id async for step in stream.events()]


def test_two_readers_share_the_steps_and_both_end(session: Session) -> None:
    async def both(stream: Stream) -> list[int]:
        return [one for said in await asyncio.gather(heard(stream), heard(stream)) for one in said]

    with Engine(session) as engine:
        for read in (
            lambda stream: sorted(asyncio.run(both(stream))),
            lambda stream: sorted(one for said in ThreadPoolExecutor(2).map(tokens, [stream, stream]) for one in said),
        ):
            stream = engine.submit([1], max_tokens=30)
            assert in_time(partial(read, stream)) == sorted(session_tokens(session))


def session_tokens(session: Session) -> list[int]:
    return tokens(session.generate([1], max_tokens=30))


def test_what_went_wrong_is_told_to_each_reader(session: Session) -> None:
    engine = Engine(session)
    stream = engine.submit([1], max_tokens=100)
    engine.close()
    for _ in range(2):
        with pytest.raises(EngineClosedError):
            in_time(lambda: tokens(stream))


def test_what_time_cuts_off_is_no_less_than_the_text_of_its_ids(session: Session) -> None:
    """The run of bytes that was not over is given with the end."""
    made = Tokenizer(models.WordLevel({f"<0x{byte:02X}>": byte for byte in range(96)}, unk_token="<0x00>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    session.tokenizer = made
    slow = Wrapped(session)
    with Engine(slow) as engine:
        stream = engine.submit([1], max_tokens=100, seconds=0.2)
        steps = list(stream)
    assert stream.finish == "deadline"
    assert "".join(step.text for step in steps) + stream.rest == made.decode([step.token_id for step in steps])


class Wrapped(Session):
    """A session that computes what another does, and takes some time for it."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.tokenizer = inner, inner.tokenizer
        self.config, self.backend, self.precision = inner.config, inner.backend, inner.precision
        self.begun, self.go_on = threading.Event(), threading.Event()

    def make_buffers(self, batch_size: int, capacity: int) -> Any:
        return self.inner.make_buffers(batch_size, capacity)

    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        return self.inner.grow_buffers(buffers, capacity)

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        self.begun.set()
        self.go_on.wait(0.02)
        return self.inner.execute(inputs, cache)

    def release(self) -> None:
        assert not self.inner._is_closed
        self.inner.close()


# Sessions.


def test_a_session_that_is_closed_while_a_thread_generates_lets_the_pass_end_and_then_says_so(session: Session) -> None:
    wrapped = Wrapped(session)
    with ThreadPoolExecutor(1) as threads:
        said = threads.submit(lambda: tokens(wrapped.generate([1, 2], max_tokens=100)))
        assert wrapped.begun.wait(TIME)
        in_time(wrapped.close)
        with pytest.raises(BackendError, match="closed"):
            said.result(TIME)


def test_a_session_that_is_closed_under_its_engine_ends_the_requests(session: Session) -> None:
    with Engine(session) as engine:
        stream = engine.submit([1, 2], max_tokens=120)
        session.close()
        with pytest.raises(MotrtError):
            in_time(lambda: tokens(stream))
        with pytest.raises(BackendError, match="closed"):
            engine.submit([1])


FORKED = """
import os, signal, sys, threading, warnings
import motrt

warnings.simplefilter("ignore")
session = motrt.load(sys.argv[1], num_threads=int(sys.argv[2]))
engine = motrt.Engine(session)
opened, stream = engine.generate([1], max_tokens=100), engine.submit([1], max_tokens=100)
next(opened)
asks = {
    "generate": lambda: list(engine.generate([1], max_tokens=2)),
    "submit": lambda: engine.submit([1]),
    "open iterator": lambda: list(opened),
    "unread iterator": lambda: list(stream),
    "wait": lambda: stream.wait(),
    "state": engine.state,
    "close": lambda: engine.close(drain_seconds=1e6),
    "session.generate": lambda: list(session.generate([1], max_tokens=2)),
    "prefill": lambda: session.prefill([[1]], "text"),
    "new engine": lambda: motrt.Engine(session),
}
if os.fork() == 0:
    signal.alarm(20)
    assert not engine.is_alive
    for name, ask in asks.items():
        try:
            ask()
        except motrt.MotrtError as failure:
            if "in each process" in str(failure):
                print(name, flush=True)
    session.close()
    os._exit(0)
os.wait()
assert engine.is_alive
engine.close()
print(len(list(session.generate([1], max_tokens=2))))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_forked_process_is_told_to_open_its_own(num_threads: int, tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(tiny_bundle), str(num_threads)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    asked = [line.split('"')[1] for line in FORKED.splitlines() if line.startswith('    "')]
    assert said == [*asked, "2"]
