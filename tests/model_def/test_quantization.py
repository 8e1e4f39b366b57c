"""Formats of weights: which weight has which, and what can not be."""

import json

import pytest

from motrt.errors import ConfigError, InputError
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.model_def.parameters import EMBEDDING, SHARED_HEAD, Parameter, parameters
from motrt.model_def.quantization import (
    NARROW_BLOCK_SIZE,
    Quantization,
    WeightFormat,
    parse_override,
    stored_bytes_of,
    usual_block_size,
)

TINY = ModelConfig.tiny()


def named(name: str) -> Parameter:
    return next(one for one in parameters(TINY) if one.name == name)


def test_norms_and_biases_are_never_quantised() -> None:
    formats = Quantization.usual("int4", TINY, table="int8")
    for one in parameters(TINY):
        assert (formats.format_of(one) is None) == (len(one.shape) == 1), one.name


def test_the_last_selector_that_fits_a_weight_counts() -> None:
    overrides = [parse_override(text) for text in ("head=int8", "audio=int8:16", "expert.audio=none", "embedding=fp16")]
    formats = Quantization.usual("int4", TINY, table="int8", overrides=overrides)
    assert formats.format_of(named("output.text.weight")) == WeightFormat("int8", 32)
    assert formats.format_of(named("output.audio.weight")) == WeightFormat("int8", 16)
    assert formats.format_of(named("layers.0.attention.wq.audio.weight")) == WeightFormat("int8", 16)
    assert formats.format_of(named("layers.0.feed_forward.audio.fc1.weight")) is None
    assert formats.format_of(named("layers.0.attention.wq.text.weight")) == WeightFormat("int4", 32)
    assert formats.format_of(named(EMBEDDING)) == WeightFormat("fp16")
    assert formats.name == "int4"


def test_a_quantization_comes_back_from_its_json() -> None:
    formats = Quantization.usual("int4", TINY, 16, symmetric=False, overrides=[("head", "int8", None), ("audio", None, None)])
    assert Quantization.from_dict(json.loads(json.dumps(formats.to_dict()))) == formats


def test_the_usual_block_is_the_largest_that_cuts_every_width() -> None:
    assert usual_block_size(TINY) == 32
    assert usual_block_size(ModelConfig.preset("llama-3.2-1b")) == 128
    odd = TINY.replace(modalities=(Modality("text", 32, SwigluExpert(24)),), head="shared")
    assert usual_block_size(odd) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"overrides": [("haed", "int8", None)]}, "nothing of this model is called 'haed'"),
        ({"overrides": [("video", "int8", None)]}, "modalities text, audio"),
        ({"block_size": 128}, "blocks of 16, 32"),
        ({"block_size": 48}, "block_size must be one of 16, 32"),
        ({"overrides": [("head", "fp16", None)]}, "fp16 is for the embedding alone"),
        ({"table": "int4"}, "the embedding is stored as int8 or fp16"),
    ],
)
def test_what_can_not_be_is_a_sentence(said: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Quantization.usual("int4", TINY, **said)  # type: ignore[arg-type]


TIED = TINY.replace(head="shared", tied_embeddings=True)


def test_a_tied_table_is_one_set_of_codes_and_the_heads_activations_are_rounded_in_its_blocks() -> None:
    formats = Quantization.usual("int4", TIED, table="int8")
    tables = [one for one in formats.coded_weights(parameters(TIED)) if one.name == EMBEDDING]
    assert formats.tied and len(tables) == 1 and tables[0].is_tied and not tables[0].is_table
    assert formats.activation_blocks(TIED)[SHARED_HEAD] == 32 and EMBEDDING not in formats.activation_blocks(TIED)
    assert Quantization.from_dict(formats.to_dict()).tied
    apart = Quantization.usual("int4", TINY, table="int8")
    assert not apart.tied and SHARED_HEAD not in apart.activation_blocks(TINY)


def test_a_tied_table_is_int8_or_plain() -> None:
    assert not Quantization.usual("int8", TIED).tied
    with pytest.raises(ConfigError, match="tied to the embedding is stored as int8"):
        Quantization.usual("int8", TIED, table="fp16")
    wrong = Quantization(Quantization.usual("int8", TIED, table="int8").formats, tied=False)
    assert wrong.problems(TIED) == ["tied must be true: whether the embedding's codes are the head's too"]


def test_a_part_can_be_what_experts_multiply_their_hidden_activations_by() -> None:
    overrides = [parse_override("hidden=int8"), parse_override("hidden.audio=int4:16")]
    formats = Quantization.usual("int4", TINY, overrides=overrides)
    assert formats.format_of(named("layers.0.feed_forward.text.w2.weight")) == WeightFormat("int8", 32)
    assert formats.format_of(named("layers.0.feed_forward.audio.fc2.weight")) == WeightFormat("int4", 16)
    for other in ("text.w1", "text.w3", "audio.fc1", "audio.down_proj", "audio.up_proj"):
        assert formats.format_of(named(f"layers.0.feed_forward.{other}.weight")) == WeightFormat("int4", 32)


def test_a_narrow_model_has_smaller_blocks_and_8_bits_at_its_ends() -> None:
    narrow = TINY.replace(num_layers=10, num_heads=8, head_size=64, num_kv_heads=8, model_width=512)
    narrow = narrow.replace(modalities=(Modality("text", 256, SwigluExpert(1024)),), head="shared")
    formats = Quantization.usual("int4", narrow, table="int8", careful=True)
    four, eight = WeightFormat("int4", 32), WeightFormat("int8", 128)
    for one in parameters(narrow):
        if len(one.shape) == 2:
            is_careful = one.name.startswith(("tok_embeddings", "output", "layers.0.", "layers.9.")) or ".w2." in one.name
            assert formats.format_of(one) == (eight if is_careful else four), one.name
    shallow = Quantization.usual("int4", narrow.replace(num_layers=9), careful=True)
    assert not [selector for selector, _ in shallow.formats if selector.startswith("layers")]
    said = Quantization.usual("int4", narrow, 64, careful=True, overrides=[parse_override("attention=int4")])
    kinds = {said.format_of(one) for one in parameters(narrow) if one.part == "attention"}
    assert kinds == {WeightFormat("int4", 64)}
    wide = ModelConfig.preset("llama-3.2-1b")
    assert Quantization.usual("int4", wide, careful=True) == Quantization.usual("int4", wide)
    assert Quantization.usual("int8", narrow, careful=True) == Quantization.usual("int8", narrow, NARROW_BLOCK_SIZE)
    assert Quantization.usual("int8", wide, careful=True) == Quantization.usual("int8", wide)
    assert Quantization.usual("int8", narrow, 64, careful=True) == Quantization.usual("int8", narrow, 64)


def test_half_scales_are_counted_as_two_bytes() -> None:
    whole, half = (Quantization.usual("int8", TINY, 32, table="int8", half_scales=is_half) for is_half in (False, True))
    num_scales = sum(one.numel // 32 for one in parameters(TINY) if len(one.shape) == 2)
    assert stored_bytes_of(TINY, whole, 4) - stored_bytes_of(TINY, half, 4) == 2 * num_scales
    assert Quantization.from_dict(half.to_dict()).half_scales and half.scale_bytes(4) == 2


def test_errors_are_weighed_at_four_bits_where_there_are_sequences() -> None:
    four, eight = WeightFormat("int4", 32), WeightFormat("int8", 32)
    weighed = Quantization.usual("int4", TINY, calibration="sampled")
    assert weighed.weighs_errors_of(four) and not weighed.weighs_errors_of(eight)
    assert not Quantization.usual("int4", TINY).weighs_errors_of(four)
    assert Quantization.from_dict(weighed.to_dict()).calibration == "sampled"
    with pytest.raises(ConfigError, match="calibration must be one of none, sampled, file"):
        Quantization.usual("int4", TINY, calibration="guessed")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "head",
        "head=",
        "head=int3",
        "=int8",
        "head=int8:",
        "head=int8:x",
        "head=int8:-1",
        "head=int8:0",
        "head=none:32",
        "embedding=fp16:32",
    ],
)
def test_an_override_that_is_none_says_how_one_looks(text: str) -> None:
    with pytest.raises(InputError, match="as in head=int8"):
        parse_override(text)


def test_bytes_are_those_of_codes_and_scales() -> None:
    one = named("layers.0.feed_forward.text.w1.weight")  # [128, 64]
    assert WeightFormat("int4", 32).num_bytes(one, 4) == 128 * 32 + 128 * 2 * 4
    assert WeightFormat("int4", 32, symmetric=False).num_bytes(one, 4) == 128 * 32 + 128 * 2 * 4 + 128
    assert WeightFormat("int8").num_bytes(one, 2) == 128 * 64 + 128 * 2
    plain = sum(one.numel for one in parameters(TINY)) * 4
    assert stored_bytes_of(TINY, None, 4) == plain
    assert stored_bytes_of(TINY, Quantization.usual("int8", TINY, table="int8"), 4) < plain / 3


def test_q_k_and_v_are_kept_as_one_where_that_is_wanted_and_their_formats_agree() -> None:
    mine = [one for one in parameters(TINY) if one.name.startswith("layers.0.attention.") and one.modality == "text"]
    alone = Quantization.usual("int4", TINY).coded_weights(mine)
    assert [one.name.split(".")[3] for one in alone] == ["wq", "wk", "wv", "wo"]
    together = Quantization.usual("int4", TINY, packed=True).coded_weights(mine)
    assert [one.name for one in together] == ["layers.0.attention.wqkv.text.weight", "layers.0.attention.wo.text.weight"]
    assert together[0].shape == (64 + 32 + 32, 64)
    assert together[0].rows_of("layers.0.attention.wv.text.weight") == slice(96, 128)
    with pytest.raises(KeyError):
        together[0].rows_of("layers.0.attention.wo.text.weight")


def test_activations_are_rounded_in_the_widest_block_of_any_product() -> None:
    assert Quantization.usual("int4", TINY, 16).activation_block(TINY) == 16
    assert Quantization.usual("int4", TINY, 16, overrides=[("head", "int8", 64)]).activation_block(TINY) == 64
    assert Quantization.usual("fp8", TINY).activation_block(TINY) is None
