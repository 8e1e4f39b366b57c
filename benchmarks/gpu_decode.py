"""Decode steps on a GPU, every way to compute them in one run, over the bandwidth that the GPU's memory has.

    motrt init model --preset llama-3.2-1b --dtype bfloat16
    motrt export model standard --target cuda --precision bf16 --max-seq-len 1024 --no-verify --operators standard
    motrt export model own --target cuda --precision bf16 --max-seq-len 1024 --no-verify --operators onnxruntime
    python benchmarks/gpu_decode.py --model model --bundle standard --bundle own --json found.json --chart found.svg

Each group of contenders has a process of its own (``gpu_contender.py``), one after the other, which measures the bandwidth
before and after itself: PyTorch as it is written, and the same captured as a CUDA graph; PyTorch compiled as a whole and
captured (the way of gpt-fast); every bundle, by this package's own kernels and by onnxruntime's; the standard one also without
captures, with attention's flash kernel, with every expert computed, and as the canonical graph alone. What there is is
written after each group.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.gpu_contender import EAGER, OPERATORS, OURS, operators_of
from motrt.runtime.bundle import open_bundle
from motrt.runtime.gpu import find_gpus
from motrt.runtime.step_kernels import MAX_ROWS

CONTENDER = Path(__file__).with_name("gpu_contender.py")
# Bytes per second by NVIDIA's datasheets (H100 SXM5 80 GB, H200 SXM), by how the driver begins the GPU's name.
DATASHEET = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}


@dataclass(frozen=True)
class Group:
    """One process of the race.

    Attributes:
        kind: as ``gpu_contender.py --group``.
        bundle: what it opens.
        rows: of its cases.
        max_seconds: after which it is ended; what it found until then counts.
    """

    kind: str
    bundle: Path
    rows: tuple[int, ...]
    max_seconds: float


def groups_of(bundles: Sequence[Path], rows: tuple[int, ...], compiles: bool, seconds: float) -> Iterator[Group]:
    """The reference first, which the others are compared with; the compiler last, which takes longest."""
    yield Group("reference", bundles[0], rows, seconds)
    yield Group("kernels", bundles[0], tuple(count for count in rows if count <= MAX_ROWS), seconds)
    for bundle in sorted(bundles, key=operators_of):  # onnxruntime before standard
        yield Group("bundle", bundle, rows, seconds)
    for bundle in bundles:
        if operators_of(bundle) == "standard":
            yield Group("flash", bundle, rows[:1], seconds)
    if compiles:
        yield Group("compiled", bundles[0], rows, seconds)


def run_group(group: Group, model: Path, reference: Path, work: Path) -> dict[str, Any]:
    """What one process found, ``ended`` where it did not come to its end by itself."""
    found = work / f"{group.kind}-{group.bundle.name}.json"
    command = [sys.executable, str(CONTENDER), "--group", group.kind, "--model", str(model), "--bundle", str(group.bundle)]
    command += ["--reference", str(reference), "--json", str(found), "--seconds", f"{0.6 * group.max_seconds:.0f}"]
    command += [part for count in group.rows for part in ("--rows", str(count))]
    started, ended = time.monotonic(), ""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=group.max_seconds)
        sys.stderr.write(done.stderr)
        ended = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-3000:]}"
    except subprocess.TimeoutExpired as late:
        ended = f"it took longer than {group.max_seconds:.0f} s: {(late.stderr or b'')[-3000:]!r}"
    document: dict[str, Any] = {"group": group.kind, "cases": {}}
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(found.read_text("utf-8"))
    return document | {"bundle": group.bundle.name, "ended": ended, "seconds": round(time.monotonic() - started, 1)}


def merged(groups: Sequence[dict[str, Any]], datasheet: float | None) -> list[dict[str, Any]]:
    """By case every contender's times, and its share of the bandwidths by kernel time and by event time."""
    traffic: dict[str, Any] = next((group["traffic"] for group in groups if "traffic" in group), {})
    cases = []
    for key, moved in traffic.items():
        name, _, rows = key.rpartition("-")
        found = {
            way: one | _shares(one, moved["bytes"], group["bandwidth_bytes_per_s"][0]["read"], datasheet)
            for group in groups
            for way, one in group["cases"].get(key, {}).items()
        }
        cases.append({"case": name, "rows": int(rows), **moved, "contenders": found})
    return cases


def _shares(found: dict[str, Any], num_bytes: int, bandwidth: float, datasheet: float | None) -> dict[str, Any]:
    """``share_of_read``: of the read bandwidth measured in the same process; ``share_of_datasheet``: of the vendor's figure."""
    milliseconds = {
        "event": found.get("event_ms", {}).get("median"),
        "kernel": found.get("kernels", {}).get("busy_us", 0) / 1000 or None,
    }
    limits = {"read": bandwidth, **({"datasheet": datasheet} if datasheet else {})}
    return {
        f"{clock}_share_of_{limit}": round(num_bytes / (taken / 1000) / value, 4)
        for clock, taken in milliseconds.items()
        if taken
        for limit, value in limits.items()
    }


def race(
    model: Path,
    bundles: Sequence[Path],
    rows: tuple[int, ...],
    compiles: bool,
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
    run: Callable[[Group, Path, Path, Path], dict[str, Any]] = run_group,
) -> dict[str, Any]:
    """Run every group; ``keep`` is given the document after each."""
    gpu = find_gpus().first
    datasheet = next((value for name, value in DATASHEET.items() if gpu is not None and gpu.name.startswith(name)), None)
    manifest = open_bundle(bundles[0]).manifest
    document: dict[str, Any] = {
        "gpu": None if gpu is None else {**vars(gpu), "driver": _driver(), "datasheet_bytes_per_s": datasheet},
        "machine": machine("motrt", "torch", "numpy", "onnxruntime-gpu", "onnx"),
        "precision": manifest.precision,
        "capacity": manifest.config.max_seq_len,
        "cases": [],
        "groups": [],
    }
    groups: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for group in groups_of(bundles, rows, compiles, seconds):
            groups.append(run(group, model, Path(work) / "reference.npz", Path(work)))
            document["cases"] = merged(groups, datasheet)
            document["groups"] = [
                {key: value for key, value in one.items() if key not in ("cases", "traffic")} for one in groups
            ]
            keep(document)
            if groups[0].get("ended") and not groups[0]["cases"]:
                break  # without the reference there is nothing to compare with
    return document


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    return None


def table_of(document: dict[str, Any]) -> str:
    """A line a contender, for people."""
    lines = [f"{'case':10} {'contender':36} {'kernels':>8} {'kernel ms':>10} {'event ms':>9} {'caller ms':>10} {'of read':>8}"]
    for case in document["cases"]:
        for name, one in case["contenders"].items():
            if "missing" in one:
                lines.append(f"{case['case']:>7} {case['rows']:2} {name:36} {one['missing'][:80]}")
                continue
            kernels = one.get("kernels", {})
            lines.append(
                f"{case['case']:>7} {case['rows']:2} {name:36} {kernels.get('kernels', 0):8.1f} "
                f"{kernels.get('busy_us', 0) / 1000:10.3f} {one.get('event_ms', {}).get('median', 0):9.3f} "
                f"{one['caller_ms']['median']:10.3f} {one.get('event_share_of_read', 0):8.2f}"
            )
    return "\n".join(lines)


def with_step_kernels(document: dict[str, Any], kernels: dict[str, Any]) -> dict[str, Any]:
    """The race with the steps of ``gpu_kernels.py`` beside it: the cut that is the default, of the same numbers of rows."""
    steps = {
        (graph.removeprefix("decode."), run["rows"]): run["cuts"][run.get("chosen", 0)][graph]
        for run in kernels["runs"]
        for graph in run["cuts"][0]
        if graph != "tuning"
    }
    cases = []
    for case in document["cases"]:
        found = steps.get((case["case"], case["rows"]))
        beside = {} if found is None or "event_ms" not in found else {f"{OURS} (alone)": {"event_ms": found["event_ms"]}}
        cases.append({**case, "contenders": {**case["contenders"], **beside}})
    return {**document, "cases": cases}


def draw(document: dict[str, Any], file: Path) -> None:
    """Bars of tokens per second between events, a panel for each case."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "motrt"  # the same figures give the same file
    cases = document["cases"]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5.6 * columns, 2.8 * rows), constrained_layout=True, squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    for panel, case in zip(panels.flat, cases, strict=False):
        measured = {name: one["event_ms"]["median"] for name, one in case["contenders"].items() if "event_ms" in one}
        bars = {name: 1000 * case["rows"] / taken for name, taken in measured.items()}
        names = sorted(bars, key=lambda name: bars[name])
        colours = ["#1f6f8b" if name.startswith((OURS, *OPERATORS.values())) else "#b8b8b8" for name in names]
        drawn = panel.barh(names, [bars[name] for name in names], color=colours)
        panel.bar_label(drawn, fmt="%.0f", padding=3)
        panel.set_title(f"{case['case']}, rows: {case['rows']}", loc="left")
        panel.set_xlabel("tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def _read(file: Path, holds: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as failure:
        raise click.ClickException(f"{file} is no JSON document ({failure}): name what --json wrote") from None
    if not isinstance(document, dict) or holds not in document:
        raise click.ClickException(f"{file} holds no {holds!r}: name what --json of gpu_decode.py or gpu_kernels.py wrote")
    return document


def _draw_again(found: Path, kernels: Path | None, chart: Path | None) -> None:
    document = _read(found, "cases")
    click.echo(table_of(document))
    if kernels is not None:
        document = with_step_kernels(document, _read(kernels, "runs"))
    if chart is not None:
        draw(document, chart)


PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.option("--model", type=PATH, help="The checkpoint that the bundles are made of.")
@click.option("--bundle", "bundles", type=PATH, multiple=True, help="A bundle for cuda; may be given again.")
@click.option("--rows", multiple=True, type=click.IntRange(1, 1024), default=(1, 8, 64), show_default=True)
@click.option("--compile/--no-compile", "compiles", default=True, help="Race PyTorch compiled, too.")
@click.option("--seconds", type=float, default=240.0, show_default=True, help="Most for one group of contenders.")
@click.option("--json", "json_file", type=PATH)
@click.option("--chart", type=PATH)
@click.option("--found", type=FILE, help="Draw what was found before, and measure nothing.")
@click.option("--kernels", type=FILE, help="What gpu_kernels.py found, to be drawn beside it.")
def main(
    model: Path | None,
    bundles: tuple[Path, ...],
    rows: tuple[int, ...],
    compiles: bool,
    seconds: float,
    json_file: Path | None,
    chart: Path | None,
    found: Path | None,
    kernels: Path | None,
) -> None:
    """Race every group; a table on standard error, one JSON document last. Exits with 1 where nothing was measured."""
    if found is not None:
        _draw_again(found, kernels, chart)
        return
    if model is None or not bundles:
        raise click.UsageError("name --model and --bundle to measure, or --found to draw")
    if (gpus := find_gpus()).first is None:
        raise click.ClickException(f"this measures a GPU, and there is none: {gpus.reason}")

    def keep(document: dict[str, Any]) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    document = race(model, bundles, rows, compiles, seconds, keep)
    click.echo(table_of(document), err=True)
    leave(document, json_file)
    if not any(EAGER in case["contenders"] for case in document["cases"]):
        raise click.ClickException("nothing was measured: see the groups' `ended`")
    if chart is not None:
        draw(document, chart)


if __name__ == "__main__":
    main()
