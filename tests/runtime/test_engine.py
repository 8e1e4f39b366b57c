"""Many requests at once: each says what it says alone, and none waits for another's fault."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import motrt
from motrt.errors import BackendError, BusyError, CapacityError, EngineClosedError, InputError, MotrtError
from motrt.model_def.config import ModelConfig
from motrt.runtime.decoding import Step
from motrt.runtime.engine import MOST_FAILURES, Engine, EngineObserver, EngineOptions, Stream
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs
from motrt.tests.export.models import torch_session

TINY = ModelConfig.tiny()
Request = dict[str, Any]


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with motrt.load(tiny_bundle, num_threads=1) as opened:
        yield opened


def requests(count: int, seed: int = 0) -> list[Request]:
    """Of all lengths, modalities and ways of choosing."""
    chance = np.random.default_rng(seed)
    return [
        {
            "prompt": chance.integers(0, TINY.vocab_size, size=int(chance.integers(1, 40))).tolist(),
            "schedule": motrt.then("text", tokens=int(chance.integers(1, 12))).then("audio", frames=int(chance.integers(1, 4))),
            "sampling": motrt.Sampling(temperature=float(chance.choice([0.0, 0.9])), seed=number),
        }
        for number in range(count)
    ]


def alone(session: Session, request: Request) -> list[int]:
    return [step.token_id for step in session.generate(**request)]


def tokens(steps: Iterator[Step] | Stream) -> list[int]:
    return [step.token_id for step in steps]


class Counting(EngineObserver):
    """Counts what an engine tells."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.batches: list[int] = []
        self.refusals: list[str] = []
        self.num_tokens = 0

    def finished(self, reason: str) -> None:
        self.ends.append(reason)

    def decoded(self, rows: int, seconds: float) -> None:
        self.batches.append(rows)

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def token(self, modality: str) -> None:
        self.num_tokens += 1


@pytest.mark.parametrize(("max_batch", "chunk"), [(1, 64), (3, 5), (16, 64), (16, 1)])
def test_every_request_says_what_it_says_alone(max_batch: int, chunk: int, session: Session) -> None:
    asked = requests(24)
    observer = Counting()
    with Engine(session, EngineOptions(max_batch, 64, chunk), observer) as engine:
        streams = [engine.submit(**one) for one in asked]
        said = [tokens(one) for one in streams]
    assert said == [alone(session, one) for one in asked]
    assert observer.ends == ["schedule"] * len(asked)
    assert observer.num_tokens == sum(map(len, said))
    assert max(observer.batches) <= max_batch
    if max_batch == 16 and chunk == 64:
        assert max(observer.batches) > 8


def test_steps_carry_what_they_carry_alone(session: Session) -> None:
    (request,) = requests(1, seed=3)
    with Engine(session) as engine:
        came = list(engine.generate(**request))
    assert came == list(session.generate(**request))
    assert came[-1].finish == "schedule"


def test_streams_can_be_awaited_side_by_side(session: Session) -> None:
    asked = requests(6, seed=4)

    async def listen(engine: Engine, request: Request) -> list[int]:
        return [step.token_id async for step in engine.stream(**request)]

    async def all_of_them(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(listen(engine, one) for one in asked))

    with Engine(session, EngineOptions(max_batch=4)) as engine:
        said = asyncio.run(all_of_them(engine))
    assert said == [alone(session, one) for one in asked]


def test_a_cancelled_request_leaves_before_the_next_step_and_the_others_do_not_notice(session: Session) -> None:
    long: Request = {"prompt": [1, 2, 3], "schedule": motrt.then("text", tokens=100)}
    observer = Counting()
    with Engine(session, EngineOptions(max_batch=4), observer) as engine:
        leaving, staying = engine.submit(**long), engine.submit(**{**long, "prompt": [7, 8]})
        steps = iter(leaving)
        next(steps)
        leaving.cancel()
        assert tokens(staying) == alone(session, {**long, "prompt": [7, 8]})
        assert leaving.wait(5)
        assert leaving.finish == "cancelled"
        assert engine.state().running == 0
    assert sorted(observer.ends) == ["cancelled", "schedule"]
    assert observer.num_tokens < 200


def test_leaving_the_loop_cancels(session: Session) -> None:
    with Engine(session) as engine:
        stream = engine.submit([1, 2, 3], schedule=motrt.then("text", tokens=120))
        for _ in stream:
            break
        assert stream.wait(5)
        assert stream.finish == "cancelled"


def test_a_request_that_waits_can_be_cancelled_too(session: Session) -> None:
    with Engine(session, EngineOptions(max_batch=1)) as engine:
        first = engine.submit([1], schedule=motrt.then("text", tokens=120))
        waiting = engine.submit([2], schedule=motrt.then("text", tokens=120))
        waiting.cancel()
        assert waiting.wait(5)
        assert (waiting.finish, tokens(waiting)) == ("cancelled", [])
        first.cancel()


def test_a_deadline_keeps_what_came_until_then(session: Session) -> None:
    with Engine(session) as engine:
        stream = engine.submit([1, 2, 3], schedule=motrt.then("text", tokens=120), seconds=0.02)
        came = tokens(stream)
    assert stream.finish == "deadline"
    assert came == alone(session, {"prompt": [1, 2, 3], "schedule": motrt.then("text", tokens=120)})[: len(came)]


class Gated(motrt.Session):
    """Waits before every pass until it is let on; everything else is the session it wraps."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.gate = inner, threading.Semaphore(0)
        self.config, self.backend, self.precision = inner.config, inner.backend, inner.precision
        self.fail_on: set[int] = set()
        self.passes = 0

    def make_buffers(self, batch_size: int, capacity: int) -> Any:
        return self.inner.make_buffers(batch_size, capacity)

    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        return self.inner.grow_buffers(buffers, capacity)

    def join_buffers(self, rows: Sequence[tuple[Any, int]], capacity: int) -> Any:
        return self.inner.join_buffers(rows, capacity)

    def replace_buffers(self, buffers: Any, rows: Any, batch_size: int, capacity: int) -> Any:
        return self.inner.replace_buffers(buffers, rows, batch_size, capacity)

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        self.gate.acquire()
        self.passes += 1
        if self.passes in self.fail_on:
            raise RuntimeError("planted")
        return self.inner.execute(inputs, cache)

    def release(self) -> None:
        pass

    def open_for_good(self) -> None:
        self.gate.release(10_000)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(session: Session) -> None:
    gated, observer = Gated(session), Counting()
    with Engine(gated, EngineOptions(max_batch=1, max_queue=2), observer) as engine:
        short: Request = {"prompt": [1, 2], "schedule": motrt.then("text", tokens=2)}
        taken = [engine.submit(**short)]
        wait_until(lambda: engine.state().reading == 1)
        taken += [engine.submit(**short) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are waiting"):
            engine.submit(**short)
        assert observer.refusals == ["queue full"]
        gated.open_for_good()
        assert [len(tokens(one)) for one in taken] == [2, 2, 2]
        assert len(tokens(engine.submit(**short))) == 2


def wait_until(is_so: Any, seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, "it never came to be"
        time.sleep(0.001)


def test_a_higher_priority_is_admitted_first_and_equals_in_their_order(session: Session) -> None:
    gated = Gated(session)
    finished: list[int] = []
    with Engine(gated, EngineOptions(max_batch=1)) as engine:
        first = engine.submit([1], schedule=motrt.then("text", tokens=1))
        wait_until(lambda: engine.state().reading == 1)
        others = [engine.submit([1], schedule=motrt.then("text", tokens=1), priority=priority) for priority in (0, 5, 0, 5)]
        gated.open_for_good()
        ends = {}
        for stream in (first, *others):
            tokens(stream)
            ends[stream.number] = stream.last_token
        finished = sorted(ends, key=lambda number: ends[number] or 0)
    assert finished == [0, 2, 4, 1, 3]


def test_a_long_prompt_does_not_stall_the_others(session: Session) -> None:
    """Between two of its chunks the running row takes a step."""
    gated = Gated(session)
    with Engine(gated, EngineOptions(max_batch=2, prefill_chunk=8)) as engine:
        running = engine.submit([1], schedule=motrt.then("text", tokens=40))
        gated.gate.release(1)
        wait_until(lambda: engine.state().running == 1)
        long = engine.submit([2] * 80, schedule=motrt.then("text", tokens=1))
        gated.open_for_good()
        tokens(long)
        said_meanwhile = len(running.row.tokens)
        assert tokens(running) == alone(session, {"prompt": [1], "schedule": motrt.then("text", tokens=40)})
    assert said_meanwhile >= 8


# What goes wrong.


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(session: Session) -> None:
    gated, observer = Gated(session), Counting()
    gated.open_for_good()
    gated.fail_on = {3}
    with Engine(gated, EngineOptions(), observer) as engine:
        stream = engine.submit([1, 2], schedule=motrt.then("text", tokens=9))
        with pytest.raises(BackendError, match="planted"):
            tokens(stream)
        assert stream.finish == "error"
        assert engine.state().failure == ""
        request: Request = {"prompt": [1, 2], "schedule": motrt.then("text", tokens=9)}
        assert tokens(engine.submit(**request)) == alone(session, request)
    assert observer.ends == ["error", "schedule"]


def test_a_backend_that_only_fails_makes_the_engine_say_so(session: Session) -> None:
    gated = Gated(session)
    gated.open_for_good()
    gated.fail_on = set(range(100))
    with Engine(gated) as engine:
        for _ in range(MOST_FAILURES):
            with pytest.raises(MotrtError):
                tokens(engine.submit([1], schedule=motrt.then("text", tokens=2)))
        wait_until(lambda: engine.state().failure != "")
        with pytest.raises(EngineClosedError, match="reading a prompt failed 3 times in a row"):
            engine.submit([1])


def test_logits_without_numbers_end_one_request_alone(session: Session) -> None:
    class OneRowOfNaN(Gated):
        def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
            logits = super().execute(inputs, cache)
            logits[(inputs.input_ids[:, -1] == 5)[: len(logits)]] = np.nan
            return logits

    broken = OneRowOfNaN(session)
    broken.open_for_good()
    good: Request = {"prompt": [1, 2], "schedule": motrt.then("audio", frames=2)}
    with Engine(broken, EngineOptions(max_batch=2)) as engine:
        ill, well = engine.submit([5], schedule=motrt.then("audio", frames=2)), engine.submit(**good)
        assert tokens(well) == alone(session, good)
        with pytest.raises(BackendError, match="NaN"):
            tokens(ill)
        assert engine.state().failure == ""


def test_closing_ends_what_is_open_and_takes_nothing_more(session: Session) -> None:
    engine = Engine(session, EngineOptions(max_batch=1))
    streams = [engine.submit([1], schedule=motrt.then("text", tokens=120)) for _ in range(3)]
    engine.close()
    for stream in streams:
        with pytest.raises(EngineClosedError):
            tokens(stream)
    with pytest.raises(EngineClosedError):
        engine.submit([1])
    engine.close()


def test_closing_with_time_lets_what_is_open_finish(session: Session) -> None:
    engine = Engine(session, EngineOptions(max_batch=2))
    asked = requests(5, seed=6)
    streams = [engine.submit(**one) for one in asked]
    engine.close(drain_seconds=30)
    assert [tokens(one) for one in streams] == [alone(session, one) for one in asked]


def test_a_request_for_nothing_ends_at_once(session: Session) -> None:
    with Engine(session) as engine:
        stream = engine.submit([1], max_tokens=0)
        assert (tokens(stream), stream.finish) == ([], "length")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt": []}, InputError),
        ({"prompt": [10**9]}, InputError),
        ({"prompt": "text without a tokenizer"}, InputError),
        ({"prompt": [[1], [2]]}, InputError),
        ({"prompt": [1], "max_tokens": -1}, InputError),
        ({"prompt": [1], "max_tokens": 10**9}, CapacityError),
        ({"prompt": [1] * 10_000}, CapacityError),
        ({"prompt": [1], "schedule": motrt.then("smell")}, InputError),
        ({"prompt": [1], "stop_ids": [-1]}, InputError),
        ({"prompt": [1], "seconds": 0}, InputError),
        ({"prompt": [1], "seconds": "soon"}, InputError),
        ({"prompt": [1], "priority": 1.5}, InputError),
    ],
)
def test_what_can_not_be_asked_is_refused_before_it_waits(options: Request, error: type[MotrtError], session: Session) -> None:
    with Engine(session) as engine:
        with pytest.raises(error):
            engine.submit(**options)
        assert engine.state().waiting == 0


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_queue": -1}, {"prefill_chunk": 0}, {"max_batch": 1.5}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        EngineOptions(**options)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_is_answered_or_refused_with_a_sentence(data: st.DataObject, session: Session) -> None:
    request: Request = {"prompt": data.draw(st.one_of(st.lists(st.integers(-1, TINY.vocab_size), max_size=9), ODD))}
    for name in ("max_tokens", "stop_ids", "schedule", "sampling", "seconds", "priority"):
        if data.draw(st.booleans()):
            request[name] = data.draw(ODD)
    request.setdefault("max_tokens", 3)
    with Engine(session) as engine:
        beside = engine.submit([3, 2, 1], schedule=motrt.then("audio", frames=1))
        try:
            said = tokens(engine.submit(**request))
        except MotrtError as refusal:
            assert str(refusal)
        else:
            assert len(said) <= TINY.max_seq_len
        assert tokens(beside) == alone(session, {"prompt": [3, 2, 1], "schedule": motrt.then("audio", frames=1)})


class Watched(EngineObserver):
    """Keeps the batch's buffers of every step."""

    engine: Engine

    def __init__(self) -> None:
        self.buffers: list[int] = []
        self.batches: list[int] = []

    def decoded(self, rows: int, seconds: float) -> None:
        cache = self.engine._batch.cache
        self.buffers.append(0 if cache is None else id(cache.buffers))
        self.batches.append(rows)


def test_a_full_batch_stays_full_and_in_its_place_while_requests_come_and_go(session: Session) -> None:
    """Whoever ends is followed by the next in the very next step, in the same memory."""
    asked: list[Request] = [{"prompt": [number], "schedule": motrt.then("text", tokens=4 + number % 5)} for number in range(40)]
    gated, watched = Gated(session), Watched()
    with Engine(gated, EngineOptions(max_batch=8, max_queue=40), watched) as engine:
        watched.engine = engine
        streams = [engine.submit(**one) for one in asked]
        gated.open_for_good()
        assert [tokens(one) for one in streams] == [alone(session, one) for one in asked]
    full = [place for place, rows in enumerate(watched.batches) if rows == 8]
    assert full == list(range(full[0], full[-1] + 1)) and len(full) > 20
    assert len({watched.buffers[place] for place in full[:-1]}) == 1


def test_a_place_rests_until_a_long_prompt_has_been_read(session: Session) -> None:
    watched, gated = Watched(), Gated(session)
    with Engine(gated, EngineOptions(max_batch=3, prefill_chunk=5), watched) as engine:
        watched.engine = engine
        lasting = [{"prompt": [number], "max_tokens": 45} for number in (1, 2)]
        asked: list[Request] = [*lasting, {"prompt": [3], "max_tokens": 3}, {"prompt": [4] * 40, "max_tokens": 6}]
        streams = [engine.submit(**one) for one in asked]
        gated.open_for_good()
        said = [tokens(one) for one in streams]
    assert said == [alone(session, one) for one in asked]
    first, last = watched.batches.index(3), len(watched.batches) - 1 - watched.batches[::-1].index(3)
    assert 2 in watched.batches[first:last]
    assert len(set(watched.buffers[first : last + 1])) == 1


def test_prompts_are_read_faster_beside_more_rows(session: Session) -> None:
    class Reading(Gated):
        def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
            sizes.append(inputs.input_ids.shape[1])
            return super().execute(inputs, cache)

    gated, sizes = Reading(session), list[int]()
    with Engine(gated, EngineOptions(max_batch=4, prefill_chunk=1)) as engine:
        streams = [engine.submit([number], max_tokens=60) for number in (1, 2, 3)]
        streams.append(engine.submit([5] * 30, max_tokens=1))
        gated.open_for_good()
        assert [len(tokens(one)) for one in streams] == [60, 60, 60, 1]
    assert max(sizes) == 3 * 2


def test_one_row_at_a_time_needs_no_copies_of_rows(session: Session) -> None:
    class CopiesNothing(Gated):
        def join_buffers(self, rows: Any, capacity: int) -> Any:
            return Session.join_buffers(self, rows, capacity)

        def replace_buffers(self, buffers: Any, rows: Any, batch_size: int, capacity: int) -> Any:
            return Session.replace_buffers(self, buffers, rows, batch_size, capacity)

    gated = CopiesNothing(session)
    gated.open_for_good()
    asked = requests(4, seed=5)
    with Engine(gated, EngineOptions(max_batch=1)) as engine:
        streams = [engine.submit(**one) for one in asked]
        assert [tokens(one) for one in streams] == [alone(session, one) for one in asked]


# The cache's rows.


def test_rows_of_several_caches_are_joined_with_what_they_hold(session: Session) -> None:
    _, first = session.prefill([[1, 2, 3], [4, 5]], "text")
    _, second = session.prefill([[100] * 70], "audio")
    joined = session.join_rows([(second, 0), (first, 1), (first, 0)])
    assert joined.lengths.tolist() == [70, 2, 3]
    logits = session.decode_step([101, 6, 7], ["audio", "text", "text"], joined)
    expected = [session.decode_step([101], "audio", second)[0], *session.decode_step([7, 6], "text", first)[::-1]]
    np.testing.assert_allclose(logits, np.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "any other"])
def test_rows_take_the_places_of_others(backend: str, session: Session, tiny_checkpoint: Path) -> None:
    """A row that comes says what it said where it came from, whatever stood in its place."""
    with torch_session(tiny_checkpoint) as reference:
        used = reference if backend == "torch" else session
        _, cache = used.prefill([[1, 2, 3], [100] * 70, [4, 5]], "text")
        _, coming = used.prefill([[9], [101, 7]], "audio")
        kept = used.join_rows([(cache, 1)])
        if backend == "any other":
            cache.buffers = Session.replace_buffers(used, cache.buffers, {0: (coming.buffers, 1)}, 3, cache.capacity)
            cache.buffers = Session.replace_buffers(used, cache.buffers, {2: (coming.buffers, 0)}, 3, cache.capacity)
            cache.lengths[:] = [2, 70, 1]
        else:
            used.replace_rows(cache, {0: (coming, 1), 2: (coming, 0)})
        assert cache.lengths.tolist() == [2, 70, 1]
        expected = [*used.decode_step([6, 8], "text", coming)[::-1], *used.decode_step([7], "text", kept)]
        logits = used.decode_step([8, 7, 6], "text", cache)
    np.testing.assert_allclose(logits, np.stack([expected[0], expected[2], expected[1]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filled", [20, 100])
def test_a_place_that_held_no_numbers_is_clean_for_the_next_row(filled: int, session: Session) -> None:
    """Of a row that comes, and of all that lies behind it where the batch has more room than the row had."""
    _, cache = session.prefill([[1] * filled, [2] * filled], "text")
    for array in cache.buffers.arrays():
        array[0] = np.nan
    _, coming = session.prefill([[3, 4]], "text")
    session.replace_rows(cache, {0: (coming, 0)})
    assert all(np.isfinite(array[0]).all() for array in cache.buffers.arrays())
    expected = session.decode_step([5], "text", coming)[0]
    np.testing.assert_allclose(session.decode_step([5, 6], "text", cache)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_longer_row_makes_room_and_a_batch_of_short_ones_gives_it_back(session: Session) -> None:
    _, short = session.prefill([[1, 2], [3]], "text")
    _, long = session.prefill([[1] * 100], "text")
    assert (short.capacity, long.capacity) == (64, 128)
    session.replace_rows(short, {1: (long, 0)})
    assert short.capacity == 128 and short.lengths.tolist() == [2, 100]
    assert session.join_rows([(short, 0)]).capacity == 64
    assert session.capacity_of([(short, 0), (long, 0)]) == 128


def test_rows_of_strangers_replace_nothing(session: Session, tiny_bundle: Path) -> None:
    _, cache = session.prefill([[1, 2, 3]], "text")
    with pytest.raises(InputError, match=r"rows 0\.\.0 \(1 came\)"):
        session.replace_rows(cache, {1: (cache, 0)})
    with motrt.load(tiny_bundle) as other, pytest.raises(InputError, match="another session"):
        other.replace_rows(other.new_cache(1), {0: (cache, 0)})
    with pytest.raises(InputError, match="rows come from other caches"):
        session.replace_rows(cache, {0: (cache, 0)})
    session.replace_rows(cache, {})
    assert cache.lengths.tolist() == [3]


def test_rows_that_can_not_be_joined_are_refused(session: Session, tiny_bundle: Path) -> None:
    _, cache = session.prefill([[1, 2, 3]], "text")
    with pytest.raises(InputError, match="at least one row"):
        session.join_rows([])
    with pytest.raises(InputError, match=r"rows 0\.\.0"):
        session.join_rows([(cache, 1)])
    with motrt.load(tiny_bundle) as other, pytest.raises(InputError, match="another session"):
        other.join_rows([(cache, 0)])


def test_a_prompt_in_pieces_equals_the_whole(session: Session) -> None:
    whole, _ = session.prefill([[1, 2, 3, 100, 101]], "audio")
    cache = session.new_cache(1)
    assert session.prefill_chunk([1, 2], "audio", cache, is_last=False).shape == (0, TINY.vocab_size)
    came = session.prefill_chunk([3, 100, 101], "audio", cache)
    assert cache.lengths.tolist() == [5]
    np.testing.assert_allclose(came, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(CapacityError):
        session.prefill_chunk([1] * TINY.max_seq_len, "audio", cache)
