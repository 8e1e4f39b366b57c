"""The load generator: it finds what is wrong where something is, and loads this machine alone."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import click
import pytest

import motrt
from motrt.benchmarks.load import (
    Crowd,
    EngineTarget,
    HttpTarget,
    Manner,
    RefusedError,
    Request,
    State,
    Tally,
    ask,
    bars,
    differences,
    distinct_requests,
    load,
    loopback,
    steps_until_free,
)
from motrt.runtime.engine import Engine, EngineOptions
from motrt.runtime.session import Session
from motrt.tests.serve.served import Served

ROOT = Path(__file__).resolve().parent.parent.parent
REQUEST = Request((1,), "text", 0.0, 0, alone=(5, 6, 7))


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with motrt.load(tiny_bundle, num_threads=1) as opened:
        yield opened


class Saying:
    """A target that says what it is told to."""

    max_batch = 1

    def __init__(self, *pieces: list[int], then: Exception | None = None) -> None:
        self.pieces, self.failure = pieces, then

    async def tokens(self, request: Request) -> AsyncIterator[list[int]]:
        for piece in self.pieces:
            yield piece
        if self.failure is not None:
            raise self.failure

    async def state(self) -> State:
        return State(0, 0, 0, 0, 0)

    def process(self) -> int:
        return 0


def tally_of(target: Saying, manner: Manner | None = None) -> Tally:
    tally = Tally()
    asyncio.run(ask(target, REQUEST, manner or Manner(), tally))
    return tally


def test_wrong_lost_and_repeated_tokens_are_told_apart() -> None:
    assert differences([5, 6, 7], [5, 6, 7]) == (0, 0, 0)
    assert differences([5, 9, 7], [5, 6, 7]) == (1, 0, 0)
    assert differences([5, 6], [5, 6, 7]) == (0, 1, 0)
    assert differences([5, 6, 7, 7], [5, 6, 7]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("pieces", "counted"),
    [
        (([5, 6, 7],), (0, 0, 0, 0)),
        (([5], [9], [7]), (1, 1, 0, 0)),
        (([5, 6],), (1, 0, 1, 0)),
        (([5], [6, 7, 7]), (1, 0, 0, 1)),
    ],
)
def test_a_target_that_says_something_else_is_found_out(
    pieces: tuple[list[int], ...], counted: tuple[int, int, int, int]
) -> None:
    tally = tally_of(Saying(*pieces))
    assert (tally.wrong_outputs, tally.wrong_tokens, tally.lost_tokens, tally.extra_tokens) == counted


def test_a_client_that_leaves_early_loses_nothing_and_a_wrong_beginning_still_counts() -> None:
    tally = tally_of(Saying([5], [6], [7]), Manner(leaves_after=2))
    assert tally.ends == {"left": 1} and tally.wrong_outputs == 0
    assert tally_of(Saying([5], [9], [7]), Manner(leaves_after=2)).wrong_outputs == 1


def test_a_refusal_is_counted_by_its_reason_and_a_cut_stream_as_cut() -> None:
    assert tally_of(Saying(then=RefusedError("429 queue_full"))).refusals == {"429 queue_full": 1}
    assert tally_of(Saying([5], then=ConnectionError())).ends == {"cut": 1}


@pytest.mark.parametrize(
    "url", ["http://example.com", "http://10.0.0.1:80", "https://127.0.0.1", "http://0.0.0.0", "127.0.0.1"]
)
def test_another_machine_is_never_loaded(url: str) -> None:
    with pytest.raises(click.UsageError, match="this machine alone"):
        loopback(url)


def test_this_machine_is() -> None:
    assert loopback("http://localhost:81") == ("127.0.0.1", 81)
    assert loopback("http://[::1]:81") == ("::1", 81)


def test_a_servers_outputs_under_load_are_their_solo_runs(session: Session, served: Served) -> None:
    requests = [dataclasses.replace(one) for one in distinct_requests(session, 8, 1)]
    target = HttpTarget(served.url, 8)
    model = {"model": served.get("/v1/models").json()["data"][0]["id"]}

    class Named(Request):
        def body(self) -> dict[str, object]:
            return super().body() | model

    named: list[Request] = [Named(**vars(one)) for one in requests]
    phase = asyncio.run(load(target, Crowd(named, slow=0), 12, 5.0, 2.0))
    told = phase.told()
    assert told["requests"]["finished"] > 0
    assert told["wrong_outputs"] == told["lost_tokens"] == told["extra_tokens"] == 0
    assert "cut" not in told["requests"]


def test_a_cancelled_row_is_free_before_the_next_step(session: Session) -> None:
    with Engine(session, EngineOptions(max_batch=4)) as engine:
        assert max(asyncio.run(steps_until_free(EngineTarget(engine), distinct_requests(session, 4, 0), 2))) < 40


def test_bars_that_are_not_met_are_told_so() -> None:
    found = {
        "wrong_outputs": 1,
        "lost_tokens": 0,
        "extra_tokens": 0,
        "compared": 3,
        "requests": {},
        "rss_mb": [1.0, 9.0],
        "rss_mb_per_minute": 8.0,
        "descriptors": [3, 9, 4],
        "occupancy": 0.5,
        "between_tokens_s": {"p50": 0.1, "p90": 0.2, "p99": 0.4},
    }
    made = bars({"load": found, "rows": {"ratio": 1.5}, "steps_until_free": [2]})
    assert len(made) == 7
    assert not any(one.is_met for one in made)


def test_a_run_of_the_engine_leaves_a_document(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), "--engine", str(tiny_bundle), "--json"]
    command += [str(tmp_path / "found.json"), "--streams", "4", "--queue", "8", "--seconds", "1", "--rows-seconds", "1"]
    done = subprocess.run([*command, "--distinct", "4"], capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["load"]["compared"] > 0 and found["load"]["wrong_outputs"] == 0
    assert done.returncode == (0 if all(one["is_met"] for one in found["bars"]) else 1)
