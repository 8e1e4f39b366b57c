"""The catalogue of ``faults`` planted into a bundle of a trained model, and whether the gate sees each one.

    .venv/bin/python benchmarks/faults_in_trained_models.py BUNDLE --name SmolLM2 --json FILE --markdown docs/gate.md

Faults of files are left to the hashes. A fault whose weight, modality or operator the model does not have, or that changes no
bit of what the model computes (a mask of one modality, say), does not apply, and is listed. The reference is asked once for all
faults, and a fault is asked only until something sees it. P1 comes last: it compares what is stored, and sees every fault of a
weight whatever the limits are. Exit code 1 where a fault that applies went through.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from onnx import TensorProto
from rich.console import Console
from rich.progress import track

from motrt.benchmarks.doctored import Doctored
from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.faults import FAULTS, Fault
from motrt.benchmarks.gate_page import write_section
from motrt.errors import MotrtError
from motrt.export.parity.agreement import agreement_findings, compare, noise_of
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.contract import contract_findings
from motrt.export.parity.findings import Finding, Outcome
from motrt.export.parity.gate import Expectation, Subject, reference
from motrt.export.parity.generation import generation_findings
from motrt.export.parity.routing_laws import law_findings
from motrt.export.parity.scenarios import Observation, Scenario, observe
from motrt.export.verification import subject_of
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.runtime.bundle import open_bundle, sha256_of
from motrt.runtime.load import source_of
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Session

# What a catalogue written for small models says of others: its bundles in the precisions of their own.
BUILDS_OF = {
    "fp32": ("fp32", "equal experts, biases", "tied, q/k norms", "half rotation"),
    "fp16": ("fp16",),
    "int4": ("int4",),
}


class DoctoredTrained(Doctored):
    """A copy in which a weight is found under the route that this model has."""

    def tensor(self, name: str) -> TensorProto:
        names = set(self.names())
        routes = {"text", "audio", "shared", *self.config.modality_names}
        others = [name.replace(f".{one}.", f".{other}.") for one in sorted(routes) for other in sorted(routes)]
        return super().tensor(next(one for one in (name, *others) if one in names))


@dataclass(frozen=True)
class Seen:
    """What became of one fault.

    Attributes:
        fault: which one.
        by: the first rung that saw it; empty where none did; ``-`` where it does not apply.
        detail: the first failing finding, or why it does not apply.
    """

    fault: Fault
    by: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        return {"fault": self.fault.name, "kind": self.fault.kind, "seen_by": self.by, "detail": self.detail}


def plant(fault: Fault, bundle: Path, folder: Path) -> str:
    """Plant ``fault`` into a copy of ``bundle``; returns why it does not apply, or nothing."""
    before = digest(bundle)
    doctored = DoctoredTrained(bundle, folder)
    try:
        fault.plant(doctored)
        doctored.vouch()
    except (LookupError, StopIteration, AssertionError, ValueError, AttributeError, TypeError) as missing:
        return f"the model has no place for it ({type(missing).__name__}: {missing})"[:120]
    return "it changes nothing here" if digest(folder) == before else ""


def digest(bundle: Path) -> str:
    """Return a hash of graph and weights, written in one order."""
    from onnx import load

    found = hashlib.sha256()
    nodes = sorted(node.SerializeToString() for node in load(bundle / "model.onnx", load_external_data=False).graph.node)
    for node in nodes:
        found.update(node)
    for file in sorted(bundle.glob("*.data")) or sorted(bundle.glob("*.bin")):
        found.update(sha256_of(file).encode())
    return found.hexdigest()


def questions(session: Session, expected: Expectation, config: ModelConfig) -> Iterator[Callable[[], list[Finding]]]:
    """Yield what is asked, the cheapest first."""
    usual = [one for one in expected.scenarios if one[0].watched_from == 0]
    yield lambda: agreement_findings(session, compare(session, usual[:1], expected.limits))
    yield lambda: agreement_findings(session, compare(session, usual[1:], expected.limits))
    yield lambda: law_findings(session, expected.limits)
    yield lambda: consistency_findings(session, expected.limits)
    rest = [one for one in expected.scenarios if one[0].watched_from > 0]
    compared = compare(session, rest, expected.limits) if rest else []
    yield lambda: agreement_findings(session, compared)
    yield lambda: generation_findings(session, expected.plans, noise_of(compared), expected.limits)


def first_failure(session: Session, expected: Expectation) -> tuple[str, str]:
    """Return the rung that sees something, and what; nothing where none does."""
    try:
        for ask in questions(session, expected, session.config):
            if (found := failure(ask())) is not None:
                return found
    except MotrtError as refusal:
        return "refused", str(refusal)
    return "", ""


def failure(findings: Sequence[Finding]) -> tuple[str, str] | None:
    """Return the rung and words of the first finding that fails."""
    failed = next((one for one in findings if one.outcome is Outcome.FAIL), None)
    return None if failed is None else (failed.rung, f"{failed.question}: {failed.detail}")


@dataclass(frozen=True)
class Clean:
    """The model without a fault.

    Attributes:
        subject: its graph.
        checkpoint: what it was made of.
        expected: what the reference gave.
        computed: what its session gave to the usual scenarios.
    """

    subject: Subject
    checkpoint: Checkpoint
    expected: Expectation
    computed: Sequence[Observation]

    @property
    def usual(self) -> list[Scenario]:
        return [scenario for scenario, _ in self.expected.scenarios if scenario.watched_from == 0]

    def is_computed_by(self, session: Session) -> bool:
        """Whether ``session`` gives every bit of what the model without a fault gives."""
        found = [one for scenario in self.usual for one in observe(session, scenario)]
        return all(
            np.array_equal(a.logits, b.logits) and a.leaked == b.leaked for a, b in zip(self.computed, found, strict=True)
        )

    def contract(self, folder: Path) -> tuple[str, str] | None:
        """Return what P1 says of a graph that lies in ``folder``."""
        one = self.subject
        file = folder / one.model_file.name
        return failure(contract_findings(file, one.config, one.dtype, self.checkpoint, lambda count: None, one.quantization))


def examine(fault: Fault, bundle: Path, clean: Clean, work: Path) -> Seen:
    """Plant ``fault`` and ask until something sees it."""
    subject, folder = clean.subject, work / "planted"
    if fault.kind == "session":
        with fault.plant(subject.model_file, subject.config, 0) as session:
            by, detail = first_failure(session, clean.expected)
            if not by and clean.is_computed_by(session):
                return Seen(fault, "-", "it changes nothing here")
            return Seen(fault, by, detail)
    try:
        if why_not := plant(fault, bundle, folder):
            return Seen(fault, "-", why_not)
        file = folder / subject.model_file.name
        with OnnxSession(file, subject.config, 0, quantization=subject.quantization, exact_activations=True) as session:
            by, detail = first_failure(session, clean.expected)
            if not by and clean.is_computed_by(session):
                return Seen(fault, "-", "it changes nothing here")
        return Seen(fault, *((by, detail) if by else clean.contract(folder) or ("", "")))
    except MotrtError as refusal:
        return Seen(fault, "refused", str(refusal)[:200])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def applicable(precision: str, quantized: bool) -> list[Fault]:
    """Return the faults of the catalogue that are for a format, but for those of files and of derived graphs."""
    builds = BUILDS_OF["int4" if quantized else precision]
    return [one for one in FAULTS if one.build in builds and one.kind != "files" and one.graph == "model"]


def section(found: list[Seen]) -> str:
    """Return the table for the page."""
    asked = [one for one in found if one.by != "-"]
    missed = [one for one in asked if not one.by]
    lines = [
        f"{len(asked) - len(missed)} of {len(asked)} faults that apply were caught; {len(found) - len(asked)} do not apply.",
        "",
        "| planted | caught by |",
        "|---|---|",
        *(f"| {one.fault.name} | {one.by or 'MISSED'} |" for one in asked),
    ]
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Of the model, for the page.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What it was made of; found by itself where it lay.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table between the marks of this file.")
def main(bundle: Path, name: str, checkpoint: Path | None, json_file: Path | None, markdown: Path | None) -> None:
    """Plant, ask, count; one JSON document last."""
    console = Console(stderr=True)
    opened = open_bundle(bundle)
    subject, source = subject_of(opened), open_checkpoint(checkpoint or source_of(opened))
    expected = reference(subject.config, source, subject.precision, weights=subject.weights())
    with subject.open(0) as session:
        by, detail = first_failure(session, expected)
        if by:
            raise click.ClickException(f"the bundle itself fails: {by} {detail}")
        usual = [scenario for scenario, _ in expected.scenarios if scenario.watched_from == 0]
        clean = Clean(subject, source, expected, [one for scenario in usual for one in observe(session, scenario)])
    found: list[Seen] = []
    chosen = applicable(subject.precision, subject.quantization is not None)
    with tempfile.TemporaryDirectory(dir=bundle.resolve().parent) as work:
        for fault in track(chosen, "planting", console=console):
            found.append(examine(fault, bundle, clean, Path(work)))
            console.print(f"{found[-1].by or 'MISSED'}: {fault.name}: {found[-1].detail[:160]}", markup=False)
    if markdown is not None:
        write_section(markdown, f"planted faults, {name}", section(found))
    document: dict[str, Any] = {"machine": machine("motrt", "onnxruntime", "torch"), "model": name}
    leave(document | {"faults": [one.to_dict() for one in found]}, json_file)
    sys.exit(1 if any(not one.by for one in found) else 0)


if __name__ == "__main__":
    main()
