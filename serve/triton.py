"""A Triton model repository from a bundle: the graph, its engines, and the generation loop, each as a model of its own.

Written with the standard library: no Triton is needed here. Every name, datatype and dim in a ``config.pbtxt`` is the
signature's. The repository holds copies of all it needs and names no path outside itself.

- ``motrt_graph``: the canonical ONNX graph in the onnxruntime backend; cache in, cache out.
- ``motrt_decode_text`` and so on: one per TensorRT engine. Engines for TensorRT-RTX are left out: Triton does not run them.
- ``motrt_generate``: prompt in, tokens out as they come (``triton_model``).
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from motrt.errors import BundleError
from motrt.model_def.atomic_folder import new_folder
from motrt.model_def.signature import DTYPE_OF_PRECISION, Signature, TensorSpec
from motrt.runtime.bundle import MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, Bundle, open_bundle
from motrt.runtime.engine_record import EngineRecord
from motrt.serve.triton_model import BUNDLE_FOLDER, INPUTS, OUTPUTS

logger = logging.getLogger(__name__)

CONFIG_FILE, MODEL_CODE, PLAN_FILE, VERSION = "config.pbtxt", "model.py", "model.plan", "1"
GRAPH_MODEL, GENERATE_MODEL = "motrt_graph", "motrt_generate"

DATATYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float64": "TYPE_FP64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}

_CODE = '''"""Made by `motrt triton`: the loop itself is in the package, which Triton's Python must have installed."""

from motrt.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(bundle: Path, out: Path) -> list[str]:
    """Write a model repository; the names of its models are returned.

    Args:
        bundle: its folder; every byte is checked first.
        out: the repository to make; its parent must exist.

    Raises:
        BundleError: when ``bundle`` is none or damaged, ``out`` exists or can not be written, or the disk is too small.
    """
    opened = open_bundle(bundle, check="hash")
    engines = _engines_for_triton(opened)
    sizes = {name: record.num_bytes for name, record in opened.manifest.files.items()}
    with new_folder(out, sum(sizes.values()), BundleError) as partial:
        _write_generate(opened, partial / GENERATE_MODEL)
        copied = partial / GENERATE_MODEL / BUNDLE_FOLDER
        _write_graph(opened, copied, partial / GRAPH_MODEL)
        for engine in engines:
            _write_engine(opened, engine, copied, partial / model_name(engine.graph))
    return [GENERATE_MODEL, GRAPH_MODEL, *(model_name(engine.graph) for engine in engines)]


def model_name(graph: str) -> str:
    """``decode.text`` as Triton calls it."""
    return f"motrt_{graph.replace('.', '_')}"


def _engines_for_triton(bundle: Bundle) -> list[EngineRecord]:
    left_out = [one.file for one in bundle.manifest.engines if one.flavour != "tensorrt"]
    if left_out:
        logger.warning("left out, for Triton runs no engines of TensorRT-RTX: %s", ", ".join(left_out))
    return [one for one in bundle.manifest.engines if one.flavour == "tensorrt"]


def _write_generate(bundle: Bundle, model: Path) -> None:
    copied = model / BUNDLE_FOLDER
    copied.mkdir(parents=True)
    for name in (*bundle.manifest.files, MANIFEST_FILE):
        shutil.copyfile(bundle.path / name, copied / name)
    _version_of(model).joinpath(MODEL_CODE).write_text(_CODE, encoding="utf-8")
    settings = {"bundle": BUNDLE_FOLDER, "backend": "auto", "threads": "0", "max_batch": "8", "max_queue": "64"}
    settings |= {"max_priority": "0", "check": ""}
    body = [
        "model_transaction_policy { decoupled: true }",
        # Triton places nothing here: the runtime takes the first GPU that it sees, or the CPU. One engine batches for all.
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *_parameters(settings),
    ]
    _write_config(model, 'backend: "python"', INPUTS, OUTPUTS, body, optional=True)


def _write_graph(bundle: Bundle, copied: Path, model: Path) -> None:
    version = _version_of(model)
    for name in (MODEL_FILE, WEIGHTS_FILE):  # the graph names its weights' file: they lie side by side
        _link(copied / name, version / name)
    signature = bundle.manifest.signature
    body = [f'default_model_filename: "{MODEL_FILE}"', "instance_group [ { count: 1 kind: KIND_AUTO } ]"]
    _write_config(model, 'backend: "onnxruntime"', signature.inputs, signature.outputs, body)


def _write_engine(bundle: Bundle, engine: EngineRecord, copied: Path, model: Path) -> None:
    _link(copied / engine.file, _version_of(model) / PLAN_FILE)
    graph = next(one for one in bundle.manifest.graphs if one.name == engine.graph)
    signature = Signature.of(graph, bundle.config, DTYPE_OF_PRECISION[bundle.manifest.precision])
    body = [f'default_model_filename: "{PLAN_FILE}"', "instance_group [ { count: 1 kind: KIND_GPU } ]"]
    _write_config(model, 'platform: "tensorrt_plan"', signature.inputs, signature.outputs, body)


def _version_of(model: Path) -> Path:
    version = model / VERSION
    version.mkdir(parents=True)
    return version


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name of the repository; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_config(
    model: Path,
    runs: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    body: Sequence[str],
    optional: bool = False,
) -> None:
    """``config.pbtxt``, in the text form of Triton's ModelConfig. Rows are a dim of ours: Triton batches nothing."""
    lines = [f'name: "{model.name}"', runs, "max_batch_size: 0", *body]
    lines += [_tensor("input", one, optional) for one in inputs]
    lines += [_tensor("output", one) for one in outputs]
    (model / CONFIG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tensor(role: str, spec: TensorSpec, optional: bool = False) -> str:
    dims = ", ".join(str(-1 if isinstance(dim, str) else dim) for dim in spec.dims)
    may_lack = " optional: true" if optional else ""
    return f'{role} [ {{ name: "{spec.name}" data_type: {DATATYPES[spec.dtype]} dims: [ {dims} ]{may_lack} }} ]'


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}' for name, value in values.items()]
