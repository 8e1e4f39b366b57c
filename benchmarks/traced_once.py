r"""What PyTorch's second trace would cost: tracing with and without it, in turn.

    .venv/bin/python benchmarks/traced_once.py --preset tiny --preset small --preset llama-3.2-1b \
        --json benchmarks/results/traced_once.json

No weights are made. The ratio is of medians; the operators of both graphs are compared.
"""

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import click
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from motrt.benchmarks.document import leave, machine
from motrt.export import onnx_from_module
from motrt.model_def.config import PRESETS, ModelConfig


def timed(config: ModelConfig) -> tuple[float, ir.Model]:
    started = time.perf_counter()
    model = onnx_from_module.trace(config, "float32")
    return time.perf_counter() - started, model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def compare(config: ModelConfig, turns: int) -> dict[str, Any]:
    """Both ways, ``turns`` times each, one after the other."""
    once, twice, same = [], [], True
    for _ in range(turns):
        seconds, short = timed(config)
        once.append(seconds)
        with patch.object(onnx_from_module, "_traced_once", nullcontext):
            seconds, long = timed(config)
        twice.append(seconds)
        same = same and operators(short) == operators(long)
    figures = {"once_s": median(once), "twice_s": median(twice), "ratio": median(twice) / median(once)}
    return {name: round(value, 2) for name, value in figures.items()} | {"turns": turns, "same_operators": same}


@click.command()
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), default=("tiny",), show_default=True)
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(presets: tuple[str, ...], turns: int, json_file: Path | None) -> None:
    """Trace in turn; one JSON document last."""
    console = Console(stderr=True)
    timed(PRESETS["tiny"])  # what is imported on the way is no part of a trace
    found = {}
    table = Table("preset", "once: s", "twice: s", "ratio", "same operators")
    for name in presets:
        found[name] = one = compare(PRESETS[name], turns)
        table.add_row(
            name, str(one["once_s"]), str(one["twice_s"]), str(one["ratio"]), "yes" if one["same_operators"] else "NO"
        )
    console.print(table)
    leave({"machine": machine("motrt", "torch"), "presets": found}, json_file)


if __name__ == "__main__":
    main()
