"""A bundle's TensorRT engines behind the session's calls.

One stream. The cache stays on the device, aliased: an engine's present is its past, as its cache-update layer demands. A pass
uploads a few small arrays and downloads the logits that are wanted, and nothing else moves. Every engine writes the same cache,
so a conversation goes from one to another as its modalities change.
"""

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motrt.errors import BackendError, BundleError, InputError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.model_def.signature import (
    BATCH,
    DTYPE_OF_PRECISION,
    HEAD_MASK,
    LOGITS_INDEX,
    NEW_TOKENS,
    NUM_LOGITS,
    Signature,
    TensorSpec,
    past_key,
    past_value,
    present_key,
    present_value,
)
from motrt.runtime.bundle import Bundle
from motrt.runtime.cuda_device import CudaDevice, DeviceBuffer
from motrt.runtime.engine_record import EngineRecord, record_of
from motrt.runtime.gpu import Gpu, find_gpus
from motrt.runtime.graph_choice import as_contract, choose, feed
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.tensorrt_library import FLAVOURS, spec_of, tensorrt_module

logger = logging.getLogger(__name__)

_ITEMSIZES = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class Bound:
    """An execution context that was told shapes and addresses.

    Attributes:
        context: TensorRT's.
        cache: whose keys and values it reads and writes; gone when nobody else holds it.
        sizes: of the symbolic dims.
        again: does the pass once more, where it was recorded.
    """

    context: Any
    cache: "weakref.ref[Cache] | None" = None
    sizes: dict[str, int] = field(default_factory=dict)
    again: Callable[[], None] | None = None


@dataclass(eq=False)
class Cache:
    """Keys and values of every layer on the device, in the order of the signature's past inputs.

    A recorded pass is valid while its context stays as it was, so each cache has contexts of its own for its steps.

    Attributes:
        buffers: two per layer.
        steps: by graph, what was bound to these very buffers.
    """

    buffers: list[DeviceBuffer]
    steps: dict[Graph, Bound] = field(default_factory=dict)


@dataclass
class LoadedEngine:
    """One engine, ready to run, and the device memory of what is not the cache.

    Attributes:
        graph: what it was built of.
        record: what the manifest says of it.
        signature: its inputs and outputs.
        engine: TensorRT's.
        inputs: device memory of each small input, large enough for any pass.
        logits: device memory of its logits.
        shared: the context of passes that are no steps: bound anew for each cache and shape.
    """

    graph: Graph
    record: EngineRecord
    signature: Signature
    engine: Any
    inputs: dict[str, DeviceBuffer]
    logits: DeviceBuffer
    shared: Bound | None = None


class TrtSession(Session):
    """Engines of one flavour, on one GPU.

    Args:
        bundle: opened; the engines' hashes are checked here, whatever else was.
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        library: TensorRT's module; None: the flavour's.
        device: where it runs; None: the first GPU.
        gpu: what that is; None: as the driver says.

    Attributes:
        passes: how many passes each engine did, by its graph's name.

    Raises:
        BundleError: when the bundle has no such engines, or an engine is not the file that the manifest bears.
        BackendError: when the library or a GPU is missing, or the engines are for another GPU or version: with the command that
            builds them anew.
    """

    def __init__(
        self, bundle: Bundle, flavour: str, library: Any = None, device: CudaDevice | None = None, gpu: Gpu | None = None
    ) -> None:
        records = [one for one in bundle.manifest.engines if one.flavour == flavour]
        if not records:
            raise BundleError(
                f"{bundle.path} holds no engines for {flavour}: make a bundle that does with `motrt export "
                f"{bundle.manifest.source['path']} OUT --target {flavour} --precision fp16`"
            )
        self._library = tensorrt_module(flavour) if library is None else library
        here = gpu or _first_gpu()
        self._refuse_other_machines(bundle, records, flavour, here)
        self.config: ModelConfig = bundle.config
        self.precision = bundle.manifest.precision
        self.backend = f"{flavour} ({here.name})"
        self.smallest_capacity = self.config.max_seq_len  # TensorRT knows no other
        self._records_graphs = flavour == "tensorrt"  # the other flavour records by itself
        self._device = CudaDevice() if device is None else device
        self._lock = threading.Lock()  # a context does one pass at a time
        self._caches: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._runtime_cache: Any = None
        self._engines: dict[Graph, LoadedEngine] = {}
        try:
            self._load_all(bundle, records)
        except BaseException:
            self.release()
            raise
        self.passes = {graph.name: 0 for graph in self._engines}
        self.most_rows = min(engine.record.ranges[BATCH].most for engine in self._engines.values())
        self.longest_pass = max(
            (engine.record.ranges[NEW_TOKENS].most for engine in self._engines.values() if NEW_TOKENS in engine.record.ranges),
            default=1,
        )

    def _refuse_other_machines(self, bundle: Bundle, records: list[EngineRecord], flavour: str, gpu: Gpu) -> None:
        versions = {FLAVOURS[flavour].module: str(self._library.__version__)}
        problems = [
            f"{one.file}: {problem}"
            for one in records
            for problem in one.differences(versions, gpu.name, gpu.compute_capability)
        ]
        quantized = bundle.manifest.quantization is not None
        also = " (with the --part, --block-size and --activations that this bundle was made with)" if quantized else ""
        capability = f" --compute-capability {gpu.compute_capability}" if flavour == "tensorrt-rtx" else ""
        raise_all(
            BackendError,
            "these engines can not run here; build them anew with `motrt export "
            f"{bundle.manifest.source['path']} OUT --target {flavour} --precision {bundle.manifest.weights}"
            f"{capability}`{also}:",
            problems,
        )

    def _load_all(self, bundle: Bundle, records: list[EngineRecord]) -> None:
        runtime = self._library.Runtime(self._library.Logger(self._library.Logger.ERROR))
        if any(one.options.get("version_compatible") for one in records):
            runtime.engine_host_code_allowed = True  # such engines carry their own runtime; their hashes are checked first
        for graph in bundle.manifest.graphs:
            record = record_of(records, graph)
            if record is not None:
                self._engines[graph] = self._load(bundle.path, graph, record, runtime)

    def _load(self, folder: Path, graph: Graph, record: EngineRecord, runtime: Any) -> LoadedEngine:
        data = (folder / record.file).read_bytes()
        # Whatever else was checked: an engine is code, and only what the manifest bears is run.
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise BundleError(f"{folder} is damaged; export it again: {record.file} is not the file that was exported")
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"TensorRT {self._library.__version__} can not load {record.file}: see what it printed (does this flavour "
                "support this GPU?), or export the bundle again here"
            )
        signature = Signature.of(graph, self.config, DTYPE_OF_PRECISION[self.precision])
        problems = signature.differences(*_found_specs(engine, self._library, signature))
        raise_all(BundleError, f"{record.file} does not keep the graph contract; export the bundle again:", problems)
        missing = {dim for spec in signature.inputs for dim in spec.dims if isinstance(dim, str)} - set(record.ranges)
        raise_all(BundleError, f"the record of {record.file} lacks ranges; export the bundle again:", sorted(missing))
        cached = {name(layer) for layer in range(self.config.num_layers) for name in (past_key, past_value)}
        small = [spec for spec in signature.inputs if spec.name not in cached]
        return LoadedEngine(
            graph=graph,
            record=record,
            signature=signature,
            engine=engine,
            inputs={spec.name: self._device.allocate(_most_bytes(spec, record)) for spec in small},
            logits=self._device.allocate(_most_bytes(signature.logits, record)),
        )

    def _context(self, engine: LoadedEngine) -> Any:
        """An execution context; the flavour for RTX records CUDA graphs of steps by itself where it is told to."""
        strategies = getattr(self._library, "CudaGraphStrategy", None)
        if strategies is None or not engine.graph.is_step:
            context = engine.engine.create_execution_context()
        else:
            settings = engine.engine.create_runtime_config()
            settings.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE
            if self._runtime_cache is None:
                self._runtime_cache = settings.create_runtime_cache()  # kernels are compiled once, not for each context
            settings.set_runtime_cache(self._runtime_cache)
            context = engine.engine.create_execution_context(settings)
        if context is None:
            free, _ = self._device.memory()
            needed = getattr(engine.engine, "device_memory_size_v2", 0) / 1e9
            raise BackendError(
                f"the GPU has too little memory left for {engine.record.file}: {needed:.2f} GB are needed to run it and "
                f"{free / 1e9:.2f} GB are free; let go of other caches, or load fewer engines"
            )
        return context

    def make_buffers(self, batch_size: int, capacity: int) -> Cache:
        for engine in self._engines.values():
            raise_all(InputError, "the engines were not built for so many rows:", engine.record.refusals({BATCH: batch_size}))
        itemsize = _ITEMSIZES[DTYPE_OF_PRECISION[self.precision]]
        num_bytes = batch_size * self.config.num_kv_heads * capacity * self.config.head_size * itemsize
        with self._lock:  # what is put on the stream must not fall into another conversation's record
            cache = Cache([self._device.allocate(num_bytes) for _ in range(2 * self.config.num_layers)])
            sizes = {BATCH: batch_size, NEW_TOKENS: 1}
            for engine in self._engines.values():  # now: a conversation that has begun must not find the memory gone
                if engine.graph.is_step:
                    self._bound(engine, sizes, cache)
        self._caches.add(cache)
        return cache

    def grow_buffers(self, buffers: Cache, capacity: int) -> Cache:
        raise AssertionError("the cache has the model's maximum from the start")

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        engine = self._engines[choose(self._engines, inputs)]
        sizes = {BATCH: inputs.input_ids.shape[0], NEW_TOKENS: inputs.input_ids.shape[1]}
        raise_all(InputError, f"the engine of {engine.graph.name} was not built for this pass:", engine.record.refusals(sizes))
        with self._lock:
            if engine.graph.is_step:
                logits = self._pass(engine, feed(engine.graph, inputs), sizes, sizes[BATCH], cache.buffers)
                return as_contract(engine.graph, self.config, logits, inputs)
            return self._passes_for_rows(engine, inputs, sizes, cache.buffers)

    def _passes_for_rows(self, engine: LoadedEngine, inputs: StepInputs, sizes: dict[str, int], cache: Cache) -> Logits:
        """The pass again for each share of the wanted rows: it writes the same into the cache every time.

        A pass that wants no logits (a prompt's middle) is given one row to compute all the same: engines take no fewer.
        """
        most, wanted = engine.record.ranges[NUM_LOGITS].most, len(inputs.logits_index)
        logits = np.empty((wanted, self.config.vocab_size), np.float32)
        for start in range(0, max(1, wanted), most):
            named = feed(engine.graph, inputs)
            for name in (LOGITS_INDEX, HEAD_MASK):
                named[name] = named[name][start : start + most] if wanted else np.zeros(1, np.int64)
            count = len(named[LOGITS_INDEX])
            rows = self._pass(engine, named, {**sizes, NUM_LOGITS: count}, count, cache)
            logits[start : start + count] = rows[: wanted - start]
        return logits

    def _pass(self, engine: LoadedEngine, named: dict[str, Any], sizes: dict[str, int], num_rows: int, cache: Cache) -> Logits:
        """One run of ``engine``; returns the first ``num_rows`` rows of its logits."""
        for name, values in named.items():
            self._device.upload(engine.inputs[name], values)
        bound = self._bound(engine, sizes, cache)
        if bound.again is not None:
            bound.again()
        else:
            self._enqueue(engine, bound.context)
            if self._records_graphs and engine.graph.is_step:
                bound.again = self._recorded(engine, bound.context)
        logits = np.empty((num_rows, int(engine.signature.logits.dims[1])), np.float32)
        self._device.download(engine.logits, logits)
        self.passes[engine.graph.name] += 1
        return logits

    def _bound(self, engine: LoadedEngine, sizes: dict[str, int], cache: Cache) -> Bound:
        """A context that has the shapes and addresses of this pass: a cache's own for its steps, told but once."""
        if engine.graph.is_step:
            if engine.graph not in cache.steps:
                cache.steps[engine.graph] = self._bind(engine, Bound(self._context(engine)), sizes, cache)
            return cache.steps[engine.graph]
        shared = engine.shared or Bound(self._context(engine))
        engine.shared = shared
        is_same = shared.cache is not None and shared.cache() is cache and shared.sizes == sizes
        return shared if is_same else self._bind(engine, shared, sizes, cache)

    def _bind(self, engine: LoadedEngine, bound: Bound, sizes: dict[str, int], cache: Cache) -> Bound:
        bound.cache = None  # until all of it is told
        context, signature = bound.context, engine.signature
        shapes = {
            spec.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims) for spec in signature.inputs
        }
        addresses = {name: buffer.address for name, buffer in engine.inputs.items()}
        addresses[signature.logits.name] = engine.logits.address
        for layer in range(self.config.num_layers):
            keys, values = cache.buffers[2 * layer].address, cache.buffers[2 * layer + 1].address
            addresses |= {past_key(layer): keys, present_key(layer): keys}
            addresses |= {past_value(layer): values, present_value(layer): values}
        refused = [name for name, shape in shapes.items() if not context.set_input_shape(name, shape)]
        refused += [name for name, address in addresses.items() if not context.set_tensor_address(name, address)]
        raise_all(BackendError, f"TensorRT does not take what a pass of {engine.record.file} needs:", refused)
        bound.cache, bound.sizes = weakref.ref(cache), dict(sizes)
        return bound

    def _enqueue(self, engine: LoadedEngine, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(f"TensorRT failed in a pass of {engine.record.file}: see what it printed")

    def _recorded(self, engine: LoadedEngine, context: Any) -> Callable[[], None]:
        """The step just done, as a CUDA graph; as itself where it can not be recorded."""
        try:
            return self._device.record(lambda: self._enqueue(engine, context))
        except BackendError as failure:
            logger.warning("steps of %s are not recorded as a CUDA graph: %s", engine.graph.name, failure)
            return lambda: self._enqueue(engine, context)

    def release(self) -> None:
        with self._lock:
            for cache in self._caches:
                cache.steps.clear()  # they hold engines and records
            self._engines.clear()
            self._device.close()


def _first_gpu() -> Gpu:
    gpus = find_gpus()
    if gpus.first is None:
        raise BackendError(f"engines run on an NVIDIA GPU, and {gpus.reason}: run this bundle with backend 'onnxruntime' here")
    return gpus.first


def _most_bytes(spec: TensorSpec, record: EngineRecord) -> int:
    count = _ITEMSIZES[spec.dtype]
    for dim in spec.dims:
        count *= record.ranges[dim].most if isinstance(dim, str) else dim
    return count


def _found_specs(engine: Any, library: Any, signature: Signature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The engine's own inputs and outputs, in the signature's order: an engine's own is no part of the contract."""
    order = {spec.name: place for place, spec in enumerate((*signature.inputs, *signature.outputs))}
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    found: tuple[list[TensorSpec], list[TensorSpec]] = ([], [])
    for name in sorted(names, key=lambda one: order.get(one, len(order))):
        is_output = engine.get_tensor_mode(name) == library.TensorIOMode.OUTPUT
        dtype, shape = engine.get_tensor_dtype(name), engine.get_tensor_shape(name)
        found[is_output].append(spec_of(library, signature, name, dtype, shape))
    return tuple(found[0]), tuple(found[1])
