"""``motrt export``: from a checkpoint to a bundle that is proven, or to none at all.

The story of an export is ``export_bundle``, from top to bottom. It is written beside its place and moved there whole;
whatever goes wrong on the way, a failed proof included, leaves nothing.
"""

import logging
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from motrt.errors import ConfigError, ExportError, InputError, LossError, ParityError
from motrt.export.answer_from_weights import known_answer
from motrt.export.engine_from_onnx import EngineOptions, build_engine, refuse_options, weight_bytes
from motrt.export.importance import Importance, measure_importance, num_passes, rows_of_file
from motrt.export.onnx_check import check_onnx
from motrt.export.onnx_from_module import attach_weights, trace, write_derived, write_onnx
from motrt.export.parity.findings import Report
from motrt.export.parity.gate import Extras, Subject, climb, climb_session
from motrt.export.quantized_graph import CodeSource
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Advance, Steps
from motrt.export.stored_weights import weight_places
from motrt.export.verification import refuse_unverifiable, subject_of
from motrt.model_def.atomic_folder import new_folder
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint
from motrt.model_def.config import MAX_SEQ_LEN, ModelConfig
from motrt.model_def.graph import ENGINE_TARGETS, OPERATORS, TARGETS, Graph, Operators, Target, plan_for
from motrt.model_def.head_surgery import Read, with_head
from motrt.model_def.health import diagnose, refuse_untrained
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import (
    Calibration,
    Quantization,
    Scales,
    Stored,
    parse_override,
    stored_bytes_of,
)
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.backends import probe
from motrt.runtime.bundle import (
    MODEL_FILE,
    TOKENIZER_FILE,
    Bundle,
    FileRecord,
    Manifest,
    open_bundle,
    record_files,
    write_manifest,
)
from motrt.runtime.engine_record import EngineRecord
from motrt.runtime.gpu import find_gpus
from motrt.runtime.known_answer import KnownAnswer
from motrt.runtime.load import open_session, other_ways
from motrt.runtime.tokenizer import read_tokenizer
from motrt.runtime.versions import EXPORT_PACKAGES, installed_versions, refuse_older

logger = logging.getLogger(__name__)

EXPORT_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
QUANTIZED: dict[str, Stored] = {"int8": "int8", "int4": "int4", "fp8": "fp8"}

_GRAPH_BYTES = 8 << 20  # more than model.onnx and the manifest ever take


@dataclass(frozen=True)
class QuantizeOptions:
    """What people choose of quantised weights; see ``model_def.quantization``.

    Attributes:
        block_size: inputs that share a scale; None: 128, or the largest that the model's widths allow, or 32 in narrow models.
        symmetric: whether zero is code 0; else every block has a zero point.
        parts: what is stored otherwise: ``head=int8``, ``expert.audio=int4:32``, ``embedding=none``.
        scales: ``search`` or ``absmax``.
        calibrate: what ``search`` weighs errors at 4 bits by: a file of sequences (see ``parity.token_file``), ``none``, or,
            with None, sequences that the model samples.
        activations: precision that is computed in: None: fp32 for ``--target onnx``, fp16 for GPUs.
    """

    block_size: int | None = None
    symmetric: bool = True
    parts: tuple[str, ...] = ()
    scales: Scales = "search"
    calibrate: str | None = None
    activations: str | None = None


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        bundle: the finished bundle.
        report: the gate's, or None where it was not run.
        seconds: of each step, by title.
    """

    bundle: Bundle
    report: Report | None
    seconds: dict[str, float]


def export_bundle(
    checkpoint_path: str | Path,
    out: str | Path,
    precision: str = "fp32",
    max_seq_len: int | None = None,
    allow_untrained: bool = False,
    verify: bool = True,
    steps: Steps | None = None,
    target: Target = "onnx",
    engine_options: EngineOptions | None = None,
    quantize_options: QuantizeOptions | None = None,
    operators: Operators | None = None,
    max_loss: float | None = None,
) -> Exported:
    """Trace, check, prove, compile where the target asks for it, and write a bundle.

    Args:
        checkpoint_path: a native checkpoint's folder.
        out: the bundle's folder; it must not exist.
        precision: ``fp32``, ``fp16`` or ``bf16``, of weights, activations and cache; or ``int8``, ``int4`` or ``fp8``, of
            weights alone.
        max_seq_len: most positions per row; None: the checkpoint's.
        allow_untrained: go on though a modality's rows were never trained.
        verify: climb the parity ladder before the bundle is made.
        steps: told of progress.
        target: what the bundle is made for (see ``plan_for``); the canonical graph is in every one.
        engine_options: for targets that are compiled; None: the usual ones.
        quantize_options: for ``int8``, ``int4`` and ``fp8``; None: the usual ones.
        operators: ``onnxruntime`` writes the steps of ``cuda`` in that runtime's own operators; None: so in bf16, for that
            target, and ``standard`` elsewhere.
        max_loss: budget of what quantization may lose, mean KL divergence in nats by modality; None: 0.5 at 4 bits, 0.05 at 8.

    Raises:
        InputError: for formats of weights that do not exist, or do not fit the model.
        CheckpointError: for a checkpoint that is not whole, or holds NaN.
        UntrainedRowsError: naming rows of a modality that was never trained.
        BundleError: for a tokenizer that can not be read.
        ExportError: where the graph can not be made or is not the one asked for, or ``out`` can not be written.
        InputError: for engine options that the target does not have.
        BackendError: where what the target is compiled with is not to be had here.
        ParityError: when the gate says FAIL; the report stands in its ``report`` attribute.
        LossError: when the graph is right, and its format loses more than ``max_loss``; a ParityError, too.
    """
    refuse_older(*EXPORT_PACKAGES, *(("onnxruntime",) if verify else ()))  # before the hours that some exports take
    steps, out = steps or Steps(), Path(out)
    checkpoint = open_checkpoint(checkpoint_path)
    options = _engine_options(target, engine_options)
    _refuse_operators(operators, target)
    if max_loss is not None and precision not in QUANTIZED:
        raise InputError(f"--precision {precision} quantises nothing, and takes no --max-loss")
    shares_table = precision not in QUANTIZED or _can_share_table(checkpoint.config, target, quantize_options)
    config, read = _as_exported(checkpoint, max_seq_len, shares_table)
    precision, quantization = _stored_as(precision, quantize_options, config, target)
    calibration = _calibration_rows(quantization, quantize_options, checkpoint)
    if options is not None:
        refuse_options(options, precision)
    on_gpu = verify and _can_prove_on_gpu(target, options)
    _refuse_unknown(precision)
    if verify and not on_gpu:
        refuse_unverifiable(precision)
    if checkpoint.tokenizer_path is not None:
        read_tokenizer(checkpoint.tokenizer_path)  # one that can not be read would make a bundle that can not be opened
    if operators is None:  # where they were measured, and proven
        operators = "onnxruntime" if target == "cuda" and precision == "bf16" else "standard"
    work = _Work(config, precision, quantization, plan_for(target, config, operators), checkpoint, steps, calibration)
    with new_folder(out, work.num_bytes(compiled=options is not None), ExportError) as folder:
        with steps.step("look at the weights", checkpoint.num_bytes) as advance:
            refuse_untrained(diagnose(checkpoint.config, _counting(checkpoint.read, advance)), allow_untrained)
        with steps.step("hash the checkpoint", checkpoint.num_bytes) as advance:
            source = {"path": str(checkpoint.path.resolve()), "sha256": checkpoint.sha256(advance)}
        census = work.write_graphs(folder, read)
        with steps.step("hash the bundle", work.weight_bytes) as advance:
            files = record_files(folder, advance)
        # The graphs on the CPU, where its kernels know the precision; then what the target runs, where its GPU is here.
        extras = Extras(max_loss=max_loss)
        report = _prove(folder, work, files, extras) if verify and precision != "bf16" else None
        engines = work.build_engines(folder, options) if options is not None else ()
        files |= {one.file: FileRecord((folder / one.file).stat().st_size, one.sha256) for one in engines}
        manifest = Manifest(
            config=config,
            precision=precision,
            files=files,
            source=source,
            versions=installed_versions(),
            parity=None if report is None else report.to_dict(),
            operators=census,
            target=target,
            graphs=work.graphs,
            weight_places=work.weight_places(folder) if target == "cuda" else {},
            engines=engines,
            quantization=quantization,
            answer=work.known_answer(folder, read),
        )
        if on_gpu:
            on_target = _prove_on_gpu(Bundle(folder, manifest), work, extras)
            report = report or on_target
            engines = tuple(replace(one, parity=_of_engine(on_target, one)) for one in engines)
            manifest = replace(manifest, engines=engines, parity=report.to_dict())
        write_manifest(folder, manifest)
    return Exported(open_bundle(out), report, steps.seconds)


@dataclass(frozen=True)
class _Work:
    """What every stage of one export knows."""

    config: ModelConfig
    precision: str
    quantization: Quantization | None
    graphs: tuple[Graph, ...]
    checkpoint: Checkpoint
    steps: Steps
    calibration: Tensor | None = None

    @property
    def dtype(self) -> str:
        return DTYPE_OF_PRECISION[self.precision]

    @property
    def weight_bytes(self) -> int:
        return stored_bytes_of(self.config, self.quantization, TORCH_DTYPES[self.dtype].itemsize)

    def num_bytes(self, compiled: bool) -> int:
        """What will lie on the disk: weights once for all graphs, and again in every engine."""
        itemsize = TORCH_DTYPES[self.dtype].itemsize
        sizes = (weight_bytes(graph, self.config, itemsize, self.quantization) + _GRAPH_BYTES for graph in self.graphs)
        engines = sum(sizes) if compiled else 0
        return self.weight_bytes + engines + _bytes_beside_weights(self.checkpoint, self.config)

    def write_graphs(self, folder: Path, read: Read) -> dict[str, int]:
        """Trace, write and check every graph; returns the canonical one's operators."""
        with self.steps.step("trace the graph"):
            model = trace(self.config, self.dtype, quantization=self.quantization)
            attach_weights(model, self.config, self.dtype, read)
        if self.quantization is not None:
            source = CodeSource(self.config, self.quantization, self.dtype, read, self._importance(read))
            with self.steps.step("choose the scales", sum(one.numel for one in parameters(self.config)), "parts") as advance:
                source.choose(advance)
            source.attach(model)
        with self.steps.step("write the weights", self.weight_bytes) as advance:
            write_onnx(model, folder, advance)
            if self.checkpoint.tokenizer_path is not None:
                shutil.copyfile(self.checkpoint.tokenizer_path, folder / TOKENIZER_FILE)
        for graph in self.graphs:
            with self.steps.step(f"trace {graph.name}"):
                write_derived(trace(self.config, self.dtype, graph, self.quantization), graph, folder)
        with self.steps.step("check the graph"):
            for graph in self.graphs:
                check_onnx(folder / graph.file_name, self.config, self.dtype, graph, self.quantization)
            return check_onnx(folder / MODEL_FILE, self.config, self.dtype, quantization=self.quantization)

    def _importance(self, read: Read) -> Importance:
        """Of each input of each weight, where any scale is chosen by it."""
        how, held = self.quantization, parameters(self.config)
        if how is None or not any(how.weighs_errors_of(one.how) for one in how.coded_weights(held)):
            return {}
        total = sum(one.numel for one in held) * num_passes(self.calibration)
        with self.steps.step("see which inputs are large", total, "parts") as advance:
            return measure_importance(self.config, read, self.calibration, advance)

    def weight_places(self, folder: Path) -> dict[str, tuple[int, int]]:
        return weight_places(folder / MODEL_FILE, (one.name for one in parameters(self.config)), self.dtype)

    def known_answer(self, folder: Path, read: Read) -> KnownAnswer | None:
        """What the weights of the bundle, or what its codes stand for, say to a short question."""
        if self.quantization is not None:
            read = QuantizedWeights(folder / MODEL_FILE, self.config, self.quantization).read
        total = 2 * sum(one.numel for one in parameters(self.config))  # exactly, and with errors
        with self.steps.step("known answer", total, "parts") as advance:
            return known_answer(self.config, read, self.precision, self.quantization, advance)

    def build_engines(self, folder: Path, options: EngineOptions) -> tuple[EngineRecord, ...]:
        return tuple(
            build_engine(folder / graph.file_name, graph, self.config, self.dtype, options, self.steps, self.quantization)
            for graph in self.graphs
        )


def _refuse_operators(operators: Operators | None, target: Target) -> None:
    if operators is None:
        return
    if operators not in OPERATORS:
        raise InputError(f"operators must be one of {', '.join(OPERATORS)} ({operators!r} came)")
    if operators != "standard" and target != "cuda":
        raise InputError(f"--operators {operators} is for --target cuda: nothing else runs them ({target!r} came)")


def _engine_options(target: Target, options: EngineOptions | None) -> EngineOptions | None:
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)} ({target!r} came)")
    if target in ENGINE_TARGETS:
        if options is not None and options.flavour != target:
            raise InputError(f"the engine options are for {options.flavour!r}, and the target is {target!r}")
        return options or EngineOptions(target)
    if options is not None:
        raise InputError(f"--target {target} compiles no engines, and takes no options for them")
    return None


def _can_share_table(config: ModelConfig, target: Target, options: QuantizeOptions | None) -> bool:
    """Whether a quantised table can be the head that is tied to it: on a CPU, unless parts say otherwise.

    Elsewhere a table is held in the graph's precision and a head is a product of its own. Of several modalities, each would
    read the others' rows at every step.
    """
    said = [parse_override(part) for part in options.parts] if options is not None else []
    is_apart = any(
        selector.startswith("head") or (selector.startswith("embedding") and kind != "int8") for selector, kind, _ in said
    )
    return target == "onnx" and len(config.modalities) == 1 and not is_apart


def _as_exported(checkpoint: Checkpoint, max_seq_len: int | None, shares_table: bool) -> tuple[ModelConfig, Read]:
    """The configuration and weights that the graph gets.

    A shared head is cut into split ones, exactly: filtering makes the other rows dead weight, and an audio step would
    read 127 times more of them. A tied head stays the embedding table (cutting it would store it twice), but where it is
    quantised and can not be (``shares_table``).
    """
    config: ModelConfig = checkpoint.config
    read: Read = checkpoint.read
    if not shares_table if config.tied_embeddings else len(config.modalities) > 1:
        config, read = with_head(config, read, "split")
    longest = config.max_seq_len if max_seq_len is None else max_seq_len
    if not 1 <= longest <= MAX_SEQ_LEN:
        raise ExportError(f"--max-seq-len must be in 1..{MAX_SEQ_LEN} ({longest} came)")
    if max_seq_len is not None:
        if max_seq_len > config.max_seq_len:
            logger.warning("%d positions are more than the %d of the checkpoint", max_seq_len, config.max_seq_len)
        config = config.replace(max_seq_len=max_seq_len)
    return config, read


def _stored_as(
    precision: str, options: QuantizeOptions | None, config: ModelConfig, target: Target
) -> tuple[str, Quantization | None]:
    """What is computed in, and how the weights are stored."""
    stored = QUANTIZED.get(precision)
    if stored is None:
        if options is not None:
            raise InputError(f"--precision {precision} quantises nothing, and takes no options for it")
        return precision, None
    options = options or QuantizeOptions()
    overrides = [parse_override(part) for part in options.parts]
    if target != "onnx" and any(selector.startswith("embedding") and kind for selector, kind, _ in overrides):
        raise InputError(
            f"--target {target} cuts the embedding by modality, and takes it in the graph's precision alone: leave "
            "--part embedding=... out"
        )
    types = {stored, *(kind for _, kind, _ in overrides)}
    if "fp8" in types and target not in ENGINE_TARGETS:
        raise InputError(f"fp8 is for --target {' and '.join(ENGINE_TARGETS)}: onnxruntime has no product for it")
    if not options.symmetric and (stored == "fp8" or target in ENGINE_TARGETS):
        raise InputError(
            "--asymmetric is for int8 and int4 in onnxruntime: fp8 has a zero of its own, and TensorRT takes no zero points"
        )
    int8_blocks = [size for _, kind, size in overrides if kind == "int8" and size]
    int8_blocks += [options.block_size] if stored == "int8" and options.block_size else []
    if target in ENGINE_TARGETS and int8_blocks:
        raise InputError(
            f"--target {target} takes int8 with one scale per output, not in blocks of {int8_blocks[0]}: TensorRT would hold "
            "what the codes stand for"
        )
    usual = "fp32" if target == "onnx" else "fp16"
    activations = usual if options.activations is None else options.activations
    if activations not in DTYPE_OF_PRECISION or activations == "fp64":
        raise InputError(f"activations are fp32, fp16 or bf16 ({activations!r} came)")
    try:
        quantization = Quantization.usual(
            stored,
            config,
            options.block_size,
            options.symmetric,
            "int8" if target == "onnx" else None,  # a GPU gathers rows of what it computes in, and holds a table once anyway
            overrides,
            options.scales,
            ("fp8", "int8") if target in ENGINE_TARGETS else ("fp8",),  # TensorRT unpacks int8 in blocks
            signed=target not in ENGINE_TARGETS,
            packed=target == "onnx",
            careful=target == "onnx",
            half_scales=target == "onnx" and activations == "fp32",
            calibration=_calibration(options, types),
        )
    except ConfigError as wrong:  # what was asked for is at fault, and not the model
        raise InputError(str(wrong)) from None
    return activations, quantization


def _calibration(options: QuantizeOptions, types: Set[Stored | None]) -> Calibration:
    if "int4" not in types:
        if options.calibrate not in (None, "none"):
            raise InputError("--calibrate is for weights of 4 bits: at 8 it would win nothing")
        return "none"
    if options.scales == "absmax" and options.calibrate not in (None, "none"):
        raise InputError("--calibrate is for --scales search: absmax looks at weights alone")
    if options.scales == "absmax" or options.calibrate == "none":
        return "none"
    return "sampled" if options.calibrate is None else "file"


def _calibration_rows(
    quantization: Quantization | None, options: QuantizeOptions | None, checkpoint: Checkpoint
) -> Tensor | None:
    """The sequences of the user's file; None where none was given."""
    if quantization is None or quantization.calibration != "file":
        return None
    assert options is not None and options.calibrate is not None
    return rows_of_file(Path(options.calibrate), checkpoint)


def _refuse_unknown(precision: str) -> None:
    if precision not in EXPORT_PRECISIONS:
        raise ExportError(f"precision must be one of {', '.join(EXPORT_PRECISIONS)} ({precision!r} came)")


def _can_prove_on_gpu(target: Target, options: EngineOptions | None) -> bool:
    """Whether what ``target`` runs can be examined on this machine: engines for other GPUs than its own can not."""
    gpu = find_gpus().first
    if target == "onnx" or gpu is None or not probe(target).is_usable:
        return False
    return options is None or not options.compute_capabilities or gpu.compute_capability in options.compute_capabilities


def _prove_on_gpu(bundle: Bundle, work: _Work, extras: Extras) -> Report:
    """The very files that will be deployed, by the backend that they are for, before the manifest makes them a bundle."""
    backend, subject = bundle.manifest.target, subject_of(bundle)
    opened, ways = partial(open_session, bundle, backend), other_ways(bundle, backend)
    return _passed(
        climb_session(opened, work.config, work.checkpoint, work.steps, subject.files, extras, subject, other_ways=ways)
    )


def _of_engine(report: Report, engine: EngineRecord) -> dict[str, Any]:
    """What an engine's record keeps of the climb that it was part of: the verdict, and the findings of its own graph."""
    told = report.to_dict()
    return {**told, "findings": [one for one in told["findings"] if one["graph"] == engine.graph]}


def _prove(folder: Path, work: _Work, files: Mapping[str, FileRecord], extras: Extras) -> Report:
    hashes = {name: record.sha256 for name, record in files.items()}
    subject = Subject(folder / MODEL_FILE, work.config, work.precision, hashes, work.graphs, work.quantization)
    return _passed(climb(subject, work.checkpoint, work.steps, extras=extras))


def _passed(report: Report) -> Report:
    """``report``, unless it refuses the export: for a fault, or for a loss over its budget."""
    if report.failed:
        said = "is the model, in a format that loses more of it than --max-loss" if report.only_loses else "is not the model"
        heading = f"what was exported {said}, so no bundle was made:"
        raise (LossError if report.only_loses else ParityError)(
            "\n  - ".join([heading, *map(str, report.failed)]), report.to_dict()
        )
    return report


def _bytes_beside_weights(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Rotary tables (two of [max_seq_len, d/2], at most float32), tokenizer, graph and manifest."""
    tokenizer = checkpoint.tokenizer_path.stat().st_size if checkpoint.tokenizer_path is not None else 0
    return 4 * config.max_seq_len * config.head_size + tokenizer + _GRAPH_BYTES


def _counting(read: Read, advance: Advance) -> Read:
    def counted(name: str) -> Tensor:
        value = read(name)
        advance(value.nbytes)
        return value

    return counted
