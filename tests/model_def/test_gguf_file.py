"""A GGUF file's header is read as the library reads it, its blocks are dequantized, and nothing in it is believed unchecked."""

import builtins
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motrt.errors import BackendError, CheckpointError, MotrtError
from motrt.model_def.checkpoint import gguf_file
from motrt.model_def.checkpoint.assemble import convert_gguf
from motrt.model_def.checkpoint.gguf_file import BLOCKS, PLAIN, is_gguf, open_gguf_file
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.gguf_files import gguf, gguf_state, header_of, write_gguf

QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FINITE_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where half floats lie


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def container(*keys: bytes, tensors: bytes = b"", num_tensors: int = 0, num_keys: int | None = None, version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, num_tensors, len(keys) if num_keys is None else num_keys)
    return b"GGUF" + counts + b"".join(keys) + tensors


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def refusal(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        open_gguf_file(tmp_path / "m.gguf")
    return str(raised.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig.tiny()
    native = dict(random_tensors(config, 3))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", header_of(config), gguf_state(config, native))


def test_the_sizes_and_numbers_of_types_are_the_librarys() -> None:
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: sizes[kind] for kind in BLOCKS} == BLOCKS
    numbers = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    known = gguf_file._TYPES
    assert {number: known[number] for number in numbers.keys() & known.keys()} == {
        number: numbers[number] for number in numbers.keys() & known.keys()
    }
    assert {*BLOCKS, *PLAIN} <= set(known.values())


def test_every_value_of_the_header_is_what_the_library_reads(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("words", "naïve 😀")
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("truths", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {key: one.contents() for key, one in read.fields.items() if not key.startswith("GGUF.")}
    assert open_gguf_file(tmp_path / "m.gguf").metadata == expected
    assert len(expected) == 16


@pytest.mark.parametrize("kind", [*QUANTIZABLE, "F16", "BF16", "F32"])
def test_what_the_library_quantizes_is_dequantized(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_CHUNK_ELEMENTS", 96)  # so that there are several chunks, the last a part of one
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    file = open_gguf_file(write_gguf(tmp_path / "m.gguf", {}, {"w": values}, {"w": kind}))
    stored = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    read = file.read("w")
    assert file.tensors["w"].type == kind
    assert str(read.dtype) == f"torch.{PLAIN.get(kind, 'float32')}"
    np.testing.assert_array_equal(read.float().numpy(), expected)


@pytest.mark.parametrize("kind", FINITE_SCALES)
def test_super_blocks_are_dequantized(kind: str, tmp_path: Path) -> None:
    elements, num_bytes = BLOCKS[kind]
    blocks = np.random.default_rng(2).integers(0, 256, (3, 2, num_bytes), dtype=np.uint8)
    for at in FINITE_SCALES[kind]:
        blocks[..., at + 1] = 0x2C  # a half float near 0.06, whatever its lower byte
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("w", blocks.reshape(3, 2 * num_bytes), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf_file(tmp_path / "m.gguf")
    assert file.tensors["w"].shape == (3, 2 * elements)
    (same,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    expected = gguf.dequantize(same.data, number)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(file.read("w").numpy(), expected)


def test_a_block_of_q8_0_is_its_scale_times_its_codes(tmp_path: Path) -> None:
    codes = np.arange(-16, 16, dtype=np.int8)
    block = np.float16(0.25).tobytes() + codes.tobytes()
    content = container(tensors=tensor("w", (32,), 8), num_tensors=1)
    (tmp_path / "m.gguf").write_bytes(content + bytes(-len(content) % 32) + block)
    assert open_gguf_file(tmp_path / "m.gguf").read("w").tolist() == (codes * 0.25).tolist()


def test_without_the_package_plain_tensors_are_read_and_blocks_are_refused_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_gguf_file(
        write_gguf(tmp_path / "m.gguf", {}, {"plain": torch.ones(32), "blocks": torch.ones(32)}, {"blocks": "Q4_0"})
    )
    real = builtins.__import__

    def without_gguf(name: str, *arguments: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    assert torch.equal(file.read("plain"), torch.ones(32))
    with pytest.raises(BackendError, match=r"pip install 'motrt\[gguf\]'"):
        file.read("blocks")


def test_a_gguf_file_is_told_by_how_it_begins(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no such thing")
    assert is_gguf(tiny)
    assert not is_gguf(tmp_path / "m.gguf")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (b"GGML" + bytes(40), "is no GGUF file"),
        (container(version=1), "of version 1: 2 and 3 are read"),
        (container(version=4), "of version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (container(num_keys=1 << 60), "announces 1152921504606846976 keys, more than can be"),
        (container(num_tensors=1 << 60), "announces 1152921504606846976 tensors"),
        (container(struct.pack("<Q", 1 << 62) + bytes(20)), "truncated"),
        (container(string("k") + struct.pack("<IIQ", 9, 0, 1 << 61)), "elements of an array, more than can be"),
        (container(string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(40)), "elements of type 9"),
        (container(string("k") + struct.pack("<I", 13) + bytes(40)), "of type 13, which GGUF does not have"),
        (container(string("k") + struct.pack("<IB", 7, 2)), "a truth value is 2"),
        (container(struct.pack("<Q", 1) + b"\xff" + bytes(20)), "not UTF-8"),
        (container(*[string("k") + struct.pack("<IB", 7, 1)] * 2), "'k' stands there twice"),
        (
            container(string("general.alignment") + struct.pack("<II", 4, 24)),
            "general.alignment must be a power of two (24 came)",
        ),
        (container(string("general.alignment") + struct.pack("<II", 4, 0)), "must be a power of two (0 came)"),
        (container(tensors=tensor("w", (4,), 99), num_tensors=1), "'w' is of type number 99, which is not read"),
        (container(tensors=tensor("w", (4,), 16), num_tensors=1), "'w' is of type IQ2_XXS, which is not read: F32"),
        (container(tensors=tensor("w", (4,), 24), num_tensors=1), "'w' is of type I8"),
        (container(tensors=tensor("w", (0,), 0), num_tensors=1), "'w' has dims [0]"),
        (container(tensors=tensor("w", (1 << 40, 1 << 40), 0), num_tensors=1), "has dims"),
        (container(tensors=tensor("w", (33,), 2), num_tensors=1), "rows of 33, which blocks of 32 do not fill"),
        (container(tensors=tensor("w", (), 0) + bytes(20), num_tensors=1), "'w' has 0 dims"),
        (container(tensors=tensor("w", (4,), 0), num_tensors=1) + bytes(20), "truncated or damaged"),
        (container(tensors=tensor("w", (4,), 0) * 2, num_tensors=2) + bytes(64), "'w' stands there twice"),
        (
            container(tensors=tensor("v", (8,), 0) + tensor("w", (8,), 0, 16), num_tensors=2) + bytes(99),
            "'w' begins inside 'v'",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_said(content: bytes, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, content)


@pytest.mark.parametrize(("limit", "said"), [("_MOST_ELEMENTS", "more than can be"), ("_MOST_HEADER_BYTES", "goes on beyond")])
def test_a_header_that_is_larger_than_any_models_is_refused(
    limit: str, said: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, limit, 20)
    with pytest.raises(CheckpointError, match=said):
        open_gguf_file(tiny)


def test_all_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    said = refusal(tmp_path, container(tensors=tensor("v", (8,), 16) + tensor("w", (8,), 99), num_tensors=2))
    assert "'v' is of type" in said
    assert "'w' is of type" in said


def test_a_file_that_ends_anywhere_is_refused(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    for end in [*range(0, 400, 7), len(whole) // 2, len(whole) - 33]:
        refusal(tmp_path, whole[:end])


def test_changed_bytes_of_a_header_are_refused_or_give_a_model(tiny: Path, tmp_path: Path) -> None:
    whole, chance = tiny.read_bytes(), random.Random(4)
    end = whole.index(b"blk.1.ffn_up.weight") + 60
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            content[chance.randrange(4, end)] = chance.choice((0, 1, 9, 127, 255, chance.randrange(256)))
        (tmp_path / "m.gguf").write_bytes(content)
        try:
            convert_gguf(tmp_path / "m.gguf").accounting.raise_unless_clean()
        except MotrtError:
            refused += 1
    assert 50 < refused < 150
