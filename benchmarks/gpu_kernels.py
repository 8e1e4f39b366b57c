"""The step kernels alone on a GPU, cut in many ways: how long a step takes, and each kernel of it. Random weights, no bundle.

    python benchmarks/gpu_kernels.py --json found.json

For each cut the whole step is captured, replayed behind a kernel that keeps the GPU busy, and timed between two events; a cut
whose logits are not those of the first is told. The kernels of the first are then timed one by one, without overlap.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.gpu_contender import Clock, measure_bandwidth, profiled, spread
from motrt.model_def.config import PRESETS, ModelConfig
from motrt.model_def.graph import Graph, plan_for
from motrt.model_def.parameters import num_parameters_read, parameters
from motrt.runtime.cuda_compiler import CudaModule, compiled
from motrt.runtime.cuda_device import CudaDevice
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.step_kernels import SOURCE, StepKernels, StepShape, Tuning

BASE = Tuning()
CUTS = [
    BASE,
    replace(BASE, overlaps=False),
    *(replace(BASE, ahead=ahead) for ahead in (4, 8)),
    *(replace(BASE, max_blocks=blocks, max_tiles=tiles) for blocks, tiles in ((2, 1), (4, 4), (16, 8))),
    *(replace(BASE, min_keys=count) for count in (64, 128)),
    *(replace(BASE, max_splits=count) for count in (8, 32)),
    replace(BASE, threads=512),
    replace(BASE, ahead=8, min_keys=64),
]
NUM_KEYS, NUM_TIMED = 256, 50


class Compiled(CudaDevice):
    """A device whose modules are compiled beforehand, many at a time."""

    code: dict[tuple[tuple[str, str], ...], bytes]

    def compile(self, source: str, macros: dict[str, str]) -> CudaModule:
        return self.load(self.code[tuple(macros.items())])

    def compile_all(self, shapes: list[StepShape]) -> None:
        source = SOURCE.read_text("utf-8")
        with ThreadPoolExecutor(16) as pool:
            made = pool.map(lambda shape: compiled(source, shape.macros, self.capability), shapes)
            self.code = {tuple(shape.macros.items()): code for shape, code in zip(shapes, made, strict=True)}


class Bench:
    """Random weights and caches of one model, and the kernels over them."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        self.config, self.rows, self.device = config, rows, Compiled()
        torch.manual_seed(0)
        made: Callable[..., Any] = lambda *shape, scale: (torch.randn(*shape, device="cuda") * scale).bfloat16()  # noqa: E731
        self.weights = {one.name: made(*one.shape, scale=one.shape[-1] ** -0.5) for one in parameters(config)}
        for name, value in self.weights.items():
            if "norm" in name:
                value.fill_(1.0)
        shape = (rows, config.num_kv_heads, config.max_seq_len, config.head_size)
        self.caches = [(made(*shape, scale=1.0), made(*shape, scale=1.0)) for _ in range(config.num_layers)]
        torch.cuda.synchronize()

    def compile_all(self, cuts: list[Tuning]) -> None:
        shapes = [
            StepShape(self.config, "bfloat16", modality, self.rows, self.device.num_multiprocessors, cut)
            for cut in cuts
            for modality in range(len(self.config.modalities))
        ]
        self.device.compile_all(shapes)

    def step(self, graph: Graph, cut: Tuning, clock: Clock) -> Callable[[], Any]:
        kernels = StepKernels(self.config, "bfloat16", self.device, lambda name: int(self.weights[name].data_ptr()), cut)
        pairs = [(int(keys.data_ptr()), int(values.data_ptr())) for keys, values in self.caches]
        step = kernels.capture(graph, self.rows, pairs)
        replay = step.replay
        assert graph.tokens is not None
        ids = np.full((self.rows, 1), self.config.id_ranges[graph.tokens].start + 7)
        none = np.empty(0, np.int64)
        inputs = StepInputs(ids, none, np.full(self.rows, NUM_KEYS), np.arange(self.rows), none)

        def clocked() -> None:
            clock.start()
            replay()
            clock.stop()

        step.replay = clocked
        return lambda: kernels.run(step, inputs)


def measured(config: ModelConfig, rows: int, cuts: list[Tuning], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    bench, clock = Bench(config, rows), Clock(on_gpu=True)
    document: dict[str, Any] = {"rows": rows, "cuts": []}
    bench.compile_all(cuts)
    steps = [one for one in plan_for("cuda", config) if one.is_step and one.tokens == one.predicts]
    with torch.cuda.stream(torch.cuda.ExternalStream(bench.device.stream)):  # type: ignore[no-untyped-call]
        right: dict[str, Any] = {}
        for cut in cuts:
            found: dict[str, Any] = {"tuning": asdict(cut)}
            for graph in steps:
                found[graph.name] = _tried(partial(_timed, bench, graph, cut, clock, right))
            document["cuts"].append(found)
            keep(document)
            shown = "  ".join(
                f"{graph.name} {found[graph.name].get('event_ms', {}).get('median', found[graph.name])}" for graph in steps
            )
            click.echo(f"rows {rows}  {cut}  {shown}", err=True)
        for graph in steps:
            alone = profiled(bench.step(graph, replace(BASE, overlaps=False), clock))
            overlapped = profiled(bench.step(graph, BASE, clock))
            document[graph.name] = {
                "bytes": 2 * num_parameters_read(config, graph.name.removeprefix("decode.")),
                "one_by_one": alone,
                "overlapped": overlapped,
            }
            keep(document)
    return document


def _tried(time_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return time_it()
    except Exception as failure:
        return {"missing": f"{type(failure).__name__}: {failure}"[:1000]}


def _timed(bench: Bench, graph: Graph, cut: Tuning, clock: Clock, right: dict[str, Any]) -> dict[str, Any]:
    step = bench.step(graph, cut, clock)
    for _ in range(5):
        logits = step()
    logits = logits[np.isfinite(logits)]
    expected = right.setdefault(graph.name, logits.copy())
    difference = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    clock.is_on = True
    clock.take()
    events = []
    for _ in range(NUM_TIMED):
        step()
        events.append(clock.take() or 0.0)
    clock.is_on = False
    return {"event_ms": spread(events), "difference": difference}


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llama-3.2-1b", show_default=True)
@click.option("--rows", multiple=True, type=click.IntRange(1, 8), default=(1, 2, 4, 8), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(preset: str, rows: tuple[int, ...], json_file: Path | None) -> None:
    """Time every cut; one JSON document last."""
    if not torch.cuda.is_available():
        raise click.ClickException("this measures a GPU, and PyTorch finds none here")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # torch's profiler beside CUDA graphs
    config = ModelConfig.preset(preset).replace(max_seq_len=1024)
    document: dict[str, Any] = {"machine": machine("motrt", "torch"), "keys": NUM_KEYS, "runs": []}
    document["bandwidth_bytes_per_s"] = measure_bandwidth(torch.device("cuda"))
    torch.cuda.empty_cache()

    def keep(one: dict[str, Any]) -> None:
        others = [run for run in document["runs"] if run["rows"] != one["rows"]]
        document["runs"] = [*others, one]
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    for count in rows:
        keep(measured(config, count, CUTS, keep))
    leave(document, json_file)


if __name__ == "__main__":
    main()
