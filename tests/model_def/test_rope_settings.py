"""RoPE is what the format means: nothing that a configuration says of it is dropped, and what was assumed is told.

No parity check can find a wrong base or factor: the reference is built from the same configuration.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motrt.errors import CheckpointError, ConfigError
from motrt.model_def.checkpoint.assemble import Assembly, convert_llama, convert_mot
from motrt.model_def.checkpoint.rope import RopeChoices
from motrt.model_def.config import ModelConfig, RopeConfig, RopeScaling, rope_frequencies
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.foreign import (
    State,
    mot_state,
    params_of,
    write_adapter,
    write_json,
    write_llama_hf,
    write_llama_meta,
    write_mot,
)

CONFIG = ModelConfig.tiny()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_AT_64 = {**LLAMA3, "original_max_position_embeddings": 64}
SCALED = RopeScaling(8.0, 1.0, 4.0, 64)


@pytest.fixture(scope="module")
def native() -> State:
    return dict(random_tensors(CONFIG, 4))


def meta(folder: Path, native: State, choices: RopeChoices | None = None, **params: Any) -> Assembly:
    """Meta's folder, converted; a field that is None is left out of its params.json."""
    write_llama_meta(folder, CONFIG, native)
    fields = {name: value for name, value in (params_of(CONFIG) | params).items() if value is not None}
    write_json(folder / "params.json", fields)
    return convert_llama(folder, rope=choices)


def hub(folder: Path, native: State, choices: RopeChoices | None = None, **config: Any) -> Assembly:
    """Hugging Face's folder, converted; a field that is None is null in its config.json."""
    return convert_llama(write_llama_hf(folder, CONFIG, native, **config), rope=choices)


def mot(folder: Path, native: State, choices: RopeChoices | None = None, **params: Any) -> Assembly:
    state, _ = write_mot(folder, CONFIG, native)
    fields = {name: value for name, value in (params_of(CONFIG) | params).items() if value is not None}
    return convert_mot(state, write_json(folder / "params.json", fields), rope=choices)


def notes(assembly: Assembly) -> str:
    return "\n".join(assembly.accounting.notes)


# A Mixture-of-Transformers training state.


def test_a_training_state_is_not_scaled_whatever_the_flag_says(tmp_path: Path, native: State) -> None:
    assembly = mot(tmp_path, native, use_scaled_rope=True, rope_scaling_factor=32)
    assert assembly.config.rope.scaling is None
    assert "accepts and ignores" in notes(assembly) and "--rope-scaling" in notes(assembly)


def test_a_training_state_is_scaled_where_that_is_asked_for(tmp_path: Path, native: State) -> None:
    asked = mot(tmp_path, native, RopeChoices(factor=32.0, scaled=True))
    assert asked.config.rope.scaling == RopeScaling(factor=32.0)
    with_factor = mot(tmp_path, native, RopeChoices(scaled=True), use_scaled_rope=True, rope_scaling_factor=16)
    assert with_factor.config.rope.scaling == RopeScaling(factor=16.0)


def test_a_training_states_base_is_its_codes_where_the_file_has_none(tmp_path: Path, native: State) -> None:
    assembly = mot(tmp_path, native, rope_theta=None)
    assert assembly.config.rope.theta == 500000.0
    assert "gives no rope_theta: 500000 is assumed" in notes(assembly)


@pytest.mark.parametrize(
    ("scaled", "sentence"), [(True, "convert what it trained with --no-rope-scaling"), (False, "not scaled")]
)
def test_an_adapters_rope_is_told(tmp_path: Path, native: State, scaled: bool, sentence: str) -> None:
    everything = mot_state(CONFIG, native)
    audio = {name: value for name, value in everything.items() if ".1." in name.split("local_experts")[-1]}
    audio |= {"tok_embeddings.weight": native["tok_embeddings.weight"], "audio_output.weight": native["output.audio.weight"]}
    llama = write_llama_meta(tmp_path / "llama", CONFIG, native)
    write_json(llama / "params.json", params_of(CONFIG) | {"use_scaled_rope": scaled, "rope_scaling_factor": 32})
    adapter = write_adapter(tmp_path / "adapter.pt", audio)
    assembly = convert_llama(llama, adapter=adapter)
    assert (assembly.config.rope.scaling is not None) == scaled
    assert "the adapter is taken to be trained with" in notes(assembly) and sentence in notes(assembly)
    assert convert_llama(llama, adapter=adapter, rope=RopeChoices(scaled=False)).config.rope.scaling is None


# Meta's params.json.


@pytest.mark.parametrize("vocab_size", [-1, None])
def test_a_params_json_of_llama_2_has_llama_2s_base(tmp_path: Path, native: State, vocab_size: int | None) -> None:
    assembly = meta(tmp_path / "llama", native, rope_theta=None, vocab_size=vocab_size)
    assert assembly.config.rope == RopeConfig(theta=10000.0, style="interleaved")
    assert "10000 is assumed, as Llama 1 and 2 have it" in notes(assembly)


@pytest.mark.parametrize("params", [{"use_scaled_rope": True, "rope_scaling_factor": 8}, {"vocab_size": 128256}])
def test_a_params_json_of_llama_3_without_a_base_is_refused(tmp_path: Path, native: State, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="say it with --rope-theta"):
        meta(tmp_path / "llama", native, rope_theta=None, **params)


def test_a_factor_that_no_file_gives_is_asked_for(tmp_path: Path, native: State) -> None:
    with pytest.raises(
        ConfigError, match=r"say it with --rope-factor \(Llama 3.1 and 3.3 have 8, Llama 3.2 1B and 3B have 32\)"
    ):
        meta(tmp_path / "asked", native, use_scaled_rope=True)
    given = meta(tmp_path / "given", native, RopeChoices(factor=8.0), use_scaled_rope=True)
    assert given.config.rope.scaling == RopeScaling(factor=8.0)
    stated = meta(tmp_path / "stated", native, use_scaled_rope=True, rope_scaling_factor=16, rope_high_freq_factor=5)
    assert stated.config.rope.scaling == RopeScaling(factor=16.0, high_freq_factor=5.0)


@pytest.mark.parametrize(
    ("width", "layers", "factor"), [(2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0), (8192, 80, 8.0), (16384, 126, 8.0)]
)
def test_published_sizes_have_their_own_factor_and_the_report_says_so(
    tmp_path: Path, width: int, layers: int, factor: float
) -> None:
    from motrt.model_def.checkpoint.params_json import read_params

    fields = {"dim": width, "n_layers": layers, "n_heads": 32, "vocab_size": 128256, "rope_theta": 5e5, "use_scaled_rope": True}
    rope = read_params(write_json(tmp_path / "params.json", fields), RopeChoices(), "llama").rope
    assert rope.config.scaling == RopeScaling(factor=factor)
    assert f"gives no factor: {factor:g} is assumed, as Llama 3." in "\n".join(rope.notes)


@pytest.mark.parametrize("flag", [None, False])
def test_rope_is_not_scaled_where_the_flag_is_absent_or_false(tmp_path: Path, native: State, flag: bool | None) -> None:
    assert meta(tmp_path / "llama", native, use_scaled_rope=flag, rope_scaling_factor=8).config.rope.scaling is None


def test_an_option_that_contradicts_the_file_is_refused(tmp_path: Path, native: State) -> None:
    with pytest.raises(ConfigError, match="rope_theta is 500000, and --rope-theta says 10000"):
        meta(tmp_path / "a", native, RopeChoices(theta=10000.0))
    with pytest.raises(ConfigError, match="--rope-factor has nothing to scale"):
        meta(tmp_path / "b", native, RopeChoices(factor=8.0))
    with pytest.raises(ConfigError, match="rope_theta is 500000, and --rope-theta says 10000"):
        hub(tmp_path / "c", native, RopeChoices(theta=10000.0))
    with pytest.raises(ConfigError, match="only together"):
        hub(tmp_path / "d", native, RopeChoices(scaled=True))
    with pytest.raises(ConfigError, match="contradicts frequencies that are not scaled"):
        RopeChoices(factor=8.0, scaled=False)
    with pytest.raises(ConfigError, match="theta must be positive"):
        RopeChoices(theta=-1.0)


@pytest.mark.parametrize("format_name", ["meta", "hub"])
def test_stored_frequencies_of_another_base_are_found(tmp_path: Path, native: State, format_name: str) -> None:
    """Older files hold the frequencies themselves, which no missing field can hide."""
    right, wrong = (torch.tensor(rope_frequencies(RopeConfig(theta=theta), CONFIG.head_size)) for theta in (5e5, 1e4))
    for stored, is_right in ((right.bfloat16(), True), (wrong.bfloat16(), False)):
        folder = tmp_path / str(is_right)
        if format_name == "meta":
            write_llama_meta(folder, CONFIG, native)
            state = torch.load(folder / "consolidated.00.pth", weights_only=True)
            torch.save(state | {"rope.freqs": stored}, folder / "consolidated.00.pth")
        else:
            write_llama_hf(folder, CONFIG, native)
            key = "model.layers.0.self_attn.rotary_emb.inv_freq"
            save_file(load_file(folder / "model.safetensors") | {key: stored}, folder / "model.safetensors")
        faults = [row.detail for row in convert_llama(folder).accounting.faults]
        assert bool(faults) != is_right
        assert all("which a base of 500000 does not give" in detail for detail in faults)


# Hugging Face's config.json.


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": None}, RopeConfig(1e4, "half")),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e4}}, RopeConfig(5e4, "half")),
        ({"rope_theta": None, "rope_scaling": {**LLAMA3_AT_64, "rope_theta": 5e4}}, RopeConfig(5e4, "half", SCALED)),
        ({"rope_theta": 5e4, "rope_parameters": {**LLAMA3_AT_64, "rope_theta": 5e4}}, RopeConfig(5e4, "half", SCALED)),
        ({"rope_scaling": LLAMA3_AT_64, "rope_parameters": LLAMA3_AT_64}, RopeConfig(5e5, "half", SCALED)),
        ({"rope_scaling": {}, "rope_parameters": LLAMA3_AT_64}, RopeConfig(5e5, "half", SCALED)),
        ({"rope_scaling": {**LLAMA3_AT_64, "type": "llama3"}}, RopeConfig(5e5, "half", SCALED)),
        ({"rope_scaling": LLAMA3_AT_64, "original_max_position_embeddings": 64}, RopeConfig(5e5, "half", SCALED)),
        ({"partial_rotary_factor": 1.0, "rotary_dim": 16}, RopeConfig(5e5, "half")),
        ({"rope_scaling": {**LLAMA3_AT_64, "attention_factor": None}}, RopeConfig(5e5, "half", SCALED)),
    ],
)
def test_every_way_to_write_rope_is_read(tmp_path: Path, native: State, config: dict[str, Any], expected: RopeConfig) -> None:
    assert hub(tmp_path / "llama", native, **config).config.rope == expected


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_scaling": {**LLAMA3_AT_64, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor must be 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0 (got 0.5)"),
        ({"rotary_dim": 8}, "rotary_dim must be 16 (got 8)"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_AT_64},
            "rope_parameters and rope_scaling differ",
        ),
        ({"rope_parameters": LLAMA3_AT_64, "rope_scaling": {**LLAMA3_AT_64, "factor": 4.0}}, "differ"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta differs: rope_theta is 500000, rope_parameters.rope_theta is 10000",
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 2e4}},
            "rope_theta differs",
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 2e4}, "rope_scaling": {"type": "default"}},
            "rope_theta differs",
        ),
        ({"rope_parameters": {"factor": 8.0}}, "factor (8.0) has no meaning for type 'default'"),
        ({"rope_scaling": {"type": "llama3", "rope_type": "default"}}, "rope_type says 'default', type says 'llama3'"),
        ({"rope_parameters": {"full_attention": LLAMA3_AT_64}}, "full_attention"),
        ({"rope_parameters": {**LLAMA3_AT_64, "attention_factor": 1.1}}, "attention_factor (1.1) has no meaning"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be of type 'default' or 'llama3' (got 'linear')"),
        ({"rope_scaling": LLAMA3}, "missing field 'original_max_position_embeddings'"),
        ({"rope_scaling": LLAMA3_AT_64, "original_max_position_embeddings": 128}, "original_max_position_embeddings differs"),
        ({"rope_interleaved": True}, "rope_interleaved must be False"),
        ({"rope_scaling": False}, "rope_scaling must be a JSON object or null (got False)"),
        ({"rope_scaling": ""}, "rope_scaling must be a JSON object or null"),
        (
            {"rope_scaling": {**LLAMA3_AT_64, "original_max_position_embeddings": 10**300}},
            "original_max_position_embeddings must",
        ),
    ],
)
def test_no_rope_setting_is_dropped(tmp_path: Path, native: State, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hub(tmp_path / "llama", native, **config)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 2}, "sliding_window must be null (got 64)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers says 2"),
        ({"model_type": None, "architectures": ["MistralForCausalLM"]}, "architectures must be ['LlamaForCausalLM']"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map names code"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantized (gptq)"),
        ({"logits_scaling": 8.0}, "logits_scaling (8.0) is not known here"),
        ({"mlp_bias": True}, "biases of the text feed-forward: the configuration says True, the weights have False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be {}"),
    ],
)
def test_a_setting_that_would_change_the_model_is_refused_by_name(
    tmp_path: Path, native: State, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        hub(tmp_path / "llama", native, **config)
    assert sentence in str(caught.value)


def test_a_field_that_stands_there_twice_is_refused(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-1] + ', "rope_theta": 10000.0}')
    with pytest.raises(ConfigError, match="'rope_theta' stands there twice"):
        convert_llama(folder)


def test_fields_without_effect_are_passed_over(tmp_path: Path, native: State) -> None:
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "pretraining_tp": 2,
        "bos_token_id": 1,
        "temperature": 0.6,
        "dtype": "float32",
    }
    fields |= {"use_sliding_window": False, "sliding_window": 4096, "attention_dropout": 0.1, "transformers_version": "5.24.0"}
    hub(tmp_path / "llama", native, None, **fields, unknown_and_null=None).accounting.raise_unless_clean()


def test_a_tied_head_that_is_stored_and_differs_is_refused(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"lm_head.weight .*from which this one differs: set tie_word_embeddings"):
        convert_llama(folder).accounting.raise_unless_clean()
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assembly = convert_llama(folder)
    assembly.accounting.raise_unless_clean()
    assert assembly.config.tied_embeddings
