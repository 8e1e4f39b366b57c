"""Decode steps by this package's own CUDA kernels (``step_kernels.cu``): which launches a step is, and how it is run.

onnxruntime begins a kernel for every operator, and a step has little to do in each: on an H200 its 246 to 278 kernels for one
row of the 1B model take longer to begin and end than the weights take to be read (docs/gpu.md). These are five kernels a layer
for a SwiGLU expert and seven for an adapter, over the same weights and the same cache; prompts, and rows of several
modalities, stay with onnxruntime.

Knows neither CUDA's libraries nor onnxruntime: a device and its compiler are handed in, so that the kernels themselves are
examined on machines without a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from motrt.model_def.config import AdapterExpert, ModelConfig, rope_frequencies
from motrt.model_def.graph import Graph
from motrt.model_def.parameters import EMBEDDING, FINAL_NORM, SHARED_HEAD, parameters, split_head
from motrt.runtime.graph_choice import empty_contract
from motrt.runtime.step_inputs import StepInputs

SOURCE = Path(__file__).with_name("step_kernels.cu")
MAX_ROWS = 8  # beyond, products are arithmetic rather than reading, and matrix units are faster
_VECTOR = 8  # values of a 16-byte load
_DTYPES = ("bfloat16", "float16")
_MAX_SHARED_BYTES = 48 * 1024  # of a block that asks for no more
_TILE = 16  # weight rows that the matrix units multiply at a time


@dataclass(frozen=True)
class Tuning:
    """How the kernels are cut, as ``benchmarks/gpu_kernels.py`` found best on an H200. Any values give the same logits.

    Attributes:
        threads: of a block.
        ahead: 16-byte loads of a thread in flight.
        max_blocks: of a product of one row, for each multiprocessor; a warp then goes on to further weights.
        max_tiles: the same of a product of several rows, a block a tile.
        max_splits: parts of the keys that attention takes beside each other.
        min_keys: of such a part.
        overlaps: whether a kernel may begin before the one ahead has ended.
    """

    threads: int = 256
    ahead: int = 16
    max_blocks: int = 4
    max_tiles: int = 2
    max_splits: int = 16
    min_keys: int = 32
    overlaps: bool = True


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    Attributes:
        kernel: its name in the source.
        grid: blocks in each direction.
        arguments: addresses, and numpy scalars where a number is taken.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[int | np.int32, ...]


class Module(Protocol):
    """The compiled source."""

    def launch(self, launch: Launch, threads: int, waits: bool) -> None:
        """Put a kernel on the device's stream; ``waits``: it waits for the kernel ahead by itself, and may begin before."""


class Device(Protocol):
    """What steps need of a device; see ``cuda_device.CudaDevice``."""

    @property
    def num_multiprocessors(self) -> int: ...

    def allocate(self, num_bytes: int) -> Any: ...
    def upload(self, buffer: Any, values: np.ndarray[Any, Any]) -> None: ...
    def download(self, buffer: Any, values: np.ndarray[Any, Any], start: int = 0) -> None: ...
    def finish(self) -> None: ...
    def record(self, work: Callable[[], None]) -> Callable[[], None]: ...
    def compile(self, source: str, macros: dict[str, str]) -> Module: ...


def why_not(config: ModelConfig, dtype: str, weights: Sequence[str]) -> str:
    """Why these kernels cannot do steps of ``config``; empty where they can.

    Args:
        config: the model's.
        dtype: of weights and cache.
        weights: names of those that are on the device as ``dtype``.
    """
    if dtype not in _DTYPES:
        return f"they are for {' and '.join(_DTYPES)}, not for {dtype}"
    absent = [one.name for one in parameters(config) if one.name not in weights]
    if absent:
        return f"{absent[0]} is not on the device as {dtype}"  # of codes, say
    if config.qk_norm:
        return "they have no norms of queries and keys"
    lanes = config.head_size // _VECTOR
    if config.head_size % _VECTOR or lanes & (lanes - 1) or lanes > 32:
        return f"they are for head sizes of 8, 16, 32, 64, 128 and 256, not for {config.head_size}"
    widths = {"model_width": config.model_width}
    for modality in config.modalities:
        expert = modality.expert
        widths[f"hidden_size of {modality.name}"] = expert.hidden_size
        widths |= {f"width of {modality.name}": expert.width} if isinstance(expert, AdapterExpert) else {}
    odd = [f"{name} {width}" for name, width in widths.items() if width % _VECTOR]
    if odd:
        return f"they are for widths that are multiples of {_VECTOR}: {', '.join(odd)}"
    group = config.num_heads // config.num_kv_heads
    merged = 4 * (Tuning().threads // 32) * group * (config.head_size + 2) + 16
    if max_rows(config) < 1 or merged > _MAX_SHARED_BYTES:
        return "its rows do not fit into the memory that a block shares"
    return ""


def max_rows(config: ModelConfig) -> int:
    """The most rows of a step: each is held normed in the memory that a block shares, beside the norm and the warps' sums."""
    sums = 4 * (Tuning().threads // 32) * (8 * _TILE + 1)
    return min(MAX_ROWS, (_MAX_SHARED_BYTES - sums - 2 * config.model_width) // (2 * (config.model_width + _VECTOR)))


@dataclass(frozen=True)
class StepShape:
    """What the kernels are compiled for.

    Attributes:
        config: the model's.
        dtype: of weights and cache.
        tokens: the index of the modality whose weights are read.
        rows: of the step.
        num_multiprocessors: of the device.
        tuning: how they are cut.
    """

    config: ModelConfig
    dtype: str
    tokens: int
    rows: int
    num_multiprocessors: int
    tuning: Tuning = Tuning()

    @property
    def splits(self) -> int:
        """Parts of the keys beside each other: enough blocks for the device, and no more than are put together quickly."""
        return max(1, min(self.tuning.max_splits, 2 * self.num_multiprocessors // (self.config.num_kv_heads * self.rows)))

    @property
    def macros(self) -> dict[str, str]:
        """Every size, as the source names it."""
        config, expert = self.config, self.config.modalities[self.tokens].expert
        is_adapter = isinstance(expert, AdapterExpert)
        sizes = {
            "IS_BF16": int(self.dtype == "bfloat16"),
            "THREADS": self.tuning.threads,
            "MAX_AHEAD": self.tuning.ahead,
            "ROWS": self.rows,
            "WIDTH": config.model_width,
            "HEADS": config.num_heads,
            "KV_HEADS": config.num_kv_heads,
            "HEAD_SIZE": config.head_size,
            "CAPACITY": config.max_seq_len,
            "IS_INTERLEAVED": int(config.rope.style == "interleaved"),
            "SPLITS": self.splits,
            "MIN_KEYS": self.tuning.min_keys,
            "EXPERT_IS_SWIGLU": int(not is_adapter),
            "HIDDEN": expert.hidden_size,
            "INNER": expert.width if isinstance(expert, AdapterExpert) else 0,
        }
        numbers = {"NORM_EPS": config.norm_eps, "SOFTMAX_SCALE": config.head_size**-0.5}
        literals = {name: f"{float(value)!r}f" for name, value in numbers.items()}
        return {name: str(size) for name, size in sizes.items()} | literals

    @property
    def workspace(self) -> dict[str, int]:
        """Bytes of what a step writes beside cache and logits; all of it zero before the first."""
        config, expert, rows = self.config, self.config.modalities[self.tokens].expert, self.rows
        inner = expert.width if isinstance(expert, AdapterExpert) else 1
        return {
            "x": 4 * rows * config.model_width,
            "queries": 4 * rows * config.num_heads * config.head_size,
            "attended": 2 * rows * config.num_heads * config.head_size,
            "hidden": 2 * rows * expert.hidden_size,
            "inner": 2 * rows * inner,
            "partial": 4 * rows * config.num_heads * self.splits * (config.head_size + 2),
            "counters": 4 * rows * config.num_kv_heads,
        }

    def blocks(self, units: int, of_rows: int = 1) -> tuple[int, int, int]:
        """Blocks for ``units`` of ``of_rows`` weight rows each: of one row a warp a unit, of several a block a tile."""
        if self.rows == 1:
            wanted, most = -(-units // (self.tuning.threads // 32)), self.tuning.max_blocks
        else:
            # Every block norms its rows again: many rows want fewer blocks.
            wanted, most = -(-units * of_rows // _TILE), max(1, self.tuning.max_tiles // (1 + self.rows // 5))
        return min(wanted, most * self.num_multiprocessors), 1, 1


@dataclass(frozen=True)
class Addresses:
    """Where a step reads and writes.

    Attributes:
        weights: the address of a parameter.
        cosines: of the rotary tables [t, d/2], in the weights' dtype.
        sines: the same.
        work: by name, as ``StepShape.workspace`` has them.
        ids: [b] int64.
        positions: [b] int64, tokens in each row's cache.
        caches: by layer, keys and values [b, k, t, d].
        logits: [b, ids of the predicted modality] float32.
    """

    weights: Callable[[str], int]
    cosines: int
    sines: int
    work: dict[str, int]
    ids: int
    positions: int
    caches: Sequence[tuple[int, int]]
    logits: int


def launches(shape: StepShape, predicts: int, at: Addresses) -> list[Launch]:
    """A step of rows of one modality, predicting modality ``predicts``: every kernel in its order."""
    config, work, weight = shape.config, at.work, at.weights
    name = config.modality_names[shape.tokens]
    route = name if config.routed_attention else config.attention_routes[0]
    pairs = (config.num_heads + 2 * config.num_kv_heads) * config.head_size // 2
    found = [Launch("embed", (shape.rows, 1, 1), (at.ids, weight(EMBEDDING), work["x"]))]
    for layer, (keys, values) in enumerate(at.caches):
        prefix = f"layers.{layer}"
        wq, wk, wv, wo = (weight(f"{prefix}.attention.{one}.{route}.weight") for one in ("wq", "wk", "wv", "wo"))
        norm = weight(f"{prefix}.attention_norm.weight")
        project = (work["x"], norm, wq, wk, wv, at.cosines, at.sines, at.positions, work["queries"], keys, values)
        attend = (work["queries"], keys, values, at.positions, work["partial"], work["counters"], work["attended"])
        found += [
            Launch("project_heads", shape.blocks(pairs, 2), project),
            Launch("attend", (shape.splits, config.num_kv_heads, shape.rows), attend),
            Launch("project_out", shape.blocks(config.model_width), (work["attended"], wo, work["x"])),
            *_expert(shape, weight, work, f"{prefix}.feed_forward.{name}", weight(f"{prefix}.ffn_norm.weight")),
        ]
    num_ids, rows_of_head = len(config.id_ranges[predicts]), _head(config, predicts, weight)
    head = (work["x"], weight(FINAL_NORM), rows_of_head, np.int32(num_ids), at.logits)
    return [*found, Launch("head", shape.blocks(num_ids), head)]


def _expert(shape: StepShape, weight: Callable[[str], int], work: dict[str, int], prefix: str, norm: int) -> list[Launch]:
    expert, width = shape.config.modalities[shape.tokens].expert, shape.config.model_width
    x, hidden, inner = work["x"], work["hidden"], work["inner"]

    def bias(name: str) -> int:
        return weight(f"{prefix}.{name}.bias") if expert.bias else 0

    def matrix(name: str) -> int:
        return weight(f"{prefix}.{name}.weight")

    if not isinstance(expert, AdapterExpert):
        into = (x, norm, matrix("w1"), matrix("w3"), bias("w1"), bias("w3"), hidden)
        return [
            Launch("swiglu_in", shape.blocks(expert.hidden_size, 2), into),
            Launch("swiglu_out", shape.blocks(width), (hidden, matrix("w2"), bias("w2"), x)),
        ]
    return [
        Launch("adapter_down", shape.blocks(expert.width), (x, norm, matrix("down_proj"), inner)),
        Launch("adapter_in", shape.blocks(expert.hidden_size), (inner, matrix("fc1"), bias("fc1"), hidden)),
        Launch("adapter_out", shape.blocks(expert.width), (hidden, matrix("fc2"), bias("fc2"), inner)),
        Launch("adapter_up", shape.blocks(width), (inner, matrix("up_proj"), x)),
    ]


def _head(config: ModelConfig, predicts: int, weight: Callable[[str], int]) -> int:
    """The address of the predicted modality's rows: its own head, or its part of a shared or tied one."""
    if config.head == "split":
        return weight(split_head(config.modality_names[predicts]))
    start = config.id_ranges[predicts].start
    return weight(EMBEDDING if config.tied_embeddings else SHARED_HEAD) + 2 * start * config.model_width


def rotary_tables(config: ModelConfig, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cosines and sines [t, d/2] as stored: bit patterns of bfloat16, or float16; computed in float64, rounded once."""
    frequencies = np.array(rope_frequencies(config.rope, config.head_size))
    angles = np.arange(config.max_seq_len, dtype=np.float64)[:, None] * frequencies
    cosines, sines = (as_stored(values, dtype) for values in (np.cos(angles), np.sin(angles)))
    return cosines, sines


def as_stored(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers as a device holds them: bit patterns of bfloat16, which numpy does not know, or float16."""
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even


@dataclass
class CapturedStep:
    """A step over one cache: what does it, the memory that it is fed and read from, and the modality that it predicts."""

    replay: Callable[[], None]
    inputs: Any
    logits: Any
    predicts: int
    held: list[Any] = field(default_factory=list)


class StepKernels:
    """Steps of one model on one device.

    Args:
        config: the model's; ``why_not`` says that they can.
        dtype: of weights and cache.
        device: where they run.
        weight: the address of a parameter on it.
        tuning: how they are cut.

    Raises:
        BackendError: where the device has no memory for the rotary tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        device: Device,
        weight: Callable[[str], int],
        tuning: Tuning = Tuning(),
    ) -> None:
        self.config, self.dtype, self.device, self._weight, self._tuning = config, dtype, device, weight, tuning
        self._source = SOURCE.read_text("utf-8")
        self._modules: dict[StepShape, Module] = {}
        self._tables = [self._uploaded(table) for table in rotary_tables(config, dtype)]
        self.max_rows = max_rows(config)

    def serves(self, graph: Graph, rows: int) -> bool:
        """Whether a pass of ``graph`` with so many rows is theirs."""
        return graph.is_step and rows <= self.max_rows

    def prepare(self, tokens: int, rows: int) -> Module:
        """Compile for a modality and a number of rows, once.

        Raises:
            BackendError: where the compiler refuses.
        """
        shape = self._shape(tokens, rows)
        if shape not in self._modules:
            self._modules[shape] = self.device.compile(self._source, shape.macros)
        return self._modules[shape]

    def capture(self, graph: Graph, rows: int, caches: Sequence[tuple[int, int]]) -> CapturedStep:
        """A step over a cache's memory, captured: done again for every token.

        Args:
            graph: which modality is read, and which predicted.
            rows: of the cache.
            caches: by layer, the addresses of keys and values.

        Raises:
            BackendError: where it cannot be compiled, has no memory, or cannot be captured.
        """
        assert graph.tokens is not None and graph.predicts is not None
        shape, module = self._shape(graph.tokens, rows), self.prepare(graph.tokens, rows)
        num_ids = len(self.config.id_ranges[graph.predicts])
        work = {name: self.device.allocate(size) for name, size in shape.workspace.items()}
        inputs, logits = self.device.allocate(16 * rows), self.device.allocate(4 * rows * num_ids)
        cosines, sines = (table.address for table in self._tables)
        places = {name: one.address for name, one in work.items()}
        start = inputs.address
        at = Addresses(self._weight, cosines, sines, places, start, start + 8 * rows, caches, logits.address)
        step = launches(shape, graph.predicts, at)

        def run() -> None:
            for number, launch in enumerate(step):
                module.launch(launch, self._tuning.threads, waits=self._tuning.overlaps and number > 0)

        return CapturedStep(self.device.record(run), inputs, logits, graph.predicts, [module, *work.values()])

    def run(self, step: CapturedStep, inputs: StepInputs) -> NDArray[np.float32]:
        """One pass: logits [n, v] of the wanted rows, -inf outside the predicted modality's range.

        Raises:
            BackendError: where the device fails.
        """
        fed = np.concatenate((inputs.input_ids[:, 0], inputs.cache_position))  # both [b] int64
        self.device.upload(step.inputs, fed)
        step.replay()
        ids = self.config.id_ranges[step.predicts]
        logits = empty_contract(self.config, step.predicts, len(inputs.logits_index))
        # Each to its place in the caller's array: fresh memory costs more than the copy, and is written once so.
        if not len(logits):
            self.device.finish()  # who asks for none relies on the cache all the same
        for row, wanted in zip(inputs.logits_index, logits, strict=True):
            self.device.download(step.logits, wanted[ids.start : ids.stop], int(row) * 4 * len(ids))
        return logits

    def _shape(self, tokens: int, rows: int) -> StepShape:
        return StepShape(self.config, self.dtype, tokens, rows, self.device.num_multiprocessors, self._tuning)

    def _uploaded(self, values: NDArray[Any]) -> Any:
        buffer = self.device.allocate(values.nbytes)
        self.device.upload(buffer, values)
        return buffer
