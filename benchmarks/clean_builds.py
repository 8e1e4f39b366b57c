"""Does the gate leave alone what is right? Many bundles without a fault, and every one that it refused.

    .venv/bin/python benchmarks/clean_builds.py --count 200 --json benchmarks/results/clean_builds.json --markdown docs/gate.md

Seeds, sizes, routings, heads and precisions; ``--outliers`` makes weights stand out besides. Each is exported and verified as
``motrt verify --bisect`` verifies it, a worker on each core. A graph that FAILs, or a part over its budget, is a false alarm;
AMBIGUOUS is counted apart, and so are formats that lose more than their budget (in the document): no fault of the graph. Exit
code 1 where there was a false alarm, or an export that was refused.
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track

from motrt.benchmarks.builds import Build, traces_shared
from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.gate_page import write_section
from motrt.errors import MotrtError
from motrt.export.bundle_from_checkpoint import QuantizeOptions
from motrt.export.parity.findings import LOSS
from motrt.export.verification import VerifyOptions, verify_bundle
from motrt.model_def.config import AdapterExpert, Modality, ModelConfig, RopeConfig, RopeScaling, SwigluExpert
from motrt.model_def.graph import Target

TINY = ModelConfig.tiny()
TEXT, AUDIO = TINY.modalities

# Every configuration is traced once (some ten seconds), and then shared by all builds of it.
CONFIGS = {
    "two modalities": TINY,
    "shared head": TINY.replace(head="shared"),
    "tied head, shared attention, norms of q and k": TINY.replace(
        head="shared", tied_embeddings=True, routed_attention=False, qk_norm=True
    ),
    "one modality": TINY.replace(modalities=(TEXT,), head="shared"),
    "three modalities": TINY.replace(modalities=(TEXT, AUDIO, Modality("picture", 17, SwigluExpert(64, bias=True)))),
    "equal experts with biases": TINY.replace(
        modalities=(Modality("text", 96, SwigluExpert(96, bias=True)), Modality("audio", 32, SwigluExpert(96, bias=True)))
    ),
    "halves rotated, one layer": TINY.replace(num_layers=1, rope=RopeConfig(theta=10_000.0, style="half")),
    "scaled rotation, four layers": TINY.replace(num_layers=4, rope=replace(TINY.rope, scaling=RopeScaling())),
    "wider, more heads": TINY.replace(
        model_width=128,
        num_heads=8,
        num_kv_heads=4,
        modalities=(Modality("text", 600, SwigluExpert(256)), Modality("audio", 64, AdapterExpert(64, 128), 4, 50.0)),
    ),
}

FORMATS: dict[str, tuple[str, QuantizeOptions | None]] = {
    "fp32": ("fp32", None),
    "fp16": ("fp16", None),
    "int8": ("int8", None),
    "int4": ("int4", None),
    "int4, zero points": ("int4", QuantizeOptions(symmetric=False)),
    "int4, head int8": ("int4", QuantizeOptions(parts=("head=int8",))),
    "int4, blocks of 32": ("int4", QuantizeOptions(block_size=32)),
    "int8, absmax": ("int8", QuantizeOptions(scales="absmax")),
}

# With a graph for each step besides, in a precision that a CPU computes; each graph is a trace of its own, so of few models.
FOR_CUDA: dict[str, tuple[str, QuantizeOptions | None]] = {
    "fp32, for cuda": ("fp32", None),
    "int4, for cuda": ("int4", QuantizeOptions(activations="fp32")),
}
CONFIGS_FOR_CUDA = ("one modality", "halves rotated, one layer")


def drawn(count: int, outliers: float = 1.0) -> list[tuple[str, str, Build]]:
    """As many builds as wanted, every configuration in every format in turn, each of another seed."""
    pairs = [(config, kind) for config in CONFIGS for kind in FORMATS]
    pairs += [(config, kind) for config in CONFIGS_FOR_CUDA for kind in FOR_CUDA]
    found = []
    for number in range(count):
        config, kind = pairs[number % len(pairs)]
        precision, options = (FORMATS | FOR_CUDA)[kind]
        target: Target = "cuda" if kind in FOR_CUDA else "onnx"
        found.append((config, kind, Build(CONFIGS[config], precision, target, options, number, outliers=outliers)))
    return found


def ask(build: Build, folder: Path) -> dict[str, Any]:
    """Return the verdict, what was wrong with the graph, whether its format loses too much, and the most of any limit."""
    try:
        report = verify_bundle(build.make(folder), options=VerifyOptions(bisect=True))
    except MotrtError as refusal:
        return {"verdict": "REFUSED", "loss": None, "share": 0.0, "wrong": str(refusal)}
    wrong = [str(one) for one in report.failed if one.rung != LOSS]
    bisected: dict[str, Any] = report.evidence["bisect"]
    if bisected["first"] is not None or bisected["broken"]:
        wrong.append(f"bisect: {bisected['sentence']}")
    shares = [share_of(one.figures) for one in report.findings if "limit" in one.figures]
    shares += [float(one["error"]) / float(one["budget"]) for one in bisected["parts"]]
    verdict = "FALSE ALARM" if wrong else report.verdict.value
    told = {"verdict": verdict, "loss": report.loss, "share": round(max(shares), 3)}
    return told | ({"wrong": "; ".join(wrong)} if wrong else {})


def share_of(figures: Mapping[str, Any]) -> float:
    """Return how much of its limit a finding's worst row came to."""
    return float(figures["share"] if "share" in figures else figures["relative_l2_max"] / figures["limit"])


def tell(task: tuple[str, str, Build]) -> dict[str, Any]:
    """Return one build's line of the document."""
    config, kind, build = task
    with tempfile.TemporaryDirectory() as folder:
        return {"config": config, "format": kind, "seed": build.seed} | ask(build, Path(folder))


_until_the_end = ExitStack()  # a worker's: what nobody holds is ended at once


def begin(cores: "Queue[int]") -> None:
    """A worker's start: a core of its own, and traces that its builds share."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)
    _until_the_end.enter_context(traces_shared())


@click.command()
@click.option("--count", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--outliers", type=click.FloatRange(1), default=1.0, help="Norms and embedding so many times as large in some channels."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the counts between the marks of this file.")
def main(count: int, outliers: float, json_file: Path | None, markdown: Path | None) -> None:
    """Build, verify, count; one JSON document last."""
    if markdown is not None and outliers > 1:
        raise click.UsageError("the page holds the counts of builds without outliers: leave --markdown or --outliers out")
    console = Console(stderr=True)
    places = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    context = get_context("spawn")
    cores: Queue[int] = context.Queue()
    for place in places:
        cores.put(place)
    told: list[dict[str, Any]] = []
    with context.Pool(len(places), begin, (cores,)) as workers:
        for one in track(workers.imap(tell, drawn(count, outliers)), "build and verify", total=count, console=console):
            told.append(one)
            if "wrong" in one:
                console.print(f"{one['config']}, {one['format']}, seed {one['seed']}: {one['wrong']}", markup=False)
    verdicts = Counter(one["verdict"] for one in told)
    alarms = [one for one in told if "wrong" in one]
    if markdown is not None:
        lines = ["| | builds | PASS | AMBIGUOUS | false alarms | most of a limit |", "|---|---|---|---|---|---|"]
        for kind in (*FORMATS, *FOR_CUDA):
            mine = [one for one in told if one["format"] == kind]
            if mine:
                counts = Counter(one["verdict"] for one in mine)
                refused, share = sum("wrong" in one for one in mine), max(one["share"] for one in mine)
                lines.append(f"| {kind} | {len(mine)} | {counts['PASS']} | {counts['AMBIGUOUS']} | {refused} | {share:.0%} |")
        write_section(markdown, "clean builds", "\n".join(lines))
    over = sum(one["loss"] == "over" for one in told)
    document = {"machine": machine("motrt", "onnxruntime", "torch"), "outliers": outliers, "verdicts": dict(verdicts)}
    leave(document | {"over_their_budget": over, "builds": told}, json_file)
    sys.exit(1 if alarms else 0)


if __name__ == "__main__":
    main()
