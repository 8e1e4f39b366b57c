"""What a server counts, for Prometheus. Each server has a registry of its own; this file knows no HTTP.

Gauges are asked of the engine when somebody looks; everything else is counted as it happens.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily

from motrt.runtime.engine import Engine, EngineObserver

# Powers of two from a fifth of a millisecond: a tiny model's steps and a large one's first tokens.
_SECONDS = tuple(0.0002 * 2**power for power in range(19))
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(EngineObserver):
    """Counts what the engine tells; ``page`` is what a scraper reads.

    Args:
        engine: asked at every look; gives None while there is none.
    """

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self.registry = CollectorRegistry()
        self._ttft = self._histogram("time_to_first_token_seconds", "From handing in a request to its first token.", _SECONDS)
        self._gap = self._histogram("inter_token_seconds", "From one token of a request to its next.", _SECONDS)
        self._step = self._histogram("decode_step_seconds", "One decode step of the batch.", _SECONDS)
        self._rows = self._histogram("batch_rows", "Rows of a decode step.", _ROWS)
        self._tokens = self._counter("tokens", "Generated tokens.", "modality")
        self._prompt = self._counter("prompt_tokens", "Tokens of the prompts that were taken.")
        self._finished = self._counter("requests", "Requests that ended.", "finish")
        self._refused = self._counter("refusals", "Requests that were not taken.", "reason")
        self._responses = self._counter("responses", "HTTP responses.", "route", "status")
        self.registry.register(_Gauges(engine))  # type: ignore[arg-type, unused-ignore]

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"motrt_{name}", told, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"motrt_{name}", told, labels, registry=self.registry)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    # What the engine tells.

    def refused(self, reason: str) -> None:
        self._refused.labels(reason.replace(" ", "_")).inc()

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def token(self, modality: str) -> None:
        self._tokens.labels(modality).inc()

    def finished(self, reason: str) -> None:
        self._finished.labels(reason).inc()

    def decoded(self, rows: int, seconds: float) -> None:
        self._rows.observe(rows)
        self._step.observe(seconds)

    # What the server tells.

    def prompted(self, tokens: int) -> None:
        self._prompt.inc(tokens)

    def responded(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()


class _Gauges:
    """How the engine stands when somebody looks."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        engine = self._engine()
        if engine is None:
            return
        state, most = engine.state(), engine.options.max_batch
        rows, is_broken = state.running + state.reading, int(bool(state.failure) or not engine.is_alive)
        for name, told, value in (
            ("queue_depth", "Requests that wait.", max(0, state.waiting)),
            ("running_rows", "Rows that decode.", state.running),
            ("reading_rows", "Requests whose prompts are being read.", state.reading),
            ("batch_occupancy", "Rows in use, as a share of max_batch.", rows / most),
            ("cache_positions", "Positions of the running batch's cache, over all rows.", state.cache_positions),
            ("cache_filled", "How many of them are filled.", state.cache_filled),
            ("engine_broken", "1 where steps failed or the engine's thread has ended: it takes no more requests.", is_broken),
        ):
            yield GaugeMetricFamily(f"motrt_{name}", told, value)
