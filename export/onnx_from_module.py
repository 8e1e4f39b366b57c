"""From the PyTorch decoder to the canonical ONNX graph.

The trace holds no weights at all: the module is built of fake tensors, and each initializer of the finished graph is
filled from the checkpoint only when the file is written, one tensor at a time. So memory stays near the largest tensor
whatever the size of the model, no pass can fold, merge or drop a weight by its value, and a weight that the trace did
not use is missing by name (``onnx_check`` looks).
"""

import ast
import contextlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnx_ir import tensor_adapters
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from motrt.errors import ExportError
from motrt.export.example_inputs import dynamic_shapes, example_inputs
from motrt.export.onnxruntime_operators import use_onnxruntime_operators
from motrt.export.quantized_graph import quantize_graph
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Cache, Decoder
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.operators import OPSET, rope_tables
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization
from motrt.model_def.routing import Selected
from motrt.model_def.signature import Signature
from motrt.runtime.bundle import MODEL_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

ROPE_TABLES = ("rope_cos", "rope_sin")

# Tensors smaller than this stay inside model.onnx: scalars and shapes that readers want to see, and no weight.
SMALLEST_EXTERNAL_BYTES = 64

# Since 1.1 onnx-ir writes tensors in several threads where it is not told otherwise, each with one in memory.
ONE_AT_A_TIME: dict[str, Any] = {"max_workers": 1} if "max_workers" in inspect.signature(ir.save).parameters else {}


# The rewriter's own rules but one: its brute-force match of two Slices lists all nodes for every node, which is quadratic in
# the number of layers, and no graph here has such a pair. None, where a version keeps its rules elsewhere: all of them, slowly.
_ALL_REWRITES: tuple[RewriteRule, ...] | None = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
REWRITES = None if _ALL_REWRITES is None else tuple(one for one in _ALL_REWRITES if one is not slice_split_rule)


class SelectingDecoder(Decoder):
    """The decoder where every expert computes every row: see ``routing.Selected``."""

    route = staticmethod(Selected.by)


class StepDecoder(Decoder):
    """The decoder where the modalities of tokens and predictions are known: see ``Decoder.step``."""

    graph: Graph

    def forward(  # type: ignore[override]  # fewer inputs: that is what it is for
        self, input_ids: Tensor, cache_position: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        assert self.graph.tokens is not None and self.graph.predicts is not None
        return self.step(input_ids, cache_position, cache, self.graph.tokens, self.graph.predicts)


MODULES: dict[str, type[Decoder]] = {"gather": Decoder, "select": SelectingDecoder, "fixed": StepDecoder}


def trace(config: ModelConfig, dtype: str, graph: Graph = CANONICAL, quantization: Quantization | None = None) -> ir.Model:
    """A graph of ``config``, its weights named and shaped but without values.

    Args:
        config: what to trace; ``max_seq_len`` sizes the rotary tables.
        dtype: of weights, activations and cache: ``float32``, ``float16`` or ``bfloat16``.
        graph: which one.
        quantization: the format of every weight; None: ``dtype``.

    Raises:
        ExportError: when PyTorch can not trace the module.
    """
    signature = Signature.of(graph, config, dtype)
    torch_dtype = TORCH_DTYPES[dtype]
    fake = FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True))
    shapes = {parameter.name: parameter.shape for parameter in parameters(config)}
    with fake:
        module = MODULES[graph.routing]
        decoder = module.from_tensors(config, lambda name: torch.empty(shapes[name], dtype=torch_dtype), torch_dtype)
        if isinstance(decoder, StepDecoder):
            decoder.graph = graph
        decoder.masked, decoder.cuts_table = graph.masked, graph.cuts_table
    plain, cache = example_inputs(config, torch_dtype, graph)
    arguments = tuple(fake.from_tensor(tensor) for tensor in plain)
    pairs = [(fake.from_tensor(keys), fake.from_tensor(values)) for keys, values in cache]

    failure: Exception | None = None
    for way in (_traced_once, contextlib.nullcontext):
        try:
            with _quiet_exporter(), way():
                program = torch.onnx.export(
                    decoder,
                    (*arguments, pairs),
                    dynamic_shapes=dynamic_shapes(signature),
                    dynamo=True,
                    opset_version=OPSET,
                    optimize=False,  # its passes read weights; ours below do not
                    verbose=False,
                )
            break
        except torch.onnx.errors.OnnxExporterError as error:
            logger.info("PyTorch %s could not trace %s: %s", torch.__version__, graph.name, error)
            failure = error
    else:
        raise ExportError(f"PyTorch {torch.__version__} could not trace the decoder ({graph.name}): {failure}") from failure
    if program is None:
        raise ExportError("PyTorch gave no program: its exporter was switched off")
    model = program.model
    with _quiet_exporter():
        _simplify(model)
    _name_inputs_and_outputs(model, signature)
    if quantization is not None:
        quantize_graph(model, config, quantization, dtype)
    if graph.operators == "onnxruntime":
        use_onnxruntime_operators(model, config, graph)
    return model


def attach_weights(model: ir.Model, config: ModelConfig, dtype: str, read: Callable[[str], Tensor]) -> None:
    """Let every initializer of ``model`` fetch its value from ``read(name)`` when it is written.

    Values are converted to ``dtype``; one that overflows there raises ExportError, naming the tensor.
    """
    cos, sin = rope_tables(config.rope, config.head_size, config.max_seq_len, TORCH_DTYPES[dtype])
    derived = dict(zip(ROPE_TABLES, (cos, sin), strict=True))
    weights = {parameter.name for parameter in parameters(config)} | set(ROPE_TABLES)

    def fetch(name: str) -> ir.TensorProtocol:
        value = derived[name] if name in derived else _converted(name, read(name), TORCH_DTYPES[dtype])
        return tensor_adapters.TorchTensor(value.contiguous(), name=name)

    for name, value in model.graph.initializers.items():
        if name in weights:
            placeholder = value.const_value
            assert placeholder is not None
            shape = ir.Shape(placeholder.shape.numpy())
            value.const_value = ir.LazyTensor(partial(fetch, name), dtype=placeholder.dtype, shape=shape, name=name)


def write_onnx(model: ir.Model, folder: Path, on_tensor: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write ``model.onnx`` and its one external data file into ``folder``, streaming the weights."""
    ir.save(
        model,
        folder / MODEL_FILE,
        external_data=WEIGHTS_FILE,
        size_threshold_bytes=SMALLEST_EXTERNAL_BYTES,
        callback=lambda tensor, info: on_tensor(tensor.nbytes),
        **ONE_AT_A_TIME,
    )


def write_derived(model: ir.Model, graph: Graph, folder: Path) -> None:
    """Write a derived graph beside the canonical one, whose weights it refers to: they lie on the disk once.

    Args:
        model: the traced graph, its weights without values.
        graph: which one it is.
        folder: where the canonical graph was written before.

    Raises:
        ExportError: for a weight that the canonical graph does not hold, in the same shape and dtype.
    """
    canonical = ir.load(folder / MODEL_FILE)
    for name, value in model.graph.initializers.items():
        if not (_is_fake(value) or isinstance(value.const_value, ir.LazyTensor)):
            continue
        held = canonical.graph.initializers[name].const_value if name in canonical.graph.initializers else None
        placeholder = value.const_value
        assert placeholder is not None and name is not None
        if held is None or held.shape != placeholder.shape or held.dtype != placeholder.dtype:
            raise ExportError(f"{graph.file_name} reads {name}, which {MODEL_FILE} does not hold as {placeholder.shape}")
        value.const_value = held
    ir.save(model, folder / graph.file_name)


def _converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    converted = value.to(dtype)
    if converted.isinf().any() and not value.isinf().any():
        raise ExportError(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: its largest magnitude is "
            f"{value.abs().max():.4g}. Compute in bf16 or fp32 (--precision, or --activations where weights are quantised)."
        )
    return converted


def _simplify(model: ir.Model) -> None:
    """Fold shapes and constants, fuse what the trace wrote out, drop what nothing reads. No weight is looked at."""
    weights = {value: value.const_value for value in model.graph.initializers.values() if _is_fake(value)}
    for value in weights:
        value.const_value = None  # a rewrite would drop a bias of zeros, or merge two equal norms
    common_passes.InlinePass()(model)
    for _ in range(2):  # what one round folds, the next can rewrite
        optimizer.fold_constants(model, onnx_shape_inference=True, input_size_limit=8192, output_size_limit=1 << 18)
        rewriter.rewrite(model, REWRITES)
    ir.passes.Sequential(
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.DeduplicateInitializersPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    )(model)
    _name_nodes(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    for value, placeholder in weights.items():
        value.const_value = placeholder


def _name_nodes(model: ir.Model) -> None:
    """Each node after the module that it came from: ``layers.3.attention.wq.text/Gemm``. Errors and profiles say it then."""
    used: Counter[str] = Counter()
    for node in model.graph:
        module = _module_of(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        name = f"{module}/{node.op_type}"
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1


def _module_of(scopes: str) -> str:
    """The innermost module of PyTorch's list of scopes, whose last entry is the operation itself."""
    try:
        names = ast.literal_eval(scopes)
    except (SyntaxError, ValueError):
        names = []
    modules = [name for name in names[:-1] if name and not name.startswith("_")] if isinstance(names, list) else []
    return modules[-1] if modules else "decoder"


def _is_fake(value: ir.Value) -> bool:
    """Whether it is a weight of the traced module. A lazy tensor is none, and would be fetched by being looked at."""
    return not isinstance(value.const_value, ir.LazyTensor) and isinstance(getattr(value.const_value, "raw", None), Tensor)


def _name_inputs_and_outputs(model: ir.Model, signature: Signature) -> None:
    """The trace numbers them; the contract names them."""
    for values, specs in ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs)):
        if len(values) != len(specs):
            raise ExportError(f"the trace has {len(values)} inputs or outputs where the contract has {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name


@contextlib.contextmanager
def _traced_once() -> Iterator[None]:
    """The exporter without its second trace: it writes a program's operations in simpler ones, in nearly half of the time.

    The decoder has no operation that it does not know as it is. Where another version of PyTorch writes one differently, the
    exporter refuses it by name, and nothing comes of that trace.
    """
    real = torch.export.ExportedProgram.run_decompositions
    torch.export.ExportedProgram.run_decompositions = lambda self, *arguments, **named: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.export.ExportedProgram.run_decompositions = real  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter's own remarks (packages it could do without, axes that share a name) help nobody here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
