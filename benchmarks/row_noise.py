"""How well a row's measured noise foretells its error, which is what the gate's limits rest on.

    .venv/bin/python benchmarks/row_noise.py BUNDLE [--json FILE]

Of every row that the gate compares: its error (onnxruntime against PyTorch), its noise, its limit, and their quotients.
``NOISE_SAFETY`` must be well above the largest error over noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from motrt.benchmarks.document import leave, machine
from motrt.export.parity.agreement import compare
from motrt.export.parity.gate import Expectation, Subject, reference, rounded_reference
from motrt.export.parity.row_noise import RowLimits
from motrt.export.report import table
from motrt.export.verification import subject_of
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime.bundle import open_bundle
from motrt.runtime.load import source_of
from motrt.runtime.tolerances import NOISE_SAFETY


def quotients(subject: Subject, expected: Expectation, exact: bool) -> dict[str, Any]:
    """Return how the errors of rows, their noise and the quotients of both are spread."""
    with subject.open(0, exact=exact) as session:
        compared = compare(session, expected.scenarios, expected.limits)
    errors = np.array([one.difference.relative_l2 for one in compared])
    noise = np.array([one.noise for one in compared])
    limits = np.array([one.limit for one in compared])
    return {
        "rows": len(compared),
        "error": spread(errors),
        "noise": spread(noise),
        "limit": spread(limits),
        "error_over_noise": spread(errors / noise),
        "error_over_limit": spread(errors / limits),
    }


def spread(values: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    """Return the 5th percentile, the median, the 95th percentile and the largest."""
    found = np.asarray(values, np.float64)
    at = {"p5": 0.05, "median": 0.5, "p95": 0.95, "largest": 1.0}
    return {name: float(np.quantile(found, share)) for name, share in at.items()}


def rounding_loss(expected: Expectation, rounded: Expectation) -> dict[str, float]:
    """Return how far 8-bit activations themselves move the logits, relative L2 by row."""
    pairs = [
        (a.logits.astype(np.float64), b.logits.astype(np.float64))
        for (_, said), (_, other) in zip(expected.scenarios, rounded.scenarios, strict=True)
        for a, b in zip(said, other, strict=True)
    ]
    return spread([float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs])


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What it was made of; found by itself where it lay.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, checkpoint: Path | None, json_file: Path | None) -> None:
    """Measure, then one JSON document last."""
    opened = open_bundle(bundle)
    subject, source = subject_of(opened), open_checkpoint(checkpoint or source_of(opened))
    weights = subject.weights()
    expected = reference(subject.config, source, subject.precision, weights=weights)
    found = {"graph": quotients(subject, expected, True)}
    document: dict[str, Any] = {"machine": machine("motrt", "onnxruntime", "torch"), "bundle": str(bundle), "spread": found}
    if weights is not None and (blocks := weights.quantization.activation_blocks(subject.config)):
        rounded = rounded_reference(subject.config, weights, blocks, subject.precision, expected)
        found["as deployed"] = quotients(subject, rounded, False)
        document["rounding_loss"] = rounding_loss(expected, rounded)
    lines = [
        (name, what, *(f"{spread[at]:.2g}" for at in ("p5", "median", "p95", "largest")))
        for name, spreads in found.items()
        for what, spread in spreads.items()
        if isinstance(spread, dict)
    ]
    columns = ["", "relative L2 by row", "5 %>", "median>", "95 %>", "largest>"]
    Console(stderr=True).print(table(f"{bundle}: NOISE_SAFETY is {NOISE_SAFETY:g}", columns, lines))
    leave(document | {"limits": limits_of(expected.limits)}, json_file)


def limits_of(limits: RowLimits) -> dict[str, Any]:
    return {**limits.to_dict(), "safety": NOISE_SAFETY}


if __name__ == "__main__":
    main()
