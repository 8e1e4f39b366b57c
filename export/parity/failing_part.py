"""The smallest graph that fails, with what it is fed: a folder that anyone can run, without this package.

part.onnx, part.onnx.data   the part, cut out of the bundle's graph with its own weights
inputs.json, expected.json  a feed for each pass and the reference's answers, in polygraphy's own format
inputs.npz, expected.npz    the same for numpy; names are "pass/value"
run.py                      runs the part in onnxruntime and prints the error of every value
README.md                   what failed, and the commands
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from motrt.errors import ExportError
from motrt.export.polygraphy_files import save_feeds, save_outputs
from motrt.export.stored_weights import stored_bytes
from motrt.model_def.atomic_folder import new_folder

# The folder's name beside a report, and what tells that it is one.
FAILING_PART, PART_FILE = "failing_part", "part.onnx"

_RUN = '''\
"""Runs part.onnx on what the reference had at its entrance, and compares with what the reference made of it."""

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations as they are
session = onnxruntime.InferenceSession("part.onnx", options, providers=["CPUExecutionProvider"])
inputs, expected = np.load("inputs.npz"), np.load("expected.npz")
taken, made = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
for name in dict.fromkeys(key.split("/")[0] for key in inputs):
    came = session.run(made, {value: inputs[f"{name}/{value}"] for value in taken})
    for value, got in zip(made, came):
        want = expected[f"{name}/{value}"].astype(np.float64)
        known = np.isfinite(want)
        error = np.linalg.norm(got[known] - want[known]) / np.linalg.norm(want[known])
        print(f"{name}: {value} {got.shape}, relative L2 error {error:.3g}")
'''

_README = """\
# A part that is not the model's

{sentence}

`part.onnx` is cut out of the bundle's graph. It is given what the PyTorch reference had at its entrance, and should make what
the reference made of it.

    python run.py
    polygraphy run part.onnx --onnxrt --load-inputs inputs.json --load-outputs expected.json

The first says the error of each pass and value; the second compares with polygraphy, element by element; its `--atol` and
`--rtol` say how far apart elements may be.
"""


@dataclass(frozen=True)
class Fed:
    """What one part is fed in one pass, and what it should make of it, by the file's names."""

    name: str
    inputs: Mapping[str, NDArray[Any]]
    expected: Mapping[str, NDArray[Any]]


def write_failing_part(folder: Path, model: onnx.ModelProto, data: Path, fed: Sequence[Fed], sentence: str) -> None:
    """Write the folder; it must not be there.

    Args:
        folder: where.
        model: the part, its external data in ``data``.
        data: the folder of the bundle.
        fed: what it is fed and what it should make, pass by pass.
        sentence: what failed, for people.

    Raises:
        ExportError: where the folder is there already, or there is no room.
    """
    taken, made = ({one.name for one in values} for values in (model.graph.input, model.graph.output))
    with new_folder(folder, None, ExportError) as work:
        _give_shapes(model, {**fed[0].inputs, **fed[0].expected})
        _save_with_values(model, data, work / PART_FILE)
        inputs = [{name: _plain(value) for name, value in one.inputs.items() if name in taken} for one in fed]
        expected = [{name: _plain(value) for name, value in one.expected.items() if name in made} for one in fed]
        names = [one.name.replace(" ", "_") for one in fed]
        for file, values in (("inputs", inputs), ("expected", expected)):
            flat = {f"{name}/{key}": value for name, one in zip(names, values, strict=True) for key, value in one.items()}
            np.savez(work / f"{file}.npz", **flat)  # type: ignore[arg-type]  # its stubs take the names for options
        save_feeds(inputs, work / "inputs.json")
        save_outputs("the reference in PyTorch", expected, work / "expected.json")
        (work / "run.py").write_text(_RUN, encoding="utf-8")
        (work / "README.md").write_text(_README.format(sentence=sentence), encoding="utf-8")


def _give_shapes(model: onnx.ModelProto, arrays: Mapping[str, NDArray[Any]]) -> None:
    """What was cut has no dims; a valid file names as many as there are."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        if not kind.HasField("shape"):
            kind.shape.SetInParent()
            for number in range(arrays[value.name].ndim):
                kind.shape.dim.add().dim_param = f"{value.name}_{number}"


def _save_with_values(model: onnx.ModelProto, data: Path, file: Path) -> None:
    """``model`` with its own copy of the values that lie in ``data``."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            values = stored_bytes(tensor, data).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = values
    onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)


def _plain(value: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(value)
