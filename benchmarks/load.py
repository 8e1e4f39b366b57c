"""Load on a server, or on the engine alone: is every token right, how fast, and is anything lost or leaked?

    .venv/bin/motrt init model --preset small && .venv/bin/motrt export model bundle
    .venv/bin/python benchmarks/load.py --serve bundle --streams 64 --queue 500 --seconds 600 \
        --json benchmarks/results/load_cpu.json --chart docs/load.svg
    .venv/bin/python benchmarks/load.py --engine bundle --seconds 60        # the same questions without HTTP
    .venv/bin/python benchmarks/load.py --url http://127.0.0.1:8000 --bundle bundle --seconds 60

What each distinct request says alone is computed first, by the same bundle in this process; then every output under load is
held against it, token by token. Use an fp32 bundle: kernels over codes round activations by block, and a batch may then say
another token than a row alone. ``--serve`` starts servers of its own (one for the throughput of 1 and 16 rows, one for the
load) and asks in the end what happens to a cancelled row, to clients that vanish, and to open streams at SIGTERM.

Clients share the machine with what they measure. It knows the server's protocol, and of the package only how to load a bundle.
"""

import asyncio
import ipaddress
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import click
import numpy as np

import motrt
from motrt.benchmarks.document import leave, machine
from motrt.runtime.engine import Engine, EngineOptions
from motrt.runtime.schedule import parse_schedule

PROMPTS = (4, 16, 40, 120)
SCHEDULES = ("text:48", "audio:12f", "text:16,audio:8f,text:16", "interleave:text=8,audio=8")
MOST_TOKENS = 64
MODEL = "motrt"
START_SECONDS, SLOW_SECONDS = 120.0, 0.25
MB = 1 << 20


# What is asked.


@dataclass(frozen=True)
class Request:
    """One of the few distinct requests, and what it says alone."""

    prompt: tuple[int, ...]
    schedule: str
    temperature: float
    seed: int
    max_tokens: int = MOST_TOKENS
    alone: tuple[int, ...] = ()

    def body(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "schedule": self.schedule,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def options(self) -> dict[str, Any]:
        return {
            "schedule": parse_schedule(self.schedule),
            "sampling": motrt.Sampling(temperature=self.temperature, seed=self.seed),
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True)
class Manner:
    """How a client behaves: after how many tokens it leaves, and how long it sleeps after each piece it reads."""

    leaves_after: int | None = None
    sleeps: float = 0.0


def distinct_requests(session: motrt.Session, count: int, seed: int, lengths: Sequence[int] = PROMPTS) -> list[Request]:
    """Prompts of every length, every schedule, greedy and not; each with what it says alone."""
    chance, requests = random.Random(seed), []
    longest = session.config.max_seq_len - MOST_TOKENS
    for number in range(count):
        length = min(lengths[number % len(lengths)], longest)
        prompt = tuple(chance.randrange(session.config.vocab_size) for _ in range(length))
        schedule = SCHEDULES[(number // len(lengths)) % len(SCHEDULES)]
        bare = Request(prompt, schedule, chance.choice((0.0, 0.8)), chance.randrange(1 << 30))
        alone = tuple(step.token_id for step in session.generate(list(prompt), **bare.options()))
        requests.append(Request(prompt, schedule, bare.temperature, bare.seed, alone=alone))
    return requests


# Who is asked.


class RefusedError(Exception):
    """The server did not take a request, and said why."""


@dataclass(frozen=True)
class State:
    """How the engine stands."""

    waiting: int
    running: int
    reading: int
    steps: int
    rows_stepped: int

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running or self.reading)


class Target(Protocol):
    """A server, or an engine."""

    max_batch: int

    def tokens(self, request: Request) -> AsyncIterator[list[int]]:
        """Ids as they come; leaving early cancels. Raises RefusedError, and ConnectionError for a stream that was cut."""

    async def state(self) -> State: ...

    def process(self) -> int:
        """Whose memory and descriptors are watched."""


class EngineTarget:
    """The engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.max_batch = engine, engine.options.max_batch

    async def tokens(self, request: Request) -> AsyncIterator[list[int]]:
        try:
            stream = self.engine.submit(list(request.prompt), **request.options())
        except motrt.MotrtError as failure:
            raise RefusedError(type(failure).__name__) from None
        async for step in stream.events():
            yield [step.token_id]

    async def state(self) -> State:
        now = self.engine.state()
        return State(now.waiting, now.running, now.reading, now.steps, now.rows_stepped)

    def process(self) -> int:
        return os.getpid()


class HttpTarget:
    """A server on this machine; HTTP as far as it is needed, on bare sockets, because clients share the cores."""

    def __init__(self, url: str, max_batch: int = 0, pid: int = 0) -> None:
        self.host, self.port = loopback(url)
        self.max_batch, self._pid = max_batch, pid

    def process(self) -> int:
        return self._pid

    async def tokens(self, request: Request) -> AsyncIterator[list[int]]:
        async with self._asked("POST", "/v1/completions", request.body()) as (status, reader):
            if status != 200:
                raise RefusedError(why_refused(status, await body_of(reader)))
            async for event in events_of(reader):
                if "error" in event:
                    raise EndedError(str(event["error"]))
                for choice in event.get("choices", ()):
                    if ids := choice.get("token_ids"):
                        yield ids

    async def get(self, path: str) -> dict[str, Any]:
        async with self._asked("GET", path) as (status, reader):
            body = await body_of(reader)
        if status != 200:
            raise ConnectionError(f"{path} answered {status}: {body[:200]!r}")
        found: dict[str, Any] = json.loads(body)
        return found

    async def state(self) -> State:
        found = await self.get("/v1/engine")
        now = found.get("state", found)
        return State(*(int(now[name]) for name in ("waiting", "running", "reading", "steps", "rows_stepped")))

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        try:
            writer.write(head.encode() + content)
            await writer.drain()
            yield await status_of(reader), reader
        finally:
            writer.transport.abort()  # a client that leaves just goes


class EndedError(Exception):
    """A stream that was told why it ends early."""


def loopback(url: str) -> tuple[str, int]:
    """Host and port of ``url``; nothing but this machine is ever loaded."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    if parts.scheme != "http" or not is_here:
        raise click.UsageError(f"{url} is not http on a loopback address: this loads servers on this machine alone")
    return host, parts.port or 80


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status; headers are read and left, because every answer is chunked or ends with the connection."""
    head = (await until(reader, b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    chunked = any(one.lower().replace(" ", "") == "transfer-encoding:chunked" for one in lines)
    reader._is_chunked = chunked  # type: ignore[attr-defined]
    return int(lines[0].split(" ")[1])


async def until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    try:
        return await reader.readuntil(end)
    except asyncio.IncompleteReadError as short:
        raise ConnectionError("the server closed the connection in the middle of an answer") from short


async def pieces_of(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The answer's bytes; a chunked answer that lacks its last chunk was cut."""
    if not reader._is_chunked:  # type: ignore[attr-defined]
        while piece := await reader.read(1 << 16):
            yield piece
        return
    while size := int(await until(reader, b"\r\n"), 16):
        try:
            piece = await reader.readexactly(size + 2)
        except asyncio.IncompleteReadError as short:
            raise ConnectionError("the server closed the connection in the middle of a chunk") from short
        yield piece[:-2]


async def body_of(reader: asyncio.StreamReader) -> bytes:
    return b"".join([piece async for piece in pieces_of(reader)])


async def events_of(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events up to [DONE]; ConnectionError where it never comes."""
    held = b""
    async for piece in pieces_of(reader):
        *whole, held = (held + piece).split(b"\n\n")
        for event in whole:
            data = b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
            if data == b"[DONE]":
                return
            if data:
                yield json.loads(data)
    raise ConnectionError("the stream ended without [DONE]")


def why_refused(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f"{status} {error.get('code') or error.get('type')}"
    except (ValueError, KeyError, AttributeError, TypeError):
        return str(status)


# What is counted.


@dataclass
class Tally:
    """What came of the requests of one phase."""

    ends: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    wrong_outputs: int = 0
    wrong_tokens: int = 0
    lost_tokens: int = 0
    extra_tokens: int = 0
    num_tokens: int = 0
    compared: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def check(self, request: Request, ids: Sequence[int], is_whole: bool) -> None:
        """Hold an output against what the request says alone; one that was left early against its beginning."""
        self.compared += 1
        wrong, lost, extra = differences(ids, request.alone if is_whole else request.alone[: len(ids)])
        self.wrong_outputs += bool(wrong or lost or extra)
        self.wrong_tokens += wrong
        self.lost_tokens += lost
        self.extra_tokens += extra


def differences(found: Sequence[int], expected: Sequence[int]) -> tuple[int, int, int]:
    """How many tokens are wrong where they stand, lost, and too many."""
    wrong = sum(one != other for one, other in zip(found, expected, strict=False))
    return wrong, max(0, len(expected) - len(found)), max(0, len(found) - len(expected))


async def ask(target: Target, request: Request, manner: Manner, tally: Tally) -> None:
    """One client's request, from its start to its end, and what came of it."""
    started = last = time.perf_counter()
    ids: list[int] = []
    end = "finished"
    steps = target.tokens(request)
    try:
        async for some in steps:
            now = time.perf_counter()
            if not ids:
                tally.first.append(now - started)
            elif not manner.sleeps:
                tally.between.append(now - last)
            last = now
            ids += some
            tally.num_tokens += len(some)
            if manner.leaves_after is not None and len(ids) >= manner.leaves_after:
                end = "left"
                break
            if manner.sleeps:
                await asyncio.sleep(manner.sleeps)
    except RefusedError as refused:
        tally.refusals[str(refused)] += 1
        return
    except (EndedError, motrt.MotrtError):
        end = "told"
    except (ConnectionError, OSError):
        end = "cut"
    except asyncio.CancelledError:
        tally.ends["stopped"] += 1
        tally.check(request, ids, is_whole=False)
        raise
    finally:
        await steps.aclose()  # type: ignore[attr-defined]
    tally.ends[end] += 1
    tally.check(request, ids, is_whole=end == "finished")


@dataclass
class Crowd:
    """How many clients of which manners ask which requests."""

    requests: list[Request]
    seed: int = 0
    leaving: float = 0.1
    slow: float = 0.05

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def next(self) -> tuple[Request, Manner]:
        request, what = self.chance.choice(self.requests), self.chance.random()
        if what < self.leaving:
            return request, Manner(leaves_after=self.chance.randrange(1, max(2, len(request.alone))))
        return request, Manner(sleeps=SLOW_SECONDS if what < self.leaving + self.slow else 0.0)

    async def closed(self, target: Target, clients: int, tally: Tally) -> None:
        """So many clients, each asking again as soon as it was answered; until cancelled."""

        async def one() -> None:
            while True:
                before = tally.refusals.total()
                await ask(target, *self.next(), tally)
                if tally.refusals.total() > before:
                    await asyncio.sleep(0.5)

        await together(one() for _ in range(clients))

    async def opened(self, target: Target, rate: float, tally: Tally) -> None:
        """Arrivals at random moments, ``rate`` a second, whether the others were answered or not; until cancelled."""
        going: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(self.chance.expovariate(rate))
                task = asyncio.create_task(ask(target, *self.next(), tally))
                going.add(task)
                task.add_done_callback(going.discard)
        finally:
            await stop(going)


async def together(ones: Iterator[Coroutine[Any, Any, None]]) -> None:
    tasks = {asyncio.create_task(one) for one in ones}
    try:
        await asyncio.gather(*tasks)
    finally:
        await stop(tasks)


async def stop(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# What is watched meanwhile.


@dataclass(frozen=True)
class Sample:
    """One second of a phase."""

    at: float
    state: State
    num_tokens: int
    rss: int
    descriptors: int


def memory_of(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors of a process; zeros where nobody may look."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (counted, not walked)
    except (OSError, IndexError):
        return 0, 0


async def watch(target: Target, tally: Tally, samples: list[Sample], every: float = 1.0) -> None:
    started = time.perf_counter()
    while True:
        state = await target.state()
        samples.append(Sample(time.perf_counter() - started, state, tally.num_tokens, *memory_of(target.process())))
        await asyncio.sleep(every)


async def during(seconds: float, *jobs: Coroutine[Any, Any, None]) -> None:
    """Let jobs run for so long; one that fails fails all."""
    tasks = {asyncio.create_task(one) for one in jobs}
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await stop(tasks)


async def idle(target: Target, seconds: float) -> float | None:
    """How long until nothing runs any more; None where that took too long."""
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        if (await target.state()).is_idle:
            return passed
        await asyncio.sleep(0.02)
    return None


# The phases.


@dataclass
class Phase:
    """Load for some time."""

    tally: Tally
    samples: list[Sample]
    max_batch: int

    def warm(self) -> list[Sample]:
        """Without the first fifth, in which batch and queue fill."""
        return self.samples[len(self.samples) // 5 :]

    def throughput(self) -> float:
        first, last = self.warm()[0], self.warm()[-1]
        return (last.num_tokens - first.num_tokens) / max(1e-9, last.at - first.at)

    def occupancy(self) -> float:
        """Rows in decode steps, of those that the batch has."""
        first, last = self.warm()[0].state, self.warm()[-1].state
        return (last.rows_stepped - first.rows_stepped) / max(1, last.steps - first.steps) / max(1, self.max_batch)

    def slots(self) -> float:
        """The share of the batch's places that are taken, those included whose prompts are being read."""
        return float(np.mean([one.state.running + one.state.reading for one in self.warm()])) / max(1, self.max_batch)

    def growth(self) -> float:
        """Resident MB a minute, after half of the time: buckets of the cache and the allocator's arenas have grown by then."""
        late = self.samples[len(self.samples) // 2 :]
        if len(late) < 3:
            return 0.0
        return float(np.polyfit([one.at / 60 for one in late], [one.rss / MB for one in late], 1)[0])

    def told(self) -> dict[str, Any]:
        tally, last = self.tally, self.warm()[-1]
        return {
            "tokens_per_s": round(self.throughput(), 1),
            "occupancy": round(self.occupancy(), 3),
            "slots_taken": round(self.slots(), 3),
            "seconds": round(last.at, 1),
            "requests": dict(tally.ends),
            "refusals": dict(tally.refusals),
            "compared": tally.compared,
            "wrong_outputs": tally.wrong_outputs,
            "wrong_tokens": tally.wrong_tokens,
            "lost_tokens": tally.lost_tokens,
            "extra_tokens": tally.extra_tokens,
            "first_token_s": quantiles(tally.first),
            "between_tokens_s": quantiles(tally.between),
            "rss_mb": [round(one.rss / MB, 1) for one in (self.samples[0], last)],
            "rss_mb_per_minute": round(self.growth(), 2),
            "descriptors": [self.samples[0].descriptors, max(one.descriptors for one in self.samples), last.descriptors],
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 90, 99)}


async def load(target: Target, crowd: Crowd, clients: int, rate: float, seconds: float) -> Phase:
    """A closed loop of ``clients``, and arrivals at ``rate`` beside it where it is above 0."""
    tally, samples = Tally(), list[Sample]()
    jobs = [crowd.closed(target, clients, tally), watch(target, tally, samples, every=min(1.0, seconds / 10))]
    if rate > 0:
        jobs.append(crowd.opened(target, rate, tally))
    await during(seconds, *jobs)
    return Phase(tally, samples, target.max_batch)


async def steps_until_free(target: Target, requests: list[Request], rounds: int) -> list[int]:
    """Decode steps that end between a client's leaving and its row's being free, in a batch of three."""
    longest = sorted(requests, key=lambda one: -len(one.alone))[:3]
    return [await _steps_of_a_leaving(target, longest) for _ in range(rounds)]


async def _steps_of_a_leaving(target: Target, requests: list[Request]) -> int:
    stays = [asyncio.create_task(ask(target, one, Manner(), Tally())) for one in requests[1:]]
    steps = target.tokens(requests[0])
    try:
        await anext(steps)
        deadline = time.perf_counter() + 30
        while (before := await target.state()).running < len(requests) and time.perf_counter() < deadline:
            await asyncio.sleep(0.005)
        await steps.aclose()  # type: ignore[attr-defined]
        while (now := await target.state()).running >= len(requests):
            await asyncio.sleep(0.002)
        return now.steps - before.steps
    finally:
        await stop(set(stays))
        await idle(target, 30)


async def vanish(target: Target, crowd: Crowd, clients: int) -> dict[str, Any]:
    """Every client goes in the middle of its stream: is everything free again?"""
    await idle(target, 60)
    await asyncio.sleep(0.5)
    before = memory_of(target.process())[1]
    tally = Tally()
    await during(4.0, crowd.closed(target, clients, tally))
    seconds = await idle(target, 30)
    for _ in range(100):  # descriptors are closed a moment after rows are free
        if (after := memory_of(target.process())[1]) <= before:
            break
        await asyncio.sleep(0.05)
    return {"clients": clients, "idle_after_s": seconds, "descriptors": [before, after], "outputs": tally.wrong_outputs}


async def end_under_load(target: Target, crowd: Crowd, clients: int, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """SIGTERM while streams are open: what each of them heard, and how the process ended."""
    tally = Tally()
    tasks = {asyncio.create_task(ask(target, crowd.next()[0], Manner(), tally)) for _ in range(clients)}
    await asyncio.sleep(3.0)
    process.send_signal(signal.SIGTERM)
    started = time.perf_counter()
    while process.poll() is None and time.perf_counter() - started < 60:
        await asyncio.sleep(0.1)
    _, late = await asyncio.wait(tasks, timeout=5)
    await stop(late)
    return {
        "exit_code": process.poll(),
        "seconds": round(time.perf_counter() - started, 1),
        "streams": dict(tally.ends),
        "refusals": dict(tally.refusals),
        "wrong_outputs": tally.wrong_outputs,
    }


# Servers of its own.


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def served(bundle: Path, max_batch: int, max_queue: int, more: Sequence[str] = ()) -> Iterator[tuple[HttpTarget, Any]]:
    """A server of ``bundle`` on a free port; killed at the end where it still runs."""
    port = free_port()
    command = [sys.executable, "-m", "motrt", "serve", str(bundle), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model-name", MODEL, "--max-batch", str(max_batch), "--max-queue", str(max_queue), *more]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        target = HttpTarget(f"http://127.0.0.1:{port}", max_batch, process.pid)
        try:
            asyncio.run(ready(target, process))
            yield target, process
        except BaseException:
            log.seek(0)
            click.echo(log.read()[-4000:].decode(errors="replace"), err=True)
            raise
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


async def ready(target: HttpTarget, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(ConnectionError, OSError):
            await target.state()
            return
        if process.poll() is not None:
            raise click.ClickException(f"the server ended with exit code {process.returncode} before it answered")
        await asyncio.sleep(0.1)
    raise click.ClickException(f"the server did not answer within {START_SECONDS:.0f} s")


@contextmanager
def engine_of(bundle: Path, max_batch: int, max_queue: int) -> Iterator[tuple[EngineTarget, None]]:
    with motrt.load(bundle) as session, Engine(session, EngineOptions(max_batch, max_queue)) as engine:
        yield EngineTarget(engine), None


# The bars.


@dataclass(frozen=True)
class Bar:
    """What is asked of a run."""

    name: str
    found: str
    is_met: bool


def bars(found: dict[str, Any]) -> list[Bar]:
    """Every bar that the run has figures for."""
    load_, made = found["load"], []
    wrong = load_["wrong_outputs"], load_["lost_tokens"], load_["extra_tokens"], load_["requests"].get("cut", 0)
    compared = f"{load_['compared']} outputs: {wrong[0]} wrong, {wrong[1]} tokens lost, {wrong[2]} too many, {wrong[3]} cut"
    made.append(
        Bar("every output is its solo run's, no token lost or twice", compared, not any(wrong) and load_["compared"] > 0)
    )
    if load_["rss_mb"][0]:
        slope, (first, most, last) = load_["rss_mb_per_minute"], load_["descriptors"]
        made.append(Bar("memory grows by less than 1 MB a minute", f"{slope:.2f} MB a minute", slope < 1))
        flat = found["vanish"]["descriptors"] if "vanish" in found else [first, last]
        made.append(Bar("descriptors are flat", f"{flat[0]} idle, {most} under load, {flat[1]} after", flat[1] <= flat[0]))
    made.append(Bar("occupancy above 90 %", f"{load_['occupancy']:.1%} of rows in each step", load_["occupancy"] > 0.9))
    gaps = load_["between_tokens_s"]
    ratio = gaps["p99"] / gaps["p50"] if gaps else float("inf")
    made.append(Bar("p99 between tokens at most 3x its median", f"{ratio:.2f}x", ratio <= 3))
    if "rows" in found:
        times = found["rows"]["ratio"]
        made.append(Bar("16 rows give at least 4x the tokens of one", f"{times:.2f}x", times >= 4))
    if "steps_until_free" in found:
        most = max(found["steps_until_free"])
        made.append(Bar("a cancelled row is free within one step", f"at most {most} steps", most <= 1))
    if "vanish" in found:
        gone = found["vanish"]
        ok = gone["idle_after_s"] is not None and gone["descriptors"][1] <= gone["descriptors"][0]
        took = "never idle" if gone["idle_after_s"] is None else f"idle after {gone['idle_after_s']:.2f} s"
        made.append(Bar("vanished clients leak nothing", f"{gone['clients']} clients: {took}", ok))
    if "sigterm" in found:
        end = found["sigterm"]
        ok = end["exit_code"] == 0 and not end["streams"].get("cut") and not end["wrong_outputs"]
        made.append(Bar("SIGTERM under load ends cleanly", f"exit code {end['exit_code']}, streams {end['streams']}", ok))
    return made


def table(made: Sequence[Bar]) -> str:
    return "\n".join(f"{'met    ' if one.is_met else 'NOT MET'}  {one.name:58} {one.found}" for one in made)


# The chart.


def draw(phase: Phase, alone: Phase | None, file: Path) -> None:
    """Throughput and occupancy over time, latencies as shares, memory over time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "motrt"
    figure, panels = pyplot.subplots(1, 4, figsize=(15, 3.4), constrained_layout=True)
    at = np.array([one.at for one in phase.samples])
    draw_rates(panels[0], at, phase)
    panels[1].plot(
        at, [one.state.running / phase.max_batch for one in phase.samples], color="#1f6f8b", label="rows of the batch"
    )
    panels[1].plot(at, [one.state.waiting for one in phase.samples] / np.float64(max(1, most_waiting(phase))), color="#d08c3c")
    panels[1].set(title=f"batch, and queue of {most_waiting(phase)}", ylim=(0, 1.05), xlabel="s", ylabel="share that is filled")
    panels[1].lines[1].set_label("queue")
    panels[1].legend(frameon=False, loc="lower right")
    draw_shares(panels[2], phase, alone)
    panels[3].plot(at, [one.rss / MB for one in phase.samples], color="#1f6f8b")
    panels[3].set(title="resident memory", ylim=(0, None), xlabel="s", ylabel="MB")
    for panel in panels:
        panel.title.set_ha("left")
        panel.title.set_x(0)
        panel.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def most_waiting(phase: Phase) -> int:
    return max(one.state.waiting for one in phase.samples)


def draw_rates(panel: Any, at: Any, phase: Phase) -> None:
    """Tokens a second over windows of about a sixtieth of the run."""
    width = max(1, len(at) // 60)
    count = np.array([one.num_tokens for one in phase.samples])
    rates = (count[width:] - count[:-width]) / np.maximum(1e-9, at[width:] - at[:-width])
    panel.plot(at[width:], rates, color="#1f6f8b")
    panel.set(title="throughput", ylim=(0, None), xlabel="s", ylabel="tokens/s")


def draw_shares(panel: Any, phase: Phase, alone: Phase | None) -> None:
    shown = [("#1f6f8b", "under load", phase), *([("#d08c3c", "one client", alone)] if alone is not None else [])]
    for colour, label, one in shown:
        values = np.sort(one.tally.between)
        values = values[:: max(1, len(values) // 300)]
        panel.plot(values * 1e3, np.linspace(0, 1, len(values)), color=colour, label=label)
    panel.set(title="between two tokens", xscale="log", xlabel="ms", ylabel="share that is below", ylim=(0, 1.02))
    panel.legend(frameon=False)


# The run.


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    streams: int
    queue: int
    clients: int
    rate: float
    seconds: float
    rows_seconds: float


Opened = Callable[[Path, int, int], Any]


def of_rows(opened: Opened, bundle: Path, crowd: Crowd, plan: Plan) -> tuple[dict[str, Any], Phase]:
    """One client, and as many as keep 16 rows full, on one server whose batch has 16 rows."""
    calm = Crowd(crowd.requests, crowd.seed, leaving=0, slow=0)
    with opened(bundle, 16, 64) as (target, _):
        asyncio.run(load(target, calm, 16, 0, min(5.0, plan.rows_seconds)))
        asyncio.run(idle(target, 60))
        one = asyncio.run(load(target, calm, 1, 0, plan.rows_seconds))
        asyncio.run(idle(target, 60))
        many = asyncio.run(load(target, calm, 20, 0, plan.rows_seconds))
    ratio = many.throughput() / max(1e-9, one.throughput())
    return {"one": one.told(), "sixteen": many.told(), "ratio": round(ratio, 2)}, one


def of_load(opened: Opened, bundle: Path, crowd: Crowd, plan: Plan) -> tuple[dict[str, Any], Phase]:
    """The load itself, and what happens to rows and streams at their ends."""
    with opened(bundle, plan.streams, plan.queue) as (target, process):
        phase = asyncio.run(load(target, crowd, plan.clients, plan.rate, plan.seconds))
        found: dict[str, Any] = {"load": phase.told()}
        asyncio.run(idle(target, 60))
        found["steps_until_free_seen"] = asyncio.run(steps_until_free(target, crowd.requests, 10))
        found["vanish"] = asyncio.run(vanish(target, crowd, min(plan.clients, 2 * plan.streams)))
        if process is not None:
            found["sigterm"] = asyncio.run(end_under_load(target, crowd, min(plan.clients, 2 * plan.streams), process))
    return found, phase


def of_leaving(bundle: Path, crowd: Crowd) -> list[int]:
    """How soon a row is free after ``cancel``, asked of the engine in this process: over HTTP the leaving itself takes time."""
    with engine_of(bundle, 4, 4) as (target, _):
        return asyncio.run(steps_until_free(target, crowd.requests, 10))


async def of_running(target: HttpTarget, crowd: Crowd, plan: Plan) -> tuple[dict[str, Any], Phase]:
    """A server that somebody else started: load alone, and none of its ends."""
    phase = await load(target, crowd, plan.clients, plan.rate, plan.seconds)
    return {"load": phase.told()}, phase


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--serve", type=PATH, help="A bundle: servers of it are started here.")
@click.option("--engine", type=PATH, help="A bundle: its engine is asked in this process, without HTTP.")
@click.option("--url", help="A running server, on this machine; --bundle says what it serves.")
@click.option("--bundle", type=PATH)
@click.option("--streams", type=click.IntRange(1, 1024), default=64, show_default=True, help="Rows of the batch.")
@click.option("--queue", type=click.IntRange(0, 10_000), default=500, show_default=True, help="Places in the queue.")
@click.option("--clients", type=click.IntRange(1, 4096), help="That ask again at once; streams and queue, where not said.")
@click.option("--rate", type=click.FloatRange(0, 1000), default=0.2, show_default=True, help="Arrivals a second beside them.")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=60, show_default=True)
@click.option(
    "--rows-seconds", type=click.FloatRange(1, 600), default=20, show_default=True, help="For 1 and for 16 rows, each."
)
@click.option("--distinct", type=click.IntRange(1, 500), default=32, show_default=True, help="Distinct requests.")
@click.option(
    "--prompt",
    "prompts",
    type=click.IntRange(1, 1 << 16),
    multiple=True,
    default=PROMPTS,
    show_default=True,
    help="Ids in one.",
)
@click.option("--leaving", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share that cancels mid-stream.")
@click.option("--slow", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Share that reads slowly.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "json_file", type=PATH)
@click.option("--chart", type=PATH)
def main(
    serve: Path | None,
    engine: Path | None,
    url: str | None,
    bundle: Path | None,
    clients: int | None,
    distinct: int,
    prompts: tuple[int, ...],
    leaving: float,
    slow: float,
    seed: int,
    json_file: Path | None,
    chart: Path | None,
    **amounts: Any,
) -> None:
    """Load, a table of bars, and one JSON document last. The exit code is 1 where a bar is not met."""
    known = serve or engine or bundle
    if sum(one is not None for one in (serve, engine, url)) != 1 or known is None:
        raise click.UsageError("give one of --serve BUNDLE, --engine BUNDLE, and --url URL with --bundle BUNDLE")
    target = HttpTarget(url, amounts["streams"]) if url is not None else None
    plan = Plan(clients=clients or min(4096, amounts["streams"] + amounts["queue"]), **amounts)
    try:
        with motrt.load(known) as session:
            requests = distinct_requests(session, distinct, seed, prompts)
            weights = session.weights
    except motrt.MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    click.echo(f"{len(requests)} distinct requests, {sum(len(one.alone) for one in requests)} tokens alone", err=True)
    crowd, alone = Crowd(requests, seed, leaving, slow), None
    if target is not None:
        found, phase = asyncio.run(of_running(target, crowd, plan))
    else:
        opened: Opened = served if serve is not None else engine_of
        rows, alone = of_rows(opened, known, crowd, plan)
        found, phase = of_load(opened, known, crowd, plan)
        found |= {"rows": rows, "steps_until_free": of_leaving(known, crowd)}
    made = bars(found)
    click.echo(table(made))
    if chart is not None:
        draw(phase, alone, chart)
    document = {
        "machine": machine("motrt", "onnxruntime", "numpy"),
        "weights": weights,
        "through": "the engine alone" if engine is not None else "HTTP",
        "plan": vars(plan) | {"distinct": distinct, "prompts": prompts, "leaving": leaving, "slow": slow, "seed": seed},
        "bars": [vars(one) for one in made],
        **found,
    }
    leave(document, json_file)
    sys.exit(0 if all(one.is_met for one in made) else 1)


if __name__ == "__main__":
    main()
