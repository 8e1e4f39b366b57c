"""Weights that are no numbers and rows that were never trained are found, named in unified ids, and refused."""

import json
from math import inf, nan

import pytest
import torch

from motrt.errors import CheckpointError, UntrainedRowsError
from motrt.model_def.config import ModelConfig
from motrt.model_def.health import Health, diagnose, refuse_untrained
from motrt.model_def.initialize import random_tensors

SPLIT = ModelConfig.tiny()
SHARED = SPLIT.replace(head="shared")


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    return dict(random_tensors(config, 0))


def health_of(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Health:
    return diagnose(config, tensors.__getitem__)


@pytest.mark.parametrize("config", [SPLIT, SHARED, SHARED.replace(tied_embeddings=True)])
def test_a_healthy_model_has_no_problems(config: ModelConfig) -> None:
    health = health_of(config, weights(config))
    assert health.problems == ()
    refuse_untrained(health)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_values_that_are_no_numbers_are_counted_and_always_refused(value: float, dtype: str) -> None:
    tensors = dict(random_tensors(SPLIT, 0, dtype))
    tensors["layers.1.feed_forward.audio.fc1.bias"][2:5] = value
    tensors["output.audio.weight"][3, 4] = value
    health = health_of(SPLIT, tensors)
    assert [(one.name, one.num_nan + one.num_inf) for one in health.non_finite] == [
        ("layers.1.feed_forward.audio.fc1.bias", 3),
        ("output.audio.weight", 1),
    ]
    for allow in (False, True):
        with pytest.raises(CheckpointError, match=r"audio\.fc1\.bias holds") as caught:
            refuse_untrained(health, allow_untrained=allow)
        assert "output.audio.weight holds" in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize(
    ("config", "table", "rows"),
    [
        (SPLIT, "tok_embeddings.weight", slice(96, 128)),
        (SPLIT, "output.audio.weight", slice(0, 32)),
        (SHARED, "output.weight", slice(96, 128)),
        (SHARED.replace(tied_embeddings=True), "tok_embeddings.weight", slice(96, 128)),
    ],
)
def test_a_modality_without_trained_rows_is_refused_naming_rows_and_remedy(
    config: ModelConfig, table: str, rows: slice, value: float
) -> None:
    tensors = weights(config)
    tensors[table][rows] = value
    health = health_of(config, tensors)
    what = "constant" if value else "zero"
    with pytest.raises(UntrainedRowsError) as caught:
        refuse_untrained(health)
    assert f"audio rows 96 to 127 of {table} (all 32 of that modality) are {what}" in str(caught.value)
    assert "adapters+new-rows" in str(caught.value) and "--allow-untrained" in str(caught.value)
    refuse_untrained(health, allow_untrained=True)


def test_the_full_size_rows_are_named_in_unified_ids() -> None:
    config = ModelConfig.preset("llama-3.2-1b").replace(model_width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4)
    tensors = weights(config)
    tensors["tok_embeddings.weight"][128256:] = 0
    tensors["output.audio.weight"][:] = 0
    with pytest.raises(UntrainedRowsError) as caught:
        refuse_untrained(health_of(config, tensors))
    assert str(caught.value).count("audio rows 128256 to 130303 of") == 2


def test_a_few_reserved_rows_are_reported_and_accepted() -> None:
    tensors = weights(SPLIT)
    tensors["tok_embeddings.weight"][[3, 4, 5, 9, 95, 96]] = 0
    tensors["output.audio.weight"][:31] = 1
    health = health_of(SPLIT, tensors)
    assert health.problems == (
        "text rows 3 to 5, 9, 95 of tok_embeddings.weight (5 of that modality) are zero",
        "audio rows 96 of tok_embeddings.weight (1 of that modality) are zero",
        "audio rows 96 to 126 of output.audio.weight (31 of that modality) are constant",
    )
    refuse_untrained(health)


def test_a_row_that_is_nan_throughout_is_no_number_and_not_flat() -> None:
    tensors = weights(SPLIT)
    tensors["output.audio.weight"][:] = nan
    health = health_of(SPLIT, tensors)
    assert [one.num_nan for one in health.non_finite] == [32 * 64]
    assert health.flat_rows == ()


def test_a_product_that_does_nothing_is_reported() -> None:
    tensors = weights(SPLIT)
    tensors["layers.0.feed_forward.audio.up_proj.weight"][:] = 0
    assert health_of(SPLIT, tensors).problems == ("layers.0.feed_forward.audio.up_proj.weight is zero throughout",)


def test_the_result_is_plain_json() -> None:
    tensors = weights(SPLIT)
    tensors["tok_embeddings.weight"][96:] = 0
    tensors["norm.weight"][0] = nan
    told = json.loads(json.dumps(health_of(SPLIT, tensors).to_dict()))
    assert told["non_finite"] == [{"name": "norm.weight", "nan": 1, "inf": 0}]
    assert told["flat_rows"][0]["ids"] == [[96, 127]]
    assert told["flat_rows"][0]["whole_modality"] is True
    assert len(told["problems"]) == 2
