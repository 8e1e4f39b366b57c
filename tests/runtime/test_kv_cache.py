"""How much room a cache is given: buckets that double, then grow evenly, up to the model's maximum and no further."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motrt.errors import CapacityError, InputError
from motrt.runtime.kv_cache import LARGEST_DOUBLED, SMALLEST_CAPACITY, capacity_for


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_bucket_holds_what_was_asked_and_is_never_twice_too_large(num_positions: int, max_seq_len: int) -> None:
    if num_positions > max_seq_len:
        with pytest.raises(CapacityError):
            capacity_for(num_positions, max_seq_len)
        return
    capacity = capacity_for(num_positions, max_seq_len)
    assert num_positions <= capacity <= max_seq_len
    assert capacity < max(2 * num_positions, SMALLEST_CAPACITY + 1)
    assert capacity < num_positions + max(LARGEST_DOUBLED, SMALLEST_CAPACITY + 1)


@pytest.mark.parametrize(("positions", "capacity"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 200), (200, 200)])
def test_the_borders_of_the_small_buckets(positions: int, capacity: int) -> None:
    assert capacity_for(positions, 200) == capacity


@pytest.mark.parametrize(("positions", "capacity"), [(129, 256), (256, 256), (257, 512), (513, 768), (1025, 1280)])
def test_the_borders_of_the_large_buckets(positions: int, capacity: int) -> None:
    assert capacity_for(positions, 8192) == capacity


@given(st.integers(1, 10**4))
def test_there_are_few_buckets(max_seq_len: int) -> None:
    buckets = {capacity_for(positions, max_seq_len) for positions in range(1, max_seq_len + 1)}
    assert len(buckets) <= 3 + max_seq_len // LARGEST_DOUBLED
    assert max(buckets) == max_seq_len


def test_one_position_too_many_is_refused_with_the_remedy() -> None:
    assert capacity_for(128, 128) == 128
    with pytest.raises(CapacityError, match=r"129 positions are more than the 128 .* larger --max-seq-len"):
        capacity_for(129, 128)


def test_going_past_the_maximum_is_an_input_error_and_a_value_error() -> None:
    assert issubclass(CapacityError, InputError)
    assert issubclass(CapacityError, ValueError)
