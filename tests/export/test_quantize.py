"""Codes and scales: the nearest, the smallest loss, and onnxruntime's own quantiser as the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import matmul_nbits_quantizer

from motrt.export.quantize import MOST_LOST, BlockScales, choose_scales, codes_under, dequantize, squared_errors
from motrt.model_def.quantization import CODE_RANGE, WeightFormat

FORMATS = [
    WeightFormat("int8", 32),
    WeightFormat("int8"),
    WeightFormat("int8", 32, symmetric=False),
    WeightFormat("int4", 32),
    WeightFormat("int4"),
    WeightFormat("int4", 32, symmetric=False),
    WeightFormat("fp8"),
    WeightFormat("fp8", 32),
]


def some_weight(out: int = 24, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("method", ["absmax", "search"])
def test_no_other_code_is_nearer(how: WeightFormat, method: str) -> None:
    weight = some_weight()
    chosen = choose_scales(weight, how, method, torch.float32)  # type: ignore[arg-type]
    codes = codes_under(weight, how, chosen)
    lost = (dequantize(codes, how, chosen) - weight).abs()
    low, high = CODE_RANGE[how.stored]
    whole = (
        torch.arange(low, high + 1) if how.stored != "fp8" else torch.arange(0, 256).to(torch.uint8).view(torch.float8_e4m3fn)
    )
    for code in whole:
        if bool(code.float().isnan()):
            continue
        others = torch.full_like(codes, 0)
        others[:] = code.to(codes.dtype)
        other = (dequantize(others, how, chosen) - weight).abs()
        assert bool((lost <= other * (1 + 1e-5) + 1e-7).all()), f"code {code} is nearer"


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_searching_never_loses_more_and_wins_at_four_bits(how: WeightFormat) -> None:
    weight = some_weight(64, 128)
    lost = {}
    for method in ("absmax", "search"):
        chosen = choose_scales(weight, how, method, torch.float32)
        lost[method] = squared_errors(weight, how, codes_under(weight, how, chosen), chosen)
    assert bool((lost["search"] <= lost["absmax"]).all())
    if how.stored == "int4" and how.symmetric:
        assert lost["search"].sum() < 0.85 * lost["absmax"].sum()
        chosen = choose_scales(weight, how, "search", torch.float32, signed=True)
        signed = squared_errors(weight, how, codes_under(weight, how, chosen), chosen)
        assert signed.sum() < 0.72 * lost["absmax"].sum()


@pytest.mark.parametrize("how", [WeightFormat("int8", 32), WeightFormat("int4", 32)], ids=str)
def test_onnxruntimes_own_quantiser_loses_no_less(how: WeightFormat) -> None:
    """Round to nearest, written by others: of the same size, and never better than searching."""
    weight = some_weight(64, 128)
    settings = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=True, bits=8 if how.stored == "int8" else 4
    )
    quantiser = matmul_nbits_quantizer.DefaultWeightOnlyQuantizer(settings)
    packed, scales, _ = quantiser.qbits_block_quant(np.ascontiguousarray(weight.numpy().T))
    codes = packed.reshape(64, -1)
    if how.stored == "int4":
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(64, -1)
    middle = 8 if how.stored == "int4" else 128
    theirs = (codes.astype(np.float32) - middle).reshape(64, 4, 32) * scales.reshape(64, 4, 1)
    their_loss = float(np.square(theirs.reshape(64, 128) - weight.numpy()).sum())
    ours = {}
    for method in ("absmax", "search"):
        chosen = choose_scales(weight, how, method, torch.float32, signed=True)
        ours[method] = float(squared_errors(weight, how, codes_under(weight, how, chosen), chosen).sum())
    # Theirs takes the largest magnitude to -8, with a scale of either sign; our usual one to 7, for TensorRT's sake.
    assert ours["absmax"] < their_loss * (8 / 7) ** 2 * 1.05
    assert ours["search"] < their_loss * (1.0 if how.stored == "int4" else 1.02)


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.integers(-30, 12),
    how=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_weights_of_any_size_give_numbers(exponent: int, how: WeightFormat, dtype: torch.dtype, seed: int) -> None:
    weight = some_weight(4, 32, seed) * 2.0**exponent
    weight[0] = 0.0
    chosen = choose_scales(weight, how, "search", dtype)
    codes = codes_under(weight, how, chosen)
    back = dequantize(codes, how, chosen)
    assert bool(chosen.scales.isfinite().all()) and bool((chosen.scales > 0).all()) and bool(back.isfinite().all())
    assert bool((back[0] == 0).all())
    if dtype == torch.float32 or (dtype == torch.float16 and exponent >= -9):
        assert (back - weight).norm() <= 0.2 * weight.norm()


def test_a_zero_point_keeps_zero_zero_and_wins_on_weights_to_one_side() -> None:
    weight = some_weight().abs()
    weight[:, 0] = 0.0
    lost = {}
    for how in (WeightFormat("int4", 32), WeightFormat("int4", 32, symmetric=False)):
        chosen = choose_scales(weight, how, "search", torch.float32)
        back = dequantize(codes_under(weight, how, chosen), how, chosen)
        assert bool((back[:, 0] == 0).all())
        lost[how.symmetric] = float((back - weight).square().sum())
    assert lost[False] < 0.5 * lost[True]


def test_scales_are_the_numbers_that_are_stored() -> None:
    """A code chosen under a scale that is rounded afterwards would not be the nearest."""
    chosen = choose_scales(some_weight(), WeightFormat("int4", 32), "search", torch.float16)
    assert chosen.scales.dtype == torch.float16
    again = BlockScales(chosen.scales.float().half())
    weight = some_weight()
    assert torch.equal(
        codes_under(weight, WeightFormat("int4", 32), chosen), codes_under(weight, WeightFormat("int4", 32), again)
    )


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_zero_points_save_a_few_hundredths_of_normal_weights_where_scales_have_signs(block: int) -> None:
    """As docs/quantization.md has it: a scale's sign gives symmetric codes most of what a zero point would."""
    weight, lost = some_weight(128, 512), {}
    for symmetric in (True, False):
        how = WeightFormat("int4", block, symmetric)
        chosen = choose_scales(weight, how, "search", torch.float32, signed=True)
        lost[symmetric] = float(squared_errors(weight, how, codes_under(weight, how, chosen), chosen).sum().sqrt())
    assert 0.01 < 1 - lost[False] / lost[True] < 0.06


@pytest.mark.parametrize("how", [WeightFormat("int4", 32), WeightFormat("int4", 32, symmetric=False)], ids=str)
def test_errors_of_inputs_that_count_more_are_smaller(how: WeightFormat) -> None:
    weight, importance = some_weight(64, 96), torch.ones(96)
    importance[5::32] = 1000.0
    lost = {}
    for name, counts in (("weighed", importance), ("plain", None)):
        chosen = choose_scales(weight, how, "search", torch.float32, signed=True, importance=counts)
        lost[name] = (dequantize(codes_under(weight, how, chosen), how, chosen) - weight).square().sum(0)
    assert (lost["weighed"] * importance).sum() < 0.2 * (lost["plain"] * importance).sum()
    assert lost["weighed"].sum() > lost["plain"].sum()


def test_equal_importance_changes_nothing() -> None:
    weight, how = some_weight(), WeightFormat("int4", 32)
    plain, weighed = (choose_scales(weight, how, "search", torch.float32, True, counts) for counts in (None, torch.ones(96)))
    assert torch.equal(plain.scales, weighed.scales)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_no_block_loses_more_than_the_law_allows_whatever_counts(how: WeightFormat) -> None:
    """Weights that count a million times as much as others would have the others clipped away."""
    weight, importance = some_weight(256, 96) ** 3, torch.ones(96)
    importance[7::32] = 1e9
    lost = []
    for method, counts in (("search", importance), ("absmax", None)):
        chosen = choose_scales(weight, how, method, torch.float32, signed=True, importance=counts)  # type: ignore[arg-type]
        lost.append(squared_errors(weight, how, codes_under(weight, how, chosen), chosen))
    assert bool((lost[0] <= MOST_LOST * lost[1] * (1 + 1e-5)).all())
    if how == WeightFormat("int4", 32):
        assert bool((lost[0] > 2 * lost[1]).any()), "nothing here asks for the law"


def test_inputs_that_never_come_leave_the_usual_scales() -> None:
    weight, how = some_weight(), WeightFormat("int4", 32)
    usual = choose_scales(weight, how, "absmax", torch.float32)
    assert torch.equal(choose_scales(weight, how, "search", torch.float32, True, torch.zeros(96)).scales, usual.scales)
