"""Is the ONNX file the graph that was asked for? Each question on its own, each answered with sentences.

The exporter asks before a bundle is made, the parity gate asks again of a finished one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from motrt.errors import ExportError, raise_all
from motrt.export.onnxruntime_operators import ATTENTION, DOMAIN, NORM
from motrt.export.quantized_graph import stored_specs
from motrt.export.stored_weights import read_graph
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization, codes_of, scales_of, zero_points_of
from motrt.model_def.signature import Signature, TensorSpec
from motrt.runtime.bundle import WEIGHTS_FILE
from motrt.runtime.graph_file import graph_problems

_PRODUCTS = ("Gemm", "MatMul")
_MASK, _NUM_KEYS = 3, 6  # of Attention's inputs: attn_mask, nonpad_kv_seqlen
_OWN = {(DOMAIN, kind, "onnxruntime") for kind in (ATTENTION, NORM)}
_BRANCHES = ("If", "Loop", "Scan")  # they force a synchronisation with the host, and hide what they do not take


def check_onnx(
    model_file: Path,
    config: ModelConfig,
    dtype: str,
    graph: Graph = CANONICAL,
    quantization: Quantization | None = None,
) -> dict[str, int]:
    """Ask every question.

    Args:
        model_file: the ONNX file, its external data beside it.
        config: what the graph should compute.
        dtype: of weights and cache.
        graph: which one it should be.
        quantization: the format of its weights.

    Returns:
        The operator census: how many of each operator.

    Raises:
        ExportError: for the first question that is not answered well, with all its problems.
    """
    try:
        onnx.checker.check_model(model_file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as failure:
        raise ExportError(f"{model_file} is no valid ONNX: {failure}") from failure
    model = read_graph(model_file)
    signature = Signature.of(graph, config, dtype)
    raise_all(ExportError, "the graph does not keep the contract:", contract_problems(model, signature))
    weights = weight_problems(model, config, dtype, graph, quantization)
    raise_all(ExportError, "weights of the checkpoint are not in the graph:", weights)
    operators = census_problems(model, config, graph, quantization)
    raise_all(ExportError, "the graph holds other operators than it should:", operators)
    raise_all(ExportError, "operators carry other numbers than the model's:", attribute_problems(model, config))
    codes = dequantize_problems(model, config, graph, quantization)
    raise_all(ExportError, "codes are not turned back by their own scales:", codes)
    routing = routing_problems(model, config, graph, quantization)
    raise_all(ExportError, "the graph would compute absent modalities:", routing)
    raise_all(ExportError, "the external data are not one file beside the model:", location_problems(model))
    raise_all(ExportError, "no bundle of this graph would be opened:", graph_problems(model_file, WEIGHTS_FILE))
    return census(model)


def contract_problems(model: onnx.ModelProto, signature: Signature) -> list[str]:
    """Names, dtypes and dims, symbolic ones included, against the signature."""
    return signature.differences(_specs(model.graph.input), _specs(model.graph.output))


def weight_problems(
    model: onnx.ModelProto,
    config: ModelConfig,
    dtype: str,
    graph: Graph = CANONICAL,
    quantization: Quantization | None = None,
) -> list[str]:
    """Every parameter of the graph must be an initializer of its name, shape and type that some node reads; no other may.

    Of a quantised one, the codes and scales must.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {name for node in model.graph.node for name in node.input}
    wanted = stored_specs(config, quantization, dtype, graph)
    absent = stored_specs(config, quantization, dtype).keys() - wanted.keys()
    problems = [f"{name} belongs to a modality that this graph does not serve" for name in stored if name in absent]
    for name, (kind, dims) in wanted.items():
        tensor = stored.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tuple(tensor.dims) != dims or tensor.data_type != kind.value:
            came, expected = (_type_name(number) for number in (tensor.data_type, kind.value))
            problems.append(f"{name} should be {expected}{list(dims)} ({came}{list(tensor.dims)} came)")
        elif name not in read:
            problems.append(f"{name} is stored and nothing reads it")
    return problems


def _type_name(number: int) -> str:
    known = number in TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(number)).lower() if known else f"type {number}"


def census(model: onnx.ModelProto) -> dict[str, int]:
    """How many of each operator, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def census_problems(
    model: onnx.ModelProto, config: ModelConfig, graph: Graph = CANONICAL, quantization: Quantization | None = None
) -> list[str]:
    """Standard operators only, no branches, and as many of the telling ones as the model has parts."""
    problems = [
        f"{node.op_type} ({node.name}) is of domain {node.domain!r}, not a standard operator"
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type, graph.operators) not in _OWN
    ]
    counts = census(model)
    problems += [f"{counts[branch]} x {branch}: the graph should have no branches" for branch in _BRANCHES if branch in counts]
    layers, wanted = config.num_layers, graph.parameters(config)
    norms = sum(len(one.shape) == 1 and not one.name.endswith(".bias") for one in wanted)
    packed = quantization.coded_weights(wanted) if quantization else ()
    products = sum(len(one.shape) == 2 and one.part in ("attention", "expert") for one in wanted)
    products -= sum(len(one.parts) - 1 for one in packed)
    heads = 1 if graph.is_step or config.head == "shared" else len(config.modalities)
    expected = {
        "Attention": layers,
        "TensorScatter": 2 * layers,
        "RotaryEmbedding": 2 * layers,
        "RMSNormalization": norms,
        "Gemm": products + heads,
    }
    if graph.operators == "onnxruntime":
        # One operator for five of attention's, one for each norm of a sum: the last is none where rows are picked before it.
        sums = 2 * layers - (0 if graph.is_step else 1)
        expected |= {"Attention": 0, "TensorScatter": 0, "RotaryEmbedding": 0, "RMSNormalization": norms - sums}
        expected |= {ATTENTION: layers, NORM: sums}
    if quantization is not None:
        expected["DequantizeLinear"] = len(packed) + sum(one.is_tied for one in packed)  # for rows, and for the product
    if graph.routing != "gather":
        expected["NonZero"] = 0  # compilers that these graphs are made for do not take it
    counts["Gemm"] = counts.get("Gemm", 0) + counts.get("MatMul", 0)
    return [
        *problems,
        *_bound_problems(model, graph),
        *(
            f"{counts.get(name, 0)} x {name}, {count} were expected"
            for name, count in expected.items()
            if counts.get(name, 0) != count
        ),
    ]


def _bound_problems(model: onnx.ModelProto, graph: Graph) -> list[str]:
    """Attention is told which keys it sees in one way, the graph's own: told in no way it sees what was never written."""
    words = {(True, False): "by a mask", (False, True): "by their number", (True, True): "twice", (False, False): "by nothing"}
    wanted = (graph.masked, not graph.masked)
    problems = []
    for node in model.graph.node:
        if node.op_type == "Attention":
            given = [name != "" for name in (*node.input, *[""] * 7)[:7]]
            told = (given[_MASK], given[_NUM_KEYS])
            if told != wanted:
                problems.append(f"Attention ({node.name}) is told its keys {words[told]}, and should be {words[wanted]}")
    return problems


def attribute_problems(model: onnx.ModelProto, config: ModelConfig) -> list[str]:
    """The numbers that are baked into operators: a wrong epsilon can hide below any tolerance on well-scaled activations."""
    expected: dict[tuple[str, str], float | bytes] = {
        ("RMSNormalization", "epsilon"): config.norm_eps,
        ("Attention", "scale"): config.head_size**-0.5,
        ("Attention", "is_causal"): 0,
        ("Attention", "softcap"): 0.0,
        (NORM, "epsilon"): config.norm_eps,
        (ATTENTION, "num_heads"): config.num_heads,
        (ATTENTION, "kv_num_heads"): config.num_kv_heads,
        (ATTENTION, "scale"): config.head_size**-0.5,
        (ATTENTION, "do_rotary"): 1,
        (ATTENTION, "rotary_interleaved"): int(config.rope.style == "interleaved"),
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


def dequantize_problems(
    model: onnx.ModelProto, config: ModelConfig, graph: Graph = CANONICAL, quantization: Quantization | None = None
) -> list[str]:
    """Every coded weight must be turned back by its own scales and zero points, along its own blocks."""
    if quantization is None:
        return []
    producers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, list[tuple[tuple[str, ...], int, int]]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            numbers = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            sources = tuple(_table_behind(name, producers) for name in node.input)
            turned_back = (sources[1:], numbers.get("axis", 1), numbers.get("block_size", 0))
            found.setdefault(sources[0], []).append(turned_back)
    turned = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] not in producers]
    readers: dict[str, list[tuple[str, int]]] = {node.output[0]: [] for node in turned}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in readers:
                readers[name].append((node.op_type, place))
    # Read by anything else, they would be turned back whole at every step, and no rung above would see it.
    problems = [
        f"{node.input[0]} is read by {readers[node.output[0]]}, and should be by one MatMul"
        for node in turned
        if readers[node.output[0]] != [("MatMul", 1)]
    ]
    # Added to rows right behind it, a product is taken apart by onnxruntime's usual optimisers; ``Sum`` they leave alone.
    stored = {one.name for one in model.graph.initializer}
    products = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in readers}
    problems += [
        f"{node.name} adds rows right behind {products[name].name}, and should be a Sum: export it again"
        for node in model.graph.node
        if node.op_type == "Add" and not stored.intersection(node.input)
        for name in node.input
        if name in products
    ]
    for one in quantization.coded_weights(graph.parameters(config)):
        how = one.how
        scales = (scales_of(one.name), *(() if how.symmetric else (zero_points_of(one.name),)))
        as_rows = (scales, 1, how.block_size or one.shape[1])
        as_product = (scales, 1 if how.block_size is None else 0, how.block_size or 0)
        wanted = [*([as_rows] if one.is_table or one.is_tied else []), *([] if one.is_table else [as_product])]
        came = found.get(codes_of(one.name), [])
        if sorted(came) != sorted(wanted):
            problems.append(f"{one.name}: {came} turns it back, {wanted} was expected")
    return problems


def _table_behind(name: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """The initializer that ``name`` is, or that its rows (of a tied table its columns) were gathered from, or that was cast."""
    for kind in ("Gather", "Transpose", "Cast"):
        if name in producers and producers[name].op_type == kind:
            name = str(producers[name].input[0])
    return name


def routing_problems(
    model: onnx.ModelProto, config: ModelConfig, graph: Graph = CANONICAL, quantization: Quantization | None = None
) -> list[str]:
    """Every product with a routed weight must take rows gathered by modality, so that an absent one costs nothing.

    A derived graph holds no absent modality's weights (``weight_problems`` sees to it), or is meant to compute them all.

    A graph that computes all experts and selects afterwards gives the same logits, so that no comparison sees it, and
    (where it selects rather than adds) not even NaN in the weights would.
    """
    if graph.routing != "gather":
        return []
    producers = {output: node for node in model.graph.node for output in node.output}
    products = {_weight_behind(node, producers): node for node in model.graph.node if node.op_type in _PRODUCTS}
    coded = quantization.coded_weights(parameters(config)) if quantization else ()
    holders = {part.name: one.name for one in coded for part in one.parts}
    routed = [one for one in parameters(config) if one.modality is not None and len(one.shape) == 2]
    problems = []
    for one in routed if len(config.modalities) > 1 else ():
        product = products.get(holders.get(one.name, one.name))
        if product is not None and not _is_gathered(product, producers):
            problems.append(f"{one.name} multiplies rows that were not gathered for {one.modality}")
    return problems


def _weight_behind(product: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> str:
    """The weight that a product multiplies by: its second input, or what the codes that it is made of stand for."""
    source = producers.get(product.input[1])
    if source is None or source.op_type != "DequantizeLinear":
        return str(product.input[1])
    return str(source.input[0]).removesuffix(codes_of(""))


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
    """All external data lie in the one file that a bundle has for them, beside the model."""
    locations = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return (
        [] if locations == {WEIGHTS_FILE} else [f"{WEIGHTS_FILE} was expected, found: {', '.join(sorted(locations)) or 'none'}"]
    )


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
