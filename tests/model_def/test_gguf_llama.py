"""A Llama in a GGUF file becomes the model that it was written from; what would be another is refused by name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from motrt.cli import main
from motrt.errors import CheckpointError, ConfigError
from motrt.export.inspection import inspect
from motrt.model_def.checkpoint.assemble import Assembly, convert_gguf, convert_llama
from motrt.model_def.checkpoint.llama import open_base
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.checkpoint.rope import RopeChoices
from motrt.model_def.checkpoint.sniff import describe_raw, kind_of
from motrt.model_def.config import ModelConfig, RopeConfig, RopeScaling, rope_frequencies
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.runtime.torch_session import TorchSession
from motrt.tests.model_def.foreign import State, write_llama_hf, write_musicgen
from motrt.tests.model_def.gguf_files import Values, gguf, gguf_state, header_of, write_gguf

CONFIG = ModelConfig.tiny()
TEXT = CONFIG.replace(modalities=CONFIG.modalities[:1], head="shared")


@pytest.fixture(scope="module")
def native() -> State:
    return dict(random_tensors(CONFIG, 5))


def text_of(native: State) -> State:
    """The text model inside ``native``, as a model of its own with a shared head."""
    state = {name: value for name, value in native.items() if ".audio." not in name and name != "output.text.weight"}
    vt = CONFIG.modalities[0].vocab_size
    return state | {
        "tok_embeddings.weight": native["tok_embeddings.weight"][:vt],
        "output.weight": native["output.text.weight"],
    }


def write(
    path: Path, native: State, changes: Values | None = None, kinds: dict[str, str] | None = None, tied: bool = False
) -> Path:
    return write_gguf(path / "m.gguf", header_of(CONFIG) | dict(changes or {}), gguf_state(CONFIG, native, tied), kinds)


def refusal(path: Path, native: State, changes: dict[str, Any], rope: RopeChoices | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        convert_gguf(write(path, native, changes), rope=rope)
    return str(raised.value)


def outcomes(assembly: Assembly, outcome: str) -> dict[str, str]:
    return {row.key: row.detail for row in assembly.accounting.rows if row.outcome == outcome}


def test_plain_weights_come_back_bit_for_bit(tmp_path: Path, native: State) -> None:
    assembly = convert_gguf(write(tmp_path, native))
    assembly.accounting.raise_unless_clean()
    assert assembly.config == TEXT
    assert assembly.dtype == "float32"
    values, expected = dict(assembly.tensors()), text_of(native)
    assert values.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(values[name], expected[name])] == []


def test_rows_as_llama_cpp_permutes_them_give_the_logits_of_the_folder_they_came_from(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "hf", CONFIG, native)
    state = gguf_state(CONFIG, native)
    for name in state:
        heads = {"attn_q": CONFIG.num_heads, "attn_k": CONFIG.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None:  # convert_hf_to_gguf: [h, 2, d/2, m] -> [h, d/2, 2, m]
            width = state[name].shape[1]
            state[name] = state[name].reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(-1, width)
    ours = convert_gguf(write_gguf(tmp_path / "m.gguf", header_of(CONFIG), state))
    assert ours.config.rope.style == "interleaved"
    logits = [
        TorchSession(Decoder.from_tensors(one.config, one.read, torch.float32)).prefill([[5, 17, 80, 2, 41]], ["text"])[0]
        for one in (ours, convert_llama(folder, head="shared"))
    ]
    torch.testing.assert_close(torch.from_numpy(logits[0]), torch.from_numpy(logits[1]), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_stored_is_the_embedding(tmp_path: Path, native: State) -> None:
    assembly = convert_gguf(write(tmp_path, native, tied=True))
    assembly.accounting.raise_unless_clean()
    assert assembly.config == TEXT.replace(tied_embeddings=True)


def test_the_report_says_what_was_dequantized_from_what(tmp_path: Path, native: State) -> None:
    kinds = {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_1", "blk.1.attn_q.weight": "Q4_1"}
    assembly = convert_gguf(write(tmp_path, native, kinds=kinds))
    said = {key: f"{kind} to float32" for key, kind in kinds.items()}
    assert outcomes(assembly, "dequantized") == said
    assert any("what was lost when they were quantized is lost in this model too" in note for note in assembly.accounting.notes)
    expected = gguf.dequantize(
        gguf.quantize(native["layers.0.attention.wq.text.weight"].numpy(), gguf.GGMLQuantizationType.Q4_1),
        gguf.GGMLQuantizationType.Q4_1,
    )
    assert torch.equal(assembly.read("layers.0.attention.wq.text.weight"), torch.from_numpy(expected))


def test_every_key_of_the_header_has_a_line(tmp_path: Path, native: State) -> None:
    path = write(tmp_path, native)
    header = {key for key in gguf.GGUFReader(path).fields if not key.startswith("GGUF.")}
    rows = convert_gguf(path).accounting.rows
    assert header <= {row.key for row in rows}
    ignored = {row.key: row.detail for row in rows if row.outcome == "ignored"}
    assert ignored == dict.fromkeys(
        ("general.name", "general.languages", "general.file_type"), "without effect on the forward pass"
    )


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_floats_stay_so_where_the_norms_allow_it(kind: str, tmp_path: Path, native: State) -> None:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    rounded = {name: value.to(dtype).float() for name, value in native.items()}
    tables = {name: kind for name, value in gguf_state(CONFIG, rounded).items() if value.ndim > 1}
    assembly = convert_gguf(write(tmp_path, rounded, kinds=tables))
    assert f"torch.{assembly.dtype}" == str(dtype)
    assembly.write(tmp_path / "out")
    read = open_checkpoint(tmp_path / "out").read
    assert [name for name, value in text_of(rounded).items() if not torch.equal(read(name).float(), value)] == []

    rounded["norm.weight"] = rounded["norm.weight"] + 1e-6  # a value that half floats do not have
    assert convert_gguf(write(tmp_path, rounded, kinds=tables)).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.attention.sliding_window": 4096}, "anything else is attention over a sliding window"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "anything else is a mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type must be 'none' or 'linear' (got 'yarn')"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "RoPE that is scaled linearly"),
        ({"llama.rope.scale_linear": 4.0}, "RoPE that is scaled linearly"),
        ({"llama.attn_logit_softcapping": 50.0}, "attention scores that are capped"),
        ({"llama.final_logit_softcapping": 30.0}, "logits that are capped"),
        ({"llama.logit_scale": 0.5}, "logits that are scaled"),
        ({"llama.embedding_scale": 12.0}, "an embedding that is scaled"),
        ({"llama.residual_scale": 0.2}, "a residual stream that is scaled"),
        ({"llama.attention.scale": 0.1}, "attention scores that are scaled in another way"),
        ({"llama.attention.causal": False}, "attention to later positions"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count must be 16, the size of a head (got 8)"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length must be 16"),
        ({"llama.hidden_activation": "gelu"}, "llama.hidden_activation ('gelu') is not known here"),
        ({"general.mood": "good"}, "general.mood ('good') is not known here"),
        ({"general.type": "adapter"}, "general.type must be 'model' (got 'adapter'): anything else is no whole model"),
        ({"split.count": 3, "split.no": 0}, "split over several files"),
        ({"llama.block_count": None}, "missing field 'llama.block_count'"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length must be a positive whole number"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv must be a positive whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "missing field 'llama.attention.layer_norm_rms_epsilon'"),
        ({"llama.block_count": 3}, "layers: the configuration says 3, the weights have 2"),
        ({"llama.feed_forward_length": 96}, "text feed-forward width"),
        ({"llama.vocab_size": 95}, "vocab_size says 95, token_embd.weight has 96 rows"),
        ({"llama.attention.head_count_kv": 3}, "key/value heads x head size: the configuration says 48, the weights have 32"),
    ],
)
def test_what_would_be_another_computation_is_refused_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path, native: State
) -> None:
    assert said in refusal(tmp_path, native, changes)


def test_all_problems_are_named_at_once(tmp_path: Path, native: State) -> None:
    said = refusal(
        tmp_path, native, {"llama.expert_count": 8, "llama.attention.sliding_window": 9, "llama.context_length": None}
    )
    assert [part for part in ("expert_count", "sliding_window", "context_length") if part not in said] == []


def test_another_architecture_is_refused_by_its_name_alone(tmp_path: Path, native: State) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"gemma2.block_count": 2}, gguf_state(CONFIG, native), arch="gemma2")
    with pytest.raises(ConfigError, match=r"general\.architecture must be 'llama' \(got 'gemma2'\)") as raised:
        convert_gguf(path)
    assert "block_count" not in str(raised.value)


def test_sizes_that_are_the_same_for_every_layer_may_be_listed(tmp_path: Path, native: State) -> None:
    changes = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [128, 128]}
    assert convert_gguf(write(tmp_path, native, changes)).config == TEXT


def test_what_the_header_leaves_out_is_llama_cpps_default(tmp_path: Path, native: State) -> None:
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size")
    config = convert_gguf(write(tmp_path, native, {f"llama.{name}": None for name in sizes})).config
    assert config == TEXT.replace(rope=RopeConfig(10000.0))


def test_a_tensor_that_the_model_has_no_place_for_is_a_fault(tmp_path: Path, native: State) -> None:
    state = gguf_state(CONFIG, native) | {"blk.0.attn_q.bias": torch.ones(64)}
    del state["blk.1.ffn_up.weight"]
    assembly = convert_gguf(write_gguf(tmp_path / "m.gguf", header_of(CONFIG), state))
    assert outcomes(assembly, "unexpected").keys() == {"blk.0.attn_q.bias"}
    assert outcomes(assembly, "missing").keys() == {"blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match="2 keys do not fit"):
        assembly.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Llama 3's scaling of RoPE.


def divisors(scaling: RopeScaling, theta: float = CONFIG.rope.theta) -> torch.Tensor:
    plain, scaled = (rope_frequencies(RopeConfig(theta, scaling=one), CONFIG.head_size) for one in (None, scaling))
    return torch.tensor([before / after for before, after in zip(plain, scaled, strict=True)])


def with_divisors(path: Path, native: State, values: torch.Tensor) -> Path:
    return write_gguf(path / "m.gguf", header_of(CONFIG), gguf_state(CONFIG, native) | {"rope_freqs.weight": values})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_read_from_its_divisors(factor: float, tmp_path: Path, native: State) -> None:
    assembly = convert_gguf(with_divisors(tmp_path, native, divisors(RopeScaling(factor=factor))))
    assembly.accounting.raise_unless_clean()
    assert assembly.config.rope == RopeConfig(CONFIG.rope.theta, "interleaved", RopeScaling(factor=factor))
    assert outcomes(assembly, "ignored")["rope_freqs.weight"] == "Llama 3's scaling of RoPE, which the configuration has"


def test_divisors_of_one_scale_nothing(tmp_path: Path, native: State) -> None:
    assert convert_gguf(with_divisors(tmp_path, native, torch.ones(8))).config == TEXT


@pytest.mark.parametrize(
    "values",
    [
        divisors(RopeScaling(factor=8.0, low_freq_factor=2.0)),
        divisors(RopeScaling(factor=8.0), theta=10000.0),
        torch.ones(4),
        torch.full((8,), 4.0),
        torch.zeros(8),
        torch.full((8,), float("nan")),
        torch.tensor([1.0, 1, 1, 1, 1, 1, 1, float("inf")]),
    ],
)
def test_other_divisors_are_refused(values: torch.Tensor, tmp_path: Path, native: State) -> None:
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is .* no other is computed here"):
        convert_gguf(with_divisors(tmp_path, native, values))


def test_an_option_does_not_overrule_the_file(tmp_path: Path, native: State) -> None:
    assert "rope_theta is 500000, and --rope-theta says 10000" in refusal(tmp_path, native, {}, RopeChoices(theta=10000.0))
    path = write(tmp_path, native, {"llama.rope.freq_base": None})
    assert convert_gguf(path, rope=RopeChoices(theta=20000.0)).config.rope.theta == 20000.0


# Beside other parts, and on the command line.


def test_an_audio_expert_is_laid_over_it_as_over_a_folder(tmp_path: Path, native: State) -> None:
    assembly = convert_gguf(write(tmp_path, native), write_musicgen(tmp_path / "musicgen", CONFIG, native))
    assembly.accounting.raise_unless_clean()
    assert assembly.config.modality_names == ("text", "audio")
    name = "layers.1.feed_forward.audio.fc1.weight"
    assert torch.equal(assembly.read(name), native[name])


def test_the_commands_say_what_a_gguf_file_is_and_how_it_is_read(tmp_path: Path, native: State) -> None:
    path = write(tmp_path, native, kinds={"token_embd.weight": "Q8_0"})
    assert kind_of(path) == "gguf"
    assert {one.name: one.stored for one in describe_raw(path)}["token_embd.weight"] == "Q8_0"
    found = inspect(path)
    assert found["kind"] == f"GGUF file: `motrt convert OUT --gguf {path}` reads it"
    assert found["config"] == TEXT.to_dict()
    assert found["stored"]["dtypes"] == {"float32": 20, "Q8_0": 1}
    assert found["stored"]["bytes"] == sum(one.num_bytes for one in describe_raw(path))
    exported = CliRunner().invoke(main, ["export", str(path), str(tmp_path / "bundle")])
    assert exported.exit_code == 1
    assert f"`motrt convert OUT --gguf {path}`" in exported.output
    with pytest.raises(CheckpointError, match="--gguf reads it"):
        open_base(path)


def test_inspecting_another_architecture_tells_its_tensors_and_why_there_is_no_model(tmp_path: Path, native: State) -> None:
    path = write_gguf(tmp_path / "m.gguf", {}, gguf_state(CONFIG, native), arch="gemma2")
    found = inspect(path)
    assert "general.architecture must be 'llama'" in found["note"]
    assert len(found["tensors"]) == 21
    (tmp_path / "cut.gguf").write_bytes(b"GGU")
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(tmp_path / "cut.gguf")


def test_without_the_package_nothing_is_half_written(tmp_path: Path, native: State, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, native, kinds={"blk.1.ffn_up.weight": "Q4_0"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = CliRunner().invoke(main, ["convert", str(tmp_path / "out"), "--gguf", str(path)])
    assert done.exit_code == 1
    assert "pip install 'motrt[gguf]'" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_convert_writes_the_checkpoint_from_the_command_line(tmp_path: Path, native: State) -> None:
    path = write(tmp_path, native, kinds={"blk.0.attn_q.weight": "Q5_1"})
    done = CliRunner().invoke(main, ["convert", str(tmp_path / "out"), "--gguf", str(path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["accounting"]["counts"] == {"loaded": 34, "ignored": 3, "dequantized": 1}
    assert open_checkpoint(tmp_path / "out").config == TEXT
    twice = CliRunner().invoke(main, ["convert", str(tmp_path / "out2"), "--gguf", str(path), "--llama", str(path)])
    assert twice.exit_code == 2
    assert "give one of --mot, --llama, --gguf or --native" in twice.output
