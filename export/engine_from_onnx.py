"""From a graph of a bundle to a TensorRT engine: parse, compare with the contract, build, look at what came out.

Polygraphy's loaders drive both flavours. Networks are strongly typed: an engine computes in the dtypes that the graph says, and
nothing else. Refitting and stripped weights are not offered: TensorRT for RTX can not build such engines without a GPU.
"""

import logging
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motrt.errors import BackendError, ExportError, InputError, raise_all
from motrt.export.steps import Advance, Steps
from motrt.export.trt_profile import Sizes, profile_for, ranges_for
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.model_def.parameters import SHARED_HEAD
from motrt.model_def.quantization import Quantization, stored_bytes_of
from motrt.model_def.signature import PRECISION_OF_DTYPE, Signature, TensorSpec
from motrt.runtime.bundle import sha256_of
from motrt.runtime.engine_record import EngineRecord
from motrt.runtime.gpu import find_gpus
from motrt.runtime.tensorrt_library import FLAVOURS, spec_of, tensorrt_for_building
from motrt.runtime.versions import refuse_older

logger = logging.getLogger(__name__)

ENGINE_PRECISIONS = ("fp16", "bf16")

# The builder holds the parsed weights, its own copy and the serialised engine. Measured: see docs/tensorrt.md.
HOST_BYTES_PER_WEIGHT_BYTE, HOST_BYTES_BESIDE = 3.25, 1 << 30

# Beside its weights an engine holds kernels or their sources, and shapes.
LARGEST_BYTES_BESIDE_WEIGHTS = 64 << 20

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

_NUM_PARTS = 1000  # of a build, for its bar


@dataclass(frozen=True)
class EngineOptions:
    """What people choose.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        sizes: of the requests to come.
        compute_capabilities: of the GPUs that will run it, ``8.9``; none: portable over all that the flavour supports
            (``tensorrt-rtx`` alone; the other builds for the GPU that is there).
        workspace_bytes: most scratch memory that a layer may use; None: TensorRT's own limit.
        version_compatible: whether later versions of the library may run it (``tensorrt`` alone).
        hardware_compatible: whether other GPUs of Ampere and later may run it (``tensorrt`` alone).
        timing_cache: a file that measurements of kernels are kept in from build to build (``tensorrt`` alone).
    """

    flavour: str
    sizes: Sizes = field(default_factory=Sizes)
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None


def refuse_options(options: EngineOptions, precision: str) -> None:
    """Refuse what could not be built, before any work.

    Raises:
        InputError: for options that the flavour does not have, or compute capabilities that it does not know.
        ExportError: for a precision that its attention has no kernel for.
        BackendError: when the library can not be imported, or needs a GPU.
    """
    if precision not in ENGINE_PRECISIONS:
        raise ExportError(
            f"--target {options.flavour} computes in {' or '.join(ENGINE_PRECISIONS)}: TensorRT's fused attention has no "
            f"kernel for {precision}. Give one of them as --precision, or as --activations where weights are quantised"
        )
    is_rtx = options.flavour == "tensorrt-rtx"
    switches = {
        "--compute-capability": options.compute_capabilities and not is_rtx,
        "--version-compatible": options.version_compatible and is_rtx,
        "--hardware-compatible": options.hardware_compatible and is_rtx,
        "--timing-cache": options.timing_cache is not None and is_rtx,
    }
    for switch, is_foreign in switches.items():
        if is_foreign:
            raise InputError(f"{switch} is not for --target {options.flavour}, which has no such thing: leave it out")
    module = tensorrt_for_building(options.flavour)
    if options.timing_cache is not None and (options.timing_cache.is_dir() or not options.timing_cache.parent.is_dir()):
        raise InputError(f"--timing-cache names a file in a folder that is there ({options.timing_cache} came)")
    if options.compute_capabilities:
        known = known_capabilities(module)
        unknown = [one for one in options.compute_capabilities if one not in known]
        if unknown:
            raise InputError(
                f"{FLAVOURS[options.flavour].module} {module.__version__} builds for compute capability {', '.join(known)}, "
                f"not for {', '.join(unknown)}: see developer.nvidia.com/cuda-gpus for your GPU's"
            )


def known_capabilities(module: Any) -> list[str]:
    """The compute capabilities that a module builds for, ``7.5`` and up."""
    names = [name for name in dir(module.ComputeCapability) if name.startswith("SM") and name[2:].isdecimal()]
    return [f"{number // 10}.{number % 10}" for number in sorted(int(name[2:]) for name in names)]


def build_engine(
    onnx_file: Path,
    graph: Graph,
    config: ModelConfig,
    dtype: str,
    options: EngineOptions,
    steps: Steps,
    quantization: Quantization | None = None,
) -> EngineRecord:
    """Build one engine, written beside its ONNX file.

    Args:
        onnx_file: the graph, its external data beside it.
        graph: which one it is.
        config: what it computes.
        dtype: of weights and cache.
        options: what people chose; already asked with ``refuse_options``.
        steps: told of progress.
        quantization: the format of its weights.

    Raises:
        ExportError: when the graph can not be parsed or built, is not what the signature says, or when the engine is not what
            was asked for.
        BackendError: when the machine has too little memory.
    """
    module = tensorrt_for_building(options.flavour)
    signature = Signature.of(graph, config, dtype)
    num_bytes = weight_bytes(graph, config, TORCH_DTYPES[dtype].itemsize, quantization)
    _refuse_small_memory(graph, num_bytes)
    ranges = ranges_for(graph, signature, options.sizes)
    builder, network, parser = _parse(onnx_file, module, options.flavour)
    layers = _layers(network)
    problems = signature.differences(*_found_specs(network, module, signature))
    problems += _layer_problems(layers, config, graph, quantization)
    raise_all(ExportError, f"{onnx_file.name}, as TensorRT parsed it, is not the graph:", problems)
    told = _told(options)
    logger.info("%s: %s for %s, %s", graph.name, options.flavour, ", ".join(options.compute_capabilities) or "any GPU", told)
    out = onnx_file.with_suffix(".engine")
    started = time.perf_counter()
    with steps.step(f"build {graph.name}", _NUM_PARTS, "parts") as advance, _monitored(module, advance) as monitor:
        _build(builder, network, parser, profile_for(signature, ranges), options, module, monitor, out)
    seconds = time.perf_counter() - started
    raise_all(ExportError, f"{out.name} is not the engine of its graph:", _file_problems(out, num_bytes))
    logger.info("%s: %.1f s, %d bytes", graph.name, seconds, out.stat().st_size)
    gpus = find_gpus()
    capability = gpus.first.compute_capability if gpus.first else None
    return EngineRecord(
        graph=graph.name,
        file=out.name,
        flavour=options.flavour,
        precision=PRECISION_OF_DTYPE[dtype],
        versions={FLAVOURS[options.flavour].module: str(module.__version__), "cuda_driver": gpus.driver or "none"},
        gpu=gpus.first.name if gpus.first else None,
        compute_capabilities=_capabilities(options, capability),
        ranges=ranges,
        onnx_sha256=sha256_of(onnx_file),
        sha256=sha256_of(out),
        options=told,
        layers=layers,
        seconds=round(seconds, 2),
    )


def weight_bytes(graph: Graph, config: ModelConfig, itemsize: int, quantization: Quantization | None = None) -> int:
    """Bytes of the weights that an engine of ``graph`` holds: of tables, the rows that it can reach."""
    if not graph.is_step:
        return stored_bytes_of(config, quantization, itemsize, graph.parameters(config))
    assert graph.tokens is not None and graph.predicts is not None
    own, predicted = (config.modalities[index].vocab_size for index in (graph.tokens, graph.predicts))
    rows = own + (predicted if config.tied_embeddings else 0)  # of tables that are stored plainly
    whole = [one for one in graph.parameters(config) if one.part != "embedding"]
    if any(one.name == SHARED_HEAD for one in whole):
        rows += predicted
        whole = [one for one in whole if one.name != SHARED_HEAD]
    return rows * config.model_width * itemsize + stored_bytes_of(config, quantization, itemsize, whole)


def _refuse_small_memory(graph: Graph, num_bytes: int) -> None:
    needed = int(num_bytes * HOST_BYTES_PER_WEIGHT_BYTE) + HOST_BYTES_BESIDE
    free = _available_bytes()
    if free is not None and free < needed:
        raise BackendError(
            f"building {graph.name} takes about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: close what "
            "else runs, or export on a larger machine"
        )


def _available_bytes() -> int | None:
    """Memory that a process can still have, as Linux estimates it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    free = [int(fields["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in fields else []
    limit = [int(text) for text in (_control_group("memory.max"), _control_group("memory.current")) if text.isdecimal()]
    return min([*free, *([limit[0] - limit[1]] if len(limit) == 2 else [])], default=None)


def _control_group(name: str) -> str:
    """What a container's limits say; empty where there are none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _polygraphy(flavour: str) -> Any:
    """Polygraphy's TensorRT loaders, for one flavour: it chooses when they are imported, once for the process."""
    refuse_older("polygraphy")
    import polygraphy.config

    wanted = flavour == "tensorrt-rtx"
    if "trt" not in _chosen:
        polygraphy.config.USE_TENSORRT_RTX = wanted
        _chosen["trt"] = flavour
    elif _chosen["trt"] != flavour:
        raise BackendError(f"this process has built for {_chosen['trt']} already: build for {flavour} in another")
    import polygraphy.backend.trt
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1  # what it would print, the errors here say
    return polygraphy.backend.trt


_chosen: dict[str, str] = {}


def _parse(onnx_file: Path, module: Any, flavour: str) -> tuple[Any, Any, Any]:
    loaders = _polygraphy(flavour)
    from polygraphy.exception import PolygraphyException

    try:
        builder, network, parser = loaders.network_from_onnx_path(str(onnx_file), strongly_typed=True)
    except PolygraphyException as failure:
        problems = _parse_problems(onnx_file, module) or [str(failure)]
        raise_all(ExportError, f"{FLAVOURS[flavour].module} {module.__version__} can not parse {onnx_file.name}:", problems)
        raise
    return builder, network, parser


def _parse_problems(onnx_file: Path, module: Any) -> list[str]:
    """What the parser says of each node that it does not take: operator, node, and the module that the node came from."""
    silent = module.Logger(module.Logger.INTERNAL_ERROR)
    builder = module.Builder(silent)
    flags = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)  # in a name: the parser keeps no hold of it
    parser = module.OnnxParser(network, silent)
    parser.parse_from_file(str(onnx_file))
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    return [
        f"{one.node_operator()}, node {one.node_name()} of module {one.node_name().rpartition('/')[0]}: {one.desc()}"
        for one in errors
    ]


def _layers(network: Any) -> dict[str, int]:
    kinds = (str(network.get_layer(number).type).rpartition(".")[2] for number in range(network.num_layers))
    return dict(Counter(kinds).most_common())


def _layer_problems(
    layers: Mapping[str, int], config: ModelConfig, graph: Graph, quantization: Quantization | None
) -> list[str]:
    """The layers that must not have been taken apart, and a ``DEQUANTIZE`` for every weight that is stored as codes."""
    expected = {
        "DEQUANTIZE": len(quantization.coded_weights(graph.parameters(config))) if quantization else 0,
        "KV_CACHE_UPDATE": 2 * config.num_layers,
        "ATTENTION_INPUT": config.num_layers,
        "ATTENTION_OUTPUT": config.num_layers,
        "ROTARY_EMBEDDING": 2 * config.num_layers,
        "NON_ZERO": 0,
        "PLUGIN_V3": 0,
    }
    return [
        f"{layers.get(kind, 0)} layers of kind {kind}, {count} were expected"
        for kind, count in expected.items()
        if layers.get(kind, 0) != count
    ]


def _found_specs(network: Any, module: Any, signature: Signature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The network's own inputs and outputs."""
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    found = ([spec_of(module, signature, one.name, one.dtype, one.shape) for one in some] for some in (inputs, outputs))
    return tuple(next(found)), tuple(next(found))


def _build(
    builder: Any,
    network: Any,
    parser: Any,
    shapes: Mapping[str, Any],
    options: EngineOptions,
    module: Any,
    monitor: Any,
    out: Path,
) -> None:
    loaders = _polygraphy(options.flavour)
    from polygraphy.exception import PolygraphyException

    profile = loaders.Profile()
    for name, (least, best, most) in shapes.items():
        profile.add(name, least, best, most)
    cache = None if options.timing_cache is None else str(options.timing_cache)
    builder.error_recorder = errors = _error_recorder(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # polygraphy calls what TensorRT means to drop: nothing that a user could mend
            engine = loaders.engine_bytes_from_network(
                (builder, network, parser),
                config=_configuration(loaders, profile, options, module, monitor),
                save_timing_cache=cache,
            )
    except (PolygraphyException, TypeError, RuntimeError, OSError) as failure:
        monitor.raise_interrupt()
        said, name = "; ".join(errors.said) or str(failure), FLAVOURS[options.flavour].module
        raise ExportError(f"{name} {module.__version__} can not build {out.stem}: {said}") from None
    monitor.raise_interrupt()
    with out.open("wb") as file:
        file.write(memoryview(engine))


def _configuration(loaders: Any, profile: Any, options: EngineOptions, module: Any, monitor: Any) -> Any:
    common: dict[str, Any] = {"profiles": [profile], "progress_monitor": monitor}
    if options.workspace_bytes is not None:
        common["memory_pool_limits"] = {module.MemoryPoolType.WORKSPACE: options.workspace_bytes}
    if options.flavour == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [tuple(map(int, one.split("."))) for one in options.compute_capabilities]
        return CreateConfigRTX(compute_capabilities=capabilities or None, **common)
    if options.hardware_compatible:
        common["hardware_compatibility_level"] = module.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.timing_cache is not None:
        common["load_timing_cache"] = str(options.timing_cache)
    return loaders.CreateConfig(version_compatible=options.version_compatible, **common)


@contextmanager
def _monitored(module: Any, advance: Advance) -> Iterator[Any]:
    """A progress monitor for one build. An interrupt ends the build, and is raised when TensorRT has come back from it."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.num_steps: dict[str, int] = {}
            self.root: str | None = None
            self.told = 0
            self.interrupt: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.num_steps[phase_name] = max(1, num_steps)
            self.root = self.root or phase_name

        def phase_finish(self, phase_name: str) -> None:
            self.num_steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name == self.root:
                    done = _NUM_PARTS * (step + 1) // self.num_steps[phase_name]
                    advance(done - self.told)
                    self.told = done
            except BaseException as interrupt:  # it may not pass through TensorRT
                self.interrupt = interrupt
            return self.interrupt is None and not signals

        def raise_interrupt(self) -> None:
            if self.interrupt is not None:
                raise self.interrupt

    with _signals_kept() as signals:
        monitor = Monitor()
        yield monitor
        if monitor.interrupt is None:
            advance(_NUM_PARTS - monitor.told)


@contextmanager
def _signals_kept() -> Iterator[list[int]]:
    """Interrupts that come meanwhile, to be acted on at the end.

    A handler that raises would do so in whichever of TensorRT's calls into Python comes next, and TensorRT drops it there.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # signals are the main thread's
        return
    kept = {number: signal.signal(number, lambda which, frame: came.append(which)) for number in _INTERRUPTS}
    try:
        yield came
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _error_recorder(module: Any) -> Any:
    """What TensorRT says went wrong, kept for the error's text."""

    class Recorder(module.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def report_error(self, code: Any, description: str) -> bool:
            self.said.append(description)
            return False

        def num_errors(self) -> int:
            return len(self.said)

        def get_error_code(self, number: int) -> Any:
            return module.ErrorCodeTRT.UNSPECIFIED_ERROR

        def get_error_desc(self, number: int) -> str:
            return self.said[number]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.said.clear()

    return Recorder()


def _file_problems(engine: Path, weights: int) -> list[str]:
    """An engine begins with TensorRT's tag, and holds its weights and not much else."""
    with engine.open("rb") as file:
        tag = file.read(4)
    size, problems = engine.stat().st_size, []
    if tag[1:4] != b"trt":
        problems.append(f"it begins with {tag!r}, which is not TensorRT's tag")
    least, most = int(0.9 * weights), int(1.15 * weights) + LARGEST_BYTES_BESIDE_WEIGHTS
    if not least <= size <= most:
        problems.append(f"it has {size} bytes; with weights of {weights}, {least} to {most} were expected")
    return problems


def _told(options: EngineOptions) -> dict[str, Any]:
    return {
        "workspace_bytes": options.workspace_bytes,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
    }


def _capabilities(options: EngineOptions, here: str | None) -> tuple[str, ...]:
    """What the engine was built for: for the datacentre flavour, the GPU that it was built on."""
    if options.flavour == "tensorrt-rtx":
        return options.compute_capabilities
    return () if options.hardware_compatible or here is None else (here,)
