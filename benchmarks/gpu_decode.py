"""Decode steps on a GPU: every way to compute them side by side in one process, over the bandwidth that its memory has.

    motrt init model --preset llama-3.2-1b --dtype bfloat16
    motrt export model cuda --target cuda --precision bf16 --max-seq-len 1024 --no-verify
    python benchmarks/gpu_decode.py --model model --bundle cuda=cuda --json found.json --chart found.svg

Contenders take turns, a few steps each. Two times are taken of every step: the device's, between two events on its stream,
and the whole of it, from ids in the host's memory to logits in the host's memory, which is what a caller waits for. The device
is kept busy until a step's work is in its queue, and is waited for before the second event, for everyone alike: onnxruntime
waits by itself. So a few microseconds of waking up are in every ``device_ms``; ``kernels`` has none of them.

PyTorch is raced twice: as it is written, and compiled as a whole and recorded as a CUDA graph (``torch_step.py``), over a cache
that is as long as the race needs. Before a contender is timed its logits are compared with the reference's: one that is wrong
is not measured. ``every expert`` is our own graph for several modalities fed with one: what a graph that computes all experts
and selects costs, recorded as ours is. Last of all the kernels of ours and of the compiled one are looked at, for a few rows:
how many, how long, and how long between them.
"""

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.torch_step import TorchStep, compiled, recorded
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.graph import CANONICAL, Graph
from motrt.runtime.backends import probe
from motrt.runtime.benchmark import cache_bytes_per_step, weight_bytes_per_step
from motrt.runtime.bundle import Bundle, open_bundle
from motrt.runtime.gpu import find_gpus
from motrt.runtime.load import open_session
from motrt.runtime.onnx_cuda_session import CudaOnnxSession
from motrt.runtime.session import Session
from motrt.runtime.torch_session import TorchSession

OURS, NOT_RECORDED, FLASH = "motrt", "motrt, not recorded", "motrt, flash attention"
ALL_EXPERTS, ONE_GRAPH = "every expert", "one graph, not recorded"
EAGER, COMPILED = "PyTorch", "PyTorch, compiled and recorded"
PROMPT_LENGTH, NUM_WARM, NUM_ROUNDS, STEPS_A_TURN = 128, 6, 16, 4
# Relative L2 of logits between two ways of rounding the same bfloat16 model; a fault is of the order of 1.
MOST_ERROR = 0.1
READ_BYTES = 1 << 32  # more than any cache of a GPU holds, by far
BUSY_CYCLES = 200_000  # about 0.1 ms: longer than a step takes to be put in the device's queue
MOST_ROWS_LOOKED_AT = 8  # in the kernels: what is kept until then takes memory

Step = Callable[[], NDArray[np.float32]]


class Clock:
    """The device's time of what lies between ``start`` and ``stop``."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu, self._marks = on_gpu, list[Any]()

    def start(self) -> None:
        if self._on_gpu:
            torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
        self._mark()

    def stop(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        self._mark()

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
        if not self._on_gpu:
            return float(1000 * sum(stop - start for start, stop in zip(marks[::2], marks[1::2], strict=True)))
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(stop) for start, stop in zip(marks[::2], marks[1::2], strict=True)))


class Clocked:
    """onnxruntime's session, with the clock around each run."""

    def __init__(self, session: Any, clock: Clock) -> None:
        self._session, self._clock = session, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self._clock.start()
        self._session.run_with_iobinding(*arguments)
        self._clock.stop()


def clocked(session: CudaOnnxSession, clock: Clock) -> CudaOnnxSession:
    """The same session, every pass of its graphs clocked."""
    for graph, loaded in session._loaded.items():
        session._loaded[graph] = type(loaded)(loaded.graph, loaded.signature, Clocked(loaded.session, clock))
    return session


def restricted(session: CudaOnnxSession, graphs: Sequence[Graph], records: bool = True) -> CudaOnnxSession:
    """The same session with some of its graphs alone, or one that records nothing; nothing is loaded twice."""
    view = copy.copy(session)
    view._recorded = set(session._recorded) if records else set()
    view._loaded = {graph: session._loaded[graph] for graph in graphs}
    view._idle, view.passes = {}, {graph.name: 0 for graph in graphs}
    return view


@dataclass
class Case:
    """Rows that go on in their own modality, and what every contender did with them.

    Attributes:
        name: ``text``, ``audio`` or ``mixed``.
        modalities: of each row.
        device_ms: by contender, of every step, turn by turn; None for one whose device is not ours to clock.
        whole_ms: the same, from ids to logits in the host's memory.
        missing: by contender, why it was not measured.
    """

    name: str
    modalities: tuple[int, ...]
    device_ms: dict[str, list[list[float | None]]] = field(default_factory=dict)
    whole_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def tell(self, name: str, failure: Exception) -> None:
        """A contender that is out of the race: what it did before does not count."""
        self.device_ms.pop(name, None)
        self.whole_ms.pop(name, None)
        self.missing[name] = f"{type(failure).__name__}: {failure}"[:2000]
        click.echo(f"{self.label}: {name} is not measured: {self.missing[name][:300]}", err=True)

    @property
    def label(self) -> str:
        return f"{self.name}, {len(self.modalities)} {'row' if len(self.modalities) == 1 else 'rows'}"


class Race:
    """One model, every way to compute its steps."""

    def __init__(self, reference: TorchSession, clock: Clock, compiles: bool, ends: float) -> None:
        self.reference, self.config, self.clock = reference, reference.config, clock
        self.compiles, self.ends = compiles, ends
        self.kept: list[tuple[Case, dict[str, Step]]] = []
        self.sessions: dict[str, Session] = {}

    def run(self, case: Case) -> None:
        """Measure one case; a contender that fails or is wrong is told, and the others go on."""
        names = [self.config.modality_names[m] for m in case.modalities]
        prompts = [self._ids(m, PROMPT_LENGTH, row) for row, m in enumerate(case.modalities)]
        ids = [self._ids(m, 1, 7 + row)[0] for row, m in enumerate(case.modalities)]
        _, cache = self.reference.prefill(prompts, names)
        expected = self.reference.decode_step(ids, names, cache)
        del cache
        steps: dict[str, Step] = {}
        for name, begin in self._contenders(case, prompts, names, ids):
            step = self._warm(case, name, begin, expected)
            if step is not None:
                steps[name] = step
        self.clock.take()
        for _ in range(NUM_ROUNDS):
            for name in list(steps):
                device, whole = [], []
                try:
                    for _ in range(STEPS_A_TURN):
                        started = time.perf_counter()
                        steps[name]()
                        whole.append(1000 * (time.perf_counter() - started))
                        device.append(self.clock.take())
                except Exception as failure:
                    case.tell(name, failure)
                    del steps[name]
                    continue
                case.device_ms.setdefault(name, []).append(device)
                case.whole_ms.setdefault(name, []).append(whole)
        if len(case.modalities) <= MOST_ROWS_LOOKED_AT:
            looked_at = {name: one for name, one in steps.items() if name.startswith(OURS) or name == COMPILED}
            self.kept.append((case, looked_at))

    def _warm(self, case: Case, name: str, begin: Callable[[], Step], expected: NDArray[np.float32]) -> Step | None:
        """A contender that gives the reference's logits and has done its first steps; None where it does not."""
        try:
            step = begin()
            error = _error(step(), expected, case.modalities, self.config.id_ranges)
            if not error < MOST_ERROR:
                raise ValueError(f"its logits differ from the reference's by {error:.2g}, {MOST_ERROR} at most is allowed")
            for _ in range(NUM_WARM):
                step()
        except Exception as failure:
            case.tell(name, failure)
            return None
        return step

    def _ids(self, modality: int, count: int, row: int) -> list[int]:
        ids = self.config.id_ranges[modality]
        return [ids[(7 + 31 * (row + place)) % len(ids)] for place in range(count)]

    def _contenders(
        self, case: Case, prompts: list[list[int]], names: list[str], ids: list[int]
    ) -> Iterator[tuple[str, Callable[[], Step]]]:
        several = len(set(case.modalities)) > 1
        for name, session in self.sessions.items():
            if not (name == ALL_EXPERTS and several):  # there it is the very graph that ours takes
                yield name, partial(_of_session, session, prompts, names, ids)
        yield EAGER, partial(self._of_torch, case, prompts, names, ids, compiles=False)
        if not self.compiles:
            case.missing[COMPILED] = "not asked for"
        elif time.monotonic() > self.ends:
            case.missing[COMPILED] = "the time for compiling was over"
        else:
            yield COMPILED, partial(self._of_torch, case, prompts, names, ids, compiles=True)

    def _of_torch(self, case: Case, prompts: list[list[int]], names: list[str], ids: list[int], compiles: bool) -> Step:
        """A conversation of ``TorchStep``, its prompts read by the reference."""
        session, several = self.reference, len(set(case.modalities)) > 1
        _, cache = session.prefill(prompts, names)
        session.reserve(cache, PROMPT_LENGTH + NUM_WARM + NUM_ROUNDS * STEPS_A_TURN + 16)
        step = TorchStep(session.decoder, case.modalities, cache.buffers, "select" if compiles and several else "gather")
        held = torch.tensor(ids, device=session.decoder.device)
        position = torch.tensor(cache.lengths, device=held.device)
        start, forward = position.clone(), compiled(step, len(ids) == 1) if compiles else step
        with torch.inference_mode():
            forward(held, position)
            replay = recorded(forward, held, position) if compiles and held.is_cuda else None
        position.copy_(start)

        def once() -> NDArray[np.float32]:
            with torch.inference_mode():
                held.copy_(torch.tensor(ids))
                self.clock.start()
                if replay is None:
                    logits = forward(held, position)
                else:
                    replay[0]()
                    logits = replay[1]
                self.clock.stop()
                said: NDArray[np.float32] = logits.cpu().numpy()
                position.add_(1)
            return said

        return once


def profiled(step: Step, count: int = 8) -> dict[str, Any]:
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
    """Per step: kernels and copies, microseconds in which one ran, microseconds between them, and the dearest by name.

    Gaps of 200 microseconds and more are the host's, between steps, and are not counted.
    """
    ordered = sorted((one for one in spans if "spin_kernel" not in one.name), key=lambda one: one.start)
    copies = sum(one.name.startswith(("Memcpy", "Memset")) for one in ordered)
    busy = gaps = 0.0
    reached = ordered[0].start if ordered else 0.0
    for one in ordered:
        if 0 < one.start - reached < 200:
            gaps += one.start - reached
        busy += max(0.0, one.end - max(reached, one.start))
        reached = max(reached, one.end)
    by_name: dict[str, list[float]] = {}
    for one in ordered:
        by_name.setdefault(one.name, []).append(one.end - one.start)
    dearest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:30]
    return {
        "kernels": round((len(ordered) - copies) / num_steps, 2),
        "copies": round(copies / num_steps, 2),
        "busy_us": round(busy / num_steps, 2),
        "gaps_us": round(gaps / num_steps, 2),
        "by_name": [
            {"name": name[:160], "calls": round(len(taken) / num_steps, 2), "us": round(sum(taken) / num_steps, 2)}
            for name, taken in dearest
        ],
    }


def _of_session(session: Session, prompts: list[list[int]], names: list[str], ids: list[int]) -> Step:
    _, cache = session.prefill(prompts, names)
    return lambda: session.decode_step(ids, names, cache)


def _error(
    came: NDArray[np.float32], expected: NDArray[np.float32], modalities: Sequence[int], ranges: Sequence[range]
) -> float:
    """Relative L2 of the worst row over the ids that it may yield; logits of one range alone are those ids."""
    worst = 0.0
    for one, wanted, modality in zip(came, expected, modalities, strict=True):
        ids = ranges[modality]
        found = one if len(one) == len(ids) else one[ids.start : ids.stop]
        right = wanted[ids.start : ids.stop]
        worst = max(worst, float(np.linalg.norm(found - right) / np.linalg.norm(right)))
    return worst


def measure_bandwidth(device: torch.device, num_bytes: int = READ_BYTES) -> float:
    """Bytes per second that the device reads: the median of sums over one large array, by its own events."""
    array = torch.ones(num_bytes // 4, device=device)
    clock, seconds = Clock(device.type == "cuda"), []
    for number in range(12):
        clock.start()
        array.sum()
        clock.stop()
        taken = clock.take()
        if number >= 2 and taken is not None:
            seconds.append(taken / 1000)
    return float(num_bytes / np.median(seconds))


def figures(case: Case, reference: Session, bandwidth: float) -> dict[str, Any]:
    """By contender: medians with quartiles, tokens/s, and the share of the bandwidth; and how many times faster ours is."""
    rows = len(case.modalities)
    lengths = np.full(rows, PROMPT_LENGTH + NUM_WARM + NUM_ROUNDS * STEPS_A_TURN // 2, np.int64)
    weights = weight_bytes_per_step(reference, None, set(case.modalities))
    num_bytes = weights + cache_bytes_per_step(reference, lengths)
    found: dict[str, Any] = {}
    for name, turns in case.whole_ms.items():
        device = [one for turn in case.device_ms[name] for one in turn if one is not None]
        one: dict[str, Any] = {"whole_ms": _spread([value for turn in turns for value in turn])}
        one["tokens_per_s_whole"] = round(1000 * rows / one["whole_ms"]["median"], 1)
        if device:
            one["device_ms"] = _spread(device)
            one["tokens_per_s_device"] = round(1000 * rows / one["device_ms"]["median"], 1)
            one["share_of_bandwidth"] = round(num_bytes / (one["device_ms"]["median"] / 1000) / bandwidth, 4)
        if OURS in case.whole_ms:
            one["ours_is_faster_by"] = {
                "whole": _ratio(turns, case.whole_ms[OURS]),
                **({"device": _ratio(case.device_ms[name], case.device_ms[OURS])} if device else {}),
            }
        found[name] = one
    return {
        "case": case.name,
        "rows": rows,
        "weight_bytes_per_step": weights,
        "bytes_per_step": num_bytes,
        "contenders": found,
        "missing": case.missing,
        "kernels": {},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = (round(float(one), 4) for one in np.percentile(values, [25, 50, 75]))
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def _ratio(theirs: Sequence[Sequence[float | None]], ours: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Turn by turn: what was measured a moment apart."""
    pairs = zip(theirs, ours, strict=True)
    ratios = [np.median(np.array(one, float)) / np.median(np.array(other, float)) for one, other in pairs]
    return _spread([float(one) for one in ratios])


def draw(document: dict[str, Any], file: Path) -> None:
    """Bars of tokens per second by the device's clock, a panel for each case."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "motrt"  # the same figures give the same file
    cases = document["cases"]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5 * columns, 2.6 * rows), constrained_layout=True, squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    for panel, case in zip(panels.flat, cases, strict=False):
        bars = {name: one.get("tokens_per_s_device", 0) for name, one in case["contenders"].items()}
        names = sorted(bars, key=lambda name: float(bars[name]))
        colours = ["#1f6f8b" if name.startswith(OURS) else "#b8b8b8" for name in names]
        drawn = panel.barh(names, [bars[name] for name in names], color=colours)
        panel.bar_label(drawn, fmt="%.0f", padding=3)
        panel.set_title(f"{case['case']}, rows: {case['rows']}", loc="left")
        panel.set_xlabel("tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def the_gpu() -> dict[str, Any] | None:
    found = find_gpus()
    if found.first is None:
        return None
    gpu = found.first
    said = {"name": gpu.name, "compute_capability": gpu.compute_capability, "memory_bytes": gpu.memory_bytes}
    return said | {"cuda_of_driver": found.driver, "driver": _driver()}


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    return None


def _operators(bundle: Bundle) -> str:
    return next((graph.operators for graph in bundle.manifest.graphs), "standard")


def our_session(bundle: Bundle, stream: int, attention_kernels: int = 0) -> CudaOnnxSession:
    """The graphs that are raced: no change-overs."""
    graphs = [graph for graph in bundle.manifest.graphs if graph.takes_one_token and graph.tokens == graph.predicts]
    return CudaOnnxSession(
        bundle.model_path,
        bundle.config,
        graphs=(*graphs, CANONICAL),
        stream=stream,
        attention_kernels=attention_kernels,
        weights=bundle.manifest.shared_weights,
    )


def cases_of(num_modalities: int, names: Sequence[str], rows: Sequence[int]) -> Iterator[Case]:
    """One row first: what is most wanted is measured before the time is over."""
    for count in rows:
        for modality in range(num_modalities):
            yield Case(names[modality], (modality,) * count)
        if num_modalities > 1 and count > 1:
            yield Case("mixed", tuple(row % num_modalities for row in range(count)))


def raced(
    model: Path,
    bundles: Sequence[str],
    rows: Sequence[int],
    device: str,
    compiles: bool,
    minutes: float,
    on_case: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure every case.

    Args:
        model: the checkpoint that the bundles are made of.
        bundles: ``BACKEND=FOLDER``; the first of ``cuda`` is what the others are compared with.
        rows: of the cases.
        device: ``cuda``; anything else examines this program, and measures nothing.
        compiles: whether PyTorch is compiled.
        minutes: after which nothing more is compiled.
        on_case: given what there is after each case, so that nothing is lost where time ends.
    """
    on_gpu = device == "cuda"
    opened = [(backend, open_bundle(folder)) for backend, _, folder in (one.partition("=") for one in bundles)]
    config = opened[0][1].config
    stream = torch.cuda.Stream() if on_gpu else None  # type: ignore[no-untyped-call]
    ends = time.monotonic() + 60 * minutes
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        clock = Clock(on_gpu)
        precision = opened[0][1].manifest.precision
        reference = TorchSession.open(open_checkpoint(model), precision, device, config.max_seq_len)
        race = Race(reference, clock, compiles, ends)
        elsewhere: dict[str, Any] = {}
        address = stream.cuda_stream if stream else 0
        for backend, bundle in opened:
            if backend != "cuda":
                race.sessions[backend] = open_session(bundle, backend)
                continue
            ours = clocked(our_session(bundle, address), clock)
            own = _operators(bundle) != "standard"
            name = f"{OURS}, onnxruntime's operators" if own else OURS
            race.sessions[name if name not in race.sessions else f"{name} ({bundle.path.name})"] = ours
            elsewhere[name] = ours.elsewhere
            if own:
                continue
            several = [graph for graph in ours._loaded if graph.one_token]
            if several:
                race.sessions[ALL_EXPERTS] = restricted(ours, (*several, CANONICAL))
            race.sessions[ONE_GRAPH] = restricted(ours, (CANONICAL,))
            race.sessions[NOT_RECORDED] = restricted(ours, tuple(ours._loaded), records=False)
            race.sessions[FLASH] = clocked(our_session(bundle, address, attention_kernels=1), clock)
        read_bytes = READ_BYTES if on_gpu else 1 << 22
        document: dict[str, Any] = {
            "gpu": the_gpu(),
            "machine": machine("motrt", "torch", "numpy") | {"onnxruntime": sys.modules["onnxruntime"].__version__},
            "precision": precision,
            "prompt": PROMPT_LENGTH,
            "capacity": config.max_seq_len,
            "bandwidth_bytes_per_s": [measure_bandwidth(reference.decoder.device, read_bytes)],
            "operators_not_on_the_gpu": elsewhere,
            "cases": [],
        }
        for case in cases_of(len(config.modalities), config.modality_names, rows):
            try:
                race.run(case)
            except Exception as failure:  # the reference itself, where memory is short
                case.missing["every contender"] = f"{type(failure).__name__}: {failure}"[:2000]
            document["cases"].append(figures(case, reference, document["bandwidth_bytes_per_s"][0]))
            on_case(document)
            for name, one in document["cases"][-1]["contenders"].items():
                shown = f"{one['device_ms']['median']:8.3f} ms on the device" if "device_ms" in one else " " * 22
                click.echo(f"{case.label:16} {name:32} {shown}, {one['whole_ms']['median']:8.3f} ms in all", err=True)
        document["bandwidth_bytes_per_s"].append(measure_bandwidth(reference.decoder.device, read_bytes))
        on_case(document)
        labels = {(one["case"], one["rows"]): one for one in document["cases"]}
        for case, steps in race.kept if on_gpu else ():
            found = {name: profiled(step) for name, step in steps.items()}
            labels[case.name, len(case.modalities)]["kernels"] = found
            on_case(document)
    return document


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--model", type=PATH, required=True, help="The checkpoint that the bundles are made of.")
@click.option("--bundle", "bundles", multiple=True, required=True, help="BACKEND=FOLDER")
@click.option("--rows", multiple=True, type=click.IntRange(1, 1024), default=(1, 8, 64), show_default=True)
@click.option("--compile/--no-compile", "compiles", default=True, help="Race PyTorch compiled and recorded, too.")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Compile nothing more after these.")
@click.option("--json", "json_file", type=PATH)
@click.option("--chart", type=PATH)
def main(
    model: Path,
    bundles: tuple[str, ...],
    rows: tuple[int, ...],
    compiles: bool,
    minutes: float,
    json_file: Path | None,
    chart: Path | None,
) -> None:
    """Measure, print a line a contender, and one JSON document last."""
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # torch's profiler beside CUDA graphs
    if not torch.cuda.is_available():
        raise click.ClickException("this measures a GPU, and PyTorch finds none here")
    if reason := probe("cuda").reason:  # it finds CUDA's libraries, too
        raise click.ClickException(f"onnxruntime can not run on the GPU: {reason}")

    def keep(document: dict[str, Any]) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    document = raced(model, bundles, rows, "cuda", compiles, minutes, keep)
    leave(document, json_file)
    if chart is not None:
        draw(document, chart)


if __name__ == "__main__":
    main()
