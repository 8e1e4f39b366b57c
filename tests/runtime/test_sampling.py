"""One draw against a brute-force full sort, chance against its definition, and every refusal."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from motrt.errors import BackendError, InputError
from motrt.model_def.config import ModelConfig
from motrt.runtime.sampling import MAX_SEED, Sampling, draw, fresh_seed, sampling_for, uniform

MASK_64 = 2**64 - 1

# Weights are float32: of many, sums are right to some of its roundings.
ROUNDING = 1e-6


# --- oracles -----------------------------------------------------------------------------------------------------------


@dataclass
class Distribution:
    """Candidates in rising order, their probabilities, and how far top-p's cut is from the nearest sum of them."""

    ids: list[int]
    probabilities: list[float]
    margin: float = 1.0


def distribution_by_full_sort(logits: np.ndarray, sampling: Sampling, seen: Sequence[int] = ()) -> Distribution:
    """Every step as it is documented, on plain Python lists, without a shortcut."""
    scores = {}
    for i, logit in enumerate(logits.tolist()):
        if i in seen:
            penalised = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
            logit = float(logits.dtype.type(penalised))
        scores[i] = logit
    order = sorted(scores, key=lambda i: (-scores[i], i))
    if sampling.temperature == 0:
        return Distribution(order[:1], [1.0])
    weights = {i: math.exp((scores[i] - scores[order[0]]) / sampling.temperature) for i in order}
    order = order[: sampling.top_k]
    order = [i for i in order if weights[i] >= (sampling.min_p or 0)]
    total = math.fsum(weights[i] for i in order)
    margin = 1.0
    if sampling.top_p is not None:
        reached = [mass / total for mass in accumulate(weights[i] for i in order)]
        margin = min((abs(share - sampling.top_p) for share in reached[:-1]), default=1.0)
        order = order[: 1 + next((n for n, share in enumerate(reached) if share >= sampling.top_p), len(order))]
        total = math.fsum(weights[i] for i in order)
    return Distribution(sorted(order), [weights[i] / total for i in sorted(order)], margin)


def philox_4x64_10(counter: int, key: int) -> int:
    """The first 64 bits of one Philox 4x64-10 block, from the paper's definition (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = (counter >> (64 * i) & MASK_64 for i in range(4))
    k0, k1 = (key >> (64 * i) & MASK_64 for i in range(2))
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = right >> 64 ^ c1 ^ k0, right & MASK_64, left >> 64 ^ c3 ^ k1, left & MASK_64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK_64, (k1 + 0xBB67AE8584CAA73B) & MASK_64
    return c0


# --- inputs ------------------------------------------------------------------------------------------------------------

# Halves from -8 to 8: ties are common, and no two different values are so near that rounding could order them.
tied_logits = st.lists(st.integers(-16, 16).map(lambda half: half / 2) | st.just(-math.inf), min_size=1, max_size=60)
logit_rows = tied_logits.filter(lambda row: max(row) > -math.inf).map(lambda row: np.array(row, np.float32))
chances = st.floats(0, 1, exclude_max=True)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.sampled_from([0.0, 0.05, 0.3, 0.99]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)


@given(logit_rows, samplings, chances, st.data())
def test_a_draw_is_what_a_full_sort_gives(logits: np.ndarray, sampling: Sampling, chance: float, data: st.DataObject) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=8))
    expected = distribution_by_full_sort(logits, sampling, seen)
    assume(expected.margin > ROUNDING)  # where rounding decides the nucleus, neither is wrong
    place = expected.ids.index(draw(logits, sampling, uniform=chance, seen=seen))
    below = math.fsum(expected.probabilities[:place])
    assert below - ROUNDING <= chance <= below + expected.probabilities[place] + ROUNDING
    assert expected.probabilities[place] > 0


@given(logit_rows, samplings)
def test_sweeping_chance_from_0_to_1_meets_every_likely_candidate_in_order(logits: np.ndarray, sampling: Sampling) -> None:
    expected = distribution_by_full_sort(logits, sampling)
    assume(expected.margin > ROUNDING)
    met = list(dict.fromkeys(draw(logits, sampling, uniform=step / 101) for step in range(101)))
    likely = [i for i, probability in zip(expected.ids, expected.probabilities, strict=True) if probability > 1 / 100]
    assert [i for i in met if i in likely] == likely
    assert met == sorted(met, key=expected.ids.index)


@pytest.mark.parametrize("spread", [0.0, 0.1, 4.0])
@pytest.mark.parametrize(
    "values", [{}, {"top_p": 0.90001}, {"top_k": 5000}, {"min_p": 1e-3}, {"top_k": 3000, "top_p": 0.70011}]
)
def test_a_long_row_is_drawn_as_by_a_full_sort(spread: float, values: dict[str, Any]) -> None:
    logits = (spread * np.random.default_rng(0).standard_normal(20000)).astype(np.float32)
    sampling = Sampling(temperature=1.0, **values)
    expected = distribution_by_full_sort(logits, sampling)
    assert expected.margin > ROUNDING
    cumulative = np.cumsum(expected.probabilities)
    for chance in (0.0, 0.01, 0.3, 0.77, 0.999, 1 - 2**-53):
        place = expected.ids.index(draw(logits, sampling, uniform=chance))
        assert cumulative[place] - expected.probabilities[place] - ROUNDING <= chance <= cumulative[place] + ROUNDING


# --- what each value means ---------------------------------------------------------------------------------------------


@given(logit_rows, chances)
def test_greedy_takes_the_greatest_and_top_k_of_one_is_greedy(logits: np.ndarray, chance: float) -> None:
    greatest = min(i for i, logit in enumerate(logits) if logit == max(logits))
    assert draw(logits, Sampling()) == greatest
    assert draw(logits, Sampling(temperature=1.7, top_k=1), uniform=chance) == greatest
    assert draw(logits, Sampling(temperature=1.7, top_p=1e-9), uniform=chance) == greatest


@given(logit_rows, samplings, chances)
def test_a_draw_leaves_the_logits_as_they_came(logits: np.ndarray, sampling: Sampling, chance: float) -> None:
    before = logits.copy()
    draw(logits, sampling, uniform=chance, seen=range(len(logits)))
    assert np.array_equal(before, logits)


def test_frequencies_over_many_draws_are_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.2, 0.2, 0.1])
    logits, num_draws = np.log(probabilities).astype(np.float32), 20000
    counts = Counter(draw(logits, Sampling(temperature=1.0), uniform=uniform(7, step)) for step in range(num_draws))
    for i, probability in enumerate(probabilities):  # five standard deviations
        assert abs(counts[i] / num_draws - probability) < 5 * math.sqrt(probability * (1 - probability) / num_draws)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 0.5}, {0}),
        ({"top_k": 2, "top_p": 0.72}, {0, 1}),  # of the two left, the first is 0.714
        ({"top_k": 2, "top_p": 0.71}, {0}),
        ({"min_p": 0.3, "top_p": 0.56}, {0, 1}),  # of the three left, the first is 0.556
        ({"min_p": 0.3, "top_p": 0.55}, {0}),
    ],
)
def test_filters_keep_what_their_definitions_say(values: dict[str, Any], kept: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1])).astype(np.float32)
    assert {draw(logits, Sampling(temperature=1.0, **values), uniform=n / 100) for n in range(100)} == kept


def test_limits_belong_to_what_they_limit() -> None:
    """Each id's share of chance has its start and not its end, and an id exactly as likely as min_p asks stays."""
    equal = np.zeros(4, np.float32)
    assert [draw(equal, Sampling(temperature=1.0), uniform=quarter / 4) for quarter in range(4)] == [0, 1, 2, 3]
    assert draw(equal, Sampling(temperature=1.0, top_p=0.5), uniform=0.5) == 1
    exact = Sampling(temperature=1.0, min_p=float(np.exp(np.float64(-1))))
    assert draw(np.array([0.0, -1.0], np.float32), exact, uniform=0.99) == 1


def test_the_penalty_makes_what_occurred_less_likely_whatever_the_sign() -> None:
    assert draw(np.array([2.0, 1.9], np.float32), Sampling(repetition_penalty=1.2), seen=[0]) == 1
    assert draw(np.array([-1.9, -2.0], np.float32), Sampling(repetition_penalty=1.2), seen=[0, 0]) == 1
    assert draw(np.array([2.0, 1.9], np.float32), Sampling(repetition_penalty=0.8), seen=np.array([1])) == 1
    assert draw(np.array([2.0, 1.9], np.float32), Sampling(repetition_penalty=1.2), seen={0, 1}) == 0


@pytest.mark.parametrize("penalty", [1e300, 1e-300])
@pytest.mark.parametrize("logits", [[1.0, -1.0], [-1.0, -2.0], [3e38, 1.0]])
def test_an_extreme_penalty_or_temperature_still_draws(penalty: float, logits: list[float]) -> None:
    row = np.array([*logits, -np.inf], np.float32)
    for temperature in (0.0, 1e-300, 1e300):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
        assert draw(row, sampling, uniform=0.999, seen=[0, 1, 2]) in (0, 1)


def test_excluded_ids_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    for values in ({}, {"top_k": 4}, {"top_p": 0.999}, {"min_p": 0.0}):
        drawn = {draw(logits, Sampling(temperature=1.0, **values), uniform=n / 50) for n in range(50)}
        assert drawn == {1, 3}
    assert draw(logits, Sampling(temperature=1.0), uniform=1 - 2**-53) == 3


# --- chance ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, MAX_SEED), st.integers(0, 2**40))
def test_chance_is_philox_with_the_seed_as_key_and_the_step_as_counter(seed: int, step: int) -> None:
    # numpy counts up before it makes a block, so a counter of n gives the block of n + 1.
    assert uniform(seed, step) == (philox_4x64_10(step + 1, seed) >> 11) / 2**53


def test_the_oracle_of_philox_gives_the_published_answer() -> None:
    """Known answers of the paper's authors (Random123, kat_vectors): all zeros, and all ones."""
    assert philox_4x64_10(0, 0) == 0x16554D9ECA36314C
    assert philox_4x64_10(2**256 - 1, 2**128 - 1) == 0x87B092C3013FE90B


@given(st.integers(0, MAX_SEED), st.integers(0, 2**40))
def test_chance_is_at_least_0_and_below_1(seed: int, step: int) -> None:
    assert 0 <= uniform(seed, step) < 1


def test_fresh_seeds_are_seeds_and_differ() -> None:
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(Sampling(seed=seed).seed == seed for seed in seeds)


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**63, 0), (0, -1), (True, 0), (0, 1.5)])
def test_a_seed_or_step_out_of_range_is_refused(seed: Any, step: Any) -> None:
    with pytest.raises(InputError, match="must be"):
        uniform(seed, step)


# --- refusals ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf, True, "1", None, 10**400],
    "top_k": [0, -1, 1.5, True, "1"],
    "top_p": [0, 0.0, 1.01, -0.5, math.nan, True],
    "min_p": [-0.1, 1, 1.0, math.nan, False],
    "repetition_penalty": [0, -1.0, math.nan, math.inf, True, None],
    "seed": [-1, 2**63, 1.0, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} must be .* came"):
        Sampling(**{name: value})


def test_all_values_out_of_range_are_named_at_once() -> None:
    with pytest.raises(InputError) as refusal:
        Sampling(**{name: values[0] for name, values in WRONG.items()})
    assert all(f"\n  - {name} must be" in str(refusal.value) for name in WRONG)


def test_numpy_numbers_are_numbers() -> None:
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int32(4))
    assert draw(np.zeros(8, np.float32), sampling, uniform=0.99) == 2


@given(st.integers(1, 300), st.data(), st.sampled_from([math.nan, math.inf]))
def test_logits_of_a_broken_model_are_refused_wherever_the_fault_stands(size: int, data: st.DataObject, fault: float) -> None:
    logits = np.zeros(size, np.float32)
    logits[data.draw(st.integers(0, size - 1))] = fault
    with pytest.raises(BackendError, match="NaN or Inf"):
        draw(logits, Sampling())


def test_a_row_that_excludes_every_id_is_refused() -> None:
    with pytest.raises(BackendError, match="all -inf"):
        draw(np.full(4, -np.inf, np.float32), Sampling(temperature=1.0), uniform=0.5)


@pytest.mark.parametrize("logits", [np.zeros((1, 4), np.float32), np.zeros(0, np.float32), np.zeros(4, np.int64)])
def test_logits_of_another_shape_or_dtype_are_refused(logits: np.ndarray) -> None:
    with pytest.raises(InputError, match="one row of floating-point numbers"):
        draw(logits, Sampling())


@pytest.mark.parametrize("seen", [[-1], [4], np.array([1, 9]), [0.5]])
def test_seen_ids_outside_the_range_are_refused(seen: Any) -> None:
    with pytest.raises(InputError, match=r"seen must hold whole numbers in 0\.\.3"):
        draw(np.zeros(4, np.float32), Sampling(repetition_penalty=1.1), seen=seen)


@pytest.mark.parametrize("chance", [-0.1, 1.0, math.nan])
def test_chance_outside_its_interval_is_refused(chance: float) -> None:
    with pytest.raises(InputError, match="uniform must be in"):
        draw(np.zeros(4, np.float32), Sampling(temperature=1.0), uniform=chance)


# --- by modality -------------------------------------------------------------------------------------------------------


def test_sampling_by_modality_fills_what_is_left_out_with_greedy() -> None:
    config, warm = ModelConfig.tiny(), Sampling(temperature=1.0)
    assert sampling_for(None, config) == {"text": Sampling(), "audio": Sampling()}
    assert sampling_for(warm, config) == {"text": warm, "audio": warm}
    assert sampling_for({"audio": warm}, config) == {"text": Sampling(), "audio": warm}


def test_unknown_modalities_and_values_that_are_no_sampling_are_refused_together() -> None:
    with pytest.raises(InputError) as refusal:
        sampling_for({"video": Sampling(), "text": 0.7}, ModelConfig.tiny())  # type: ignore[dict-item]
    assert "no modality 'video': this model has text, audio" in str(refusal.value)
    assert "'text' must be a Sampling (float came)" in str(refusal.value)
    with pytest.raises(InputError, match="int came"):
        sampling_for(3, ModelConfig.tiny())  # type: ignore[arg-type]
