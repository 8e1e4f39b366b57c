"""The graph contract: the name, dtype and dims of everything that enters and leaves the model. Standard library alone.

Tensor names stand in this file and nowhere else. The model is traced *to* this signature, engines are built *from* it,
sessions check themselves *against* it, and the parity report compares sessions which all speak it.

============================== ============ ============ ==============================================================
input                          dtype        dims         meaning
============================== ============ ============ ==============================================================
``input_ids``                  int64        [b, s]       unified ids
``modality_mask``              int64        [b, s]       modality of the token *at* each position: routes the experts
``cache_position``             int64        [b]          tokens already in the cache, per row: where this step writes
``logits_index``               int64        [n]          flat positions (row * s + column) whose logits are wanted
``head_mask``                  int64        [n]          modality *predicted* at each wanted position: routes the head
``past_key.i``/``past_value.i`` cache dtype [b, k, t, d] fixed-capacity buffers
``logits``                     float32      [n, v]       unified vocabulary; -inf outside the predicted modality's range
``present_key.i``/...          cache dtype  [b, k, t, d] may alias the past buffers
============================== ============ ============ ==============================================================

Derived graphs (``graph.Graph``) fix dims and drop inputs, and mean the same by what is left. One whose modalities are known
beforehand takes one token per row and wants the logits of every row, so ``modality_mask``, ``logits_index`` and
``head_mask`` fall away; its output is ``range_logits``, float32 [b, ids of the predicted modality]: the part of ``logits``
that is not -inf.

Key j is visible to the query at column c of row r if ``j <= cache_position[r] + c``. That one rule covers prefill,
chunked prefill, decode steps and ragged rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph

# Bump when a name, dtype, dim or meaning changes: bundles carry it, and an older runtime refuses a newer contract.
CONTRACT_VERSION = 1

INPUT_IDS = "input_ids"
MODALITY_MASK = "modality_mask"
CACHE_POSITION = "cache_position"
LOGITS_INDEX = "logits_index"
HEAD_MASK = "head_mask"
LOGITS = "logits"
RANGE_LOGITS = "range_logits"

BATCH, NEW_TOKENS, CAPACITY, NUM_LOGITS = "b", "s", "t", "n"

# The names that people use for the element types of weights, activations and cache, and torch's names for the same.
DTYPE_OF_PRECISION = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PRECISION_OF_DTYPE = {dtype: precision for precision, dtype in DTYPE_OF_PRECISION.items()}
FLOAT_DTYPES = tuple(PRECISION_OF_DTYPE)

Dim = str | int


def past_key(layer: int) -> str:
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    return f"past_value.{layer}"


def present_key(layer: int) -> str:
    return f"present_key.{layer}"


def present_value(layer: int) -> str:
    return f"present_value.{layer}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: symbolic dims are strings (``b s t n``), fixed ones are numbers."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one graph, in order.

    Attributes:
        inputs: what the graph takes.
        outputs: what it gives.
        num_layers: how many key/value pairs the cache holds.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    num_layers: int

    @classmethod
    def canonical(cls, config: ModelConfig, cache_dtype: str) -> "Signature":
        """The signature of the canonical graph of ``config``, its cache held in ``cache_dtype`` (``float32``...)."""
        if cache_dtype not in FLOAT_DTYPES:
            raise ValueError(f"cache_dtype must be one of {', '.join(FLOAT_DTYPES)} ({cache_dtype!r} came)")
        tokens, wanted = (BATCH, NEW_TOKENS), (NUM_LOGITS,)
        buffer = (BATCH, config.num_kv_heads, CAPACITY, config.head_size)
        layers = range(config.num_layers)
        return cls(
            inputs=(
                TensorSpec(INPUT_IDS, "int64", tokens),
                TensorSpec(MODALITY_MASK, "int64", tokens),
                TensorSpec(CACHE_POSITION, "int64", (BATCH,)),
                TensorSpec(LOGITS_INDEX, "int64", wanted),
                TensorSpec(HEAD_MASK, "int64", wanted),
                *(TensorSpec(name(i), cache_dtype, buffer) for i in layers for name in (past_key, past_value)),
            ),
            outputs=(
                TensorSpec(LOGITS, "float32", (NUM_LOGITS, config.vocab_size)),
                *(TensorSpec(name(i), cache_dtype, buffer) for i in layers for name in (present_key, present_value)),
            ),
            num_layers=config.num_layers,
        )

    @classmethod
    def of(cls, graph: Graph, config: ModelConfig, cache_dtype: str) -> "Signature":
        """The signature of a derived graph: the canonical one, with what ``graph`` knows beforehand left out."""
        whole = cls.canonical(config, cache_dtype)
        sizes: dict[Dim, Dim] = {} if graph.capacity is None else {CAPACITY: graph.capacity}
        if graph.takes_one_token:
            sizes[NEW_TOKENS] = 1
        if graph.predicts is None:
            return whole.with_dims(sizes)
        fixed = whole.with_dims(sizes | {NUM_LOGITS: BATCH})
        logits = TensorSpec(RANGE_LOGITS, "float32", (BATCH, config.modalities[graph.predicts].vocab_size))
        kept = tuple(spec for spec in fixed.inputs if spec.name not in (MODALITY_MASK, LOGITS_INDEX, HEAD_MASK))
        return cls(kept, (logits, *fixed.outputs[1:]), whole.num_layers)

    def with_dims(self, sizes: Mapping[Dim, Dim]) -> "Signature":
        """The same with some symbolic dims replaced."""

        def fixed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(one.name, one.dtype, tuple(sizes.get(dim, dim) for dim in one.dims)) for one in specs)

        return Signature(fixed(self.inputs), fixed(self.outputs), self.num_layers)

    @property
    def cache_dtype(self) -> str:
        return self.input(past_key(0)).dtype

    @property
    def logits(self) -> TensorSpec:
        """The output that holds the logits: ``logits``, or a step's ``range_logits``."""
        return self.outputs[0]

    def input(self, name: str) -> TensorSpec:
        return next(spec for spec in self.inputs if spec.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {
            "contract_version": CONTRACT_VERSION,
            "inputs": [_spec_to_dict(spec) for spec in self.inputs],
            "outputs": [_spec_to_dict(spec) for spec in self.outputs],
        }

    def differences(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> list[str]:
        """How a graph's real inputs and outputs differ from this signature, as sentences; none where they agree."""
        return _differences("input", self.inputs, inputs) + _differences("output", self.outputs, outputs)


def _spec_to_dict(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "dims": list(spec.dims)}


def _differences(role: str, expected: tuple[TensorSpec, ...], came: tuple[TensorSpec, ...]) -> list[str]:
    wanted, found = {spec.name: spec for spec in expected}, {spec.name: spec for spec in came}
    problems = [f"{role} {name!r} is missing" for name in wanted if name not in found]
    problems += [f"{role} {name!r} is unexpected" for name in found if name not in wanted]
    problems += [f"{role} {found[n]} should be {wanted[n]}" for n in wanted if n in found and wanted[n] != found[n]]
    if not problems and [spec.name for spec in expected] != [spec.name for spec in came]:
        problems.append(f"{role}s are in another order than the signature's")
    return problems
