"""A fault planted in a real bundle, and what the gate says of it.

A fault in a file is given a manifest that vouches for it: it is as if the exporter itself had made it, and nothing but the
ladder stands between it and a service. Faults of the kind ``files`` are not: there the manifest is what must tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motrt.benchmarks.doctored import Doctored
from motrt.benchmarks.faults import Fault
from motrt.errors import MotrtError
from motrt.export.parity.findings import Outcome, Report
from motrt.export.parity.gate import Extras, climb_session
from motrt.export.steps import Steps
from motrt.export.verification import VerifyOptions, subject_of, verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime.bundle import open_bundle
from motrt.runtime.onnx_session import OnnxSession


@dataclass(frozen=True)
class Examined:
    """What the gate said of one fault.

    Attributes:
        fault: which one.
        rungs: those with a failing finding; ``hash`` where the manifest told, ``refused`` where nothing could be run.
        first: the first failing finding, in its own words.
        named: the place that was named; empty where none was.
        is_named_right: whether that is the place, or rightly none.
    """

    fault: Fault
    rungs: tuple[str, ...]
    first: str
    named: str
    is_named_right: bool

    @property
    def is_caught(self) -> bool:
        return bool(self.rungs)

    @property
    def rungs_above(self) -> tuple[str, ...]:
        """What would have caught it had P1 not been asked; ``bisect`` among them."""
        above = tuple(one for one in self.rungs if one != "P1")
        return (*above, "bisect") if self.named and not self.named.startswith("P1") else above

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "fault": self.fault.name,
            "kind": self.fault.kind,
            "bundle": self.fault.build,
            "caught_by": list(self.rungs),
            "without_p1": list(self.rungs_above),
            "expected_place": _place_words(self.fault),
            "named": self.named,
            "place_is_right": self.is_named_right,
        }


def _place_words(fault: Fault) -> str:
    """Where it is, as the bisection names places."""
    if fault.place is None:
        return fault.weight or ""
    layer, part = fault.place
    words = part if layer is None else f"layer {layer}, {part}"
    return words if fault.graph == "model" else f"{fault.graph}: {words}"


def examine(fault: Fault, bundles: Mapping[str, Path], work: Path) -> Examined:
    """Plant ``fault`` in a copy of its bundle, and let the gate look.

    Args:
        fault: which one.
        bundles: every bundle of ``BUILDS`` that is needed, by name; the checkpoint of each lies beside it.
        work: a folder for the copy; it must not be there.
    """
    bundle = bundles[fault.build]
    if fault.kind == "session":
        return _judged(fault, _climb_with(fault.plant, bundle))
    try:
        if fault.kind == "files":
            planted = fault.plant(bundle, work, bundles)
        else:
            doctored = Doctored(bundle, work, f"{fault.graph}.onnx")
            fault.plant(doctored)
            planted = doctored.vouch()
        report = verify_bundle(planted, bundle.parent / "checkpoint", num_threads=1, options=VerifyOptions(bisect=True))
    except MotrtError as refusal:
        rung = "hash" if fault.kind == "files" else "refused"
        return Examined(fault, (rung,), str(refusal), "", fault.place is None)
    return _judged(fault, report)


def _climb_with(kind: type[OnnxSession], bundle: Path) -> Report:
    opened = open_bundle(bundle)
    checkpoint = open_checkpoint(bundle.parent / "checkpoint")
    return climb_session(
        lambda: kind(opened.model_path, opened.config, 1),
        opened.config,
        checkpoint,
        Steps(),
        {},
        Extras(is_dissected=True),
        subject_of(opened),
    )


def _judged(fault: Fault, report: Report) -> Examined:
    failed = [one for one in report.findings if one.outcome is Outcome.FAIL]
    rungs = tuple(sorted({one.rung for one in failed}))
    told = report.evidence["bisect"]
    named, is_right = _named(fault, told)
    by_p1 = next((one for one in failed if fault.weight is not None and one.rung == "P1" and fault.weight in one.detail), None)
    if not named and by_p1 is not None:
        named, is_right = f"P1: {fault.weight}", fault.place is None
    elif fault.weight is not None:
        is_right = is_right and fault.place is not None
    return Examined(fault, rungs, str(failed[0]) if failed else "", named, is_right)


def _named(fault: Fault, told: Mapping[str, Any]) -> tuple[str, bool]:
    """The place that the bisection names, and whether it is the right one."""
    if told["broken"]:
        layer = None if fault.place is None else fault.place[0]
        is_right = fault.place is not None and f"layer {layer}" in told["broken"] and told["graph"] == fault.graph
        return told["broken"], is_right
    if told["first"] is None:
        return "", fault.place is None
    first = told["first"]
    words = first["part"] if first["layer"] == "outside the layers" else f"{first['layer']}, {first['part']}"
    named = words if told["graph"] == "model" else f"{told['graph']}: {words}"
    return named, named == _place_words(fault) and fault.place is not None
