"""What ``inspect`` tells of each kind of thing, as the keys that tables and machines read."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from motrt.errors import BundleError, InputError, MotrtError
from motrt.export.inspection import inspect
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import num_parameters_read, parameters
from motrt.runtime.bundle import sha256_of
from motrt.tests.export.models import TINY
from motrt.tests.model_def.foreign import (
    mot_state,
    write_adapter,
    write_llama_hf,
    write_llama_meta,
    write_mot,
    write_musicgen,
)

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


def test_a_training_state_with_its_params_is_a_model(tmp_path: Path) -> None:
    native = dict(random_tensors(TINY, 0))
    native["tok_embeddings.weight"][3] = 0
    native["layers.0.attention.wq.text.weight"][0, 0] = float("nan")
    found = inspect(write_mot(tmp_path, TINY, native)[0])
    state = mot_state(TINY, native)
    assert found["kind"] == "mot" and found["dtype"] == "float32"
    assert {one["name"]: (one["dtype"], one["shape"]) for one in found["tensors"]} == {
        name: ("float32", list(value.shape)) for name, value in state.items()
    }
    stored = sum(value.numel() for value in state.values())
    assert found["stored"] == {"parameters": stored, "bytes": 4 * stored, "dtypes": {"float32": len(state)}}
    assert found["config"]["modalities"] == TINY.to_dict()["modalities"]
    assert found["total_parameters"] == sum(row["parameters"] for row in found["parameters"]) == TOTAL
    assert found["bytes_read_per_step"]["audio"] == 4 * num_parameters_read(TINY, "audio")
    assert found["health"]["non_finite"] == [{"name": "layers.0.attention.wq.text.weight", "nan": 1, "inf": 0}]
    assert [(one["table"], one["ids"]) for one in found["health"]["flat_rows"]] == [("tok_embeddings.weight", [[3, 3]])]
    check_files(found, tmp_path, {"state.pt", "params.json"})


def check_files(found: dict[str, Any], folder: Path, names: set[str]) -> None:
    """The files are these, with the sizes and hashes that they have."""
    assert {file["name"] for file in found["files"]} == names
    for file in found["files"]:
        assert file["sha256"] == hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
        assert file["bytes"] == (folder / file["name"]).stat().st_size


def test_a_training_state_alone_says_why_it_has_no_configuration(tmp_path: Path) -> None:
    native = dict(random_tensors(TINY, 0))
    native["norm.weight"][:2] = float("inf")
    native["layers.1.attention.wk.text.weight"][:] = 0
    file, params = write_mot(tmp_path, TINY, native)
    params.unlink()
    found = inspect(file)
    assert "config" not in found and "no params.json lies beside it" in found["note"]
    assert found["health"]["non_finite"] == [{"name": "norm.weight", "nan": 0, "inf": 2}]
    assert [name for name in found["health"]["zero_weights"] if "wk" in name] == found["health"]["zero_weights"] != []
    check_files(found, tmp_path, {"state.pt"})


def test_a_training_state_that_its_params_contradict_is_looked_at_all_the_same(tmp_path: Path) -> None:
    file, params = write_mot(tmp_path, TINY, dict(random_tensors(TINY, 0)))
    params.write_text("{}")
    found = inspect(file)
    assert found["note"].startswith("no configuration: ") and found["health"]["problems"] == []


@pytest.mark.parametrize("write", [write_llama_meta, write_llama_hf])
def test_a_llama_folder_is_a_model_of_text(write: Callable[..., Path], tmp_path: Path) -> None:
    native = dict(random_tensors(TINY, 0))
    native["tok_embeddings.weight"][5:8] = 1
    found = inspect(write(tmp_path / "llama", TINY, native))
    assert [one["name"] for one in found["config"]["modalities"]] == ["text"]
    assert found["total_bytes"] == 4 * found["total_parameters"] == sum(row["bytes"] for row in found["parameters"])
    assert [one["ids"] for one in found["health"]["flat_rows"]] == [[[5, 7]]]
    is_meta = write is write_llama_meta
    names = {"consolidated.00.pth", "params.json"} if is_meta else {"model.safetensors", "config.json"}
    check_files(found, tmp_path / "llama", names)


def test_parts_of_models_are_scanned_and_hashed(tmp_path: Path) -> None:
    native = dict(random_tensors(TINY, 0))
    found = inspect(write_musicgen(tmp_path / "musicgen", TINY, native))
    assert "source of an audio expert" in found["note"]
    assert "text_encoder.shared.weight" in found["health"]["zero_weights"]
    check_files(found, tmp_path / "musicgen", {"model.safetensors", "config.json"})
    adapter = inspect(write_adapter(tmp_path / "adapter.pt", {"a": torch.ones(2), "b": torch.tensor([1])}))
    assert "laid over a model" in adapter["note"]
    assert adapter["stored"] == {"parameters": 3, "bytes": 16, "dtypes": {"float32": 1, "int64": 1}}
    check_files(adapter, tmp_path, {"adapter.pt"})


def test_a_bundle(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    found = inspect(tiny_bundle)
    assert found["kind"] == "bundle" and found["dtype"] == "float32" and found["config"] == TINY.to_dict()
    assert found["total_parameters"] == TOTAL
    assert found["operators"]["Attention"] == TINY.num_layers
    assert [one["name"] for one in found["signature"]["inputs"]][:2] == ["input_ids", "modality_mask"]
    assert found["parity"] is None and found["health"]["problems"] == []
    assert found["answer"]["reference"].startswith("torch ")
    assert Path(found["source"]["path"]) == tiny_checkpoint.resolve()
    assert {one["name"] for one in found["files"]} == {"model.onnx", "model.onnx.data"}


def test_an_onnx_file(tiny_bundle: Path) -> None:
    found = inspect(tiny_bundle / "model.onnx")
    assert found["kind"] == "ONNX file" and found["opsets"] == {"ai.onnx": 24}
    assert found["inputs"][0] == {"name": "input_ids", "dtype": "int64", "dims": ["b", "s"]}
    assert found["outputs"][0] == {"name": "logits", "dtype": "float32", "dims": ["n", TINY.vocab_size]}
    assert found["operators"]["TensorScatter"] == 2 * TINY.num_layers
    assert "note" not in found
    graph = onnx.load(tiny_bundle / "model.onnx", load_external_data=False).graph
    check_files(found, tiny_bundle, {"model.onnx", "model.onnx.data"})
    assert found["total_bytes"] >= 4 * TOTAL and found["dtypes"]["float32"] >= len(parameters(TINY))
    assert found["health"]["non_finite"] == []
    assert found["total_parameters"] >= TOTAL and len(graph.initializer) > len(parameters(TINY))


def one_weight(folder: Path, location: str) -> Path:
    """A graph of one float32 weight [2, 2], whose data are said to lie at ``location``."""
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2, 2])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [weight])
    (folder / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return folder / "m.onnx"


def test_an_onnx_files_data_are_looked_at_where_they_lie_beside_it(tmp_path: Path) -> None:
    torch.tensor([1.0, float("nan"), float("inf"), 0]).numpy().tofile(tmp_path / "w.bin")
    found = inspect(one_weight(tmp_path, "w.bin"))
    assert found["health"]["non_finite"] == [{"name": "w", "nan": 1, "inf": 1}]
    assert found["total_bytes"] == 16
    check_files(found, tmp_path, {"m.onnx", "w.bin"})
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match="too short for w"):
        inspect(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["missing.bin", "../outside.bin", "link.bin", "loop.bin"])
def test_an_onnx_files_data_elsewhere_are_named_and_not_opened(location: str, tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to("../gone.bin")
    (folder / "loop.bin").symlink_to("loop.bin")
    found = inspect(one_weight(folder, location))
    assert location in found["note"] and found["health"]["problems"] == []
    check_files(found, folder, {"m.onnx"})


def test_an_onnx_files_data_behind_a_link_are_looked_at(tmp_path: Path) -> None:
    torch.tensor([1.0, float("nan"), float("inf"), 0]).numpy().tofile(tmp_path / "blob")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.bin").symlink_to("../blob")
    assert inspect(one_weight(folder, "w.bin"))["health"]["non_finite"] == [{"name": "w", "nan": 1, "inf": 1}]


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
