"""Rotation, cache and attention, each against a form written out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motrt.model_def.config import RopeConfig, RopeScaling, RopeStyle
from motrt.model_def.operators import attend, attend_to_first, rope_tables, rotate, write_cache

D = 8
STYLES: tuple[RopeStyle, ...] = ("interleaved", "half")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("style", STYLES)
def test_rotation_at_position_zero_changes_nothing(style: RopeStyle) -> None:
    x = normal(1, 2, 3, D)
    tables = rope_tables(RopeConfig(), D, 4, torch.float64)
    assert torch.equal(rotate(x, *tables, torch.zeros(1, 3, dtype=torch.int64), style), x)


@pytest.mark.parametrize("style", STYLES)
@given(near=st.integers(0, 40), apart=st.integers(0, 40), shift=st.integers(0, 40))
def test_scores_depend_on_the_distance_alone(style: RopeStyle, near: int, apart: int, shift: int) -> None:
    tables = rope_tables(RopeConfig(theta=100.0), D, 128, torch.float64)

    def score(query_at: int, key_at: int) -> float:
        q = rotate(normal(1, 1, 1, D, seed=1), *tables, torch.tensor([[query_at]]), style)
        k = rotate(normal(1, 1, 1, D, seed=2), *tables, torch.tensor([[key_at]]), style)
        return float((q * k).sum())

    assert math.isclose(score(near + apart, near), score(near + apart + shift, near + shift), abs_tol=1e-12)


def test_the_two_styles_are_one_rotation_of_permuted_values() -> None:
    x, positions = normal(2, 3, 4, D), torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    tables = rope_tables(RopeConfig(), D, 16, torch.float64)
    order = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    assert torch.equal(
        rotate(x, *tables, positions, "interleaved")[..., order], rotate(x[..., order], *tables, positions, "half")
    )


def test_the_tables_hold_the_angle_of_each_position_and_pair() -> None:
    cos, sin = rope_tables(RopeConfig(theta=10000.0), D, 5, torch.float64)
    for position in range(5):
        for pair in range(D // 2):
            angle = position / 10000.0 ** (2 * pair / D)
            assert math.isclose(cos[position, pair], math.cos(angle), rel_tol=1e-13)
            assert math.isclose(sin[position, pair], math.sin(angle), abs_tol=1e-13)


def test_tables_of_half_precision_are_rounded_once_from_float64() -> None:
    rope = RopeConfig()
    for exact, rounded in zip(
        rope_tables(rope, D, 5000, torch.float64), rope_tables(rope, D, 5000, torch.float16), strict=True
    ):
        assert torch.equal(exact.to(torch.float16), rounded)


def test_a_longer_table_begins_with_the_shorter_one() -> None:
    scaled = RopeConfig(scaling=RopeScaling())
    for short, long in zip(rope_tables(scaled, D, 10, torch.float32), rope_tables(scaled, D, 99, torch.float32), strict=True):
        assert torch.equal(short, long[:10])


def test_scaling_keeps_short_waves_slows_long_ones_and_blends_between() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=100)
    size, theta = 64, 10000.0
    sines = (rope_tables(RopeConfig(theta, scaling=one), size, 2, torch.float64)[1][1].asin() for one in (None, scaling))
    plain, scaled = sines
    seen = set()
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 100 / 4:
            expected, kind = before, "kept"
        elif wavelength > 100 / 1:
            expected, kind = before / 8, "slowed"
        else:
            smooth = (100 / wavelength - 1) / 3
            expected, kind = (1 - smooth) * before / 8 + smooth * before, "blended"
        seen.add(kind)
        assert math.isclose(after, expected, rel_tol=1e-9)
    assert seen == {"kept", "blended", "slowed"}


def test_new_keys_stand_behind_what_each_row_holds_and_nothing_else_moves() -> None:
    cache, new = normal(2, 3, 10, D), normal(2, 3, 2, D, seed=1)
    before = cache.clone()
    written = write_cache(cache, new, torch.tensor([0, 7]))
    assert torch.equal(cache, before)
    assert torch.equal(written[0, :, 0:2], new[0]) and torch.equal(written[0, :, 2:], before[0, :, 2:])
    assert torch.equal(written[1, :, 7:9], new[1])
    assert torch.equal(written[1, :, :7], before[1, :, :7]) and torch.equal(written[1, :, 9:], before[1, :, 9:])


def test_attention_is_a_softmax_over_visible_keys_with_heads_in_groups() -> None:
    query, key, value = normal(1, 4, 2, D), normal(1, 2, 5, D, seed=1), normal(1, 2, 5, D, seed=2)
    visible = torch.tensor([[True, True, False, False, False], [True, True, True, False, True]])[None, None]
    mixed = attend(query, key, value, visible)
    for head in range(4):
        for column in range(2):
            seen = [at for at in range(5) if visible[0, 0, column, at]]
            scores = [math.exp(float(query[0, head, column] @ key[0, head // 2, at]) / math.sqrt(D)) for at in seen]
            wanted = sum(s / sum(scores) * value[0, head // 2, at] for s, at in zip(scores, seen, strict=True))
            torch.testing.assert_close(mixed[0, head, column], wanted, rtol=1e-12, atol=1e-12)


def test_a_number_of_keys_means_what_a_mask_of_the_first_means() -> None:
    query, key, value = normal(3, 4, 1, D), normal(3, 2, 5, D, seed=1), normal(3, 2, 5, D, seed=2)
    num_keys = torch.tensor([1, 3, 5])
    visible = torch.tensor([[True] * count + [False] * (5 - count) for count in num_keys])[:, None, None]
    assert torch.equal(attend_to_first(query, key, value, num_keys), attend(query, key, value, visible))
