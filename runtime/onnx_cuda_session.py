"""The bundle's graphs in onnxruntime on a GPU.

The cache lies on the device and stays there. A graph of one token per row (nothing in it asks the host) is recorded as a CUDA
graph by onnxruntime: its inputs and logits then have memory of their own on the device, a pass copies two small arrays there
and one array of logits back, and nothing else moves. What is recorded belongs to addresses, so caches that are given up are
used again; onnxruntime keeps every record as long as the session, and one for each thread that computes.
"""

import itertools
import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from motrt.errors import BackendError
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.parameters import Parameter, parameters
from motrt.runtime.bundle import WEIGHTS_FILE, WeightPlaces
from motrt.runtime.cuda_device import CudaDevice
from motrt.runtime.graph_choice import as_contract, choose, feed
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_session import BoundBuffers, LoadedGraph, OnnxSession, session_options
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.step_kernels import CapturedStep, StepKernels, why_not

logger = logging.getLogger(__name__)

# What a cache is to numpy, which has no bfloat16, nor does onnxruntime give arrays of it: such a cache is held as bit patterns,
# and bound by its address under ONNX's number for what they are (onnx.TensorProto.BFLOAT16).
_STORED: dict[str, Any] = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_BOUND_AS = {"bfloat16": 16}

_SAY_WHERE = "session.record_ep_graph_assignment_info"
_WEIGHTS_APART = "session.use_device_allocator_for_initializers"  # exactly their size, and not an arena's
# A product's bias stays an operator of its own: that onnxruntime's GPU kernels of codes add one was never measured here.
_BIAS_APART = ("optimization.disable_specified_optimizers", "MatMulAddFusion")


# Memory taken by another thread, for whatever session, would break what is just being recorded: all sessions take turns.
_ONE_AT_A_TIME = threading.RLock()

# Caches of one shape that are kept for the next conversation: device memory that nobody uses.
MOST_IDLE = 2


@dataclass
class RecordedStep:
    """One step's graph, bound to device memory that never moves, under a number by which onnxruntime knows its record."""

    binding: Any
    inputs: dict[str, Any]
    logits: Any
    options: Any


@dataclass(frozen=True)
class SharedWeight:
    """A weight on the device, and the same memory as graphs borrow it."""

    value: Any
    lent: Any


@dataclass
class Held:
    """A cache's device memory, and what was bound and recorded over it."""

    buffers: BoundBuffers
    steps: dict[Graph, RecordedStep] = field(default_factory=dict)
    kernels: dict[Graph, CapturedStep] = field(default_factory=dict)


class Lease:
    """The use of a cache's memory; it goes back to the session when the conversation lets go of it."""

    def __init__(self, held: Held, idle: list[Held]) -> None:
        self.held, self._idle = held, idle

    def __del__(self) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle.append(self.held)


class CudaOnnxSession(OnnxSession):
    """ONNX files on the first GPU.

    Args:
        model: path of the canonical graph; others lie beside it.
        config: what the graphs compute.
        graphs: which graphs to load, most special first.
        records_steps: whether steps are recorded as CUDA graphs. Where onnxruntime can not, they are done as they are.
        stream: the CUDA stream to compute on, by its address (torch: ``stream.cuda_stream``); 0: onnxruntime's own.
        attention_kernels: which kernels attention may take, as onnxruntime numbers them (``sdpa_kernel``: 1 flash, 8 cuDNN); 0:
            what it thinks best, which since 1.30 is cuDNN's on Hopper and newer.
        weights: where weights lie that are put on the device once, for all graphs (``Manifest.shared_weights``). What is not
            named each graph holds for itself.
        step_kernels: whether steps of one modality take this package's own kernels (``step_kernels``), where they can.

    Attributes:
        no_kernels: why steps take onnxruntime's kernels; empty where they take this package's own.
        elsewhere: by graph, the operators that onnxruntime did not put on the GPU, and how many of each; what computes shapes
            is meant to be there. None where this onnxruntime does not say.
        shares: by graph, whether it reads the weights that all share.

    Raises:
        BackendError: when onnxruntime has no CUDA, or can not run a graph.
        BundleError: when a graph does not have the contract's inputs and outputs.
    """

    device = "cuda"
    provider = "CUDAExecutionProvider"

    def __init__(
        self,
        model: Path,
        config: ModelConfig,
        graphs: Sequence[Graph] = (CANONICAL,),
        records_steps: bool = True,
        stream: int = 0,
        attention_kernels: int = 0,
        weights: WeightPlaces | None = None,
        step_kernels: bool = True,
    ) -> None:
        self._recorded = {graph for graph in graphs if graph.takes_one_token} if records_steps else set()
        self._asked = {"user_compute_stream": str(stream)} if stream else {}
        self._asked |= {"sdpa_kernel": str(attention_kernels)} if attention_kernels else {}
        self._numbers = itertools.count(1)
        self._idle: dict[tuple[int, int], list[Held]] = {}
        self.elsewhere: dict[str, dict[str, int] | None] = {}
        self.shares: dict[str, bool] = {}
        # Without that call, which has come with onnxruntime 1.24, nothing can be lent.
        self._shared = weights if weights is not None and weights.places and hasattr(ort.OrtValue, "from_dlpack") else None
        self._weights: dict[str, SharedWeight] = {}
        super().__init__(model, config, graphs=graphs, exact_activations=True)
        self.backend = "onnxruntime (CUDA)"
        self.smallest_capacity = config.max_seq_len  # growing would move what is recorded
        self._kernels: StepKernels | None = None
        self.no_kernels = self._why_no_kernels() if step_kernels and records_steps else "they were not asked for"
        if not self.no_kernels:
            self._open_kernels(model.parent / WEIGHTS_FILE)

    def _why_no_kernels(self) -> str:
        if self.device != "cuda":
            return "they are for GPUs"
        if self._shared is None or not any(graph.is_step for graph in self._loaded):
            return "the bundle does not say where its weights lie, or has no steps of one modality"
        return why_not(self.config, self._shared.dtype, list(self._shared.places))

    def _open_kernels(self, weights_file: Path) -> None:
        """Compile the steps of one row; where that fails, steps are onnxruntime's."""
        shared, known = self._shared, {one.name: one for one in parameters(self.config)}
        assert shared is not None
        owner = weakref.ref(self)  # not the session itself: it holds the kernels that hold this

        def address(name: str) -> int:
            session = owner()
            assert session is not None
            return int(session._weight(weights_file, known[name], shared).value.data_ptr())

        try:
            device = self._copier or CudaDevice()
            kernels = StepKernels(self.config, shared.dtype, device, address)
            for modality in sorted({graph.tokens for graph in self._loaded if graph.tokens is not None}):
                kernels.prepare(modality, 1)
        except BackendError as failure:
            self._give_up_kernels(failure)
        else:
            self._kernels = kernels
            self.backend = "onnxruntime (CUDA), own step kernels"

    def _give_up_kernels(self, failure: BackendError) -> None:
        self._kernels, self.no_kernels = None, str(failure)
        self.backend = "onnxruntime (CUDA)"
        logger.warning("steps take onnxruntime's kernels, not this package's own: %s", self.no_kernels)

    def _provider(self, graph: Graph) -> tuple[str, dict[str, str]]:
        # TF32 keeps ten bits of a float32 product: what the parity ladder allows, it would use up.
        # Memory is asked for as it is needed: an arena that doubles would keep half of the GPU to itself.
        settings = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", **self._asked}
        return self.provider, settings | ({"enable_cuda_graph": "1"} if graph in self._recorded else {})

    def _open(self, graph: Graph, file: Path, options: Any, instead: bytes | None = None) -> LoadedGraph:
        recordings = (True, False) if graph in self._recorded else (False,)
        ways = [(records, shares) for records in recordings for shares in ((True, False) if self._shared else (False,))]
        for records, shares in ways:
            if not records:
                self._recorded.discard(graph)
            try:
                loaded = super()._open(graph, file, self._options(graph, file, shares), instead)
            except BackendError as failure:
                if (records, shares) == ways[-1]:
                    raise
                said = f"{'recorded' if records else 'not recorded'}, weights {'shared' if shares else 'of its own'}"
                logger.warning("%s can not be opened so (%s), and is opened otherwise: %s", graph.name, said, str(failure))
                continue
            self.shares[graph.name] = shares
            break
        self.elsewhere[graph.name] = _elsewhere(loaded.session, self.provider)
        logger.info("%s: operators that are not on the GPU: %s", graph.name, self.elsewhere[graph.name])
        return loaded

    def _options(self, graph: Graph, file: Path, shares: bool) -> Any:
        options = session_options(num_threads=0, exact_activations=True)
        options.add_session_config_entry(_SAY_WHERE, "1")
        options.add_session_config_entry(_WEIGHTS_APART, "1")
        options.add_session_config_entry(*_BIAS_APART)
        if shares and self._shared is not None:
            for one in graph.parameters(self.config):
                if one.name in self._shared.places:
                    options.add_initializer(one.name, self._weight(file.parent / WEIGHTS_FILE, one, self._shared).lent)
        return options

    def _weight(self, file: Path, parameter: Parameter, shared: WeightPlaces) -> SharedWeight:
        """A weight on the device, put there when it is first asked for."""
        held = self._weights.get(parameter.name)
        if held is None:
            stored = _STORED[shared.dtype]
            values = np.memmap(file, stored, "r", shared.places[parameter.name][0], parameter.shape)
            try:
                kind = _BOUND_AS.get(shared.dtype, stored)
                value = ort.OrtValue.ortvalue_from_shape_and_type(parameter.shape, kind, self.device, 0)
                value.update_inplace(np.asarray(values))
                # onnxruntime shares only what is not its own: lent, the same memory counts as somebody else's.
                held = self._weights[parameter.name] = SharedWeight(value, ort.OrtValue.from_dlpack(value))
            except Exception as failure:
                raise BackendError(f"{parameter.name} can not be put on the GPU: {failure}") from failure
        return held

    def make_buffers(self, batch_size: int, capacity: int) -> Any:
        shape = (batch_size, self.config.num_kv_heads, capacity, self.config.head_size)
        idle = self._idle.setdefault((batch_size, capacity), [])
        with _ONE_AT_A_TIME:
            held = idle.pop() if idle else self._held(shape)
            self._empty(held, shape)
        return Lease(held, idle)

    def _empty(self, held: Held, shape: tuple[int, ...]) -> None:
        if self._copier is not None:
            for value in held.buffers.values:
                self._copier.zero(value.data_ptr(), value.tensor_size_in_bytes())
            self._copier.finish()
            return
        nothing = np.zeros(shape, _STORED[self.signature.cache_dtype])
        for value in held.buffers.values:
            value.update_inplace(nothing)

    def join_buffers(self, rows: Sequence[tuple[Any, int]], capacity: int) -> Any:
        lease = self.make_buffers(len(rows), capacity)
        self._put(lease.held, dict(enumerate(rows)))
        return lease

    def replace_buffers(self, buffers: Any, rows: Mapping[int, tuple[Any, int]], batch_size: int, capacity: int) -> Any:
        """In place: what is recorded over the batch's memory stays."""
        self._put(buffers.held, rows)
        return buffers

    def _put(self, held: Held, rows: Mapping[int, tuple[Any, int]]) -> None:
        """Copies of others' rows in the places named. Every cache has the model's maximum, so a row is as long in each."""
        with _ONE_AT_A_TIME:
            copier = self._copier
            for number, into in enumerate(held.buffers.values):
                sources = {place: (lease.held.buffers.values[number], row) for place, (lease, row) in rows.items()}
                if copier is None:
                    array = into.numpy()
                    for place, (source, row) in sources.items():
                        array[place] = source.numpy()[row]
                    into.update_inplace(array)
                    continue
                size = into.tensor_size_in_bytes() // into.shape()[0]
                for place, (source, row) in sources.items():
                    copier.copy(into.data_ptr() + place * size, source.data_ptr() + row * size, size)
            if copier is not None:
                copier.finish()

    @cached_property
    def _copier(self) -> CudaDevice | None:
        """What copies from device to device; None where nothing does, and the host's memory is the way."""
        try:
            return CudaDevice()
        except BackendError as failure:
            # As text: who keeps the exception keeps the frames that it came through, and a cache with them.
            logger.warning("caches are emptied and joined by way of the host's memory, which is slow: %s", str(failure))
            return None

    def _held(self, shape: tuple[int, ...]) -> Held:
        """New memory; where there is none left, what is kept for others is given up first."""
        count = 2 * self.config.num_layers
        try:
            return Held(self._bind([self._value(shape) for _ in range(count)]))
        except BackendError:
            if not any(self._idle.values()):
                raise
            for idle in self._idle.values():
                idle.clear()
            return Held(self._bind([self._value(shape) for _ in range(count)]))

    def _value(self, shape: tuple[int, ...]) -> Any:
        """Keys or values on the device, whatever was there before."""
        stored = np.dtype(_STORED[self.signature.cache_dtype])
        try:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, stored.type, self.device, 0)
        except Exception as failure:
            needed = 2 * self.config.num_layers * math.prod(shape) * stored.itemsize / 1e9
            raise BackendError(f"no memory on the GPU for a cache of {needed:.2f} GB: {failure}") from failure

    def _bind_cache(self, binding: Any, past: str, present: str, value: Any) -> None:
        kind = _BOUND_AS.get(self.signature.cache_dtype)
        if kind is None:
            super()._bind_cache(binding, past, present, value)
        else:
            for name, bind in ((past, binding.bind_input), (present, binding.bind_output)):
                bind(name, self.device, 0, kind, value.shape(), value.data_ptr())

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        held: Held = cache.buffers.held
        loaded = self._loaded[choose(self._loaded, inputs)]
        with _ONE_AT_A_TIME:
            step = self._captured(loaded.graph, held, len(inputs.cache_position))
            if step is not None and self._kernels is not None:
                self.passes[loaded.graph.name] += 1
                return self._kernels.run(step, inputs)
            if loaded.graph not in self._recorded:
                return self._run(loaded, held.buffers, inputs, _not_recorded())
            is_new = loaded.graph not in held.steps
            if is_new:
                held.steps[loaded.graph] = self._step(loaded, held, inputs)
            try:
                return self._run_recorded(loaded, held, inputs)
            except BackendError as failure:
                if not is_new:
                    raise
                del held.steps[loaded.graph]
                logger.warning("steps of %s are not recorded as a CUDA graph: %s", loaded.graph.name, str(failure))
                self._recorded.discard(loaded.graph)
                return self._run(loaded, held.buffers, inputs, _not_recorded())

    def _captured(self, graph: Graph, held: Held, rows: int) -> CapturedStep | None:
        """A step of own kernels over a cache; None where it is not theirs, or cannot be had."""
        if self._kernels is None or not self._kernels.serves(graph, rows):
            return None
        if graph not in held.kernels:
            addresses = [int(value.data_ptr()) for value in held.buffers.values]
            caches = list(zip(addresses[::2], addresses[1::2], strict=True))
            try:
                held.kernels[graph] = self._captured_once_or_again(graph, rows, caches)
            except BackendError as failure:
                self._give_up_kernels(failure)
        return held.kernels.get(graph)

    def _captured_once_or_again(self, graph: Graph, rows: int, caches: Sequence[tuple[int, int]]) -> CapturedStep:
        """A capture; where it fails, once more without the caches that are kept for others: it may have been memory."""
        assert self._kernels is not None
        try:
            return self._kernels.capture(graph, rows, caches)
        except BackendError:
            if not any(self._idle.values()):
                raise
            for idle in self._idle.values():
                idle.clear()
            return self._kernels.capture(graph, rows, caches)

    def _step(self, loaded: LoadedGraph, held: Held, inputs: StepInputs) -> RecordedStep:
        """Device memory for what a step takes and gives, bound once; onnxruntime records the pass when it is done again."""
        binding = held.buffers.bindings[loaded.graph]
        values = {name: self._on_device(value) for name, value in feed(loaded.graph, inputs).items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        shape = (inputs.input_ids.shape[0], int(loaded.signature.logits.dims[1]))
        logits = self._on_device(np.zeros(shape, np.float32))
        binding.bind_ortvalue_output(loaded.signature.logits.name, logits)
        return RecordedStep(binding, values, logits, _numbered(next(self._numbers)))

    def _on_device(self, value: np.ndarray[Any, Any]) -> Any:
        try:
            return ort.OrtValue.ortvalue_from_numpy(np.array(value, order="C"), self.device, 0)
        except Exception as failure:
            raise BackendError(f"no memory on the GPU for a step's inputs and logits: {failure}") from failure

    def _run_recorded(self, loaded: LoadedGraph, held: Held, inputs: StepInputs) -> Logits:
        graph, step = loaded.graph, held.steps[loaded.graph]
        for name, value in feed(graph, inputs).items():
            step.inputs[name].update_inplace(np.ascontiguousarray(value))
        try:
            loaded.session.run_with_iobinding(step.binding, step.options)
        except Exception as failure:
            raise BackendError(
                f"onnxruntime failed in a recorded step of {graph.name}: {failure}. Where other passes run, open it with "
                "CudaOnnxSession(..., records_steps=False)"
            ) from failure
        self.passes[graph.name] += 1
        return as_contract(graph, self.config, step.logits.numpy(), inputs)

    def release(self) -> None:
        self._kernels = None
        self._idle.clear()
        self._weights.clear()
        copier = self.__dict__.get("_copier")
        if copier is not None:
            copier.close()
        super().release()


def _numbered(number: int) -> Any:
    """By this number onnxruntime knows what it recorded."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _not_recorded() -> Any:
    """A pass that is neither recorded nor taken from a record, though the session records."""
    return _numbered(-1)


def _elsewhere(session: Any, provider: str) -> dict[str, int] | None:
    """The operators that other providers than ``provider`` were given, and how many of each."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before onnxruntime 1.24
        return None
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != provider]
    return dict(Counter(node.op_type for part in parts for node in part.get_nodes()).most_common())
