"""Is the ONNX file the graph that was asked for? Each question on its own, each answered with sentences.

The exporter asks before a bundle is made, the parity gate asks again of a finished one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from motrt.errors import ExportError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.parameters import parameters
from motrt.model_def.signature import Signature, TensorSpec

_PRODUCTS = ("Gemm", "MatMul")
_BRANCHES = ("If", "Loop", "Scan")  # they force a synchronisation with the host, and hide what they do not take


def check_onnx(model_file: Path, config: ModelConfig, dtype: str, graph: Graph = CANONICAL) -> dict[str, int]:
    """Ask every question.

    Args:
        model_file: the ONNX file, its external data beside it.
        config: what the graph should compute.
        dtype: of weights and cache.
        graph: which one it should be.

    Returns:
        The operator census: how many of each operator.

    Raises:
        ExportError: for the first question that is not answered well, with all its problems.
    """
    try:
        onnx.checker.check_model(model_file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as failure:
        raise ExportError(f"{model_file} is no valid ONNX: {failure}") from failure
    model = onnx.load(model_file, load_external_data=False)
    signature = Signature.of(graph, config, dtype)
    raise_all(ExportError, "the graph does not keep the contract:", contract_problems(model, signature))
    raise_all(ExportError, "weights of the checkpoint are not in the graph:", weight_problems(model, config, dtype, graph))
    raise_all(ExportError, "the graph holds other operators than it should:", census_problems(model, config, graph))
    raise_all(ExportError, "operators carry other numbers than the model's:", attribute_problems(model, config))
    raise_all(ExportError, "the graph would compute absent modalities:", routing_problems(model, config, graph))
    raise_all(ExportError, "the external data are not one file beside the model:", location_problems(model))
    return census(model)


def contract_problems(model: onnx.ModelProto, signature: Signature) -> list[str]:
    """Names, dtypes and dims, symbolic ones included, against the signature."""
    return signature.differences(_specs(model.graph.input), _specs(model.graph.output))


def weight_problems(model: onnx.ModelProto, config: ModelConfig, dtype: str, graph: Graph = CANONICAL) -> list[str]:
    """Every parameter of the graph must be an initializer of its name, shape and dtype that some node reads; no other may."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {name for node in model.graph.node for name in node.input}
    expected_type = _TENSOR_DTYPES[dtype]
    wanted = graph.parameters(config)
    absent = {one.name for one in parameters(config)} - {one.name for one in wanted}
    problems = [f"{name} belongs to a modality that this graph does not serve" for name in stored if name in absent]
    for parameter in wanted:
        tensor = stored.get(parameter.name)
        if tensor is None:
            problems.append(f"{parameter.name} is missing")
        elif tuple(tensor.dims) != parameter.shape or tensor.data_type != expected_type:
            came = f"{TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"
            problems.append(f"{parameter.name} should be {dtype}{list(parameter.shape)} ({came} came)")
        elif parameter.name not in read:
            problems.append(f"{parameter.name} is stored and nothing reads it")
    return problems


def census(model: onnx.ModelProto) -> dict[str, int]:
    """How many of each operator, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def census_problems(model: onnx.ModelProto, config: ModelConfig, graph: Graph = CANONICAL) -> list[str]:
    """Standard operators only, no branches, and as many of the telling ones as the model has parts."""
    problems = [
        f"{node.op_type} ({node.name}) is of domain {node.domain!r}, not a standard operator"
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx")
    ]
    counts = census(model)
    problems += [f"{counts[branch]} x {branch}: the graph should have no branches" for branch in _BRANCHES if branch in counts]
    layers, wanted = config.num_layers, graph.parameters(config)
    norms = sum(len(one.shape) == 1 and not one.name.endswith(".bias") for one in wanted)
    products = sum(len(one.shape) == 2 and one.part in ("attention", "expert") for one in wanted)
    heads = 1 if graph.is_step or config.head == "shared" else len(config.modalities)
    expected = {
        "Attention": layers,
        "TensorScatter": 2 * layers,
        "RotaryEmbedding": 2 * layers,
        "RMSNormalization": norms,
        "Gemm": products + heads,
    }
    if graph.routing != "gather":
        expected["NonZero"] = 0  # compilers that these graphs are made for do not take it
    counts["Gemm"] = counts.get("Gemm", 0) + counts.get("MatMul", 0)
    return problems + [
        f"{counts.get(name, 0)} x {name}, {count} were expected"
        for name, count in expected.items()
        if counts.get(name, 0) != count
    ]


def attribute_problems(model: onnx.ModelProto, config: ModelConfig) -> list[str]:
    """The numbers that are baked into operators: a wrong epsilon can hide below any tolerance on well-scaled activations."""
    expected: dict[tuple[str, str], float | bytes] = {
        ("RMSNormalization", "epsilon"): config.norm_eps,
        ("Attention", "scale"): config.head_size**-0.5,
        ("Attention", "is_causal"): 0,
        ("Attention", "softcap"): 0.0,
        ("RotaryEmbedding", "interleaved"): int(config.rope.style == "interleaved"),
        ("RotaryEmbedding", "rotary_embedding_dim"): 0,
        ("Gelu", "approximate"): b"none",
        ("TensorScatter", "mode"): b"linear",
    }
    return [
        f"{node.op_type} ({node.name}) has {attribute.name} {value!r}, {wanted!r} was expected"
        for node in model.graph.node
        for attribute in node.attribute
        if (wanted := expected.get((node.op_type, attribute.name))) is not None
        and not _same_number((value := onnx.helper.get_attribute_value(attribute)), wanted)
    ]


def _same_number(value: float | bytes, wanted: float | bytes) -> bool:
    if isinstance(value, bytes) or isinstance(wanted, bytes):
        return value == wanted
    return abs(value - wanted) <= 1e-6 * abs(wanted)  # attributes are float32


def routing_problems(model: onnx.ModelProto, config: ModelConfig, graph: Graph = CANONICAL) -> list[str]:
    """Every product with a routed weight must take rows gathered by modality, so that an absent one costs nothing.

    A derived graph holds no absent modality's weights (``weight_problems`` sees to it), or is meant to compute them all.

    A graph that computes all experts and selects afterwards gives the same logits, so that no comparison sees it, and
    (where it selects rather than adds) not even NaN in the weights would.
    """
    if graph.routing != "gather":
        return []
    producers = {output: node for node in model.graph.node for output in node.output}
    products = {name: node for node in model.graph.node if node.op_type in _PRODUCTS for name in node.input[1:2]}
    routed = [one for one in parameters(config) if one.modality is not None and len(one.shape) == 2]
    return [
        f"{one.name} multiplies rows that were not gathered for {one.modality}"
        for one in routed
        if len(config.modalities) > 1 and one.name in products and not _is_gathered(products[one.name], producers)
    ]


def _is_gathered(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether the first input of ``node`` comes from a Gather by the positions that a NonZero found."""
    source = _first_behind(node.input[0], producers, ("Gather",))
    return source is not None and _first_behind(source.input[1], producers, ("NonZero",)) is not None


def _first_behind(name: str, producers: Mapping[str, onnx.NodeProto], wanted: tuple[str, ...]) -> onnx.NodeProto | None:
    """The nearest node of a ``wanted`` kind on the path of first inputs that leads to ``name``."""
    while name in producers:
        node = producers[name]
        if node.op_type in wanted:
            return node
        if not node.input:
            return None
        name = node.input[0]
    return None


def location_problems(model: onnx.ModelProto) -> list[str]:
    """All external data lie in one file beside the model."""
    locations = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return [] if len(locations) == 1 and "/" not in "".join(locations) else [f"found: {', '.join(sorted(locations)) or 'none'}"]


_TENSOR_DTYPES = {
    "float64": TensorProto.DOUBLE,
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
_DTYPE_NAMES: dict[int, str] = {number: name for name, number in _TENSOR_DTYPES.items()}


def _specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, _DTYPE_NAMES.get(tensor.elem_type, str(tensor.elem_type)), dims)
