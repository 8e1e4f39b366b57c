"""The five small inputs: what is made of prompts passes the check, and any one thing spoiled does not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motrt.errors import CapacityError, InputError
from motrt.model_def.config import ModelConfig
from motrt.runtime.step_inputs import (
    StepInputs,
    as_whole_numbers,
    check_inputs,
    check_prompts,
    decode_inputs,
    modality_of_ids,
    prefill_inputs,
)

TINY = ModelConfig.tiny()  # ids 0 to 95 text, 96 to 127 audio, 128 positions

ids = st.integers(0, TINY.vocab_size - 1)
prompts_of_any_shape = st.lists(st.lists(ids, min_size=1, max_size=20), min_size=1, max_size=5)


@dataclass(frozen=True)
class Case:
    """Inputs that are in order, and the cache that they are for."""

    inputs: StepInputs
    batch_size: int
    capacity: int


@st.composite
def prefills(draw: st.DrawFn) -> Case:
    prompts = [np.array(prompt) for prompt in draw(prompts_of_any_shape)]
    longest = max(map(len, prompts))
    start = draw(st.integers(0, longest - 1))
    stop = draw(st.integers(start + 1, longest))
    predicted = np.array(draw(st.lists(st.integers(0, 1), min_size=len(prompts), max_size=len(prompts))))
    return Case(prefill_inputs(prompts, start, stop, predicted, TINY), len(prompts), 2 * longest)


@st.composite
def decodes(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 5))
    lengths = np.array(draw(st.lists(st.integers(1, 100), min_size=count, max_size=count)))
    active = np.array(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1))))
    predicted = np.array(draw(st.lists(st.integers(0, 1), min_size=len(active), max_size=len(active))))
    capacity = int(lengths.max()) + 1
    tokens = np.array(draw(st.lists(ids, min_size=count, max_size=count)))
    return Case(decode_inputs(tokens, lengths, active, predicted, capacity, TINY), count, capacity)


cases = prefills() | decodes()


def check(case: Case, **spoiled: Any) -> None:
    check_inputs(replace(case.inputs, **spoiled), TINY, case.batch_size, case.capacity)


@given(cases)
def test_what_is_made_of_prompts_and_tokens_passes_the_check(case: Case) -> None:
    check(case)


FIELDS = tuple(StepInputs.__dataclass_fields__)

SPOILERS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "a list": lambda value: value.tolist(),
    "None": lambda value: None,
    "int32": lambda value: value.astype(np.int32),
    "float": lambda value: value.astype(np.float64),
    "booleans": lambda value: value.astype(bool),
    "one dimension more": lambda value: value[None],
    "no dimension": lambda value: np.array(0),
    "longer": lambda value: np.concatenate([value, value[:1]]),
    "empty": lambda value: value[:0],
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("spoiler", SPOILERS)
@settings(max_examples=15)
@given(case=cases)
def test_a_field_of_another_type_or_shape_is_refused_by_its_name(field: str, spoiler: str, case: Case) -> None:
    value = getattr(case.inputs, field)
    if value.size == 0:
        return  # a chunk in which no row ends wants no logits: there is nothing to spoil
    with pytest.raises(InputError, match=field):
        check(case, **{field: SPOILERS[spoiler](value)})


@pytest.mark.parametrize("field", FIELDS)
@given(case=cases, place=st.integers(0, 10**6), wrong=st.sampled_from([-1, 10**6, -(2**63), 2**63 - 1]))
def test_one_number_out_of_range_is_refused_by_its_field_and_value(field: str, case: Case, place: int, wrong: int) -> None:
    value = getattr(case.inputs, field).copy()
    if value.size == 0:
        return
    value.flat[place % value.size] = wrong
    with pytest.raises(InputError, match=rf"{field} must be in 0\.\..*\({wrong} came, 1 such\)"):
        check(case, **{field: value})


@given(case=cases, place=st.integers(0, 10**6))
def test_a_mask_that_contradicts_one_id_is_refused_and_says_where(case: Case, place: int) -> None:
    mask = case.inputs.modality_mask.copy()
    where = np.unravel_index(place % mask.size, mask.shape)
    mask[where] = 1 - mask[where]
    with pytest.raises(InputError, match=rf"contradicts input_ids at 1 positions: row {where[0]}, column {where[1]} holds id"):
        check(case, modality_mask=mask)


@given(case=cases)
def test_one_position_too_few_in_the_cache_is_a_capacity_error(case: Case) -> None:
    needed = int(case.inputs.cache_position.max()) + case.inputs.input_ids.shape[1]
    check_inputs(case.inputs, TINY, case.batch_size, needed)
    with pytest.raises(CapacityError, match="grow it first"):
        check_inputs(case.inputs, TINY, case.batch_size, needed - 1)


def test_all_problems_are_told_at_once() -> None:
    case = Case(decode_inputs(np.array([1, 99]), np.array([3, 4]), np.array([0]), np.array([1]), 64, TINY), 2, 64)
    with pytest.raises(InputError) as failure:
        check(case, head_mask=np.array([7]), cache_position=np.array([-3, 0]))
    assert "head_mask" in str(failure.value)
    assert "cache_position" in str(failure.value)


@given(st.lists(ids, min_size=1))
def test_the_modality_of_ids_is_the_configurations_own(numbers: list[int]) -> None:
    assert modality_of_ids(np.array(numbers), TINY).tolist() == [TINY.modality_of(number) for number in numbers]


@given(prompts_of_any_shape, st.integers(1, 8))
def test_chunks_hold_every_id_once_at_its_place_and_want_every_row_once(prompts: list[list[int]], chunk: int) -> None:
    arrays = [np.array(prompt) for prompt in prompts]
    longest, predicted = max(map(len, prompts)), np.arange(len(prompts)) % 2
    written: list[dict[int, int]] = [{} for _ in prompts]
    wanted: list[int] = []
    for start in range(0, longest, chunk):
        inputs = prefill_inputs(arrays, start, min(start + chunk, longest), predicted, TINY)
        width = inputs.input_ids.shape[1]
        for row, column in np.ndindex(*inputs.input_ids.shape):
            written[row].setdefault(int(inputs.cache_position[row]) + column, int(inputs.input_ids[row, column]))
        for flat, head in zip(inputs.logits_index, inputs.head_mask, strict=True):
            row, column = divmod(int(flat), width)
            assert start + column == len(prompts[row]) - 1
            assert head == predicted[row]
            wanted.append(row)
    assert [[row[position] for position in range(len(prompt))] for row, prompt in zip(written, prompts, strict=True)] == prompts
    assert sorted(wanted) == list(range(len(prompts)))


@given(prompts_of_any_shape)
def test_padding_reads_no_other_modalitys_weights(prompts: list[list[int]]) -> None:
    arrays = [np.array(prompt) for prompt in prompts]
    inputs = prefill_inputs(arrays, 0, max(map(len, prompts)), np.zeros(len(prompts), np.int64), TINY)
    for row, prompt in zip(inputs.input_ids, prompts, strict=True):
        assert row.tolist()[: len(prompt)] == prompt
        assert set(row.tolist()[len(prompt) :]) <= {prompt[-1]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2], [1, 2]), ((3,), [3]), (range(2), [0, 1]), (np.array([5], np.uint8), [5]), ([], [])],
)
def test_whole_numbers_of_any_kind_are_read(values: object, expected: list[int]) -> None:
    found = as_whole_numbers(values)
    assert found is not None
    assert found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    "values", [None, 3, "12", "1", [1.0], [True], [[1]], [1, [2]], [2**63], [2**70], ["a"], {1, 2}, [None]]
)
def test_what_is_no_flat_row_of_whole_numbers_is_not_read(values: object) -> None:
    assert as_whole_numbers(values) is None


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompt"),
        (5, "no prompt"),
        (None, "no prompt"),
        (np.array(5), "no prompt"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([1, 2], "prompt 0 must be a flat sequence"),
        (["abc"], "prompt 0 must be a flat sequence"),
        ([[1, [2]]], "prompt 0 must be a flat sequence"),
        ([[1.5]], "prompt 0 must be a flat sequence"),
        ([[1], [True]], "prompt 1 must be a flat sequence"),
        ([[-1]], r"prompt 0: ids must be in 0\.\.127 \(-1 came, 1 such\)"),
        ([[1, 128, 129]], r"prompt 0: ids must be in 0\.\.127 \(128 came, 2 such\)"),
        ([[2**63]], "prompt 0 must be a flat sequence"),
    ],
)
def test_a_prompt_that_can_not_be_read_is_refused(prompts: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_prompts(prompts, TINY)


def test_every_bad_prompt_is_named() -> None:
    prompts: list[Any] = [[1], [], [500], ["x"]]
    with pytest.raises(InputError) as failure:
        check_prompts(prompts, TINY)
    assert all(f"prompt {number}" in str(failure.value) for number in (1, 2, 3))
    assert "prompt 0" not in str(failure.value)


def test_prompts_may_be_lists_tuples_and_arrays() -> None:
    each: Any = [[1, 2], (3,), np.array([4, 99], np.uint8)]
    together: Any = np.array([[1, 2], [3, 4]])
    assert [row.tolist() for row in check_prompts(each, TINY)] == [[1, 2], [3], [4, 99]]
    assert [row.tolist() for row in check_prompts(together, TINY)] == [[1, 2], [3, 4]]
