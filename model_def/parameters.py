"""Every parameter of a decoder: name, shape, the part it belongs to, the modality that reads it. No framework.

The native checkpoint stores exactly these names, the PyTorch modules have exactly these names, and the ONNX graph's
weights carry exactly these names, all in the same [out, in] layout. Counting, checking, converting and inspecting all
read this one table.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from motrt.model_def.config import AdapterExpert, Expert, ModelConfig

EMBEDDING = "tok_embeddings.weight"
FINAL_NORM = "norm.weight"
SHARED_HEAD = "output.weight"

PARTS = ("embedding", "attention", "expert", "norm", "head")


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model.

    Attributes:
        name: its name in the native checkpoint, the module's state and the graph.
        shape: [out, in] for products, [rows, m] for tables, [width] for norms and biases.
        part: one of ``PARTS``.
        modality: the only modality whose positions read it; None where every position does.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    modality: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def split_head(modality: str) -> str:
    """The name of one modality's output layer in a split head."""
    return f"output.{modality}.weight"


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of the decoder that ``config`` describes, in the order of the forward pass."""
    m = config.model_width
    found = [Parameter(EMBEDDING, (config.vocab_size, m), "embedding")]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        found.append(Parameter(f"{prefix}.attention_norm.weight", (m,), "norm"))
        found.extend(_attention(config, f"{prefix}.attention"))
        found.append(Parameter(f"{prefix}.ffn_norm.weight", (m,), "norm"))
        for modality in config.modalities:
            route = f"{prefix}.feed_forward.{modality.name}"
            found += [
                Parameter(f"{route}.{name}", shape, "expert", modality.name)
                for name, shape in expert_shapes(modality.expert, m)
            ]
    found.append(Parameter(FINAL_NORM, (m,), "norm"))
    found.extend(head_parameters(config))
    return tuple(found)


def head_parameters(config: ModelConfig) -> list[Parameter]:
    """The output layers: none where the embedding is tied."""
    if config.tied_embeddings:
        return []
    if config.head == "shared":
        return [Parameter(SHARED_HEAD, (config.vocab_size, config.model_width), "head")]
    return [
        Parameter(split_head(modality.name), (modality.vocab_size, config.model_width), "head", modality.name)
        for modality in config.modalities
    ]


def _attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    m, d = config.model_width, config.head_size
    query, key_value = config.num_heads * d, config.num_kv_heads * d
    shapes = {"wq": (query, m), "wk": (key_value, m), "wv": (key_value, m), "wo": (m, query)}
    for route in config.attention_routes:
        modality = route if config.routed_attention else None
        for name, shape in shapes.items():
            yield Parameter(f"{prefix}.{name}.{route}.weight", shape, "attention", modality)
        if config.qk_norm:
            yield Parameter(f"{prefix}.q_norm.{route}.weight", (d,), "attention", modality)
            yield Parameter(f"{prefix}.k_norm.{route}.weight", (d,), "attention", modality)


def expert_shapes(expert: Expert, m: int) -> list[tuple[str, tuple[int, ...]]]:
    """The (name, shape) pairs of one expert's parameters, without prefix."""
    hidden = expert.hidden_size
    if isinstance(expert, AdapterExpert):
        width = expert.width
        pairs = [("down_proj", width, m, False), ("fc1", hidden, width, expert.bias)]
        pairs += [("fc2", width, hidden, expert.bias), ("up_proj", m, width, False)]
    else:
        pairs = [("w1", hidden, m, expert.bias), ("w2", m, hidden, expert.bias), ("w3", hidden, m, expert.bias)]
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, out, into, bias in pairs:
        shapes.append((f"{name}.weight", (out, into)))
        if bias:
            shapes.append((f"{name}.bias", (out,)))
    return shapes


def parameters_read(config: ModelConfig, modality: str) -> list[Parameter]:
    """What one decode step of ``modality`` must read: its own weights and the shared ones, one row of the embedding.

    A shared (or tied) head counts as that modality's rows of it: filtering makes the others dead weight. Of weights that are
    read in part, the shape is that part's.
    """
    own_rows = config.modalities[config.modality_index(modality)].vocab_size
    found = []
    for one in parameters(config):
        if one.part == "embedding":
            found.append(replace(one, shape=(1 + (own_rows if config.tied_embeddings else 0), config.model_width)))
        elif one.part == "head" and one.modality is None:
            found.append(replace(one, shape=(own_rows, config.model_width)))
        elif one.modality in (None, modality):
            found.append(one)
    return found


def together_name(parameter: Parameter) -> str:
    """The name under which weights that multiply the same rows can be kept as one: of q, k and v; else a weight's own."""
    if parameter.part != "attention":
        return parameter.name
    return re.sub(r"\.w[qkv]\.", ".wqkv.", parameter.name)


def layer_of(parameter: Parameter) -> int | None:
    """The number of the layer that it belongs to; None for those outside all layers."""
    first, _, rest = parameter.name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None


def is_hidden_product(parameter: Parameter) -> bool:
    """Whether it is what an expert multiplies its hidden activations by: ``w2`` of a SwiGLU, ``fc2`` of an adapter."""
    return parameter.part == "expert" and parameter.name.endswith((".w2.weight", ".fc2.weight"))


def num_parameters_read(config: ModelConfig, modality: str) -> int:
    """Weights that one decode step of ``modality`` must read: see ``parameters_read``."""
    return sum(one.numel for one in parameters_read(config, modality))
