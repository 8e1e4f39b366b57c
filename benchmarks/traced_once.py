r"""What is left out of PyTorch's way to a graph would cost: tracing with and without it, in turn.

    .venv/bin/python benchmarks/traced_once.py --preset tiny --preset small --preset llama-3.2-1b \
        --json benchmarks/results/traced_once.json

Left out are PyTorch's second trace, and the one rule of onnxscript's rewriter that looks at all nodes for every node. No
weights are made. Ratios are of medians; the operators of all graphs are compared.
"""

import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import click
import onnx_ir as ir
from rich.console import Console

from motrt.benchmarks.document import leave, machine
from motrt.export import onnx_from_module
from motrt.export.report import table
from motrt.model_def.config import PRESETS, ModelConfig

USUAL = "as exported"


def ways() -> dict[str, AbstractContextManager[Any]]:
    """Return the ways to trace, each to be entered once."""
    return {
        USUAL: nullcontext(),
        "traced twice": patch.object(onnx_from_module, "_traced_once", nullcontext),
        "every rule": patch.object(onnx_from_module, "REWRITES", None),
    }


def timed(config: ModelConfig) -> tuple[float, Counter[str]]:
    """Return the seconds that a trace takes, and how many operators of each type it has."""
    started = time.perf_counter()
    model: ir.Model = onnx_from_module.trace(config, "float32")
    return time.perf_counter() - started, Counter(node.op_type for node in model.graph)


def compare(config: ModelConfig, turns: int) -> dict[str, Any]:
    """Trace every way, ``turns`` times each, one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in ways()}
    found: list[Counter[str]] = []
    for _ in range(turns):
        for name, way in ways().items():
            with way:
                took, operators = timed(config)
            seconds[name].append(took)
            found.append(operators)
    usual = median(seconds[USUAL])
    figures = {name: {"s": round(median(some), 2), "ratio": round(median(some) / usual, 2)} for name, some in seconds.items()}
    return {"ways": figures, "turns": turns, "same_operators": all(one == found[0] for one in found)}


@click.command()
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), default=("tiny",), show_default=True)
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(presets: tuple[str, ...], turns: int, json_file: Path | None) -> None:
    """Trace in turn; one JSON document last."""
    timed(PRESETS["tiny"])  # what is imported on the way is no part of a trace
    found = {name: compare(PRESETS[name], turns) for name in presets}
    rows = [
        (
            name,
            str(PRESETS[name].num_layers),
            *(f"{way['s']} ({way['ratio']})" for way in one["ways"].values()),
            "yes" if one["same_operators"] else "NO",
        )
        for name, one in found.items()
    ]
    columns = ["preset", "layers>", *(f"{name}: s>" for name in ways()), "same operators"]
    Console(stderr=True).print(table("seconds of a trace (times as many)", columns, rows))
    leave({"machine": machine("motrt", "torch", "onnxscript"), "presets": found}, json_file)


if __name__ == "__main__":
    main()
