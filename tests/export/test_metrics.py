"""How two rows differ, and what follows from it: no value that is no number may slip through."""

import json
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motrt.export.parity.agreement import Compared, agreement_findings
from motrt.export.parity.findings import Finding, Outcome, Report
from motrt.export.parity.metrics import compare_rows, summary
from motrt.export.parity.scenarios import Observation
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.runtime.tolerances import relative_l2_limit
from motrt.runtime.torch_session import TorchSession

rows = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30).map(np.array)


@given(rows)
def test_a_row_equals_itself(row: np.ndarray) -> None:
    same = compare_rows(row, row)
    assert (same.relative_l2, same.max_abs, same.mean_square, same.same_top_1, same.top_k_overlap) == (0, 0, 0, True, 1)
    assert same.kl == pytest.approx(0, abs=1e-9)


@given(rows, st.sampled_from([nan, inf, -inf]), st.data())
def test_a_value_that_is_no_number_differs_infinitely_on_either_side(
    row: np.ndarray, value: float, data: st.DataObject
) -> None:
    spoilt = row.copy()
    spoilt[data.draw(st.integers(0, len(row) - 1))] = value
    for one, other in ((row, spoilt), (spoilt, row), (spoilt, spoilt)):
        found = compare_rows(one, other)
        assert found.relative_l2 == inf and not found.same_top_1
        worst = summary([compare_rows(row, row), found, compare_rows(row, row)])
        assert worst["relative_l2_max"] == inf


def test_the_measures_of_a_known_pair() -> None:
    found = compare_rows(np.array([3.0, 4.0, 0.0]), np.array([3.0, 4.0, 5.0]))
    assert found.relative_l2 == 1.0
    assert found.max_abs == 5.0 and found.mean_abs == pytest.approx(5 / 3) and found.mean_square == pytest.approx(25 / 3)
    assert found.margin == 1.0 and not found.same_top_1
    assert found.cosine == pytest.approx(25 / (5 * 50**0.5))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array([3.0, 4.0, 0.0]), np.array([3.0, 4.0, 5.0])))
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()))


def compared_rows(at: int, expected: np.ndarray, actual: np.ndarray, limit: float, noise: float = 0.0) -> Compared:
    rms = float(np.sqrt(np.mean(expected**2)))
    observation = Observation(0, at, 0, "prefill", actual, 0)
    return Compared("s", observation, compare_rows(expected, actual), rms, noise, limit)


def judged(expected: list[float], came: list[float], others: float = 0.0) -> Finding:
    """One row's finding, in a model whose other row had an error of ``others``."""
    config = ModelConfig.tiny()
    session = TorchSession(Decoder.from_tensors(config, dict(random_tensors(config, 0)).__getitem__))
    made = [(np.array(expected), np.array(came)), (np.array([1.0, 0.0]), np.array([1.0, others]))]
    limit = relative_l2_limit(config, "fp32")
    compared = [compared_rows(at, one, two, limit) for at, (one, two) in enumerate(made)]
    (finding,) = agreement_findings(session, compared)
    return finding


def test_another_best_id_is_a_near_tie_only_where_the_noise_could_do_it() -> None:
    limit = relative_l2_limit(ModelConfig.tiny(), "fp32")
    tie, clear = limit / 4, limit / 2
    assert judged([1.0, 1.0 - tie], [1.0, 1.0 + tie]).outcome is Outcome.AMBIGUOUS
    assert judged([1.0, 1.0 - tie], [1.0, 1.0 - tie / 2]).outcome is Outcome.PASS
    # A wide row, so that one logit may move far within the limit while the noise of all is small.
    wide = [0.0] * 998
    found = judged([1.0, 1.0 - clear, *wide], [1.0, 1.0 + clear / 4, *wide])
    assert found.outcome is Outcome.FAIL and "in spite of a margin" in found.detail


def test_an_id_outside_the_range_that_is_not_minus_infinity_fails() -> None:
    config = ModelConfig.tiny()
    session = TorchSession(Decoder.from_tensors(config, dict(random_tensors(config, 0)).__getitem__))
    row = np.array([1.0, 2.0])
    (finding,) = agreement_findings(
        session, [Compared("s", Observation(0, 0, 0, "prefill", row, 3), compare_rows(row, row), 1.0, 0.0, 1e-6)]
    )
    assert finding.outcome is Outcome.FAIL and "3 ids outside the range" in finding.detail


def test_a_report_is_strict_json_and_its_verdict_the_worst_finding() -> None:
    found = [Finding("P4", "q", outcome, "", {"x": inf, "y": nan, "z": 1}) for outcome in Outcome]
    report = Report("b", "r", tuple(found), 1.0).to_dict()
    assert report["verdict"] == "FAIL"
    assert json.loads(json.dumps(report, allow_nan=False))["findings"][0]["figures"] == {"x": "inf", "y": "nan", "z": 1}
    assert Report("b", "r", tuple(found[:2]), 1.0).verdict is Outcome.AMBIGUOUS
    assert Report("b", "r", (found[0], found[3]), 1.0).verdict is Outcome.PASS
