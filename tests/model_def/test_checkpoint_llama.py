"""A routed model is assembled from a Llama, a MusicGen and an adapter file, and says what stands in for what none has."""

from pathlib import Path
from typing import Any

import pytest
import torch

from motrt.errors import CheckpointError, ConfigError, UntrainedRowsError
from motrt.model_def.checkpoint.assemble import Assembly, convert_llama
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig, RopeScaling
from motrt.model_def.decoder import Decoder
from motrt.model_def.health import diagnose, refuse_untrained
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
TEXT_ONLY = CONFIG.replace(modalities=CONFIG.modalities[:1], head="shared")


@pytest.fixture(scope="module")
def native() -> State:
    """A routed model as ``convert`` can build it: audio attention as the text's, no bias in the audio expert."""
    state = dict(random_tensors(CONFIG, 21))
    for name in state:
        if ".attention." in name and ".audio." in name:
            state[name] = state[name.replace(".audio.", ".text.")]
        if name.endswith(".bias"):
            state[name] = torch.zeros_like(state[name])
    return state


def adapter_state(native: State, *, rows_alone: bool = True) -> State:
    """What training adds: projections, and the audio rows of the embedding and of the head."""
    everything = mot_state(CONFIG, native)
    state = {name: tensor for name, tensor in everything.items() if "down_proj" in name or "up_proj" in name}
    table = native["tok_embeddings.weight"]
    state["tok_embeddings.weight"] = table[96:].clone() if rows_alone else table
    state["audio_output.weight"] = native["output.audio.weight"]
    return state


def outcomes(assembly: Assembly, outcome: str) -> dict[str, str]:
    return {row.key: row.detail for row in assembly.accounting.rows if row.outcome == outcome}


def assert_holds(assembly: Assembly, native: State) -> None:
    assembly.accounting.raise_unless_clean()
    values = dict(assembly.tensors())
    assert values.keys() == native.keys()
    assert [name for name in native if not torch.equal(values[name], native[name])] == []


@pytest.mark.parametrize("rows_alone", [True, False])
def test_the_parts_give_the_model_that_they_were_taken_from(tmp_path: Path, native: State, rows_alone: bool) -> None:
    assembly = convert_llama(
        write_llama_meta(tmp_path / "llama", CONFIG, native),
        write_musicgen(tmp_path / "musicgen", CONFIG, native),
        write_adapter(tmp_path / "adapter.pt", adapter_state(native, rows_alone=rows_alone)),
    )
    assert assembly.config == CONFIG
    assert_holds(assembly, native)
    assert "audio attention: 8 weights are copies of the text model's" in assembly.accounting.notes
    assert "audio feed-forward: the first 2 of MusicGen's 3 layers" in assembly.accounting.notes
    assert "audio feed-forward: the source's fc1 and fc2 have no bias, so the biases are zero" in assembly.accounting.notes
    assert "adapter.pt: step 1200, loss 2.5" in assembly.accounting.notes


def test_every_key_of_every_source_has_a_line(tmp_path: Path, native: State) -> None:
    llama = write_llama_meta(tmp_path / "llama", CONFIG, native)
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native, pickled=True)
    extra = adapter_state(native)
    assembly = convert_llama(llama, music, write_adapter(tmp_path / "adapter.pt", extra))
    by_source: dict[str, set[str]] = {}
    for row in assembly.accounting.rows:
        by_source.setdefault(row.source, set()).add(row.key)
    loaded_llama = torch.load(llama / "consolidated.00.pth", weights_only=True)
    loaded_music = torch.load(music / "pytorch_model.bin", weights_only=True)
    assert set(loaded_llama) <= by_source["consolidated.00.pth"]
    assert set(loaded_music) == by_source["musicgen"]
    assert {*extra, "step", "loss"} == by_source["adapter.pt"]
    ignored = outcomes(assembly, "ignored")
    assert "first 2 of 3 layers" in ignored["decoder.model.decoder.layers.2.fc1.weight"]
    assert "fc1 and fc2" in ignored["text_encoder.shared.weight"]
    assert len(outcomes(assembly, "copied")) == 8
    assert outcomes(assembly, "initialised").keys() == {name for name in native if name.endswith(".bias")}


def test_without_an_adapter_what_is_made_up_is_told_and_the_model_is_refused(tmp_path: Path, native: State) -> None:
    llama = write_llama_meta(tmp_path / "llama", CONFIG, native)
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native)
    assembly = convert_llama(llama, music, seed=3)
    made = outcomes(assembly, "initialised")
    assert "random, seed 3" in made["layers.1.feed_forward.audio.up_proj.weight"]
    assert made["tok_embeddings.audio.weight"] == "zero: rows 96 to 127 of tok_embeddings.weight"
    assert made["output.audio.weight"] == "zero: rows 96 to 127 of the head"
    assembly.write(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    up = "layers.1.feed_forward.audio.up_proj.weight"
    assert torch.equal(checkpoint.read(up), dict(random_tensors(CONFIG, 3))[up])
    with pytest.raises(UntrainedRowsError, match=r"audio rows 96 to 127 of tok_embeddings\.weight"):
        refuse_untrained(diagnose(checkpoint.config, checkpoint.read))


def test_an_adapter_prevails_over_every_base(tmp_path: Path, native: State) -> None:
    extra = adapter_state(native)
    replaced = {
        "layers.0.attention.local_experts_wq.0.weight": native["layers.0.attention.wq.text.weight"] + 1,
        "layers.0.feed_forward.audio.fc1.weight": native["layers.0.feed_forward.audio.fc1.weight"] + 2,
        "output.text.weight": native["output.text.weight"] + 3,
    }
    assembly = convert_llama(
        write_llama_meta(tmp_path / "llama", CONFIG, native),
        write_musicgen(tmp_path / "musicgen", CONFIG, native),
        write_adapter(tmp_path / "adapter.pt", extra | replaced),
    )
    expected = dict(native)
    for route in ("text", "audio"):  # the audio attention is the copy of what the text attention became
        expected[f"layers.0.attention.wq.{route}.weight"] = replaced["layers.0.attention.local_experts_wq.0.weight"]
    expected["layers.0.feed_forward.audio.fc1.weight"] = replaced["layers.0.feed_forward.audio.fc1.weight"]
    expected["output.text.weight"] = replaced["output.text.weight"]
    assert_holds(assembly, expected)
    ignored = outcomes(assembly, "ignored")
    assert "of adapter.pt" in ignored["layers.0.attention.wq.weight"]
    assert "of adapter.pt" in ignored["decoder.model.decoder.layers.0.fc1.weight"]
    assert "of adapter.pt" in ignored["output.weight"]


def test_an_adapter_may_bring_the_whole_audio_side(tmp_path: Path) -> None:
    config = CONFIG.replace(qk_norm=True)
    native = dict(random_tensors(config, 5))
    everything = mot_state(config, native)
    extra = {
        name: value for name, value in everything.items() if ".1." in name.split("local_experts")[-1] or "normalization" in name
    }
    extra |= {"tok_embeddings.weight": native["tok_embeddings.weight"], "audio_output.weight": native["output.audio.weight"]}
    assembly = convert_llama(
        write_llama_meta(tmp_path / "llama", CONFIG, native), adapter=write_adapter(tmp_path / "adapter.pt", extra)
    )
    assert assembly.config == config
    assert_holds(assembly, native)


def test_keys_that_fit_nowhere_are_named(tmp_path: Path, native: State) -> None:
    extra = adapter_state(native)
    extra["lora.weight"] = torch.zeros(3)
    extra["tok_embeddings.weight"] = torch.zeros(131, 64)
    extra["layers.1.feed_forward.local_experts.1.up_proj.weight"] = torch.zeros(64, 33)
    del extra["layers.0.feed_forward.local_experts.1.down_proj.weight"]
    assembly = convert_llama(
        write_llama_meta(tmp_path / "llama", CONFIG, native),
        write_musicgen(tmp_path / "musicgen", CONFIG, native),
        write_adapter(tmp_path / "adapter.pt", extra),
    )
    assert {(row.outcome, row.key) for row in assembly.accounting.faults} == {
        ("unexpected", "lora.weight"),
        ("misshapen", "tok_embeddings.weight"),
        ("misshapen", "layers.1.feed_forward.local_experts.1.up_proj.weight"),
        ("missing", "layers.0.feed_forward.local_experts.1.down_proj.weight"),
    }
    with pytest.raises(CheckpointError, match="4 keys do not fit"):
        assembly.write(tmp_path / "out")


def test_a_key_given_twice_is_named(tmp_path: Path, native: State) -> None:
    extra = adapter_state(native) | {"output.audio.weight": native["output.audio.weight"]}
    llama, music = write_llama_meta(tmp_path / "llama", CONFIG, native), write_musicgen(tmp_path / "musicgen", CONFIG, native)
    assembly = convert_llama(llama, music, write_adapter(tmp_path / "adapter.pt", extra))
    assert [row.outcome for row in assembly.accounting.faults] == ["unexpected"]


def test_llama_alone_is_a_plain_llama(tmp_path: Path, native: State) -> None:
    assembly = convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native))
    assert assembly.config == TEXT_ONLY
    values = dict(assembly.tensors())
    assert torch.equal(values["output.weight"], native["output.text.weight"])
    assert torch.equal(values["tok_embeddings.weight"], native["tok_embeddings.weight"][:96])
    assert torch.equal(values["layers.1.feed_forward.text.w2.weight"], native["layers.1.feed_forward.text.w2.weight"])


def test_a_head_can_be_asked_for(tmp_path: Path, native: State) -> None:
    llama, music = write_llama_meta(tmp_path / "llama", CONFIG, native), write_musicgen(tmp_path / "musicgen", CONFIG, native)
    assembly = convert_llama(llama, music, write_adapter(tmp_path / "a.pt", adapter_state(native)), head="shared")
    assert assembly.config == CONFIG.replace(head="shared")
    rows = torch.cat([native["output.text.weight"], native["output.audio.weight"]])
    assert torch.equal(assembly.read("output.weight"), rows)


def test_a_tied_llama_stays_tied_alone_and_is_untied_with_audio(tmp_path: Path, native: State) -> None:
    llama = write_llama_hf(tmp_path / "llama", CONFIG, native, tied=True)
    alone = convert_llama(llama)
    assert alone.accounting.is_clean
    assert alone.config.tied_embeddings and alone.config.head == "shared"
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native)
    extra = adapter_state(native)
    del extra["audio_output.weight"]
    routed = convert_llama(llama, music, write_adapter(tmp_path / "adapter.pt", extra))
    assert routed.accounting.is_clean
    assert not routed.config.tied_embeddings
    table = native["tok_embeddings.weight"]
    assert torch.equal(routed.read("output.text.weight"), table[:96])
    assert torch.equal(routed.read("output.audio.weight"), table[96:])
    assert "the head was tied to them" in outcomes(routed, "copied")["output.text.weight"]


def test_a_tied_llama_split_alone_has_a_head_of_its_own(tmp_path: Path, native: State) -> None:
    assembly = convert_llama(write_llama_hf(tmp_path / "llama", CONFIG, native, tied=True), head="split")
    assert torch.equal(assembly.read("output.text.weight"), native["tok_embeddings.weight"][:96])


def test_a_llama_without_its_head_is_missing_it(tmp_path: Path, native: State) -> None:
    llama = write_llama_hf(tmp_path / "llama", CONFIG, native, tied=True, tie_word_embeddings=False)
    assert [(row.outcome, row.key) for row in convert_llama(llama).accounting.faults] == [("missing", "lm_head.weight")]


def _hf_rows(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """Interleaved rows to half-rotation rows: within a head, the even ones first, then the odd ones."""
    heads = weight.reshape(-1, head_size, weight.shape[1])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(weight.shape)


def test_metas_and_hugging_faces_files_of_one_model_give_the_same_logits(tmp_path: Path, native: State) -> None:
    permuted = {
        name: _hf_rows(value, CONFIG.head_size) if ".attention.wq." in name or ".attention.wk." in name else value
        for name, value in native.items()
    }
    meta = convert_llama(write_llama_meta(tmp_path / "meta", CONFIG, native))
    hf = convert_llama(write_llama_hf(tmp_path / "hf", CONFIG, permuted))
    assert (meta.config.rope.style, hf.config.rope.style) == ("interleaved", "half")
    logits = []
    for assembly in (meta, hf):
        decoder = Decoder.from_tensors(assembly.config, assembly.read, torch.float64)
        ids, zeros = torch.arange(10)[None], torch.zeros(1, 10, dtype=torch.int64)
        result, _ = decoder(ids, zeros, zeros[0, :1], torch.arange(10), zeros[0], decoder.new_cache(1, 10))
        logits.append(result)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-10)


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 10000.0}, 10000.0, None),
        ({"rope_theta": None}, 10000.0, None),
        ({"rope_scaling": _LLAMA3}, 500000.0, RopeScaling()),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, 7e5, None),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7e5, **_LLAMA3}}, 7e5, RopeScaling()),
    ],
)
def test_rope_is_read_as_old_and_new_configurations_write_it(
    tmp_path: Path, native: State, changes: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    rope = convert_llama(write_llama_hf(tmp_path / "llama", CONFIG, native, **changes)).config.rope
    assert (rope.theta, rope.style, rope.scaling) == (theta, "half", scaling)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "qwen3"}, "model_type must be 'llama'"),
        ({"hidden_act": "gelu", "attention_bias": True}, "hidden_act must be 'silu'"),
        ({"hidden_act": "gelu", "attention_bias": True}, "attention_bias must be False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: RoPE must be of type 'default' or 'llama3' (got 'yarn')"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing field 'low_freq_factor'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false ('false' came)"),
        ({"rope_scaling": [1]}, "rope_scaling must be a JSON object or null (got [1])"),
        ({"hidden_size": None}, "missing field 'hidden_size'"),
        ({"vocab_size": 95}, "vocab_size says 95, model.embed_tokens.weight has 96 rows"),
        ({"num_hidden_layers": 4}, "layers: the configuration says 4, the weights have 2"),
        ({"intermediate_size": 64}, "text feed-forward width: the configuration says 64, the weights have 128"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, native: State, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_llama(write_llama_hf(tmp_path / "llama", CONFIG, native, **changes))
    assert sentence in str(caught.value)


def test_rotated_rows_in_another_order_than_the_bases_are_refused(tmp_path: Path, native: State) -> None:
    extra = {"layers.0.attention.local_experts_wq.1.weight": native["layers.0.attention.wq.audio.weight"]}
    llama = write_llama_hf(tmp_path / "llama", CONFIG, native)
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native)
    with pytest.raises(CheckpointError, match=r"interleaved order.*convert with Meta's folder instead"):
        convert_llama(llama, music, write_adapter(tmp_path / "adapter.pt", extra))


def test_too_few_musicgen_layers_are_missing(tmp_path: Path, native: State) -> None:
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native, extra_layers=-1)
    assembly = convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native), music)
    assert {row.key for row in assembly.accounting.faults} == {
        "decoder.model.decoder.layers.1.fc1.weight",
        "decoder.model.decoder.layers.1.fc2.weight",
    }


def test_folders_that_hold_something_else_say_what_was_expected(tmp_path: Path, native: State) -> None:
    llama = write_llama_meta(tmp_path / "llama", CONFIG, native)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a folder: --llama takes"):
        convert_llama(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"expected consolidated\.00\.pth with params\.json"):
        convert_llama(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not a folder: --musicgen takes"):
        convert_llama(llama, tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        convert_llama(llama, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="it is not a Hugging Face MusicGen"):
        convert_llama(llama, write_llama_hf(tmp_path / "hf", CONFIG, native))
    torch.save({"norm.weight": torch.ones(64)}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="is no adapter file: expected a mapping with 'adapter_state_dict'"):
        convert_llama(llama, adapter=tmp_path / "plain.pt")
    (llama / "consolidated.01.pth").touch()
    with pytest.raises(CheckpointError, match="split over several files by tensor parallelism"):
        convert_llama(llama)


def test_another_activation_is_refused(tmp_path: Path, native: State) -> None:
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native)
    write_json(music / "config.json", {"model_type": "musicgen", "decoder": {"activation_function": "relu"}})
    with pytest.raises(ConfigError, match="must be 'gelu', the exact one"):
        convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native), music)


def test_codebooks_and_frame_rate_are_musicgens(tmp_path: Path, native: State) -> None:
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native)
    encoder = {"sampling_rate": 16000, "upsampling_ratios": [8, 5, 2]}
    write_json(music / "config.json", {"decoder": {"num_codebooks": 2, "vocab_size": 30}, "audio_encoder": encoder})
    audio = convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native), music).config.modalities[1]
    assert (audio.vocab_size, audio.codes_per_frame, audio.frames_per_second) == (30, 2, 200.0)


def test_a_tokenizer_beside_the_base_travels_along(tmp_path: Path, native: State) -> None:
    llama = write_llama_hf(tmp_path / "llama", CONFIG, native)
    (llama / "tokenizer.json").write_text("{}")
    convert_llama(llama).write(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tokenizer_path == tmp_path / "out" / "tokenizer.json"


def test_a_musicgen_layer_of_an_impossible_number_is_ignored(tmp_path: Path, native: State) -> None:
    music = write_musicgen(tmp_path / "musicgen", CONFIG, native, pickled=True)
    key = f"decoder.model.decoder.layers.{'9' * 5000}.fc1.weight"
    state = torch.load(music / "pytorch_model.bin", weights_only=True)
    torch.save(state | {key: torch.ones(2, 2)}, music / "pytorch_model.bin")
    assembly = convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native), music)
    assert key in outcomes(assembly, "ignored")
    assert "audio feed-forward: the first 2 of MusicGen's 3 layers" in assembly.accounting.notes
