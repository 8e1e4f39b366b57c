"""The native checkpoint: what is written is read back exactly, and nothing that is not whole opens."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from motrt.errors import CheckpointError, ConfigError
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint, write_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import parameters

TINY = ModelConfig.tiny()


def tensors_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {p.name: torch.randn(p.shape, generator=generator).to(dtype) for p in parameters(config)}


def written(out: Path, config: ModelConfig = TINY, dtype: str = "float32", **options: object) -> Checkpoint:
    write_checkpoint(out, config, tensors_of(config).items(), dtype, **options)  # type: ignore[arg-type]
    return open_checkpoint(out)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    checkpoint = written(tmp_path / "model", dtype=dtype)
    assert (checkpoint.config, checkpoint.dtype, checkpoint.tokenizer_path) == (TINY, dtype, None)
    for name, tensor in tensors_of(TINY).items():
        assert torch.equal(checkpoint.read(name), tensor.to(getattr(torch, dtype)))
        assert checkpoint.shape(name) == tuple(tensor.shape)


def test_the_safetensors_library_reads_the_same_values(tmp_path: Path) -> None:
    written(tmp_path / "model", dtype="bfloat16")
    loaded = load_file(tmp_path / "model" / "model.safetensors")
    expected = tensors_of(TINY)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name].bfloat16()) for name in expected)


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "model")
    other = {name: tensor + 1 for name, tensor in tensors_of(TINY).items()}
    save_file(other, tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(open_checkpoint(tmp_path / "model").read(name), other[name]) for name in checkpoint.names)


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    whole, sharded = written(tmp_path / "whole"), written(tmp_path / "sharded", shard_bytes=40_000)
    assert len(sharded.files()) > 4
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert all(torch.equal(whole.read(name), sharded.read(name)) for name in whole.names)


def test_no_shard_is_larger_than_asked_but_for_a_tensor_that_is(tmp_path: Path) -> None:
    sharded = written(tmp_path / "model", shard_bytes=20_000)
    by_file: dict[Path, list[int]] = {}
    for stored in sharded.stored.values():
        by_file.setdefault(stored.file, []).append(stored.numbytes)
    assert all(sum(sizes) <= 20_000 or len(sizes) == 1 for sizes in by_file.values())


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TINY, reversed(tensors_of(TINY).items()), "float32")
    assert open_checkpoint(tmp_path / "model").sha256() == written(tmp_path / "again").sha256()


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    done: list[int] = []
    checkpoint = written(tmp_path / "model", progress=done.append)
    assert sum(done) == checkpoint.num_bytes == sum(p.numel for p in parameters(TINY)) * 4
    hashed: list[int] = []
    checkpoint.sha256(hashed.append)
    assert sum(hashed) == sum(file.stat().st_size for file in checkpoint.files())


def test_a_tokenizer_travels_along(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    checkpoint = written(tmp_path / "model", tokenizer=tmp_path / "t.json")
    assert checkpoint.tokenizer_path == tmp_path / "model" / "tokenizer.json"
    assert checkpoint.tokenizer_path in checkpoint.files()


def test_the_hash_changes_with_the_model_and_not_with_the_tokenizer(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "model")
    before = checkpoint.sha256()
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoint.sha256() != before
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoint.sha256() == before
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert open_checkpoint(tmp_path / "model").sha256() == before
    assert tmp_path / "model" / "tokenizer.json" in open_checkpoint(tmp_path / "model").files()
    (tmp_path / "model" / "config.json").write_text(TINY.replace(norm_eps=1e-6).to_json())
    assert open_checkpoint(tmp_path / "model").sha256() != before


def test_the_hash_of_shards_covers_their_index(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "model", shard_bytes=100_000)
    before = checkpoint.sha256()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text() + "\n")
    assert checkpoint.sha256() != before


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm.weight"], tensors["layers.1.attention.wq.text.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stray.weight"] = torch.zeros(3)


def _misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = torch.ones(65)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = torch.ones(64, dtype=torch.int32)


def _mixed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = torch.ones(64, dtype=torch.bfloat16)


_FAULTS = [
    (_drop, ["missing: norm.weight", "missing: layers.1.attention.wq.text.weight"]),
    (_add, ["unexpected: stray.weight"]),
    (_misshape, [r"misshapen: norm.weight is \[65\], config.json asks for \[64\]"]),
    (_integers, ["not a float: norm.weight is int32"]),
    (_mixed, ["mixed dtypes: one was expected, bfloat16, float32 came"]),
]


@pytest.mark.parametrize(("fault", "sentences"), _FAULTS)
def test_opening_names_every_key_that_is_wrong(
    tmp_path: Path, fault: Callable[[dict[str, torch.Tensor]], None], sentences: list[str]
) -> None:
    written(tmp_path / "model")
    tensors = tensors_of(TINY)
    fault(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    for sentence in sentences:
        with pytest.raises(CheckpointError, match=sentence):
            open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 5, 200, 20_000, -1])
def test_a_truncated_file_does_not_open(tmp_path: Path, keep: int) -> None:
    written(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    "content", [b"x" * 500, b"\x10" + b"\0" * 7 + b"[1, 2, 3, 4, 5] ", b"\x10" + b"\0" * 7 + b'{"a": {"dtype"} ']
)
def test_a_foreign_file_does_not_open(tmp_path: Path, content: bytes) -> None:
    written(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: object) -> None:
    written(tmp_path / "model")
    header = json.dumps({"a": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="'a' is described wrongly"):
        open_checkpoint(tmp_path / "model")


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "model")
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": one, "b": one}).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="begins at byte"):
        open_checkpoint(tmp_path / "model")


def _index(folder: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    file = folder / "model.safetensors.index.json"
    return file, json.loads(file.read_text())


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\0b"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / "model", shard_bytes=40_000)
    file, index = _index(tmp_path / "model")
    index["weight_map"]["norm.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no plain file name"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("shard_bytes", [40_000, 4_000_000_000])
def test_files_behind_links_are_the_same_checkpoint(tmp_path: Path, shard_bytes: int) -> None:
    checkpoint = written(tmp_path / "model", shard_bytes=shard_bytes)
    before, value = checkpoint.sha256(), checkpoint.read("norm.weight")
    for number, file in enumerate(checkpoint.files()):
        file.rename(tmp_path / str(number))
        file.symlink_to(f"../{number}")
    (tmp_path / "link").symlink_to("model")
    again = open_checkpoint(tmp_path / "link")
    assert again.sha256() == before and torch.equal(again.read("norm.weight"), value)


@pytest.mark.parametrize("shard_bytes", [40_000, 4_000_000_000])
@pytest.mark.parametrize("of", ["weights", "index", "configuration", "tokenizer"])
def test_a_link_that_leads_nowhere_is_told_from_a_missing_file(tmp_path: Path, shard_bytes: int, of: str) -> None:
    checkpoint = written(tmp_path / "model", shard_bytes=shard_bytes)
    names = {"weights": checkpoint.stored["norm.weight"].file.name, "index": "model.safetensors.index.json"}
    file = tmp_path / "model" / (names | {"configuration": "config.json", "tokenizer": "tokenizer.json"})[of]
    if of == "index" and not file.exists():
        (tmp_path / "model" / "model.safetensors").unlink()
    file.unlink(missing_ok=True)
    file.symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{file.name} is a link to gone, which is not there"):
        open_checkpoint(tmp_path / "model")
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(CheckpointError, match=f"{file.name} is a link that leads back to itself"):
        open_checkpoint(tmp_path / "model")


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "model", shard_bytes=40_000)
    file, index = _index(tmp_path / "model")
    first, last = checkpoint.stored["tok_embeddings.weight"].file.name, checkpoint.stored["norm.weight"].file.name
    index["weight_map"]["norm.weight"] = first
    index["weight_map"]["nowhere.weight"] = last
    del index["weight_map"]["tok_embeddings.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "model")
    message = str(caught.value)
    assert f"norm.weight is in {last}, and model.safetensors.index.json puts it in {first}" in message
    assert "nowhere.weight is not in" in message
    assert "tok_embeddings.weight is in" in message
    (tmp_path / "model" / last).unlink()
    with pytest.raises(CheckpointError, match=f"{last} is missing"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    written(tmp_path / "model", shard_bytes=40_000)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path / "model")


def test_a_folder_with_both_kinds_of_weights_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "model", shard_bytes=40_000)
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="remove the one that is not meant"):
        open_checkpoint(tmp_path / "model")


def test_what_is_no_checkpoint_says_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: a native checkpoint is a folder"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"has no config\.json.*motrt convert"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"Hugging Face folder.*motrt convert"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(TINY.to_json())
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


def test_an_impossible_configuration_names_its_file(tmp_path: Path) -> None:
    written(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**TINY.to_dict(), "num_kv_heads": 3}))
    with pytest.raises(ConfigError, match=r"config\.json: impossible[^\0]*num_kv_heads"):
        open_checkpoint(tmp_path / "model")
    file.write_text("{")
    with pytest.raises(ConfigError, match="not readable JSON"):
        open_checkpoint(tmp_path / "model")


def test_a_configuration_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(TINY.replace(num_layers=3, head="shared").to_json())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "model")
    assert "missing: layers.2.ffn_norm.weight" in str(caught.value)
    assert "unexpected: output.audio.weight [32, 64]" in str(caught.value)


def test_writing_the_wrong_tensors_names_them_all_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = tensors_of(TINY)
    del tensors["norm.weight"]
    tensors["stray"] = torch.zeros(1)
    tensors["layers.0.ffn_norm.weight"] = torch.zeros(3)
    tensors["layers.1.ffn_norm.weight"] = torch.zeros(64, dtype=torch.int64)
    pairs = [*tensors.items(), ("layers.0.attention_norm.weight", tensors["layers.0.attention_norm.weight"])]
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "model", TINY, pairs, "float32")
    for sentence in (
        "missing: norm",
        "unexpected: stray",
        "misshapen: layers.0.ffn",
        "not a float: layers.1.ffn",
        "given twice: l",
    ):
        assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(TINY)
    tensors["norm.weight"][3] = 70000.0
    with pytest.raises(CheckpointError, match=r"too large for float16: norm\.weight.*bfloat16 or float32"):
        write_checkpoint(tmp_path / "model", TINY, tensors.items(), "float16")
    tensors["norm.weight"][3] = float("inf")  # infinite before: the health check's business, not a rounding's
    write_checkpoint(tmp_path / "model", TINY, tensors.items(), "float16")


def test_unknown_dtypes_and_missing_tokenizers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype must be one of"):
        write_checkpoint(tmp_path / "model", TINY, tensors_of(TINY).items(), "int8")
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        write_checkpoint(tmp_path / "model", TINY, tensors_of(TINY).items(), "float32", tokenizer=tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_after_opening_is_told(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"ended inside 'output\.audio\.weight'"):
        checkpoint.read("output.audio.weight")
    weights.unlink()
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.read("norm.weight")
    with pytest.raises(CheckpointError, match="holds no weight 'stray'"):
        checkpoint.read("stray")


_STREAM = """
import sys
from motrt.model_def.checkpoint.native import open_checkpoint
def resident(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024
checkpoint = open_checkpoint(sys.argv[1])
before = resident("VmRSS")
total = 0
for name in checkpoint.names:
    total += checkpoint.read(name).numel()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is not there")
def test_streaming_a_checkpoint_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    config = TINY.replace(model_width=1024, num_layers=12)
    write_checkpoint(tmp_path / "model", config, ((p.name, torch.zeros(p.shape)) for p in parameters(config)), "float32")
    checkpoint = open_checkpoint(tmp_path / "model")
    largest = max(stored.numbytes for stored in checkpoint.stored.values())
    ran = subprocess.run([sys.executable, "-c", _STREAM, str(tmp_path / "model")], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 3 * largest + 4_000_000 < checkpoint.num_bytes
