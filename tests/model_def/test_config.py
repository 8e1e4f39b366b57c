"""Configurations: what is possible travels through JSON unchanged, what is not is refused, every fault named at once."""

import copy
import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from motrt.errors import ConfigError
from motrt.model_def.config import (
    PRESETS,
    RESERVED_MODALITY_NAMES,
    AdapterExpert,
    Modality,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    SwigluExpert,
)
from motrt.tests.model_def.configurations import configurations

TINY = ModelConfig.tiny()


# --- what is possible --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(configurations())
def test_a_configuration_comes_back_from_json_as_it_was(config: ModelConfig) -> None:
    assert ModelConfig.from_json(config.to_json()) == config
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()


@settings(deadline=None)
@given(configurations())
def test_id_ranges_follow_each_other_and_sum_to_the_vocabulary(config: ModelConfig) -> None:
    assert [len(ids) for ids in config.id_ranges] == [modality.vocab_size for modality in config.modalities]
    assert sum(map(len, config.id_ranges)) == config.vocab_size
    ends = [0, *(ids.stop for ids in config.id_ranges)]
    assert [ids.start for ids in config.id_ranges] == ends[:-1]
    assert ends[-1] == config.vocab_size


@settings(deadline=None)
@given(configurations(), st.data())
def test_every_id_belongs_to_the_modality_whose_range_holds_it(config: ModelConfig, data: st.DataObject) -> None:
    token_id = data.draw(st.integers(0, config.vocab_size - 1))
    number = config.modality_of(token_id)
    assert token_id in config.id_ranges[number]
    assert config.modality_index(config.modalities[number].name) == number


@pytest.mark.parametrize("token_id", [-1, 128])
def test_an_id_outside_the_vocabulary_belongs_to_nobody(token_id: int) -> None:
    with pytest.raises(ConfigError, match=r"outside the vocabulary 0\.\.127"):
        TINY.modality_of(token_id)


def test_audio_ids_begin_where_text_ids_end() -> None:
    full = ModelConfig.preset("llama-3.2-1b")
    assert full.id_ranges == (range(128256), range(128256, 130304))
    assert full.vocab_size == 130304
    assert [full.modality_of(token_id) for token_id in (0, 128255, 128256, 130303)] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_travels_through_json(name: str) -> None:
    assert ModelConfig.from_json(ModelConfig.preset(name).to_json()) == PRESETS[name]


def test_the_one_modality_preset_is_a_plain_llama() -> None:
    plain = ModelConfig.preset("llama-3.2-1b-text")
    assert plain.modality_names == ("text",)
    assert plain.vocab_size == 128256


def test_attention_is_kept_per_modality_or_once() -> None:
    assert TINY.attention_routes == ("text", "audio")
    assert TINY.replace(routed_attention=False).attention_routes == ("shared",)


def test_a_list_of_modalities_becomes_a_tuple_so_that_configurations_compare_and_hash() -> None:
    listed = TINY.replace(modalities=list(TINY.modalities))
    assert listed == TINY
    assert hash(listed) == hash(TINY)


def test_no_attribute_of_a_torch_module_is_a_legal_name_for_a_modality() -> None:
    attributes = {name for name in dir(nn.ModuleDict()) if re.fullmatch("[a-z][a-z0-9_]*", name)}
    assert attributes <= RESERVED_MODALITY_NAMES


# --- what is not -------------------------------------------------------------------------------------------------------

TEXT = Modality("text", 96, SwigluExpert(128))

CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 5}, "num_kv_heads (2) must divide num_heads (5)"),
    "odd head": ({"head_size": 15}, "head_size must be even"),
    "tied": ({"tied_embeddings": True}, "tied_embeddings needs head 'shared'"),
    "same names": ({"modalities": (TEXT, TEXT)}, "different names (text, text came)"),
    "no modality": ({"modalities": ()}, "modalities must name at least one"),
    "reserved": ({"modalities": (dataclasses.replace(TEXT, name="shared"),)}, "not a reserved one ('shared' came)"),
    "capital": ({"modalities": (dataclasses.replace(TEXT, name="Text"),)}, "lower-case word"),
    "no ids": ({"modalities": (dataclasses.replace(TEXT, vocab_size=0),)}, "modality 'text': vocab_size must be positive"),
    "no time": ({"modalities": (dataclasses.replace(TEXT, frames_per_second=-1.0),)}, "frames_per_second must be positive"),
    "no hidden": (
        {"modalities": (dataclasses.replace(TEXT, expert=SwigluExpert(0)),)},
        "hidden_size must be positive (0 came)",
    ),
    "no width": ({"modalities": (dataclasses.replace(TEXT, expert=AdapterExpert(-1, 4)),)}, "width must be positive (-1 came)"),
    "head": ({"head": "both"}, "head must be 'split' or 'shared' ('both' came)"),
    "style": ({"rope": RopeConfig(style="whole")}, "rope.style must be 'interleaved' or 'half' ('whole' came)"),  # type: ignore[arg-type]
    "theta": ({"rope": RopeConfig(theta=math.nan)}, "rope.theta must be positive (nan came)"),
    "scaling": ({"rope": RopeConfig(scaling=RopeScaling(high_freq_factor=1.0))}, "high_freq_factor must be greater"),
    "factor": ({"rope": RopeConfig(scaling=RopeScaling(factor=0.0))}, "rope.scaling: factor must be positive"),
    "infinite": ({"norm_eps": math.inf}, "norm_eps must be positive (inf came)"),
    "huge": ({"norm_eps": 10**400}, "norm_eps must be positive"),
    "no layers": ({"num_layers": 0}, "num_layers must be positive (0 came)"),
    "hanging": ({"num_layers": 10**8}, "num_layers must be at most 4096 (100000000 came)"),
    "terabytes": ({"max_seq_len": 10**13}, "max_seq_len must be at most 1048576 (10000000000000 came)"),
    "wide": ({"model_width": 2**31}, "model_width must be at most 2147483647 (2147483648 came)"),
    "many heads": ({"num_heads": 2**31}, "num_heads must be at most 2147483647"),
    "many ids": (
        {"modalities": (dataclasses.replace(TEXT, vocab_size=10**12),)},
        "modality 'text': vocab_size must be at most",
    ),
    "many ids together": (
        {"modalities": (dataclasses.replace(TEXT, vocab_size=2**31 - 1), dataclasses.replace(TEXT, name="other"))},
        "vocab_size, summed over the modalities, must be at most 2147483647 (2147483743 came)",
    ),
    "no kv heads": ({"num_kv_heads": 0}, "num_kv_heads must be positive (0 came)"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_in_a_sentence(case: str) -> None:
    changes, sentence = CONTRADICTIONS[case]
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.tiny(**changes)
    assert sentence in str(refusal.value)


def test_all_contradictions_are_named_at_once() -> None:
    changes: dict[str, Any] = {"rope": RopeConfig(theta=-1.0, scaling=RopeScaling(factor=0.0)), "num_layers": -2}
    for case in ("heads", "odd head", "tied", "infinite"):
        changes |= CONTRADICTIONS[case][0]
    expert = AdapterExpert(width=0, hidden_size=0)
    changes["modalities"] = (Modality("text", 0, expert), Modality("text", 7, SwigluExpert(8), codes_per_frame=0))
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.tiny(**changes)
    for sentence in (
        *("must divide num_heads", "head_size must be even", "tied_embeddings needs", "norm_eps must be", "num_layers must be"),
        *("rope.theta", "rope.scaling: factor", "different names", "'text': vocab_size", "'text': codes_per_frame"),
        *("'text': width", "'text': hidden_size"),
    ):
        assert str(refusal.value).count(sentence) == 1


def test_all_sizes_beyond_the_bounds_are_named_at_once() -> None:
    wide = AdapterExpert(width=2**40, hidden_size=2**41)
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.tiny(
            num_layers=10**400, max_seq_len=2**20 + 1, head_size=2**32, modalities=(Modality("text", 2**50, wide),)
        )
    for name in ("num_layers", "max_seq_len", "head_size", "'text': width", "'text': hidden_size", "'text': vocab_size"):
        assert str(refusal.value).count(f"{name} must be at most") == 1
    assert "must be positive" not in str(refusal.value)
    assert "summed" not in str(refusal.value)


def test_sizes_at_the_bounds_are_possible() -> None:
    assert ModelConfig.tiny(num_layers=4096, max_seq_len=2**20).num_layers == 4096


WRONG_TYPES: dict[tuple[str, ...], list[Any]] = {
    ("model_width", "num_layers", "num_heads", "num_kv_heads", "head_size", "max_seq_len"): ["8", 8.0, None, True],
    ("routed_attention", "qk_norm", "tied_embeddings"): [1, "true", None],
    ("norm_eps",): ["1e-5", None, False, [1e-5]],
    ("head",): [1, None, ["split"]],
    ("rope",): [None, {}, "half", RopeScaling()],
    ("modalities",): [None, 3, "text", {"text": TEXT}, ("text",), [TEXT, None]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for names, values in WRONG_TYPES.items() for name in names for value in values]
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"- {name} must be"):
        ModelConfig.tiny(**{name: value})


# The same constructors, as a caller without a type checker sees them.
ANY_MODALITY: Any = Modality
ANY_SWIGLU: Any = SwigluExpert
ANY_ROPE: Any = RopeConfig
ANY_SCALING: Any = RopeScaling


@pytest.mark.parametrize(
    ("holder", "sentence"),
    [
        (ANY_MODALITY(3, 96, SwigluExpert(8)), "modality 3: name must be a string"),
        (ANY_MODALITY(["text"], 96, SwigluExpert(8)), "name must be a string"),
        (ANY_MODALITY("text", "96", SwigluExpert(8)), "modality 'text': vocab_size must be a whole number ('96' came)"),
        (ANY_MODALITY("text", 96, "swiglu"), "expert must be of type SwigluExpert or of type AdapterExpert"),
        (ANY_MODALITY("text", 96, ANY_SWIGLU(8.0)), "hidden_size must be a whole number (8.0 came)"),
        (ANY_MODALITY("text", 96, ANY_SWIGLU(8, bias="no")), "bias must be true or false ('no' came)"),
        (ANY_MODALITY("text", 96, ANY_SWIGLU(8, kind="adapter")), "kind must be 'swiglu' ('adapter' came)"),
        (ANY_MODALITY("text", 96, SwigluExpert(8), frames_per_second="50"), "frames_per_second must be a number or null"),
        (ANY_ROPE(theta="big"), "rope.theta must be a number ('big' came)"),
        (ANY_ROPE(style=None), "rope.style must be 'interleaved' or 'half' (None came)"),
        (ANY_ROPE(scaling=32.0), "rope.scaling must be of type RopeScaling or null (32.0 came)"),
        (ANY_ROPE(scaling=ANY_SCALING(factor="32")), "rope.scaling: factor must be a number ('32' came)"),
    ],
)
def test_a_value_of_the_wrong_type_within_a_part_is_refused_with_its_place(holder: Any, sentence: str) -> None:
    changes = {"modalities": (holder,)} if isinstance(holder, Modality) else {"rope": holder}
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.tiny(**changes)
    assert sentence in str(refusal.value)


def places(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every object stands in nested JSON values, the whole among them."""
    if isinstance(values, dict):
        return [at, *(place for key, value in values.items() for place in places(value, (*at, key)))]
    if isinstance(values, list):
        return [place for number, value in enumerate(values) for place in places(value, (*at, number))]
    return []


WITH_SCALING = TINY.replace(rope=RopeConfig(scaling=RopeScaling()))


def object_at(values: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        values = values[step]
    return values


@pytest.mark.parametrize("place", places(WITH_SCALING.to_dict()), ids=str)
def test_an_unknown_field_is_refused_wherever_it_stands(place: tuple[Any, ...]) -> None:
    values = WITH_SCALING.to_dict()
    object_at(values, place)["surprise"] = 1
    with pytest.raises(ConfigError, match="unknown field 'surprise'"):
        ModelConfig.from_dict(values)


def test_missing_fields_are_refused_all_at_once_and_defaults_may_be_left_out() -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict({"num_layers": 2, "colour": "red"})
    for name in ("model_width", "num_heads", "num_kv_heads", "head_size", "modalities"):
        assert f"missing field '{name}'" in str(refusal.value)
    assert "unknown field 'colour'" in str(refusal.value)
    assert "num_layers" not in str(refusal.value)
    required = {name: TINY.to_dict()[name] for name in ("model_width", "num_layers", "num_heads", "num_kv_heads", "head_size")}
    modality = {"name": "text", "vocab_size": 96, "expert": {"kind": "swiglu", "hidden_size": 8}}
    assert ModelConfig.from_dict({**required, "modalities": [modality]}).rope == RopeConfig()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(places(WITH_SCALING.to_dict())), json_values, st.data())
def test_whatever_stands_in_a_field_there_is_a_configuration_or_a_sentence(place: Any, value: Any, data: st.DataObject) -> None:
    values = copy.deepcopy(WITH_SCALING.to_dict())
    holder = object_at(values, place)
    holder[data.draw(st.sampled_from(sorted(holder)))] = value
    try:
        config = ModelConfig.from_dict(values)
    except ConfigError as refusal:
        assert str(refusal)
    else:
        assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "{", "nothing", "[" * 100000, "[]", "3", "null", '"text"'])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not JSON|must be a JSON object"):
        ModelConfig.from_json(text)


def test_unknown_presets_and_modalities_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"choose one of tiny, tiny64, small, llama-3\.2-1b, llama-3\.2-1b-text"):
        ModelConfig.preset("medium")
    with pytest.raises(ConfigError, match="it has text, audio"):
        TINY.modality_index("video")
