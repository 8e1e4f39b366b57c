"""A Hugging Face folder's weights: one set of them is read, whole, or it is said why not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motrt.errors import CheckpointError, MotrtError
from motrt.model_def.checkpoint.assemble import Assembly, convert_llama
from motrt.model_def.checkpoint.sniff import describe_raw
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.foreign import (
    State,
    mot_state,
    write_adapter,
    write_json,
    write_llama_hf,
    write_llama_meta,
    write_musicgen,
)

CONFIG = ModelConfig.tiny()


@pytest.fixture(scope="module")
def native() -> State:
    return dict(random_tensors(CONFIG, 31))


def in_shards(folder: Path, ending: str, save: Callable[[State, Path], Any], keep: bool = False) -> Path:
    """Split the folder's model.safetensors into two shards and an index of another ending."""
    single = folder / "model.safetensors"
    state, names = load_file(single), sorted(load_file(single))
    stem = "model" if ending == "safetensors" else "pytorch_model"
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, inside in parts.items():
        save({name: state[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    write_json(folder / f"{stem}.{ending}.index.json", {"weight_map": weight_map})
    if not keep:
        single.unlink()
    return folder


def assert_is_the_text_model(assembly: Assembly, native: State) -> None:
    assembly.accounting.raise_unless_clean()
    assert torch.equal(
        assembly.read("output.text.weight" if assembly.config.head == "split" else "output.weight"),
        native["output.text.weight"],
    )
    name = "layers.1.feed_forward.text.w2.weight"
    assert torch.equal(assembly.read(name), native[name])


@pytest.mark.parametrize("shards", [False, True])
def test_pickled_weights_of_a_llama_are_read(tmp_path: Path, native: State, shards: bool) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    if shards:
        in_shards(folder, "bin", torch.save)
    else:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert_is_the_text_model(convert_llama(folder), native)
    assert len(describe_raw(folder)) == 3 + 9 * CONFIG.num_layers


def test_a_stale_file_beside_an_index_and_its_shards_is_refused(tmp_path: Path, native: State) -> None:
    folder = in_shards(write_llama_hf(tmp_path / "llama", CONFIG, native), "safetensors", save_file, keep=True)
    with pytest.raises(CheckpointError, match="remove the one that is not meant"):
        convert_llama(folder)
    (folder / "model.safetensors").unlink()
    assert_is_the_text_model(convert_llama(folder), native)


def test_an_index_of_the_one_file_is_no_second_set(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    names = load_file(folder / "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "model.safetensors")})
    assert_is_the_text_model(convert_llama(folder), native)


def test_a_pickle_beside_safetensors_is_left_alone_and_told(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    torch.save({"model.norm.weight": torch.zeros(3)}, folder / "pytorch_model.bin")
    assembly = convert_llama(folder)
    assert_is_the_text_model(assembly, native)
    assert "llama: pytorch_model.bin was not read, the safetensors beside it were" in assembly.accounting.notes


def test_metas_and_hugging_faces_weights_in_one_folder_are_refused(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    meta = write_llama_meta(tmp_path / "meta", CONFIG, native)
    for name in ("consolidated.00.pth", "params.json"):
        (meta / name).rename(folder / name)
    with pytest.raises(CheckpointError, match="keep the set that is meant"):
        convert_llama(folder)


def test_a_shard_that_holds_other_than_its_index_says_is_refused(tmp_path: Path, native: State) -> None:
    folder = in_shards(write_llama_hf(tmp_path / "llama", CONFIG, native), "safetensors", save_file)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["lm_head.weight"]
    weight_map["model.extra.weight"] = weight_map["model.norm.weight"]
    write_json(index, {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight") as caught:
        convert_llama(folder)
    assert "model.extra.weight" in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, native: State, name: str) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is a link to \.\./blobs/gone, which is not there"):
        convert_llama(folder)


def test_a_tokenizer_that_is_not_read_is_told(tmp_path: Path, native: State) -> None:
    folder = write_llama_meta(tmp_path / "llama", CONFIG, native)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assembly = convert_llama(folder)
    assert assembly.tokenizer is None
    assert any("tokenizer.model is not read" in note for note in assembly.accounting.notes)
    write_json(folder / "tokenizer.json", {})
    assembly = convert_llama(folder)
    assert assembly.tokenizer is not None
    assert not any("tokenizer.model" in note for note in assembly.accounting.notes)


def _layer(**parts: torch.Tensor) -> State:
    stem = "model.layers.0.self_attn.q_proj."
    return {f"{stem}{name.replace('__', '.')}": value.clone() for name, value in parts.items()}


CODES, SCALES = torch.ones(8, 8, dtype=torch.int32), torch.ones(8, 8)
QUANTIZED = {
    "GPTQ": _layer(qweight=CODES, qzeros=CODES, scales=SCALES, g_idx=CODES),
    "AWQ": _layer(qweight=CODES, qzeros=CODES, scales=SCALES),
    "compressed-tensors": _layer(weight_packed=CODES, weight_scale=SCALES),
    "bitsandbytes, 4 bits": _layer(weight=CODES.to(torch.uint8), weight__absmax=SCALES),
    "bitsandbytes, 8 bits": _layer(weight=CODES.to(torch.int8), SCB=SCALES),
    "FP8 with a scale": _layer(weight=SCALES.to(torch.float8_e4m3fn), weight_scale_inv=SCALES),
    "MLX, packed": _layer(weight=CODES.to(torch.uint32), scales=SCALES, biases=SCALES),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_refused_by_what_they_are(tmp_path: Path, native: State, method: str) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    save_file(QUANTIZED[method], folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"quantized weights \\({method}"):
        convert_llama(folder)


@pytest.mark.parametrize("settings", [{"quantization_config": {"quant_method": "awq"}}, {"quantization": {"bits": 4}}])
def test_a_configuration_of_quantized_weights_is_refused_by_what_it_is(
    tmp_path: Path, native: State, settings: dict[str, Any]
) -> None:
    with pytest.raises(MotrtError, match="the weights are quantized"):
        convert_llama(write_llama_hf(tmp_path / "llama", CONFIG, native, **settings))


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "model.onnx", "model.safetensors"])
def test_a_file_where_a_folder_is_expected_is_named_by_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" if name.endswith("gguf") else b"other")
    with pytest.raises(CheckpointError, match=re.escape("GGUF" if name.endswith("gguf") else f"{name} is not a folder")):
        convert_llama(tmp_path / name)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "complex64", "float8_e8m0fnu"])
def test_a_dtype_that_is_no_weights_is_no_damage(tmp_path: Path, native: State, dtype: str) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.extra": torch.ones(4).to(getattr(torch, dtype))}, folder / "model.safetensors")
    (fault,) = convert_llama(folder).accounting.faults
    assert (fault.outcome, fault.key) == ("unexpected", "model.extra")


def test_a_dtype_that_is_not_known_is_named_and_no_damage(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match="F4") as caught:
        convert_llama(folder)
    assert "damaged" not in str(caught.value)


def test_a_missing_weight_is_blamed_on_the_file_that_should_have_it(tmp_path: Path, native: State) -> None:
    llama, music = write_llama_meta(tmp_path / "llama", CONFIG, native), write_musicgen(tmp_path / "music", CONFIG, native)
    key = "decoder.model.decoder.layers.1.fc2.weight"
    state = load_file(music / "model.safetensors")
    del state[key]
    save_file(state, music / "model.safetensors")
    faults = convert_llama(llama, music).accounting.faults
    assert [(row.outcome, row.key, row.source) for row in faults] == [("missing", key, "music")]
    audio = {name: value for name, value in mot_state(CONFIG, native).items() if ".1." in name.split("local_experts")[-1]}
    gone = "layers.1.feed_forward.local_experts.1.expert.fc1.weight"
    del audio[gone]
    faults = convert_llama(llama, adapter=write_adapter(tmp_path / "adapter.pt", audio)).accounting.faults
    assert [(row.outcome, row.key, row.source) for row in faults] == [("missing", gone, "adapter.pt")]
