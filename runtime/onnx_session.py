"""The canonical graph in onnxruntime, and the graphs derived of it. The one file of this room that needs it.

The cache stays where it is: past and present are bound to the same buffers, so ``TensorScatter`` writes in place. A
step binds five small arrays and one row of logits, and nothing else moves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from motrt.errors import BackendError, BundleError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
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
from motrt.runtime.graph_choice import as_contract, choose, feed, num_logit_rows
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs

try:
    import onnxruntime as ort
except ImportError as missing:
    raise BackendError(
        f"onnxruntime can not be imported ({missing}): install it with `pip install 'motrt[cpu]'` or 'motrt[gpu]'"
    ) from missing

# TF32 keeps ten bits of a float32 product: what the parity ladder allows, it would use up.
PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}

_STORED = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_BFLOAT16 = 16  # of onnx.TensorProto.DataType

_DTYPES = {"tensor(double)": "float64", "tensor(float)": "float32", "tensor(float16)": "float16"}
_DTYPES |= {"tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}

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


class OnnxSession(Session):
    """ONNX files behind the session's calls, on the CPU or a GPU.

    Args:
        model: path of the canonical graph; others lie beside it.
        config: what the graphs compute.
        num_threads: for products; 0 leaves it to onnxruntime (one per core).
        log_severity: what onnxruntime prints: 3 errors, 2 warnings too.
        overrides: initializers to replace, by name; parity uses them to poison weights.
        graphs: which graphs to load, most special first: each pass takes the first that serves it.
        device: ``cpu`` or ``cuda``. The cache lies there, and stays there.

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
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.config = config
        self._device = device
        self.backend = f"onnxruntime ({device.upper()})"
        self._overrides: list[Any] = []  # onnxruntime keeps pointers into them
        self._loaded: dict[Graph, LoadedGraph] = {}
        for graph in graphs:
            file = model if graph == CANONICAL else model.parent / graph.file_name
            options = ort.SessionOptions()
            options.log_severity_level = log_severity
            options.intra_op_num_threads = num_threads
            self._override(options, {one.name for one in graph.parameters(config)}, overrides or {})
            self._loaded[graph] = self._open(graph, file, options)
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

    def _open(self, graph: Graph, file: Path, options: Any) -> LoadedGraph:
        provider = PROVIDERS[self._device]
        try:
            session = ort.InferenceSession(file, options, providers=[provider])
        except Exception as failure:  # onnxruntime's exceptions share no base of their own
            place = self._device.upper()
            raise BackendError(f"onnxruntime {ort.__version__} can not run {file} on the {place}: {failure}") from failure
        if session.get_providers()[0] != provider[0]:
            raise BackendError(f"onnxruntime {ort.__version__} fell back to the CPU: see `motrt inspect --backends`")
        inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
        cache_dtype = next((spec.dtype for spec in inputs if spec.name == past_key(0)), "float32")
        signature = Signature.of(graph, self.config, cache_dtype if cache_dtype in FLOAT_DTYPES else "float32")
        problems = signature.differences(inputs, outputs)
        raise_all(BundleError, f"{file} does not keep the graph contract; export it again:", problems)
        return LoadedGraph(graph, signature, session)

    def make_buffers(self, batch_size: int, capacity: int) -> BoundBuffers:
        shape = (batch_size, self.config.num_kv_heads, capacity, self.config.head_size)
        nothing = np.zeros(shape, _STORED[self.signature.cache_dtype])
        return self._bind([self._value(nothing.copy()) for _ in range(2 * self.config.num_layers)])

    def _value(self, stored: np.ndarray[Any, Any]) -> Any:
        """Keys or values on the device; ``stored`` is their bit pattern, since numpy has no bfloat16."""
        try:
            if self.signature.cache_dtype != "bfloat16":
                return ort.OrtValue.ortvalue_from_numpy(stored, self._device, 0)
            value = ort.OrtValue.ortvalue_from_shape_and_type(stored.shape, _BFLOAT16, self._device, 0)
            value.update_inplace(stored)
        except Exception as failure:
            needed = 2 * self.config.num_layers * stored.nbytes / 1e9
            raise BackendError(f"no memory on the {self._device} for a cache of {needed:.2f} GB: {failure}") from failure
        return value

    def _bind(self, ort_values: Sequence[Any]) -> BoundBuffers:
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
                bindings[graph].bind_ortvalue_input(past, value)
                bindings[graph].bind_ortvalue_output(present, value)
        return BoundBuffers(values, bindings)

    def grow_buffers(self, buffers: BoundBuffers, capacity: int) -> BoundBuffers:
        grown = []
        for value in buffers.values:
            old = value.numpy()
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, : old.shape[2]] = old
            grown.append(self._value(new))
        return self._bind(grown)

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        loaded = self._loaded[choose(self._loaded, inputs)]
        binding, graph = cache.buffers.bindings[loaded.graph], loaded.graph
        # Kept in a name until the run is over: onnxruntime reads them where they lie.
        fed = {name: np.ascontiguousarray(value) for name, value in feed(graph, inputs).items()}
        for name, value in fed.items():
            binding.bind_cpu_input(name, value)
        logits = np.empty((num_logit_rows(graph, inputs), int(loaded.signature.logits.dims[1])), np.float32)
        binding.bind_ortvalue_output(loaded.signature.logits.name, ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            loaded.session.run_with_iobinding(binding)
        except Exception as failure:
            raise BackendError(f"onnxruntime failed in this step: {failure}") from failure
        self.passes[graph.name] += 1
        return as_contract(graph, self.config, logits, inputs)

    def release(self) -> None:
        del self._loaded


def _specs(found: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(one.name, _DTYPES.get(one.type, one.type), tuple(one.shape)) for one in found)
