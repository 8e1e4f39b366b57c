"""One way to compute decode steps on a GPU, measured alone in a process of its own; ``gpu_decode.py`` starts one for each.

Alone, because an illegal access in one way ends every later CUDA call of its process. Every way is compared with the logits
that PyTorch saved (``--reference``) before it is timed, and is not timed where they differ. Three times are taken of a step:

- the caller's: from ids in host memory to logits in host memory, nothing of ours in between;
- between two CUDA events around the work, on its own stream, behind a kernel that keeps the GPU busy for 0.1 ms, in which what
  is captured is queued; of what is not captured it is the host's time, which queues more slowly than that;
- the kernels': the time in which at least one kernel ran, from the profiler, with the gaps between them beside it.
"""

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray

from motrt.benchmarks.torch_step import TorchStep, captured, compiled
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.runtime.backends import probe
from motrt.runtime.benchmark import cache_bytes_per_step, weight_bytes_per_step
from motrt.runtime.bundle import open_bundle
from motrt.runtime.onnx_cuda_session import CudaOnnxSession
from motrt.runtime.session import Session
from motrt.runtime.step_kernels import CapturedStep
from motrt.runtime.torch_session import TorchSession

GROUPS = ("reference", "compiled", "kernels", "bundle", "flash")
EAGER, CAPTURED, COMPILED = "PyTorch eager", "PyTorch eager, captured", "PyTorch compiled, captured"
NOT_CAPTURED, ALL_EXPERTS, ONE_GRAPH, FLASH = "not captured", "every expert", "canonical graph, not captured", "flash attention"
OURS = "motrt, own kernels"
OPERATORS = {"standard": "motrt, standard operators", "onnxruntime": "motrt, onnxruntime operators"}

NUM_PROMPT, NUM_WARM_UP, NUM_STEPS, NUM_PROFILED = 128, 8, 64, 8
# Relative L2 of logits between two ways of rounding the same bfloat16 model; a fault is of the order of 1.
MAX_ERROR = 0.1
NUM_READ_BYTES = 1 << 32  # more than any cache of a GPU holds, by far
BUSY_CYCLES = 200_000  # about 0.1 ms: longer than a step takes to be put in the device's queue
# A capture waits for nothing: what onnxruntime does behind a run by itself, the clock does behind its second event.
_DO_NOT_SYNCHRONIZE = "disable_synchronize_execution_providers"

Logits = NDArray[np.float32]
Step = Callable[[], Logits]


@dataclass(frozen=True)
class Case:
    """Rows that go on in their own modality.

    Attributes:
        name: ``text``, ``audio`` or ``mixed``.
        modalities: of each row.
    """

    name: str
    modalities: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.modalities)

    @property
    def key(self) -> str:
        return f"{self.name}-{self.rows}"

    def names(self, config: ModelConfig) -> list[str]:
        return [config.modality_names[modality] for modality in self.modalities]

    def prompts(self, config: ModelConfig) -> list[list[int]]:
        return [_ids(config, modality, NUM_PROMPT, row) for row, modality in enumerate(self.modalities)]

    def ids(self, config: ModelConfig) -> list[int]:
        return [_ids(config, modality, 1, 7 + row)[0] for row, modality in enumerate(self.modalities)]


def _ids(config: ModelConfig, modality: int, count: int, row: int) -> list[int]:
    ids = config.id_ranges[modality]
    return [ids[(7 + 31 * (row + place)) % len(ids)] for place in range(count)]


def cases_of(config: ModelConfig, rows: Sequence[int]) -> Iterator[Case]:
    """One row first: what is most wanted is measured before the time is over."""
    count = len(config.modalities)
    for number in rows:
        for modality, name in enumerate(config.modality_names):
            yield Case(name, (modality,) * number)
        if count > 1 and number > 1:
            yield Case("mixed", tuple(row % count for row in range(number)))


class Clock:
    """Milliseconds of the device between ``start`` and ``stop``; of the host where there is no GPU. Off until switched on."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu, self.is_on, self._marks = on_gpu, False, list[Any]()

    def start(self) -> None:
        if self.is_on:
            if self._on_gpu:
                torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
            self._mark()

    def stop(self) -> None:
        if self.is_on:
            self._mark()
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def take(self) -> float | None:
        """Milliseconds since the last time it was asked; None where nothing was marked."""
        marks, self._marks = self._marks, []
        if not marks:
            return None
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        if not self._on_gpu:
            return float(1000 * sum(stop - start for start, stop in pairs))
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(stop) for start, stop in pairs))


class Clocked:
    """onnxruntime's session with the clock around each run, which then waits for nothing itself."""

    def __init__(self, session: Any, clock: Clock) -> None:
        self._session, self._clock = session, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        with contextlib.suppress(Exception):  # already there, of a step that is replayed
            options.add_run_config_entry(_DO_NOT_SYNCHRONIZE, "1")
        self._clock.start()
        self._session.run_with_iobinding(binding, options)
        self._clock.stop()


def clocked(session: CudaOnnxSession, clock: Clock) -> CudaOnnxSession:
    """The same session, every pass of its graphs clocked."""
    for graph, loaded in session._loaded.items():
        session._loaded[graph] = type(loaded)(loaded.graph, loaded.signature, Clocked(loaded.session, clock))
    return session


def clocked_kernels(session: CudaOnnxSession, clock: Clock) -> CudaOnnxSession:
    """The same session, every step of its own kernels clocked.

    Raises:
        ValueError: where it has none.
    """
    kernels = session._kernels
    if kernels is None:
        raise ValueError(f"the session has no kernels of its own: {session.no_kernels}")
    capture = kernels.capture

    def captured_step(*arguments: Any) -> CapturedStep:
        step = capture(*arguments)
        replay = step.replay

        def clocked_replay() -> None:
            clock.start()
            replay()
            clock.stop()

        step.replay = clocked_replay
        return step

    kernels.capture = captured_step  # type: ignore[method-assign, assignment]
    return session


def restricted(session: CudaOnnxSession, graphs: Sequence[Graph], captures: bool = True) -> CudaOnnxSession:
    """The same session with some of its graphs alone, or one that captures nothing; nothing is loaded twice."""
    view = copy.copy(session)
    view._recorded = set(session._recorded) if captures else set()
    view._loaded = {graph: session._loaded[graph] for graph in graphs}
    view._idle, view.passes = {}, {graph.name: 0 for graph in graphs}
    return view


@dataclass(frozen=True)
class Way:
    """One way to compute a step.

    Attributes:
        name: what it is called in tables.
        begin: reads a case's prompts and gives its step.
        takes: which cases it is asked for.
    """

    name: str
    begin: Callable[[Case], Step]
    takes: Callable[[Case], bool] = lambda case: True


class Pytorch:
    """Steps of PyTorch, their prompts read by the reference."""

    def __init__(self, session: TorchSession, clock: Clock) -> None:
        self.session, self.clock = session, clock

    def reference(self, case: Case) -> Logits:
        """What the decoder itself says, one step behind the prompts."""
        config = self.session.config
        _, cache = self.session.prefill(case.prompts(config), case.names(config))
        return self.session.decode_step(case.ids(config), case.names(config), cache)

    def begin(self, case: Case, compiles: bool, captures: bool) -> Step:
        """A conversation of ``TorchStep``."""
        session, several = self.session, len(set(case.modalities)) > 1
        _, cache = session.prefill(case.prompts(session.config), case.names(session.config))
        session.reserve(cache, NUM_PROMPT + NUM_WARM_UP + 2 * NUM_STEPS + NUM_PROFILED + 16)
        step = TorchStep(session.decoder, case.modalities, cache.buffers, "select" if captures and several else "gather")
        ids = case.ids(session.config)
        held = torch.tensor(ids, device=session.decoder.device)
        position = torch.tensor(cache.lengths, device=held.device)
        start, forward = position.clone(), compiled(step, tunes=case.rows == 1) if compiles else step
        with torch.inference_mode():
            forward(held, position)
            replay = captured(forward, held, position) if captures and held.is_cuda else None
        position.copy_(start)

        def once() -> Logits:
            with torch.inference_mode():
                held.copy_(torch.tensor(ids))
                self.clock.start()
                if replay is None:
                    logits = forward(held, position)
                else:
                    replay[0]()
                    logits = replay[1]
                self.clock.stop()
                said: Logits = logits.cpu().numpy()
                position.add_(1)
            return said

        return once


def _is_of_kernels(session: CudaOnnxSession, case: Case) -> bool:
    kernels = session._kernels
    return kernels is not None and len(set(case.modalities)) == 1 and case.rows <= kernels.max_rows


def of_session(session: Session, case: Case) -> Step:
    config = session.config
    names, ids = case.names(config), case.ids(config)
    _, cache = session.prefill(case.prompts(config), names)
    return lambda: session.decode_step(ids, names, cache)


def ways_of_bundle(session: CudaOnnxSession, operators: str) -> list[Way]:
    """The bundle as it is; and, with standard operators, what it would be without each of the things it does."""
    name = OPERATORS[operators]
    found = [Way(name, lambda case: of_session(session, case))]
    if operators != "standard":
        return found
    uncaptured = restricted(session, tuple(session._loaded), captures=False)
    one_graph = restricted(session, (CANONICAL,), captures=False)
    found += [Way(NOT_CAPTURED, lambda case: of_session(uncaptured, case), lambda case: case.rows == 1)]
    several = tuple(graph for graph in session._loaded if graph.one_token)
    if several:
        every = restricted(session, (*several, CANONICAL))
        # A mixed batch takes that very graph anyway.
        found += [Way(ALL_EXPERTS, lambda case: of_session(every, case), lambda case: len(set(case.modalities)) == 1)]
    return [*found, Way(ONE_GRAPH, lambda case: of_session(one_graph, case), lambda case: case.rows == 1)]


def error_of(got: Logits, expected: Logits, modalities: Sequence[int], ranges: Sequence[range]) -> float:
    """Relative L2 of the worst row over the ids that it may yield; logits of one range alone are those ids."""
    worst = 0.0
    for one, wanted, modality in zip(got, expected, modalities, strict=True):
        ids = ranges[modality]
        found = one if len(one) == len(ids) else one[ids.start : ids.stop]
        right = wanted[ids.start : ids.stop]
        worst = max(worst, float(np.linalg.norm(found - right) / np.linalg.norm(right)))
    return worst


def measure(way: Way, case: Case, expected: Logits, clock: Clock, ranges: Sequence[range]) -> tuple[dict[str, Any], Step]:
    """The caller's and the events' milliseconds of a case; returns them with the step, to be profiled later.

    Raises:
        ValueError: where its logits are not the reference's.
    """
    clock.is_on = False
    step = way.begin(case)
    error = error_of(step(), expected, case.modalities, ranges)
    if not error < MAX_ERROR:
        raise ValueError(f"its logits differ from the reference's by {error:.2g}, expected less than {MAX_ERROR}")
    for _ in range(NUM_WARM_UP):
        step()
    caller, events = [], []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        step()
        caller.append(1000 * (time.perf_counter() - started))
    clock.is_on = True
    clock.take()
    for _ in range(NUM_STEPS):
        step()
        if (taken := clock.take()) is not None:
            events.append(taken)
    clock.is_on = False
    found: dict[str, Any] = {"error": round(error, 6), "caller_ms": spread(caller)}
    if events:
        found["event_ms"] = spread(events)
    return found, step


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = (round(float(one), 4) for one in np.percentile(values, [25, 50, 75]))
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def profiled(step: Step, count: int = NUM_PROFILED) -> dict[str, Any]:
    """Which kernels the device ran in a step, whoever launched them; a failure to look is no failure to measure."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(count):
                step()
        spans = [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events() or ()
            if event.device_type == torch.profiler.DeviceType.CUDA
        ]
        return kernels_of(spans, count)
    except Exception as failure:
        return {"missing": f"{type(failure).__name__}: {failure}"[:2000]}


@dataclass(frozen=True)
class Span:
    """One kernel or copy, in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


def kernels_of(spans: Sequence[Span], num_steps: int) -> dict[str, Any]:
    """Per step: kernels and copies, microseconds in which a kernel ran, microseconds between them, and the longest by name.

    Gaps of 200 microseconds and more are the host's, between steps, and are not counted; copies are the caller's.
    """
    ordered = sorted((one for one in spans if "spin_kernel" not in one.name), key=lambda one: one.start)
    kernels = [one for one in ordered if not one.name.startswith(("Memcpy", "Memset"))]
    busy = gaps = 0.0
    reached = kernels[0].start if kernels else 0.0
    for one in kernels:
        if 0 < one.start - reached < 200:
            gaps += one.start - reached
        busy += max(0.0, one.end - max(reached, one.start))
        reached = max(reached, one.end)
    by_name: dict[str, list[float]] = {}
    for one in kernels:
        by_name.setdefault(one.name, []).append(one.end - one.start)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:30]
    return {
        "kernels": round(len(kernels) / num_steps, 2),
        "copies": round((len(ordered) - len(kernels)) / num_steps, 2),
        "busy_us": round(busy / num_steps, 2),
        "gaps_us": round(gaps / num_steps, 2),
        "by_name": [
            {"name": name[:160], "calls": round(len(taken) / num_steps, 2), "us": round(sum(taken) / num_steps, 2)}
            for name, taken in longest
        ],
    }


def measure_bandwidth(device: torch.device, num_bytes: int = NUM_READ_BYTES) -> dict[str, float]:
    """Bytes per second that the device reads, and that it copies (each byte counted as read and as written), by its events."""
    array = torch.ones(num_bytes // 4, device=device)
    other = torch.empty_like(array)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "read": (array.sum, num_bytes),
        "copy": (lambda: other.copy_(array), 2 * num_bytes),
    }
    found = {}
    for name, (work, moved) in ways.items():
        clock, seconds = Clock(device.type == "cuda"), []
        clock.is_on = True
        for number in range(12):
            clock.start()
            work()
            clock.stop()
            taken = clock.take()
            if number >= 2 and taken is not None:
                seconds.append(taken / 1000)
        found[name] = float(moved / np.median(seconds))
    return found


def open_cuda_session(folder: Path, stream: int, attention_kernels: int = 0, step_kernels: bool = False) -> CudaOnnxSession:
    """A bundle's graphs without its change-overs, computed on ``stream``."""
    bundle = open_bundle(folder)
    graphs = [graph for graph in bundle.manifest.graphs if graph.takes_one_token and graph.tokens == graph.predicts]
    return CudaOnnxSession(
        bundle.model_path,
        bundle.config,
        graphs=(*graphs, CANONICAL),
        stream=stream,
        attention_kernels=attention_kernels,
        weights=bundle.manifest.shared_weights,
        step_kernels=step_kernels,
    )


def operators_of(folder: Path) -> str:
    return next((graph.operators for graph in open_bundle(folder).manifest.graphs), "standard")


class Contender:
    """One group of ways over every case, its findings kept as they come.

    Args:
        group: one of ``GROUPS``.
        ways: what is measured.
        config: of the model.
        clock: that the ways start and stop.
        keep: given the whole document after each case.
    """

    def __init__(
        self,
        group: str,
        ways: Sequence[Way],
        config: ModelConfig,
        clock: Clock,
        keep: Callable[[dict[str, Any]], None] = lambda document: None,
    ) -> None:
        self.ways, self.config, self.clock, self._keep = ways, config, clock, keep
        self.document: dict[str, Any] = {"group": group, "cases": {}}
        self._steps: list[tuple[dict[str, Any], Step]] = []

    def run(
        self, cases: Sequence[Case], reference: Callable[[Case], Logits], profiles: bool, seconds: float = float("inf")
    ) -> dict[str, Any]:
        """Measure every way on every case, and profile them last: a profiler may slow what comes behind it.

        After ``seconds`` no case is begun, so that there is time left to profile those that were.
        """
        ends = time.monotonic() + seconds
        for case in cases:
            found: dict[str, Any] = {}
            self.document["cases"][case.key] = found
            try:
                if time.monotonic() > ends:
                    raise TimeoutError(f"{seconds:.0f} s were over")
                expected = reference(case)
            except Exception as failure:
                found |= {way.name: _missing(failure) for way in self.ways if way.takes(case)}
                continue
            for way in self.ways:
                if way.takes(case):
                    found[way.name] = self._measured(way, case, expected)
                    self._keep(self.document)
                    click.echo(f"{case.key:10} {way.name:32} {said_of(found[way.name])}", err=True)
        for found, step in self._steps if profiles else ():
            found["kernels"] = profiled(step)
            self._keep(self.document)
        return self.document

    def _measured(self, way: Way, case: Case, expected: Logits) -> dict[str, Any]:
        try:
            found, step = measure(way, case, expected, self.clock, self.config.id_ranges)
        except Exception as failure:
            return _missing(failure)
        self._steps.append((found, step))
        return found


def _missing(failure: Exception) -> dict[str, Any]:
    return {"missing": f"{type(failure).__name__}: {failure}"[:2000]}


def said_of(found: dict[str, Any]) -> str:
    if "missing" in found:
        return f"not measured: {found['missing'][:300]}"
    events = found.get("event_ms", {}).get("median", float("nan"))
    return f"{events:8.3f} ms by events, {found['caller_ms']['median']:8.3f} ms for the caller, error {found['error']:.2g}"


def traffic(session: Session, cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """By case, the bytes of weights and of keys and values that a step in the middle of the measurement has to read."""
    found = {}
    for case in cases:
        lengths = np.full(case.rows, NUM_PROMPT + NUM_WARM_UP + NUM_STEPS, np.int64)
        weights = weight_bytes_per_step(session, None, set(case.modalities))
        found[case.key] = {"weight_bytes": weights, "bytes": weights + cache_bytes_per_step(session, lengths)}
    return found


def contend(
    group: str,
    model: Path,
    folder: Path,
    rows: Sequence[int],
    reference: Path,
    device: str,
    keep: Callable[[dict[str, Any]], None] = lambda document: None,
    profiles: bool = True,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Measure one group.

    Args:
        group: ``reference`` also writes ``reference``; ``bundle`` and ``flash`` race ``folder``.
        model: the checkpoint that the bundle is made of.
        folder: a bundle for ``cuda``; precision and capacity are its own.
        rows: of the cases.
        reference: an .npz of logits by case.
        device: ``cuda``; anything else examines this program, and measures nothing.
        keep: given what there is after each case, so that nothing is lost where time ends.
        profiles: whether kernels are looked at.
        seconds: after which no case is begun.
    """
    on_gpu = device == "cuda"
    clock, stream = Clock(on_gpu), cast(Any, None)
    if group == "kernels":  # whose stream is their own
        ours = clocked_kernels(open_cuda_session(folder, 0, step_kernels=True), clock)
        stream = torch.cuda.ExternalStream(cast(Any, ours._kernels).device.stream) if on_gpu else None  # type: ignore[no-untyped-call]
    elif on_gpu:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        bandwidth = measure_bandwidth(torch.device(device), NUM_READ_BYTES if on_gpu else 1 << 22)
        if on_gpu:
            torch.cuda.empty_cache()
        session: Session
        if group in ("reference", "compiled"):
            bundle = open_bundle(folder)
            opened = TorchSession.open(open_checkpoint(model), bundle.manifest.precision, device, bundle.config.max_seq_len)
            pytorch, session = Pytorch(opened, clock), opened
            ways = ways_of_pytorch(pytorch, group)
        elif group == "kernels":
            session, ways = ours, [Way(OURS, lambda case: of_session(ours, case), partial(_is_of_kernels, ours))]
        else:
            kernels = 1 if group == "flash" else 0
            ours = clocked(open_cuda_session(folder, stream.cuda_stream if stream else 0, kernels), clock)
            session = ours
            name = OPERATORS[operators_of(folder)]
            ways = ways_of_bundle(ours, operators_of(folder))
            if group == "flash":
                ways = [Way(f"{name}, {FLASH}", ways[0].begin)]
        cases = list(cases_of(session.config, rows))
        contender = Contender(group, ways, session.config, clock, keep)
        contender.document |= {"bandwidth_bytes_per_s": [bandwidth], "traffic": traffic(session, cases)}
        if isinstance(session, CudaOnnxSession):
            told = {"not_on_gpu": session.elsewhere, "shares_weights": session.shares, "no_kernels": session.no_kernels}
            contender.document |= told
        if group == "reference":
            np.savez(reference, **{case.key: pytorch.reference(case) for case in cases})  # type: ignore[arg-type]
        with np.load(reference) as saved:
            document = contender.run(cases, lambda case: cast(Logits, saved[case.key]), profiles, seconds)
        if isinstance(session, CudaOnnxSession):
            document["captured"] = sorted(graph.name for graph in session._recorded)
        document["bandwidth_bytes_per_s"].append(measure_bandwidth(torch.device(device), NUM_READ_BYTES if on_gpu else 1 << 22))
    keep(document)
    return document


def ways_of_pytorch(pytorch: Pytorch, group: str) -> list[Way]:
    if group == "compiled":
        return [Way(COMPILED, lambda case: pytorch.begin(case, compiles=True, captures=True))]
    return [
        Way(EAGER, lambda case: pytorch.begin(case, compiles=False, captures=False)),
        Way(CAPTURED, lambda case: pytorch.begin(case, compiles=False, captures=True)),
    ]


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--group", type=click.Choice(GROUPS), required=True)
@click.option("--model", type=PATH, required=True)
@click.option("--bundle", type=PATH, required=True)
@click.option("--reference", type=PATH, required=True, help="An .npz of logits by case; the group 'reference' writes it.")
@click.option("--rows", multiple=True, type=click.IntRange(1, 1024), default=(1, 8, 64), show_default=True)
@click.option("--seconds", type=float, default=float("inf"), help="Begin no case after these.")
@click.option("--json", "json_file", type=PATH, required=True)
def main(
    group: str, model: Path, bundle: Path, reference: Path, rows: tuple[int, ...], seconds: float, json_file: Path
) -> None:
    """Measure one group of contenders, and write what was found after each case."""
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # torch's profiler beside CUDA graphs
    if not torch.cuda.is_available():
        raise click.ClickException("this measures a GPU, and PyTorch finds none here")
    if group in ("kernels", "bundle", "flash") and (reason := probe("cuda").reason):  # it finds CUDA's libraries, too
        raise click.ClickException(f"onnxruntime cannot run on the GPU: {reason}")

    def keep(document: dict[str, Any]) -> None:
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    contend(group, model, bundle, rows, reference, "cuda", keep, seconds=seconds)


if __name__ == "__main__":
    main()
