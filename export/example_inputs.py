"""The inputs that a trace is made with, and which of their dims stay symbolic.

Every modality occurs among the tokens and among the predictions: an expert that the example does not use would be
dropped from the graph without a word. Sizes differ from each other and from 0 and 1, which tracing would specialise.
"""

from typing import Any

import torch
from torch import Tensor

from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.signature import Signature, TensorSpec

ExampleCache = list[tuple[Tensor, Tensor]]
Example = tuple[list[Tensor], ExampleCache]


def example_inputs(config: ModelConfig, dtype: torch.dtype, graph: Graph = CANONICAL) -> Example:
    """The inputs of ``graph`` in its signature's order: ragged rows, and a cache that already holds some tokens."""
    num_modalities = len(config.modalities)
    batch, new_tokens, capacity = 2, 2 * num_modalities + 1, graph.capacity or 8 * num_modalities
    if graph.one_token:
        batch, new_tokens = 2 * num_modalities, 1
    held = 3 * torch.arange(batch)
    buffer = (batch, config.num_kv_heads, capacity, config.head_size)
    cache = [(torch.zeros(buffer, dtype=dtype), torch.zeros(buffer, dtype=dtype)) for _ in range(config.num_layers)]
    if graph.tokens is not None:
        return [torch.full((batch, 1), config.id_ranges[graph.tokens].start), held], cache
    mask = torch.arange(batch * new_tokens).reshape(batch, new_tokens) % num_modalities
    starts = torch.tensor([ids.start for ids in config.id_ranges])
    logits_index = torch.arange(1, batch * new_tokens)
    return [starts[mask], mask, held, logits_index, logits_index % num_modalities], cache


def dynamic_shapes(signature: Signature) -> tuple[Any, ...]:
    """The symbolic dims of ``example_inputs`` in the form that ``torch.export`` takes."""
    symbolic = [_symbolic_dims(spec) for spec in signature.inputs]
    num_plain = len(signature.inputs) - 2 * signature.num_layers
    buffers = symbolic[num_plain:]
    pairs = [(buffers[2 * i], buffers[2 * i + 1]) for i in range(signature.num_layers)]
    return (*symbolic[:num_plain], pairs)


def _symbolic_dims(spec: TensorSpec) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
