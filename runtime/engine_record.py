"""What the manifest says of one compiled engine, and whether it can run here. Imports no library.

An engine is code for one flavour and version of TensorRT, and for some GPUs: nothing is deserialised before the record is
compared with the machine, and nothing whose hash the manifest does not bear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from motrt.model_def.graph import Graph
from motrt.model_def.signature import BATCH, NEW_TOKENS, NUM_LOGITS
from motrt.runtime.versions import version_numbers

# What people call a symbolic dim, in errors.
DIM_NAMES = {BATCH: "rows", NEW_TOKENS: "new tokens per row", NUM_LOGITS: "rows of logits"}


@dataclass(frozen=True)
class Range:
    """Sizes of one symbolic dim that an engine takes: from ``least`` to ``most``, fastest at ``best``."""

    least: int
    best: int
    most: int


@dataclass(frozen=True)
class EngineRecord:
    """One engine file.

    Attributes:
        graph: the name of the graph that it was built of.
        file: its name in the bundle.
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        precision: ``fp16`` or ``bf16``.
        versions: of the TensorRT module that built it, and the CUDA version that the driver supported there.
        gpu: the GPU that it was built on; None for one that was built without.
        compute_capabilities: those that it was built for; none: portable over all that the flavour supports.
        ranges: by symbolic dim, the sizes that it takes.
        onnx_sha256: of the ONNX file that it was built of.
        sha256: its own.
        options: what else the builder was told.
        layers: how many of each layer the parsed network had.
        seconds: that the build took.
        parity: the gate's report of this very file, or None where no GPU was there to climb on.
    """

    graph: str
    file: str
    flavour: str
    precision: str
    versions: Mapping[str, str]
    gpu: str | None
    compute_capabilities: tuple[str, ...]
    ranges: Mapping[str, Range]
    onnx_sha256: str
    sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    parity: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {
            "graph": self.graph,
            "file": self.file,
            "flavour": self.flavour,
            "precision": self.precision,
            "versions": dict(self.versions),
            "gpu": self.gpu,
            "compute_capabilities": list(self.compute_capabilities),
            "ranges": {dim: [one.least, one.best, one.most] for dim, one in self.ranges.items()},
            "onnx_sha256": self.onnx_sha256,
            "sha256": self.sha256,
            "options": dict(self.options),
            "layers": dict(self.layers),
            "seconds": self.seconds,
            "parity": None if self.parity is None else dict(self.parity),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EngineRecord":
        """What ``to_dict`` gave; KeyError, TypeError or ValueError for anything else."""
        gpu, parity = values["gpu"], values["parity"]
        return cls(
            graph=str(values["graph"]),
            file=str(values["file"]),
            flavour=str(values["flavour"]),
            precision=str(values["precision"]),
            versions={name: str(version) for name, version in values["versions"].items()},
            gpu=None if gpu is None else str(gpu),
            compute_capabilities=tuple(map(str, values["compute_capabilities"])),
            ranges={dim: Range(*map(int, sizes)) for dim, sizes in values["ranges"].items()},
            onnx_sha256=str(values["onnx_sha256"]),
            sha256=str(values["sha256"]),
            options=dict(values["options"]),
            layers={name: int(count) for name, count in values["layers"].items()},
            seconds=float(values["seconds"]),
            parity=parity_report(parity),
        )

    def differences(self, versions: Mapping[str, str], gpu: str, compute_capability: str) -> list[str]:
        """Why this engine can not run on a machine, as sentences; none where it can.

        Args:
            versions: of the TensorRT module that would run it.
            gpu: the GPU's name there.
            compute_capability: the GPU's.
        """
        problems = []
        module = next(iter(versions))
        built, here = self.versions.get(module), versions[module]
        if built is None:
            problems.append(f"it was built by {self.flavour}, and {module} {here} would run it")
        elif built != here and not (self.options.get("version_compatible") and version_numbers(here) >= version_numbers(built)):
            problems.append(f"it was built by {module} {built}, and {here} is installed here")
        if self.compute_capabilities and compute_capability not in self.compute_capabilities:
            capabilities = ", ".join(self.compute_capabilities)
            problems.append(f"it was built for compute capability {capabilities}, and {gpu} has {compute_capability}")
        if self.flavour == "tensorrt" and self.gpu != gpu:
            if not self.options.get("hardware_compatible"):
                problems.append(f"it was built on {self.gpu}, and this is {gpu}")
            elif version_numbers(compute_capability) < (8,):
                problems.append(f"it was built for Ampere and later, and {gpu} has compute capability {compute_capability}")
        return problems

    def refusals(self, sizes: Mapping[str, int]) -> list[str]:
        """Which sizes of a request its profile can not hold, as sentences that name the dim and its range."""
        return [
            f"{DIM_NAMES.get(dim, dim)}: {size} asked, the engine takes {self.ranges[dim].least} to {self.ranges[dim].most}"
            for dim, size in sizes.items()
            if dim in self.ranges and not self.ranges[dim].least <= size <= self.ranges[dim].most
        ]


def parity_report(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A gate's report, which has a verdict and a backend, or None; KeyError, TypeError or ValueError for anything else."""
    if values is None:
        return None
    told = dict(values)
    return {**told, "verdict": str(told["verdict"]), "backend": str(told["backend"])}


def record_of(records: Sequence[EngineRecord], graph: Graph) -> EngineRecord | None:
    """The record of ``graph``'s engine; None where it has none."""
    return next((one for one in records if one.graph == graph.name), None)
