"""Many requests at once over one session: continuous batching.

Requests join and leave the running batch between two steps. Each turn of the engine drops who is cancelled or late, admits who
waits, reads new prompts as far as a chunk goes, seats those that are read in the places of those that ended, and does one
decode step for all rows that are running, whatever their modalities and positions. A long prompt so delays the others by a
chunk, never by its length. One thread of the engine's own does all of that; callers hand requests in and take steps out from
any thread, or from an event loop.

A row's tokens depend on its own prompt, schedule, sampling and seed (see ``decoding``): never on who shares its batch. An
engine knows token ids; text comes in and out only through the tokenizer that the session may carry. It knows nothing of HTTP.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from motrt.errors import BackendError, BusyError, EngineClosedError, InputError
from motrt.runtime.decoding import Prompt, Row, Step, prepare_rows
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.sampling import SamplingByModality
from motrt.runtime.schedule import Schedule
from motrt.runtime.session import Logits, Session

logger = logging.getLogger(__name__)

# Steps in a row that may fail before the engine calls itself broken: one may be a request's fault, three are the backend's.
MOST_FAILURES = 3

# What a pass costs beside its ids, in ids: every weight is read, however few ids there are. Of the 1B model at int4 a step of
# text takes some 34 ms and 19 ms for each row, one of audio 16 and 6 (docs/performance.md, batch).
PASS_COST = 3

# Ids of prompts that are read for each row of a step. A row of a step costs about what two ids of a prompt do, so reading
# delays those who decode by about a step; and answers that are half as long as their prompts still keep the batch full.
READ_PER_ROW = 2

# How a request ends beside what ``Step.finish`` knows.
CANCELLED, DEADLINE = "cancelled", "deadline"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine shares its session.

    Attributes:
        max_batch: rows that decode together, those whose prompts are being read included.
        max_queue: requests that wait beside them; one more is refused.
        prefill_chunk: ids of prompts that are read between two decode steps, or their cost where prompts are short; at least
            ``READ_PER_ROW`` for each row that decodes.
    """

    max_batch: int = 8
    max_queue: int = 64
    prefill_chunk: int = 64

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_queue", 0), ("prefill_chunk", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 1 << 16:
                raise InputError(f"{name} must be a whole number in {least}..{1 << 16} ({value!r} came)")


class EngineObserver:
    """Told what happens, for metrics; every method may be overridden, none may block or raise."""

    def refused(self, reason: str) -> None:
        """A request was not taken."""

    def first_token(self, seconds: float) -> None:
        """A request's first token came so long after it was handed in."""

    def next_token(self, seconds: float) -> None:
        """A later token came so long after the one before."""

    def token(self, modality: str) -> None:
        """A token of a modality was generated."""

    def finished(self, reason: str) -> None:
        """A request ended: a ``Step.finish``, ``cancelled``, ``deadline`` or ``error``."""

    def decoded(self, rows: int, seconds: float) -> None:
        """A decode step of so many rows took so long."""


@dataclass(frozen=True)
class EngineState:
    """How an engine stands, at one moment.

    Attributes:
        waiting: requests in the queue.
        running: rows that decode.
        reading: requests whose prompts are being read.
        cache_positions: positions of the running batch's cache, over all rows, and how many of them are filled.
        steps: decode steps so far, and the rows in them: their quotient is the mean batch.
        failure: why the engine is broken; empty while it serves.
    """

    waiting: int
    running: int
    reading: int
    cache_positions: int
    cache_filled: int
    steps: int
    rows_stepped: int
    failure: str = ""


_END = object()


class Stream:
    """One request's steps, as they come. Iterate over it, or ``async for`` over ``events``; ``cancel`` ends it early.

    Attributes:
        number: of the request, counted by the engine.
        finish: how it ended; None while it goes on.
        error: what ended it, where something went wrong.
        admitted: when it left the queue, by the monotonic clock; None while it waits.
    """

    def __init__(self, number: int, row: Row, priority: int, deadline: float | None) -> None:
        self.number, self.row, self.priority, self.deadline = number, row, priority, deadline
        self.finish: str | None = None
        self.error: BaseException | None = None
        self.started = time.monotonic()
        self.admitted: float | None = None
        self.last_token: float | None = None
        self._is_cancelled = threading.Event()
        self._ended = threading.Event()
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    # What callers do.

    def cancel(self) -> None:
        """Let go of the request: its row is free before the next step. A request that has ended stays as it is."""
        self._is_cancelled.set()

    def __iter__(self) -> Iterator[Step]:
        """Each step as it comes.

        Raises:
            MotrtError: what ended the request, where something went wrong.
        """
        try:
            while (step := self._steps.get()) is not _END:
                yield step
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error

    async def events(self) -> AsyncIterator[Step]:
        """The same in an event loop: nothing blocks it."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()
        self._wake = (loop, wake)
        try:
            while True:
                try:
                    step = self._steps.get_nowait()
                except queue.Empty:
                    await wake.wait()
                    wake.clear()
                    continue
                if step is _END:
                    break
                yield step
        finally:
            self._wake = None
            self.cancel()
        if self.error is not None:
            raise self.error

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the request has ended within so long."""
        return self._ended.wait(seconds)

    # What the engine does.

    @property
    def is_unwanted(self) -> str | None:
        """Why the request should not go on; None where it should."""
        if self._is_cancelled.is_set():
            return CANCELLED
        return DEADLINE if self.deadline is not None and time.monotonic() >= self.deadline else None

    def give(self, step: Step) -> None:
        self._put(step)

    def end(self, finish: str, error: BaseException | None = None) -> bool:
        """Whether it had not ended before."""
        if self.finish is not None:
            return False
        self.finish, self.error = finish, error
        self._put(_END)
        self._ended.set()
        return True

    def _put(self, value: Any) -> None:
        self._steps.put(value)
        wake = self._wake
        if wake is not None:
            loop, event = wake
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.cancel()


@dataclass
class _Reading:
    """A prompt that is being read into a cache of its own."""

    stream: Stream
    cache: KVCache
    done: int = 0

    @property
    def is_done(self) -> bool:
        return self.done == len(self.stream.row.prompt)


@dataclass
class _Batch:
    """The rows that decode together, in the order of the cache's rows; those that ended rest there until others come."""

    streams: list[Stream] = field(default_factory=list)
    cache: KVCache | None = None

    def places(self, ended: bool) -> list[int]:
        """Of the streams that have ended, or of those that go on."""
        return [place for place, one in enumerate(self.streams) if (one.finish is not None) == ended]


class Engine:
    """Serves requests over ``session``; see the head of this file. A context manager, or call ``close``.

    Args:
        session: what computes; nothing else may use it meanwhile. It stays open when the engine is closed.
        options: how it is shared.
        observer: told what happens.
    """

    def __init__(self, session: Session, options: EngineOptions | None = None, observer: EngineObserver | None = None) -> None:
        self.session, self.options, self.observer = session, options or EngineOptions(), observer or EngineObserver()
        if session.most_rows is not None and session.most_rows < self.options.max_batch:
            raise InputError(f"max_batch must be at most {session.most_rows}: this backend takes no more rows")
        self.failure = ""
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._waiting: list[Stream] = []
        self._reading: deque[_Reading] = deque()
        self._batch = _Batch()
        self._steps = self._rows_stepped = 0
        self._failures: Counter[str] = Counter()
        self._is_closing = self._is_draining = False
        self._thread = threading.Thread(target=self._serve, name="motrt-engine", daemon=True)
        self._thread.start()

    # What callers do.

    def submit(
        self,
        prompt: Prompt,
        *,
        schedule: Schedule | None = None,
        sampling: SamplingByModality | None = None,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] = (),
        priority: int = 0,
        seconds: float | None = None,
    ) -> Stream:
        """Hand in one request; everything is checked here, and nothing is computed yet.

        Args:
            prompt: text, or ids: one prompt.
            schedule: as of ``decoding.generate``.
            sampling: likewise.
            max_tokens: likewise.
            stop_ids: likewise.
            priority: requests of a higher one are admitted first; equal ones in the order in which they came.
            seconds: how long it may take from now; what has come by then is kept, and ``finish`` is ``deadline``.

        Raises:
            InputError: for values out of range.
            CapacityError: for prompt and tokens that are more than the model holds.
            BusyError: when the queue is full.
            EngineClosedError: when the engine is closing, or broken.
        """
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InputError(f"priority must be a whole number ({priority!r} came)")
        if seconds is not None and not (isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0):
            raise InputError(f"seconds must be a number above 0 ({seconds!r} came)")
        rows = prepare_rows(self.session, prompt, schedule, sampling, max_tokens, stop_ids)
        if len(rows) != 1:
            raise InputError(f"a request is one prompt ({len(rows)} came): hand in each by itself")
        deadline = None if seconds is None else time.monotonic() + seconds
        stream = Stream(next(self._numbers), rows[0], priority, deadline)
        with self._lock:
            if self._is_closing or self._is_draining or self.failure:
                raise EngineClosedError(self.failure or "the engine is closing and takes no more requests")
            if len(self._waiting) >= self.options.max_queue + self._room():
                self.observer.refused("queue full")
                raise BusyError(f"{len(self._waiting)} requests are waiting and no more are taken: try again later")
            if not rows[0].begins():
                stream.end("schedule" if rows[0].limit else "length")
                self.observer.finished(stream.finish or "")
                return stream
            self._waiting.append(stream)
            self._lock.notify_all()
        return stream

    def generate(self, prompt: Prompt, **options: Any) -> Iterator[Step]:
        """Hand in a request and iterate over its steps; leaving the loop cancels it. Options are ``submit``'s."""
        return iter(self.submit(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Step]:
        """The same for ``async for``. Options are ``submit``'s."""
        return self.submit(prompt, **options).events()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs: without it nothing is generated, whatever ``failure`` says."""
        return self._thread.is_alive()

    def state(self) -> EngineState:
        """How the engine stands now."""
        with self._lock:
            cache = self._batch.cache
            return EngineState(
                waiting=len(self._waiting),
                running=len(self._batch.places(ended=False)),
                reading=len(self._reading),
                cache_positions=0 if cache is None else cache.batch_size * cache.capacity,
                cache_filled=0 if cache is None else int(cache.lengths.sum()),
                steps=self._steps,
                rows_stepped=self._rows_stepped,
                failure=self.failure,
            )

    def close(self, drain_seconds: float = 0.0) -> None:
        """End the engine: requests that are not done within ``drain_seconds`` end with EngineClosedError."""
        with self._lock:
            self._is_draining = True
            self._lock.notify_all()
            self._lock.wait_for(self._is_idle, timeout=drain_seconds)
            self._is_closing = True
            self._lock.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The engine's own thread.

    def _room(self) -> int:
        return self.options.max_batch - len(self._batch.places(ended=False)) - len(self._reading)

    def _is_idle(self) -> bool:
        return not (self._waiting or self._reading or self._batch.places(ended=False))

    def _serve(self) -> None:
        try:
            while self._serve_a_turn():
                pass
        except Exception as failure:  # memory that can not be had for a batch, say: nobody may wait for ever
            logger.exception("the engine is broken")
            self.failure = f"the engine is broken: {failure!r}"
        self._end_all(EngineClosedError(self.failure or "the engine was closed before this request was done"))

    def _serve_a_turn(self) -> bool:
        """Whether there will be another."""
        with self._lock:
            self._lock.wait_for(lambda: self._is_closing or not self._is_idle())
            if self._is_closing or self.failure:
                return False
            self._drop_unwanted()
            self._admit()
        self._seat(self._read_prompts())
        self._decode()
        with self._lock:
            if self._is_idle():
                self._batch = _Batch()  # and the memory of its cache
                self._lock.notify_all()
        return True

    def _attempt(self, what: str, streams: Sequence[Stream], work: Callable[[], None]) -> bool:
        """Whether ``work`` could be done. What fails ends the requests that were in it, and no others."""
        try:
            work()
        except Exception as failure:
            logger.exception("%s failed: %d requests end", what, len(streams))
            told = failure if isinstance(failure, BackendError) else BackendError(f"{what} failed: {failure!r}")
            self._failures[what] += 1
            with self._lock:
                for stream in streams:
                    self._finish(stream, "error", told)
                self._reading = deque(one for one in self._reading if one.stream.finish is None)
                if self._failures[what] >= MOST_FAILURES:
                    self.failure = f"{what} failed {self._failures[what]} times in a row, the last time with: {failure}"
            return False
        self._failures[what] = 0
        return True

    def _finish(self, stream: Stream, finish: str, error: Exception | None = None) -> None:
        if stream.end(finish, error):
            self.observer.finished(finish)

    def _drop_unwanted(self) -> None:
        """Whoever is cancelled or late leaves: from the queue, from reading, from the batch."""
        for stream in (*self._waiting, *(one.stream for one in self._reading), *self._batch.streams):
            if (reason := stream.is_unwanted) is not None:
                self._finish(stream, reason)
        self._waiting = [one for one in self._waiting if one.finish is None]
        self._reading = deque(one for one in self._reading if one.stream.finish is None)

    def _admit(self) -> None:
        """The longest waiting of the highest priority first, while there is room."""
        while self._waiting and self._room() > 0:
            chosen = max(self._waiting, key=lambda one: (one.priority, -one.number))
            self._waiting.remove(chosen)
            chosen.admitted = time.monotonic()
            try:
                cache = self.session.new_cache(1, len(chosen.row.prompt) + 1)
            except Exception as failure:
                self._finish(chosen, "error", failure if isinstance(failure, BackendError) else BackendError(repr(failure)))
                continue
            self._reading.append(_Reading(chosen, cache))

    def _read_prompts(self) -> list[_Reading]:
        """Ids of prompts as far as a chunk goes; returns those that were read to their ends and go on.

        The first takes what there is, others follow where the whole of them fits in what is left: a pass for a few of a long
        prompt's ids would cost what it costs for all.
        """
        left = whole = max(self.options.prefill_chunk, READ_PER_ROW * len(self._batch.places(ended=False)))
        for reading in tuple(self._reading):
            count = len(reading.stream.row.prompt) - reading.done
            if left < whole and count + PASS_COST > left:
                break
            count = min(count, whole, self.session.longest_pass)
            self._attempt("reading a prompt", [reading.stream], partial(self._read, reading, count))
            left -= count + PASS_COST
        if self._reading and self._reading[0].done and not self._reading[0].is_done:
            self._reading.rotate(-1)  # others' prompts take turns with a long one
        return [one for one in self._reading if one.is_done and one.stream.finish is None]

    def _read(self, reading: _Reading, count: int) -> None:
        """The next ids of a prompt; at its end, its first token."""
        row, stop = reading.stream.row, reading.done + count
        name = self.session.config.modality_names[row.next_modality or 0]
        is_last = stop == len(row.prompt)
        logits = self.session.prefill_chunk(row.prompt[reading.done : stop], name, reading.cache, is_last)
        reading.done = stop
        if is_last:
            self._take([(reading.stream, logits[0])])

    def _seat(self, arrived: Sequence[_Reading]) -> None:
        """Rows that ended leave the batch, and those that arrived join it."""
        if not self._attempt("joining the batch", [one.stream for one in arrived], partial(self._change_rows, arrived)):
            self._attempt("leaving the batch", self._batch.streams, partial(self._change_rows, ()))
        with self._lock:
            self._reading = deque(one for one in self._reading if not one.is_done)

    def _change_rows(self, arrived: Sequence[_Reading]) -> None:
        """In place where those that arrive find places of ended ones and the capacity is right; else into a new cache.

        Places that are kept for those whose prompts are being read cost arithmetic, and a new cache copies of all rows: so
        they are kept, as long as they are not more than the rows that go on.
        """
        batch, session = self._batch, self.session
        ended, kept = batch.places(ended=True), batch.places(ended=False)
        if not (ended or arrived):
            return
        staying = [(batch.cache, place) for place in kept] if batch.cache is not None else []
        coming = [(one.cache, 0) for one in arrived]
        rows, cache = [*staying, *coming], batch.cache
        free = len(ended) - len(arrived)
        may_rest = 0 <= free <= min(len(self._reading) - len(arrived), len(kept) + len(arrived))
        if not staying and len(arrived) == 1:  # its own cache will do, for backends that can not copy rows too
            cache, streams = arrived[0].cache, [arrived[0].stream]
        elif cache is not None and rows and may_rest and session.capacity_of(rows) == cache.capacity:
            session.replace_rows(cache, dict(zip(ended, coming, strict=False)))
            seated = dict(zip(ended, (one.stream for one in arrived), strict=False))
            streams = [seated.get(place, one) for place, one in enumerate(batch.streams)]
        else:
            cache = session.join_rows(rows) if rows else None
            streams = [*(batch.streams[place] for place in kept), *(one.stream for one in arrived)]
        with self._lock:
            self._batch = _Batch(streams, cache)

    def _decode(self) -> None:
        if self._batch.cache is not None and self._batch.places(ended=False):
            self._attempt("a decode step", self._batch.streams, self._step)

    def _step(self) -> None:
        batch, cache, names = self._batch, self._batch.cache, self.session.config.modality_names
        assert cache is not None
        started = time.perf_counter()
        going = batch.places(ended=False)
        predicted = [names[batch.streams[place].row.next_modality or 0] for place in going]
        newest = [one.row.newest for one in batch.streams]
        logits = self.session.decode_step(newest, predicted, cache, active=None if len(going) == len(newest) else going)
        self._take([(batch.streams[place], its_logits) for place, its_logits in zip(going, logits, strict=True)])
        with self._lock:
            self._steps += 1
            self._rows_stepped += len(going)
        self.observer.decoded(len(going), time.perf_counter() - started)

    def _take(self, answers: Sequence[tuple[Stream, Logits]]) -> None:
        """The next step of each stream. All are chosen before any is handed out, which wakes threads that want the GIL."""
        chosen = [(stream, self._choose(stream, logits)) for stream, logits in answers]
        for stream, step in chosen:
            if step is not None:
                self._hand_out(stream, step)

    def _choose(self, stream: Stream, logits: Logits) -> Step | None:
        """None where no id can be chosen from the logits, which ends this stream alone."""
        try:
            return stream.row.take(logits)
        except Exception as failure:
            told = failure if isinstance(failure, BackendError) else BackendError(f"no token could be chosen: {failure!r}")
            self._finish(stream, "error", told)
            return None

    def _hand_out(self, stream: Stream, step: Step) -> None:
        now = time.monotonic()
        if stream.last_token is None:
            self.observer.first_token(now - stream.started)
        else:
            self.observer.next_token(now - stream.last_token)
        stream.last_token = now
        self.observer.token(step.modality)
        stream.give(step)
        if step.finish is not None:
            self._finish(stream, step.finish)

    def _end_all(self, failure: EngineClosedError) -> None:
        with self._lock:
            for stream in (*self._waiting, *(one.stream for one in self._reading), *self._batch.streams):
                self._finish(stream, "error", failure)
            self._waiting, self._reading, self._batch = [], deque(), _Batch()
            self._lock.notify_all()
