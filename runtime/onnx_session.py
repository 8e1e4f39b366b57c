"""The canonical graph in onnxruntime, and the graphs derived of it. This file and its CUDA kin alone need it.

The cache stays where it is: past and present are bound to the same buffers, so ``TensorScatter`` writes in place. A
step binds five small arrays and one row of logits, and nothing else moves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motrt.errors import BackendError, BundleError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import (
    FLOAT_DTYPES,
    PRECISION_OF_DTYPE,
    Signature,
    TensorSpec,
    past_key,
    past_value,
    present_key,
    present_value,
)
from motrt.runtime.bundle import WEIGHTS_FILE
from motrt.runtime.graph_choice import as_contract, choose, feed, num_logit_rows
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.versions import refuse_older

try:
    import onnxruntime as ort
except ImportError as missing:
    raise BackendError(
        f"onnxruntime can not be imported ({missing}): install it with `pip install 'motrt[cpu]'` or 'motrt[gpu]'"
    ) from missing

_DTYPES = {"tensor(double)": "float64", "tensor(float)": "float32", "tensor(float16)": "float16"}
_DTYPES |= {"tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}

# Products over codes: activations as they are, or rounded to 8 bits in blocks, which is what the fast kernels multiply.
_ACCURACY_LEVEL, _EXACT, _ROUNDED = "session.qdq_matmulnbits_accuracy_level", "1", "4"
# With "1" codes are turned back once, when the graph is loaded, and products are plain ones.
_TURN_BACK = "session.disable_quant_qdq"
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
# Bytes that begin as one of onnxruntime's own files do would be taken for one, and nobody has looked through that.
_FORMAT, _ONNX = "session.load_model_format", "ONNX"

_ERRORS_ONLY = 3  # onnxruntime's severities: 0 verbose, 1 info, 2 warning, 3 error


@dataclass(frozen=True)
class LoadedGraph:
    """One graph of the plan, ready to run."""

    graph: Graph
    signature: Signature
    session: Any


@dataclass(frozen=True)
class BoundBuffers:
    """Keys and values of every layer, bound once as past and present of every graph: all of them write the same cache."""

    values: tuple[Any, ...]
    bindings: dict[Graph, Any]

    def arrays(self) -> Iterator[np.ndarray[Any, Any]]:
        """Keys and values as arrays, one after the other; those on the CPU are the memory itself."""
        for value in self.values:
            yield value.numpy()


class OnnxSession(Session):
    """ONNX files behind the session's calls, on the CPU.

    Args:
        model: path of the canonical graph; others lie beside it.
        config: what the graphs compute.
        num_threads: for products; 0 leaves it to onnxruntime (one per core).
        log_severity: what onnxruntime prints: 3 errors, 2 warnings too.
        overrides: initializers to replace, by name; parity uses them to poison weights.
        graphs: which graphs to load, most special first: each pass takes the first that serves it.
        quantization: of the graphs' weights.
        exact_activations: multiply codes by activations as they are, and not rounded to 8 bits as the fast kernels have them;
            parity asks so whether what is left of a difference is that rounding. For int4 a kernel does; for int8 onnxruntime's
            turns every code back at every step (the 1B model: 6 s), so there what codes stand for is held in their place.
        replaced: serialised graphs to run in the place of files, their external data still beside ``model``.

    Attributes:
        passes: how many passes each graph did, by its name.

    Raises:
        BackendError: when onnxruntime can not run a graph here.
        BundleError: when a graph does not have the contract's inputs and outputs.
    """

    def __init__(
        self,
        model: Path,
        config: ModelConfig,
        num_threads: int = 0,
        log_severity: int = _ERRORS_ONLY,
        overrides: Mapping[str, Any] | None = None,
        graphs: Sequence[Graph] = (CANONICAL,),
        quantization: Quantization | None = None,
        exact_activations: bool = False,
        replaced: Mapping[Graph, bytes] | None = None,
    ) -> None:
        self.config = config
        self.backend = "onnxruntime (CPU)"
        self._overrides: list[Any] = []  # onnxruntime keeps pointers into them
        self._loaded: dict[Graph, LoadedGraph] = {}
        if quantization is not None and not exact_activations:
            self.activation_block = quantization.activation_block(config)
        for graph in graphs:
            file = model if graph == CANONICAL else model.parent / graph.file_name
            options = session_options(num_threads, exact_activations, log_severity)
            if exact_activations and quantization is not None and quantization.multiplies("int8", config):
                options.add_session_config_entry(_TURN_BACK, "1")
            self._override(options, {one.name for one in graph.parameters(config)}, overrides or {})
            self._loaded[graph] = self._open(graph, file, options, (replaced or {}).get(graph))
        self.signature = next(iter(self._loaded.values())).signature
        self.precision = PRECISION_OF_DTYPE[self.signature.cache_dtype]
        self.passes = {graph.name: 0 for graph in self._loaded}
        if any(graph.capacity is not None for graph in graphs):
            self.smallest_capacity = config.max_seq_len

    def _override(self, options: Any, names: set[str], overrides: Mapping[str, Any]) -> None:
        for name, value in overrides.items():
            if name in names:
                held = ort.OrtValue.ortvalue_from_numpy(value)
                self._overrides.append((value, held))
                options.add_initializer(name, held)

    def _open(self, graph: Graph, file: Path, options: Any, instead: bytes | None = None) -> LoadedGraph:
        name, settings = self._provider(graph)
        try:
            session = _inference_session(instead or file, file.parent, options, (name, settings))
            inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())  # names that are no UTF-8 fail here
        except Exception as failure:  # onnxruntime's exceptions share no base of their own
            place = name.removesuffix("ExecutionProvider")
            raise BackendError(f"onnxruntime {ort.__version__} can not run {file} on the {place}: {failure}") from failure
        if session.get_providers()[0] != name:
            raise BackendError(f"onnxruntime {ort.__version__} fell back to the CPU: see `motrt inspect --backends`")
        cache_dtype = next((spec.dtype for spec in inputs if spec.name == past_key(0)), "float32")
        signature = Signature.of(graph, self.config, cache_dtype if cache_dtype in FLOAT_DTYPES else "float32")
        problems = signature.differences(inputs, outputs)
        raise_all(BundleError, f"{file} does not keep the graph contract; export it again:", problems)
        return LoadedGraph(graph, signature, session)

    def _provider(self, graph: Graph) -> tuple[str, dict[str, str]]:
        """Which of onnxruntime's execution providers runs ``graph``, and its settings."""
        return "CPUExecutionProvider", {}

    def make_buffers(self, batch_size: int, capacity: int) -> BoundBuffers:
        shape = (batch_size, self.config.num_kv_heads, capacity, self.config.head_size)
        dtype = np.dtype(self.signature.cache_dtype)
        zeros = [np.zeros(shape, dtype) for _ in range(2 * self.config.num_layers)]
        return self._bind([ort.OrtValue.ortvalue_from_numpy(one) for one in zeros])

    def _bind(self, ort_values: Sequence[Any]) -> BoundBuffers:
        """Bind ``ort_values`` as past and present of every graph."""
        values = tuple(ort_values)
        names = [
            pair
            for layer in range(self.config.num_layers)
            for pair in ((past_key(layer), present_key(layer)), (past_value(layer), present_value(layer)))
        ]
        bindings = {}
        for graph, loaded in self._loaded.items():
            bindings[graph] = loaded.session.io_binding()
            for (past, present), value in zip(names, values, strict=True):
                self._bind_cache(bindings[graph], past, present, value)
        return BoundBuffers(values, bindings)

    def _bind_cache(self, binding: Any, past: str, present: str, value: Any) -> None:
        """One buffer as past and present alike, so that it is written in place."""
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)

    def grow_buffers(self, buffers: BoundBuffers, capacity: int) -> BoundBuffers:
        grown = []
        for value in buffers.values:
            old = value.numpy()
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, : old.shape[2]] = old
            grown.append(ort.OrtValue.ortvalue_from_numpy(new))
        return self._bind(grown)

    def join_buffers(self, rows: Sequence[tuple[BoundBuffers, int]], capacity: int) -> BoundBuffers:
        return self._bind([ort.OrtValue.ortvalue_from_numpy(one) for one in joined_arrays(rows, capacity)])

    def replace_buffers(
        self, buffers: BoundBuffers, rows: Mapping[int, tuple[BoundBuffers, int]], batch_size: int, capacity: int
    ) -> BoundBuffers:
        """In place: the batch's memory stays as it is while requests come and go."""
        for place, (others, row) in rows.items():
            for array, other in zip(buffers.arrays(), others.arrays(), strict=True):
                size = min(capacity, other.shape[2])
                array[place, :, :size] = other[row, :, :size]
                array[place, :, size:] = 0
        return buffers

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        return self._run(self._loaded[choose(self._loaded, inputs)], cache.buffers, inputs)

    def _run(self, loaded: LoadedGraph, buffers: BoundBuffers, inputs: StepInputs, options: Any = None) -> Logits:
        """One pass of one graph, its small inputs and its logits in the host's memory."""
        binding, graph = buffers.bindings[loaded.graph], loaded.graph
        # Kept in a name until the run is over: onnxruntime reads them where they lie.
        fed = {name: np.ascontiguousarray(value) for name, value in feed(graph, inputs).items()}
        for name, value in fed.items():
            binding.bind_cpu_input(name, value)
        logits = np.empty((num_logit_rows(graph, inputs), int(loaded.signature.logits.dims[1])), np.float32)
        binding.bind_ortvalue_output(loaded.signature.logits.name, ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            loaded.session.run_with_iobinding(binding, options)
        except Exception as failure:
            raise BackendError(f"onnxruntime failed in this step: {failure}") from failure
        self.passes[graph.name] += 1
        return as_contract(graph, self.config, logits, inputs)

    def release(self) -> None:
        del self._loaded


def joined_arrays(rows: Sequence[tuple[BoundBuffers, int]], capacity: int) -> Iterator[np.ndarray[Any, Any]]:
    """Keys or values [rows, k, capacity, d] of each layer in turn: copies of those rows, zeros behind what they hold."""
    sources = list({id(buffers): buffers for buffers, _ in rows}.values())
    for arrays in zip(*(one.arrays() for one in sources), strict=True):
        by_source = dict(zip(map(id, sources), arrays, strict=True))
        _, k, _, d = arrays[0].shape
        made = np.zeros((len(rows), k, capacity, d), arrays[0].dtype)
        for number, (buffers, row) in enumerate(rows):
            old = by_source[id(buffers)][row]
            made[number, :, : old.shape[1]] = old[:, :capacity]
        yield made


def open_graph(model: bytes, folder: Path, num_threads: int = 0) -> Any:
    """A serialised graph of any inputs in onnxruntime's own session on the CPU, opened as ``OnnxSession`` opens its own.

    Args:
        model: the graph.
        folder: where its external data lie.
        num_threads: for products; 0: one per core. Activations are multiplied as they are.

    Raises:
        BackendError: when onnxruntime can not run it.
    """
    options = session_options(num_threads, exact_activations=True)
    try:
        return _inference_session(model, folder, options, ("CPUExecutionProvider", {}))
    except Exception as failure:  # onnxruntime's exceptions share no base of their own
        raise BackendError(f"onnxruntime {ort.__version__} can not run a part of {folder}: {failure}") from failure


def session_options(num_threads: int, exact_activations: bool, log_severity: int = _ERRORS_ONLY) -> Any:
    """How every graph is opened: see ``OnnxSession``.

    Raises:
        BackendError: when onnxruntime is too old.
    """
    refuse_older(onnxruntime=ort.__version__)
    options = ort.SessionOptions()
    options.log_severity_level = log_severity
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry(_ACCURACY_LEVEL, _EXACT if exact_activations else _ROUNDED)
    options.add_session_config_entry(_FORMAT, _ONNX)
    return options


def _inference_session(model: Path | bytes, folder: Path, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    """A graph, of a file or serialised, in onnxruntime; its external data lie in ``folder``.

    onnxruntime reads external data that lie, links followed, in the folder or beside the file that the graph lies in, and no
    others, wherever a link may lead. Those are handed over in memory: that is slower, and takes as much again while it loads.
    """
    data = folder / WEIGHTS_FILE
    near = [folder.resolve()]
    if isinstance(model, bytes):
        options.add_session_config_entry(_DATA_FOLDER, str(folder))
    else:
        near.append(model.resolve().parent)
    values = None
    if data.is_file() and data.resolve().parent not in near:
        values = np.memmap(data, np.uint8, "r")  # in a name until the session is made: onnxruntime holds its address alone
        options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [values], [values.size])
    # A fallback would be another backend, and is told on standard output.
    return ort.InferenceSession(model, options, providers=[provider], enable_fallback=0)


def _specs(found: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(one.name, _DTYPES.get(one.type, one.type), tuple(one.shape)) for one in found)
