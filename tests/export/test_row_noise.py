"""Each row's own noise: steep rows are known, flat ones are held tightly, and what was not measured is taken to be steep."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motrt.export.parity.agreement import agreement_findings, compare
from motrt.export.parity.findings import Outcome
from motrt.export.parity.gate import ask, in_float32
from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.row_noise import (
    LARGEST_CONDITIONING,
    Key,
    RowLimits,
    key_of,
    logits_by_row,
    measure_limits,
    observations_of,
)
from motrt.export.parity.scenarios import Observation, Scenario, observe, scenarios
from motrt.export.relative_errors import RelativeErrors, relative_errors_in
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.tolerances import FLOOR, LARGEST_NOISE, NOISE_SAFETY, expected_noise
from motrt.runtime.torch_session import TorchSession
from motrt.tests.export.models import THREE, TIED, TINY, torch_session, write_random

ROW = Scenario("row", (np.array([3, 4, 100, 101, 5, 6, 7], np.int64),), (4,))


def sharp(seed: int = 0) -> Decoder:
    """Queries and keys twelve times as large: attention jumps at little, at some positions more than at others."""
    large = {name: value * 12 if ".wq." in name or ".wk." in name else value for name, value in random_tensors(TINY, seed)}
    return Decoder.from_tensors(TINY, large.__getitem__, torch.float64)


def test_errors_are_independent_relative_and_of_the_size_that_was_asked_for() -> None:
    x = torch.full((200, 300), 7.0, dtype=torch.float64)
    errors = RelativeErrors(1e-3, seed=1)
    first, second = (errors.apply(x) / x - 1 for _ in range(2))
    for one in (first, second):
        assert float(one.square().mean().sqrt()) == pytest.approx(1e-3, rel=0.02)
        assert abs(float(one.mean())) < 1e-4 and float(one.abs().max()) <= 1e-3 * 3**0.5 * (1 + 1e-9)
    assert abs(float((first * second).mean())) < 1e-7
    torch.testing.assert_close(RelativeErrors(1e-3, seed=1).apply(x) / x - 1, first, rtol=0, atol=0)


def test_more_values_than_are_kept_have_errors_too() -> None:
    x = torch.ones(5, 1 << 20)
    assert float((RelativeErrors(1e-3).apply(x) - 1).square().mean(1).sqrt().min()) > 0.9e-3


def test_a_decoder_is_itself_again_after_it_was_given_errors(tiny_checkpoint: Path) -> None:
    session = torch_session(tiny_checkpoint, "fp64")
    before = observe(session, ROW)
    with relative_errors_in(session.decoder, 1e-3, 0):
        disturbed = observe(session, ROW)
    assert min(compare_rows(a.logits, b.logits).relative_l2 for a, b in zip(before, disturbed, strict=True)) > 1e-4
    for one, other in zip(before, observe(session, ROW), strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


@pytest.mark.parametrize("config", [TINY, THREE, TIED], ids=["two", "three", "tied"])
def test_every_row_that_is_compared_was_measured(config: ModelConfig, tmp_path: Path) -> None:
    session = torch_session(write_random(tmp_path / "m", config, 0), "fp64")
    expected = ask(session)
    keys = {key_of(scenario, one) for scenario, said in expected.scenarios for one in said}
    assert keys <= set(expected.limits.noise) and len(keys) > 100
    assert all(value > 0 for value in expected.limits.noise.values())


def test_noise_foretells_the_errors_of_float32_row_by_row() -> None:
    decoder = sharp()
    session, asked = TorchSession(decoder), scenarios(TINY)
    with in_float32(session) as noisy:
        limits = measure_limits(logits_by_row(session, asked), noisy, "fp32", asked)
    found = []
    for scenario in asked:
        for one, other in zip(observe(session, scenario), observe(torch_single(decoder), scenario), strict=True):
            error = compare_rows(one.logits, other.logits).relative_l2
            found.append((error / limits.noise_of(key_of(scenario, one)), error))
    quotients, errors = (np.array(column) for column in zip(*found, strict=True))
    assert errors.max() / np.median(errors) > 5  # steep rows there are
    assert quotients.max() < NOISE_SAFETY / 1.5 and 0.2 < np.median(quotients) < 3
    assert np.corrcoef(np.log(errors), np.log(errors / quotients))[0, 1] > 0.7


def torch_single(decoder: Decoder) -> TorchSession:
    state = decoder.state_dict()
    return TorchSession(Decoder.from_tensors(decoder.config, state.__getitem__, torch.float32))


def test_half_precisions_are_measured_with_their_own_roundings() -> None:
    session = TorchSession(sharp())
    with in_float32(session) as noisy:
        expected = logits_by_row(session, [ROW])
        found = [measure_limits(expected, noisy, one, [ROW]) for one in ("fp32", "fp16", "bf16")]
    single, half, brain = (float(np.median(list(one.noise.values()))) for one in found)
    assert 1e3 < half / single < 1e5 and brain > 3 * half


def test_a_row_is_found_again_however_it_is_asked() -> None:
    session = TorchSession(sharp())
    with in_float32(session) as noisy:
        limits = measure_limits(logits_by_row(session, [ROW]), noisy, "fp32", [ROW])
    in_steps = replace(ROW, num_prompt=(1,))
    for one in observe(session, in_steps):
        assert key_of(in_steps, one) in limits.noise
    other = replace(ROW, start=5)
    assert key_of(other, replace(observe(session, ROW)[0], position=5)) not in limits.noise


def test_what_was_not_measured_is_taken_to_be_the_steepest() -> None:
    key, other = Key(b"a", 0, 0), Key(b"b", 0, 0)
    limits = RowLimits.of_noise(TINY, "fp32", {key: 1e-4, Key(b"c", 0, 0): 1e-9})
    assert limits.of(other) == limits.worst == limits.of(key) == NOISE_SAFETY * 1e-4
    assert limits.of(Key(b"c", 0, 0)) == FLOOR * expected_noise(TINY, "fp32")
    assert limits.conditioning == pytest.approx(1e-4 / expected_noise(TINY, "fp32"))


def test_no_model_is_so_steep_that_a_part_may_be_wrong() -> None:
    steepest = RowLimits.of_noise(TINY, "fp16", {Key(b"a", 0, 0): LARGEST_NOISE})
    assert steepest.conditioning == LARGEST_CONDITIONING < LARGEST_NOISE / expected_noise(TINY, "fp16")


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_rows_that_overflow_float32_are_as_noisy_as_can_be_and_not_without_limit() -> None:
    session = TorchSession(Decoder.from_tensors(TINY, dict(random_tensors(TINY, 0)).__getitem__, torch.float64))
    exact = {key: values.astype(np.float64) for key, values in logits_by_row(session, [ROW]).items()}
    with in_float32(session) as noisy:
        noisy.decoder.norm.weight.data *= 3e38
        limits = measure_limits(exact, noisy, "fp32", [ROW])
    assert set(limits.noise.values()) == {LARGEST_NOISE} and limits.worst == NOISE_SAFETY * LARGEST_NOISE


@pytest.mark.parametrize("config", [TINY, THREE, TIED], ids=["two", "three", "tied"])
def test_one_pass_over_whole_rows_gives_what_steps_give(config: ModelConfig, tmp_path: Path) -> None:
    session = torch_session(write_random(tmp_path / "m", config, 0), "fp64")
    wanted = [
        *scenarios(config),
        Scenario("late", (np.arange(7),), (3,), start=9),
        replace(scenarios(config)[0], watched_from=20),
    ]
    logits = logits_by_row(session, wanted)
    for scenario in wanted:
        for one, other in zip(observations_of(scenario, logits, config), observe(session, scenario), strict=True):
            assert (one.row, one.position, one.predicted) == (other.row, other.position, other.predicted)
            np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-6)


class Tilted(TorchSession):
    """Errors of a given size in flat rows alone: too small for a limit that the steepest row sets."""

    size = 0.0
    flat: frozenset[int] = frozenset()

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        places = inputs.cache_position[inputs.logits_index // inputs.input_ids.shape[1]]
        places = places + inputs.logits_index % inputs.input_ids.shape[1]
        signs = np.where(np.arange(logits.shape[1]) % 2, 1, -1) * self.size
        return np.where(np.isin(places, list(self.flat))[:, None], logits * (1 + signs), logits)


def test_a_fault_that_the_steepest_row_would_hide_is_seen_in_a_flat_one() -> None:
    session = TorchSession(sharp())
    scenario = scenarios(TINY)[0]
    said = observe(session, scenario)
    with in_float32(session) as noisy:
        limits = measure_limits(logits_by_row(session, [scenario]), noisy, "fp32", [scenario])
    by_limit = sorted(said, key=lambda one: limits.of(key_of(scenario, one)))
    flattest = by_limit[0]
    own = limits.of(key_of(scenario, flattest))
    assert limits.worst > 4 * own
    tilted = Tilted(session.decoder)
    tilted.size, tilted.flat = (own * limits.worst) ** 0.5, frozenset([flattest.position])
    (failed,) = failures(tilted, scenario, said, limits)
    assert "rounding alone moves this row by" in failed and f"position {flattest.position}" in failed
    tilted.size = own / 2
    assert not failures(tilted, scenario, said, limits)


def failures(session: TorchSession, scenario: Scenario, said: list[Observation], limits: RowLimits) -> list[str]:
    findings = agreement_findings(session, compare(session, [(scenario, said)], limits))
    return [one.detail for one in findings if one.outcome is Outcome.FAIL]


def test_rows_so_steep_that_a_fault_could_hide_are_undecided_and_not_passed(tiny_checkpoint: Path) -> None:
    session = torch_session(tiny_checkpoint, "fp64")
    said = [replace(one, logits=-one.logits) for one in observe(session, ROW)]
    limits = RowLimits.of_noise(TINY, "fp32", {})
    wide = replace(limits, worst=10.0, steepest=1.0)
    findings = agreement_findings(session, compare(session, [(ROW, said)], wide))
    assert all(one.outcome is Outcome.AMBIGUOUS and "so steep" in one.detail for one in findings)


def test_large_logits_may_be_off_by_more_in_float32_and_small_ones_by_a_thousandth(tiny_checkpoint: Path) -> None:
    session = torch_session(tiny_checkpoint, "fp32")
    exact = torch_session(tiny_checkpoint, "fp64")
    said = observe(exact, ROW)
    limits = RowLimits.of_noise(TINY, "fp32", {key_of(ROW, one): 1.0 for one in said})
    assert not failures(session, ROW, said, limits)
    off = [replace(one, logits=one.logits + np.eye(1, len(one.logits), 0)[0] * 2e-3) for one in said]
    tight = RowLimits.of_noise(TINY, "fp32", {key_of(ROW, one): 1e-3 for one in said})
    assert not failures(session, ROW, off, tight)  # which the row's own noise explains
    assert failures(session, ROW, off, RowLimits.of_noise(TINY, "fp32", {key_of(ROW, one): 1e-9 for one in said}))
