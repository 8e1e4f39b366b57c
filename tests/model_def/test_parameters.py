"""The parameter table against counts worked out from the model's definition, and against itself."""

from collections import Counter

import pytest
from hypothesis import given, settings

from motrt.errors import ConfigError
from motrt.model_def.config import AdapterExpert, Modality, ModelConfig, SwigluExpert
from motrt.model_def.parameters import PARTS, Parameter, num_parameters_read, parameters
from motrt.tests.model_def.configurations import configurations

FULL = ModelConfig.preset("llama-3.2-1b")
TINY = ModelConfig.tiny()
M, LAYERS = 2048, 16


def count(config: ModelConfig, part: str | None = None, modality: str | None = None) -> int:
    chosen = [one for one in parameters(config) if part in (None, one.part) and modality in (None, one.modality)]
    return sum(one.numel for one in chosen)


def number_read_by_hand(config: ModelConfig, modality: Modality) -> int:
    """One decode step, from the definition of the model rather than from the table."""
    m, d = config.model_width, config.head_size
    attention = m * d * (2 * config.num_heads + 2 * config.num_kv_heads) + (2 * d if config.qk_norm else 0)
    expert = modality.expert
    if isinstance(expert, SwigluExpert):
        feed_forward = 3 * m * expert.hidden_size + (2 * expert.hidden_size + m if expert.bias else 0)
    else:
        feed_forward = 2 * m * expert.width + 2 * expert.width * expert.hidden_size
        feed_forward += expert.hidden_size + expert.width if expert.bias else 0
    embedding_row, final_norm, head = m, m, m * modality.vocab_size
    return embedding_row + config.num_layers * (attention + feed_forward + 2 * m) + final_norm + head


def test_the_full_size_model_has_the_parameters_its_description_says() -> None:
    attention = LAYERS * (M * M * 2 + M * 512 * 2)
    assert attention == 167_772_160
    assert count(FULL, "attention", "text") == count(FULL, "attention", "audio") == attention
    assert count(FULL, "expert", "text") == LAYERS * 3 * M * 8192 == 805_306_368
    assert count(FULL, "expert", "audio") == LAYERS * (2 * M * 1024 + 2 * 1024 * 4096 + 4096 + 1024) == 201_408_512
    assert count(FULL, "head", "text") == 128256 * M == 262_668_288
    assert count(FULL, "head", "audio") == 2048 * M == 4_194_304
    assert count(FULL, "embedding") == 130304 * M
    assert count(FULL, "norm") == (2 * LAYERS + 1) * M
    assert count(FULL) == 1_876_051_968


def test_a_text_step_reads_1236_million_weights_and_an_audio_step_373() -> None:
    assert round(num_parameters_read(FULL, "text") / 1e6) == 1236
    assert round(num_parameters_read(FULL, "audio") / 1e6) == 373


def test_one_modality_has_the_parameters_of_a_plain_llama() -> None:
    plain = ModelConfig.preset("llama-3.2-1b-text")
    tied = plain.replace(tied_embeddings=True)
    assert count(tied) == 1_235_814_400  # Llama-3.2-1B as published, its head being its embedding
    assert count(plain) == count(tied) + 128256 * M
    assert num_parameters_read(tied, "text") == num_parameters_read(plain, "text") == count(tied) + M


def test_the_small_preset_has_about_60_million_parameters() -> None:
    assert 50e6 < count(ModelConfig.preset("small")) < 70e6


@settings(deadline=None, max_examples=50)
@given(configurations())
def test_what_a_step_reads_is_what_the_models_definition_says(config: ModelConfig) -> None:
    config = config.replace(num_layers=min(config.num_layers, 3))
    for modality in config.modalities:
        assert num_parameters_read(config, modality.name) == number_read_by_hand(config, modality)


@settings(deadline=None, max_examples=50)
@given(configurations())
def test_names_are_unique_and_every_parameter_has_a_part_a_size_and_a_modality_of_the_model(config: ModelConfig) -> None:
    config = config.replace(num_layers=min(config.num_layers, 3))
    table = parameters(config)
    assert max(Counter(one.name for one in table).values()) == 1
    assert {one.part for one in table} <= set(PARTS)
    assert {one.modality for one in table} <= {None, *config.modality_names}
    assert all(one.numel > 0 and one.shape for one in table)


@settings(deadline=None, max_examples=50)
@given(configurations())
def test_a_split_head_holds_what_a_shared_one_does_and_a_tied_one_nothing(config: ModelConfig) -> None:
    config = config.replace(num_layers=1, tied_embeddings=False)
    split, shared = config.replace(head="split"), config.replace(head="shared")
    assert count(split, "head") == count(shared, "head") == config.vocab_size * config.model_width
    assert count(shared.replace(tied_embeddings=True), "head") == 0
    assert all(num_parameters_read(split, name) == num_parameters_read(shared, name) for name in config.modality_names)


def test_the_tiny_layer_is_named_and_shaped_as_the_checkpoint_has_it() -> None:
    layer = {one.name: one for one in parameters(TINY.replace(qk_norm=True)) if one.name.startswith("layers.1.")}
    assert {name.removeprefix("layers.1."): one.shape for name, one in layer.items()} == {
        "attention_norm.weight": (64,),
        "attention.wq.text.weight": (64, 64),
        "attention.wk.text.weight": (32, 64),
        "attention.wv.text.weight": (32, 64),
        "attention.wo.text.weight": (64, 64),
        "attention.q_norm.text.weight": (16,),
        "attention.k_norm.text.weight": (16,),
        "attention.wq.audio.weight": (64, 64),
        "attention.wk.audio.weight": (32, 64),
        "attention.wv.audio.weight": (32, 64),
        "attention.wo.audio.weight": (64, 64),
        "attention.q_norm.audio.weight": (16,),
        "attention.k_norm.audio.weight": (16,),
        "ffn_norm.weight": (64,),
        "feed_forward.text.w1.weight": (128, 64),
        "feed_forward.text.w2.weight": (64, 128),
        "feed_forward.text.w3.weight": (128, 64),
        "feed_forward.audio.down_proj.weight": (32, 64),
        "feed_forward.audio.fc1.weight": (64, 32),
        "feed_forward.audio.fc1.bias": (64,),
        "feed_forward.audio.fc2.weight": (32, 64),
        "feed_forward.audio.fc2.bias": (32,),
        "feed_forward.audio.up_proj.weight": (64, 32),
    }
    assert layer["layers.1.attention.wq.audio.weight"].modality == "audio"
    assert layer["layers.1.ffn_norm.weight"].modality is None


def test_parameters_outside_the_layers_are_the_table_the_norm_and_the_heads() -> None:
    def outside(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {one.name: one.shape for one in parameters(config) if not one.name.startswith("layers.")}

    both = {"tok_embeddings.weight": (128, 64), "norm.weight": (64,)}
    assert outside(TINY) == {**both, "output.text.weight": (96, 64), "output.audio.weight": (32, 64)}
    assert outside(TINY.replace(head="shared")) == {**both, "output.weight": (128, 64)}
    assert outside(TINY.replace(head="shared", tied_embeddings=True)) == both


def test_attention_that_is_not_routed_is_kept_once_and_read_by_every_modality() -> None:
    shared = [one for one in parameters(TINY.replace(routed_attention=False)) if one.part == "attention"]
    assert len(shared) == 4 * TINY.num_layers
    assert all(one.modality is None and ".shared." in one.name for one in shared)


def test_a_projection_next_to_an_adapter_never_has_a_bias() -> None:
    expert = AdapterExpert(width=4, hidden_size=8, bias=False)
    config = TINY.replace(modalities=(Modality("audio", 8, expert),))
    assert not [one for one in parameters(config) if one.name.endswith(".bias")]
    assert Parameter("layers.0.feed_forward.audio.down_proj.weight", (4, 64), "expert", "audio") in parameters(config)


def test_a_step_of_a_modality_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="no modality 'video'"):
        num_parameters_read(TINY, "video")
