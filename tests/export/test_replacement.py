"""What the laws replace is really replaced, in every form that weights are stored in."""

from pathlib import Path

import numpy as np
import pytest

from motrt.export.parity.gate import Subject
from motrt.export.parity.routing_laws import swap_finding
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.model_def.parameters import parameters
from motrt.runtime.bundle import open_bundle
from motrt.tests.conftest import MakeBundle

TINY = ModelConfig.tiny().replace(num_layers=1)
EQUAL = TINY.replace(
    modalities=(Modality("text", 96, SwigluExpert(96, bias=True)), Modality("audio", 32, SwigluExpert(96, bias=True)))
)
PROMPT = [1, 2, 3]


def subject_of(path: Path) -> Subject:
    manifest = open_bundle(path).manifest
    return Subject(path / "model.onnx", manifest.config, manifest.precision, {}, quantization=manifest.quantization)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_poison_is_seen_where_a_weight_is_used_and_nowhere_else(precision: str, make_bundle: MakeBundle) -> None:
    """Every weight by itself: a law that is seen through poison which nobody took would always hold."""
    subject = subject_of(make_bundle(TINY, precision))
    with subject.open(1) as session:
        good = session.prefill([PROMPT], "text")[0][0, :96]
    for one in parameters(TINY):
        if one.part not in ("attention", "expert", "head"):
            continue
        with subject.replacement(1).with_poison([one]) as poisoned:
            came = poisoned.prefill([PROMPT], "text")[0][0, :96]
        if one.modality == "text":
            assert np.isnan(came).any(), one.name
        else:
            np.testing.assert_array_equal(came, good, err_msg=one.name)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_equal_experts_can_be_swapped(precision: str, make_bundle: MakeBundle) -> None:
    subject = subject_of(make_bundle(EQUAL, precision))
    with subject.open(1) as session:
        finding = swap_finding(session, subject.replacement(1))
    assert finding.outcome.value == "PASS", finding
