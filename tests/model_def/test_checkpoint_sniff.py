"""What a file or folder is, is told by what it holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from motrt.errors import CheckpointError
from motrt.model_def.checkpoint.sniff import describe_raw, kind_of
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import init_checkpoint, random_tensors
from motrt.tests.model_def.foreign import (
    State,
    mot_state,
    write_adapter,
    write_llama_hf,
    write_llama_meta,
    write_mot,
    write_musicgen,
)

CONFIG = ModelConfig.tiny()


@pytest.fixture(scope="module")
def native() -> State:
    return dict(random_tensors(CONFIG, 0))


def test_every_kind_is_told(tmp_path: Path, native: State) -> None:
    init_checkpoint(tmp_path / "native", CONFIG)
    assert kind_of(tmp_path / "native") == "native"
    assert kind_of(tmp_path / "native" / "model.safetensors") == "native"
    assert kind_of(write_llama_meta(tmp_path / "meta", CONFIG, native)) == "llama-meta"
    assert kind_of(tmp_path / "meta" / "consolidated.00.pth") == "llama-meta"
    assert kind_of(write_llama_hf(tmp_path / "hf", CONFIG, native)) == "llama-hf"
    assert kind_of(tmp_path / "hf" / "model.safetensors") == "llama-hf"
    assert kind_of(write_musicgen(tmp_path / "music", CONFIG, native)) == "musicgen"
    assert kind_of(tmp_path / "music" / "model.safetensors") == "musicgen"
    assert kind_of(write_mot(tmp_path, CONFIG, native)[0]) == "mot"
    assert kind_of(write_adapter(tmp_path / "adapter.pt", {"a": torch.ones(1)})) == "adapter"
    (tmp_path / "model.onnx").touch()
    assert kind_of(tmp_path / "model.onnx") == "onnx"
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").touch()
    assert kind_of(tmp_path / "bundle") == "bundle"


def test_what_is_none_of_them_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no tensors here")
    (tmp_path / "notes.txt").write_text("no tensors here")
    (tmp_path / "broken.safetensors").write_text("no tensors here")
    torch.save([1], tmp_path / "list.pt")
    save_file({"conv.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    assert {kind_of(path) for path in [*tmp_path.iterdir(), tmp_path, tmp_path / "missing"]} == {"unknown"}


def test_names_shapes_and_dtypes_are_listed_without_loading(tmp_path: Path, native: State) -> None:
    state, _ = write_mot(tmp_path, CONFIG, native)
    expected = {(name, tuple(value.shape), "float32") for name, value in mot_state(CONFIG, native).items()}
    assert {(one.name, one.shape, one.dtype) for one in describe_raw(state)} == expected
    adapter = write_adapter(tmp_path / "a.pt", {"x": torch.ones(2, 3, dtype=torch.bfloat16)})
    assert [(one.name, one.shape, one.dtype) for one in describe_raw(adapter)] == [("x", (2, 3), "bfloat16")]
    for folder in (write_llama_meta(tmp_path / "m", CONFIG, native), write_llama_hf(tmp_path / "h", CONFIG, native)):
        assert len(describe_raw(folder)) == 3 + 9 * CONFIG.num_layers
    music = write_musicgen(tmp_path / "music", CONFIG, native, pickled=True)
    assert any(one.name == "decoder.model.decoder.layers.2.fc1.weight" for one in describe_raw(music))


def test_what_can_not_be_listed_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights that are known here"):
        describe_raw(tmp_path)
    with pytest.raises(CheckpointError, match="can not be read"):
        describe_raw(tmp_path / "missing.pt")
