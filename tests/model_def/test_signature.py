"""The contract as the design says it, and how a graph that differs from it is described."""

import json

import pytest
from hypothesis import given, settings

from motrt.model_def.config import ModelConfig
from motrt.model_def.signature import CONTRACT_VERSION, FLOAT_DTYPES, Signature, TensorSpec
from motrt.tests.model_def.configurations import configurations

TINY = ModelConfig.tiny()  # 2 layers, 2 key/value heads of 16, 128 ids
SIGNATURE = Signature.canonical(TINY, "float16")


def test_the_canonical_graph_takes_and_gives_what_the_contract_says() -> None:
    assert list(map(str, SIGNATURE.inputs)) == [
        "input_ids: int64[b, s]",
        "modality_mask: int64[b, s]",
        "cache_position: int64[b]",
        "logits_index: int64[n]",
        "head_mask: int64[n]",
        "past_key.0: float16[b, 2, t, 16]",
        "past_value.0: float16[b, 2, t, 16]",
        "past_key.1: float16[b, 2, t, 16]",
        "past_value.1: float16[b, 2, t, 16]",
    ]
    assert list(map(str, SIGNATURE.outputs)) == [
        "logits: float32[n, 128]",
        "present_key.0: float16[b, 2, t, 16]",
        "present_value.0: float16[b, 2, t, 16]",
        "present_key.1: float16[b, 2, t, 16]",
        "present_value.1: float16[b, 2, t, 16]",
    ]


@settings(deadline=None, max_examples=30)
@given(configurations())
def test_every_past_buffer_has_a_present_one_like_it_and_names_are_unique(config: ModelConfig) -> None:
    config = config.replace(num_layers=min(config.num_layers, 5))
    signature = Signature.canonical(config, "float32")
    past = [spec for spec in signature.inputs if spec.name.startswith("past_")]
    present = [spec for spec in signature.outputs if spec.name.startswith("present_")]
    assert [(spec.name.replace("past", "present"), spec.dims, spec.dtype) for spec in past] == [
        (spec.name, spec.dims, spec.dtype) for spec in present
    ]
    assert len(past) == 2 * config.num_layers == 2 * signature.num_layers
    names = [spec.name for spec in (*signature.inputs, *signature.outputs)]
    assert len(set(names)) == len(names)


def test_the_signature_does_not_depend_on_the_kind_of_head() -> None:
    assert Signature.canonical(TINY, "float32") == Signature.canonical(TINY.replace(head="shared"), "float32")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_cache_has_the_dtype_asked_for_and_logits_are_float32(dtype: str) -> None:
    signature = Signature.canonical(TINY, dtype)
    assert signature.cache_dtype == dtype
    assert signature.outputs[0].dtype == "float32"


def test_a_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_dtype must be one of float64, float32"):
        Signature.canonical(TINY, "int8")


def test_the_signature_is_written_as_json_with_the_version_of_the_contract() -> None:
    plain = json.loads(json.dumps(SIGNATURE.to_dict()))
    assert plain["contract_version"] == CONTRACT_VERSION
    for role, specs in (("inputs", SIGNATURE.inputs), ("outputs", SIGNATURE.outputs)):
        assert [TensorSpec(one["name"], one["dtype"], tuple(one["dims"])) for one in plain[role]] == list(specs)


def test_an_input_is_found_by_its_name() -> None:
    assert SIGNATURE.input("head_mask") == TensorSpec("head_mask", "int64", ("n",))


def test_a_graph_that_agrees_differs_in_nothing() -> None:
    assert SIGNATURE.differences(SIGNATURE.inputs, SIGNATURE.outputs) == []


def test_every_difference_of_a_graph_is_told_at_once() -> None:
    inputs = (TensorSpec("input_ids", "int32", ("b", "s")), *SIGNATURE.inputs[2:], TensorSpec("surprise", "int64", (1,)))
    outputs = (TensorSpec("logits", "float32", ("n", 127)), *SIGNATURE.outputs[1:])
    assert SIGNATURE.differences(inputs, outputs) == [
        "input 'modality_mask' is missing",
        "input 'surprise' is unexpected",
        "input input_ids: int32[b, s] should be input_ids: int64[b, s]",
        "output logits: float32[n, 127] should be logits: float32[n, 128]",
    ]


def test_a_fixed_dim_where_a_symbol_belongs_is_a_difference() -> None:

    def fixed(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.name, spec.dtype, tuple(1 if dim == "b" else dim for dim in spec.dims))

    specialised = tuple(map(fixed, SIGNATURE.inputs))
    assert len(SIGNATURE.differences(specialised, SIGNATURE.outputs)) == 7  # all but logits_index and head_mask


def test_another_order_is_a_difference() -> None:
    found = SIGNATURE.differences(SIGNATURE.inputs[::-1], SIGNATURE.outputs)
    assert found == ["inputs are in another order than the signature's"]
