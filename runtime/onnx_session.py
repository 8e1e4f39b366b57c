"""The canonical graph in onnxruntime. The one file of this room that needs it.

The cache stays where it is: past and present are bound to the same buffers, so ``TensorScatter`` writes in place. A
step binds five small arrays and one row of logits, and nothing else moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motrt.errors import BackendError, BundleError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.signature import (
    LOGITS,
    PRECISION_OF_DTYPE,
    Signature,
    TensorSpec,
    past_key,
    past_value,
    present_key,
    present_value,
)
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs

try:
    import onnxruntime as ort
except ImportError as missing:
    raise BackendError(
        f"onnxruntime can not be imported ({missing}): install it with `pip install 'motrt[cpu]'` or 'motrt[gpu]'"
    ) from missing

CPU = "CPUExecutionProvider"

_DTYPES = {"tensor(double)": "float64", "tensor(float)": "float32", "tensor(float16)": "float16"}
_DTYPES |= {"tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}

_ERRORS_ONLY = 3  # onnxruntime's severities: 0 verbose, 1 info, 2 warning, 3 error


@dataclass(frozen=True)
class BoundBuffers:
    """Keys and values of every layer, bound once as past and present."""

    values: tuple[Any, ...]
    binding: Any


class OnnxSession(Session):
    """One ONNX file behind the session's calls, on the CPU.

    Args:
        model: path of ``model.onnx``, its external data beside it.
        config: what the graph computes.
        num_threads: for products; 0 leaves it to onnxruntime (one per core).
        log_severity: what onnxruntime prints: 3 errors, 2 warnings too.
        overrides: initializers to replace, by name; parity uses them to poison weights.

    Raises:
        BackendError: when onnxruntime can not run the graph here.
        BundleError: when the graph does not have the contract's inputs and outputs.
    """

    def __init__(
        self,
        model: Path,
        config: ModelConfig,
        num_threads: int = 0,
        log_severity: int = _ERRORS_ONLY,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = log_severity
        options.intra_op_num_threads = num_threads
        if overrides:
            values = [ort.OrtValue.ortvalue_from_numpy(value) for value in overrides.values()]
            for name, value in zip(overrides, values, strict=True):
                options.add_initializer(name, value)
            self._overrides = (overrides, values)  # onnxruntime keeps pointers into them
        try:
            self._session = ort.InferenceSession(model, options, providers=[CPU])
        except Exception as failure:  # onnxruntime's exceptions share no base of their own
            raise BackendError(f"onnxruntime {ort.__version__} can not run {model} on the CPU: {failure}") from failure
        self.config = config
        self.backend = "onnxruntime (CPU)"
        self.signature = Signature.canonical(config, self._cache_dtype())
        self.precision = PRECISION_OF_DTYPE[self.signature.cache_dtype]
        problems = self.signature.differences(*self.found_specs())
        raise_all(BundleError, f"{model} does not keep the graph contract; export it again:", problems)

    def found_specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The graph's own inputs and outputs, as onnxruntime reports them."""
        return _specs(self._session.get_inputs()), _specs(self._session.get_outputs())

    def _cache_dtype(self) -> str:
        types = {one.name: one.type for one in self._session.get_inputs()}
        return _DTYPES.get(types.get(past_key(0), ""), "float32")

    def make_buffers(self, batch_size: int, capacity: int) -> BoundBuffers:
        shape = (batch_size, self.config.num_kv_heads, capacity, self.config.head_size)
        dtype = np.dtype(self.signature.cache_dtype)
        return self._bind([np.zeros(shape, dtype) for _ in range(2 * self.config.num_layers)])

    def _bind(self, arrays: Sequence[np.ndarray[Any, Any]]) -> BoundBuffers:
        values = tuple(ort.OrtValue.ortvalue_from_numpy(array) for array in arrays)
        binding = self._session.io_binding()
        names = [
            pair
            for layer in range(self.config.num_layers)
            for pair in ((past_key(layer), present_key(layer)), (past_value(layer), present_value(layer)))
        ]
        for (past, present), value in zip(names, values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        return BoundBuffers(values, binding)

    def grow_buffers(self, buffers: BoundBuffers, capacity: int) -> BoundBuffers:
        grown = []
        for value in buffers.values:
            old = value.numpy()
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, : old.shape[2]] = old
            grown.append(new)
        return self._bind(grown)

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        binding = cache.buffers.binding
        # Kept in a name until the run is over: onnxruntime reads them where they lie.
        fed = {name: np.ascontiguousarray(value) for name, value in inputs.named().items()}
        for name, value in fed.items():
            binding.bind_cpu_input(name, value)
        logits = np.empty((len(inputs.logits_index), self.config.vocab_size), np.float32)
        binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as failure:
            raise BackendError(f"onnxruntime failed in this step: {failure}") from failure
        return logits

    def release(self) -> None:
        del self._session


def _specs(found: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(one.name, _DTYPES.get(one.type, one.type), tuple(one.shape)) for one in found)
