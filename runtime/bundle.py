"""The folder that is deployed: one graph, its weights, perhaps a tokenizer, and the manifest that vouches for them.

The manifest is written last: no manifest, no bundle. It carries the size and hash of every other file and a hash of
itself, so any flipped byte of any file is found: the manifest's always, the others' by size always and by hash when
asked. Nothing else is read: graphs that would read other files are refused (``graph_file``). Files may be links, to wherever:
what is hashed is what a session reads. This file imports neither torch nor onnx nor onnxruntime.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from motrt.errors import BundleError, ConfigError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.file_problem import file_problem, folder_problem
from motrt.model_def.graph import TARGETS, Graph, Target
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import CONTRACT_VERSION, DTYPE_OF_PRECISION, Signature
from motrt.runtime.engine_record import EngineRecord, parity_report
from motrt.runtime.evaluation_record import Evaluation
from motrt.runtime.graph_file import graph_problems
from motrt.runtime.known_answer import KnownAnswer

# Bump when an older runtime could misread the folder.
FORMAT_VERSION = 1

MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json"

_HASH_CHUNK = 1 << 22
_MOST_MANIFEST_BYTES = 1 << 26  # a thousand times what any export writes
_MOST_EVALUATIONS = 100  # kept in a manifest; the oldest go
_SELF_HASH = "manifest_sha256"
_REQUIRED = ("format_version", "config", "precision", "signature", "files", "source", "versions", "parity")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class WeightPlaces:
    """Where weights lie in the graphs' data file.

    Attributes:
        dtype: of all of them.
        places: by name, the first byte and the number of bytes.
    """

    dtype: str
    places: Mapping[str, tuple[int, int]]

    def problems(self, config: ModelConfig, file_bytes: int) -> list[str]:
        """What does not fit the model or the file; none where all does."""
        itemsize = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        wanted = {one.name: one.numel * itemsize for one in parameters(config)}
        return [
            f"{name} is said to have {count} bytes from {first}"
            for name, (first, count) in self.places.items()
            if wanted.get(name) != count or first < 0 or first + count > file_bytes
        ]


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        config: the model that the graph computes.
        precision: ``fp32``, ``fp16`` or ``bf16``, of activations and cache, and of the weights that are not quantised.
        files: every other file of the bundle, by name.
        source: where the checkpoint lay (``path``) and its ``sha256``.
        versions: of the packages that made the bundle.
        parity: the gate's report (``verdict`` and figures), or None where it was not run.
        operators: how many of each operator the canonical graph holds.
        target: what the bundle was made for.
        graphs: those derived of the canonical graph, most special first.
        engines: what was compiled of them.
        quantization: which weights are stored in fewer bits, and how; None: none.
        answer: what a session must say to a short question; None in bundles of older versions.
        evaluations: how well the bundle was found to predict texts, the latest last.
        weight_places: by name, the first byte and the number of bytes in ``model.onnx.data``, of the weights that are held as
            they are computed with; for targets whose sessions share them, none for others.
    """

    config: ModelConfig
    precision: str
    files: Mapping[str, FileRecord]
    source: Mapping[str, str]
    versions: Mapping[str, str]
    parity: Mapping[str, Any] | None = None
    operators: Mapping[str, int] = field(default_factory=dict)
    target: Target = "onnx"
    graphs: tuple[Graph, ...] = ()
    engines: tuple[EngineRecord, ...] = ()
    quantization: Quantization | None = None
    answer: KnownAnswer | None = None
    evaluations: tuple[Evaluation, ...] = ()
    weight_places: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        return Signature.canonical(self.config, DTYPE_OF_PRECISION[self.precision])

    @property
    def shared_weights(self) -> WeightPlaces:
        """What sessions of one process can share."""
        return WeightPlaces(DTYPE_OF_PRECISION[self.precision], self.weight_places)

    @property
    def weights(self) -> str:
        """What the products' weights are stored as, in a word: ``int4``, or the precision."""
        return self.precision if self.quantization is None else self.quantization.name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the hash of themselves."""
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "precision": self.precision,
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
            "signature": self.signature.to_dict(),
            "files": {name: {"bytes": one.num_bytes, "sha256": one.sha256} for name, one in self.files.items()},
            "source": dict(self.source),
            "versions": dict(self.versions),
            "operators": dict(self.operators),
            "target": self.target,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "engines": [engine.to_dict() for engine in self.engines],
            "parity": None if self.parity is None else dict(self.parity),
            "answer": None if self.answer is None else self.answer.to_dict(),
            **({"evaluations": [one.to_dict() for one in self.evaluations]} if self.evaluations else {}),
            "weight_places": {name: list(place) for name, place in self.weight_places.items()},
        }


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_FILE

    @property
    def num_bytes(self) -> int:
        """Of all files that the manifest names."""
        return sum(one.num_bytes for one in self.manifest.files.values())

    @property
    def tokenizer_path(self) -> Path | None:
        return self.path / TOKENIZER_FILE if TOKENIZER_FILE in self.manifest.files else None


def sha256_of(file: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The hash of a file, read in pieces; ``progress`` is told each piece's bytes."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def record_files(folder: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> dict[str, FileRecord]:
    """Size and hash of every file in ``folder``, by name."""
    return {
        file.name: FileRecord(file.stat().st_size, sha256_of(file, progress))
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST_FILE
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; the last thing that is written into a bundle."""
    (folder / MANIFEST_FILE).write_text(_canonical(manifest.to_dict()), encoding="utf-8")


def record_evaluation(bundle: Bundle, evaluation: Evaluation) -> None:
    """Write an evaluation into the manifest, in the place of an earlier one of the same. No other file changes.

    The manifest is replaced as a whole: a reader has the old one or the new one.

    Raises:
        OSError: when the folder can not be written.
    """
    manifest = bundle.manifest
    kept = tuple(one for one in manifest.evaluations if not one.is_of_the_same(evaluation))
    written = replace(manifest, evaluations=(*kept, evaluation)[-_MOST_EVALUATIONS:])
    partial = bundle.path / f".{MANIFEST_FILE}.{os.getpid()}"
    try:
        partial.write_text(_canonical(written.to_dict()), encoding="utf-8")
        partial.replace(bundle.path / MANIFEST_FILE)
    finally:
        partial.unlink(missing_ok=True)


def _canonical(values: Mapping[str, Any]) -> str:
    """The one spelling of a manifest, its own hash in it: any changed byte makes it another."""
    body = {name: value for name, value in values.items() if name != _SELF_HASH}
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, _SELF_HASH: hashlib.sha256(plain.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"


def is_bundle(path: Path) -> bool:
    """Whether ``path`` holds a manifest, be it a link that leads nowhere: ``open_bundle`` says what is wrong with it."""
    return os.path.lexists(path / MANIFEST_FILE)


def open_bundle(path: str | Path, check: str = "size", progress: Callable[[int], None] = lambda num_bytes: None) -> Bundle:
    """Read and check a bundle's manifest, files and graphs.

    Args:
        path: the folder.
        check: ``size`` compares every file's size, ``hash`` reads every byte.
        progress: told the bytes hashed.

    Raises:
        BundleError: when it is no bundle, of a newer version, damaged, or holds a graph that no export writes; every file that
            is at fault is named.
        ValueError: for another ``check``.
    """
    if check not in ("size", "hash"):
        raise ValueError(f"check must be 'size' or 'hash' ({check!r} came)")
    folder = Path(path)
    manifest = _manifest_from(folder, _read_manifest(folder))
    absent = [problem for name in manifest.files if (problem := _absence(folder, name))]
    raise_all(BundleError, f"{folder} is not whole; fetch or export it again:", absent)
    problems = [problem for name, record in manifest.files.items() if (problem := _size_problem(folder / name, record))]
    raise_all(BundleError, f"{folder} is damaged; export it again:", problems)
    if check == "hash":
        problems = [
            problem for name, record in manifest.files.items() if (problem := _hash_problem(folder / name, record, progress))
        ]
        raise_all(BundleError, f"{folder} is damaged; export it again:", problems)
    names = (MODEL_FILE, *(graph.file_name for graph in manifest.graphs))
    problems = [problem for name in names for problem in graph_problems(folder / name, WEIGHTS_FILE)]
    raise_all(BundleError, f"{folder} holds what no export writes, and is not opened; export it again:", problems)
    return Bundle(folder, manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    if problem := folder_problem(folder):
        raise BundleError(f"{folder} {problem}: give a bundle's folder")
    if not os.path.lexists(file):
        raise BundleError(f"{folder} has no {MANIFEST_FILE}, so it is no bundle: make one with `motrt export`")
    if problem := file_problem(file):
        raise BundleError(f"{file} {problem}: fetch or export the bundle again")
    try:
        if file.stat().st_size > _MOST_MANIFEST_BYTES:
            raise BundleError(f"{file} has {file.stat().st_size} bytes, so it is no manifest: export the bundle again")
        text = file.read_bytes().decode("utf-8")
        values = json.loads(text)
        expected = _canonical(values) if isinstance(values, dict) else None
    except (OSError, ValueError, RecursionError) as failure:
        raise BundleError(f"{file} can not be read ({failure}): export the bundle again") from None
    if not isinstance(values, dict):
        raise BundleError(f"{file} is no manifest: export the bundle again")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} has format {version} and this motrt reads up to {FORMAT_VERSION}: upgrade motrt, or export it again"
        )
    if version != FORMAT_VERSION or text != expected:
        raise BundleError(f"{file} was changed after the export (its own hash differs): export the bundle again")
    return values


def _manifest_from(folder: Path, values: dict[str, Any]) -> Manifest:
    try:
        missing = [name for name in _REQUIRED if name not in values]
        raise_all(BundleError, f"{folder / MANIFEST_FILE} is not whole; export the bundle again. It lacks:", missing)
        contract = values["signature"]["contract_version"]
        if contract > CONTRACT_VERSION:  # first of all: a newer contract's configuration may have fields unknown here
            raise BundleError(
                f"{folder} keeps graph contract {contract} and this motrt speaks up to {CONTRACT_VERSION}: "
                "upgrade motrt, or export it again"
            )
        config = ModelConfig.from_dict(values["config"])
        manifest = Manifest(
            config=config,
            precision=values["precision"],
            files={name: FileRecord(int(one["bytes"]), str(one["sha256"])) for name, one in values["files"].items()},
            source={name: str(values["source"][name]) for name in ("path", "sha256")},
            versions={name: str(version) for name, version in values["versions"].items()},
            parity=parity_report(values["parity"]),
            operators={name: int(count) for name, count in values.get("operators", {}).items()},
            target=values.get("target", "onnx"),
            graphs=tuple(Graph.from_dict(one, config) for one in values.get("graphs", ())),
            engines=tuple(EngineRecord.from_dict(one) for one in values.get("engines", ())),
            quantization=None if (coded := values.get("quantization")) is None else Quantization.from_dict(coded),
            answer=None if (known := values.get("answer")) is None else KnownAnswer.from_dict(known),
            evaluations=tuple(Evaluation.from_dict(one) for one in values.get("evaluations", ())),
            weight_places={name: (int(first), int(n)) for name, (first, n) in values.get("weight_places", {}).items()},
        )
        if manifest.target not in TARGETS:
            raise BundleError(f"{folder} is made for {manifest.target!r}, which this motrt does not know: upgrade motrt")
        if manifest.quantization is not None:
            raise_all(
                BundleError, f"{folder}: the manifest contradicts itself; export again:", manifest.quantization.problems(config)
            )
        if manifest.answer is not None:
            raise_all(
                BundleError,
                f"{folder}: the manifest's answer contradicts it; export again:",
                manifest.answer.problems_of(config),
            )
        if manifest.signature.to_dict() != values["signature"]:
            raise BundleError(f"{folder}: the manifest's signature is not its configuration's: export the bundle again")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as failure:
        raise BundleError(f"{folder / MANIFEST_FILE} is no manifest of this version ({failure}): export again") from None
    wanted = [MODEL_FILE, WEIGHTS_FILE, *(graph.file_name for graph in manifest.graphs)]
    needed = [name for name in (*wanted, *(one.file for one in manifest.engines)) if name not in manifest.files]
    raise_all(BundleError, f"{folder / MANIFEST_FILE} is not whole; export the bundle again. It names no:", needed)
    problems = _engine_problems(manifest)
    problems += manifest.shared_weights.problems(manifest.config, manifest.files[WEIGHTS_FILE].num_bytes)
    raise_all(BundleError, f"{folder / MANIFEST_FILE} contradicts itself; export the bundle again:", problems)
    return manifest


def _engine_problems(manifest: Manifest) -> list[str]:
    """An engine must be of a graph of this bundle, and of the very file that lies here."""
    onnx_hashes = {graph.name: manifest.files[graph.file_name].sha256 for graph in manifest.graphs}
    problems = []
    for engine in manifest.engines:
        if onnx_hashes.get(engine.graph) != engine.onnx_sha256:
            problems.append(f"{engine.file} was built of another graph than {engine.graph}")
        if manifest.files[engine.file].sha256 != engine.sha256:
            problems.append(f"{engine.file} has two hashes")
    return problems


def _absence(folder: Path, name: str) -> str | None:
    """Why there is no file of this name to be read; None where there is."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        return f"{name!r} is no plain file name: a bundle's files lie in its own folder"
    problem = file_problem(folder / name)
    return f"{name} {problem}" if problem else None


def _size_problem(file: Path, record: FileRecord) -> str | None:
    size = file.stat().st_size
    return None if size == record.num_bytes else f"{file.name} has {size} bytes, {record.num_bytes} were exported"


def _hash_problem(file: Path, record: FileRecord, progress: Callable[[int], None]) -> str | None:
    try:
        is_same = sha256_of(file, progress) == record.sha256
    except OSError as failure:
        return f"{file.name} can not be read ({failure.strerror})"
    return None if is_same else f"{file.name} is not the file that was exported: its hash differs"
