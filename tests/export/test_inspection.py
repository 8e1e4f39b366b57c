"""What ``inspect`` tells of each kind of thing, as the keys that tables and machines read."""

from pathlib import Path

import onnx
import pytest

from motrt.errors import InputError, MotrtError
from motrt.export.inspection import inspect
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import num_parameters_read, parameters
from motrt.runtime.bundle import sha256_of
from motrt.tests.export.models import TINY
from motrt.tests.model_def.foreign import mot_state, write_mot

TOTAL = sum(one.numel for one in parameters(TINY))


def test_a_native_checkpoint(tiny_checkpoint: Path) -> None:
    found = inspect(tiny_checkpoint)
    assert found["kind"] == "native checkpoint" and found["dtype"] == "float32"
    assert found["config"] == TINY.to_dict()
    assert found["total_parameters"] == sum(row["parameters"] for row in found["parameters"]) == TOTAL
    assert found["total_bytes"] == 4 * TOTAL
    for name in TINY.modality_names:
        assert found["parameters_read_per_step"][name] == num_parameters_read(TINY, name)
        assert found["bytes_read_per_step"][name] == 4 * num_parameters_read(TINY, name)
    assert found["health"]["problems"] == []
    for file in found["files"]:
        assert file["sha256"] == sha256_of(tiny_checkpoint / file["name"])
        assert file["bytes"] == (tiny_checkpoint / file["name"]).stat().st_size
    assert {"config.json", "model.safetensors"} <= {file["name"] for file in found["files"]}


def test_a_training_state(tmp_path: Path) -> None:
    native = dict(random_tensors(TINY, 0))
    found = inspect(write_mot(tmp_path, TINY, native)[0])
    state = mot_state(TINY, native)
    assert found["kind"] == "mot"
    assert {one["name"]: (one["dtype"], one["shape"]) for one in found["tensors"]} == {
        name: ("float32", list(value.shape)) for name, value in state.items()
    }
    assert found["total_parameters"] == sum(value.numel() for value in state.values())
    assert found["total_bytes"] == 4 * found["total_parameters"]


def test_a_bundle(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    found = inspect(tiny_bundle)
    assert found["kind"] == "bundle" and found["dtype"] == "float32" and found["config"] == TINY.to_dict()
    assert found["total_parameters"] == TOTAL
    assert found["operators"]["Attention"] == TINY.num_layers
    assert [one["name"] for one in found["signature"]["inputs"]][:2] == ["input_ids", "modality_mask"]
    assert found["parity"] is None
    assert Path(found["source"]["path"]) == tiny_checkpoint.resolve()
    assert {one["name"] for one in found["files"]} == {"model.onnx", "model.onnx.data"}


def test_an_onnx_file(tiny_bundle: Path) -> None:
    found = inspect(tiny_bundle / "model.onnx")
    assert found["kind"] == "ONNX file" and found["opsets"] == {"ai.onnx": 24}
    assert found["inputs"][0] == {"name": "input_ids", "dtype": "int64", "dims": ["b", "s"]}
    assert found["outputs"][0] == {"name": "logits", "dtype": "float32", "dims": ["n", TINY.vocab_size]}
    assert found["operators"]["TensorScatter"] == 2 * TINY.num_layers
    graph = onnx.load(tiny_bundle / "model.onnx", load_external_data=False).graph
    assert found["total_parameters"] >= TOTAL and len(graph.initializer) > len(parameters(TINY))


def test_what_is_nothing_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing lies at"):
        inspect(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="nothing that motrt knows"):
        inspect(tmp_path / "notes.txt")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="no ONNX file"):
        inspect(tmp_path / "bad.onnx")


def test_a_damaged_bundle_is_not_described(tiny_bundle: Path, tmp_path: Path) -> None:
    for file in tiny_bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(data)
    with pytest.raises(MotrtError, match=r"model\.onnx\.data is not the file"):
        inspect(tmp_path)
