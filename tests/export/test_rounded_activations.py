"""8-bit activations that a model does not bear are a loss, and said to be; faults are faults, in such a model too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from motrt.errors import ParityError
from motrt.export.bundle_from_checkpoint import QuantizeOptions, export_bundle
from motrt.export.parity.findings import LOSS, Finding, Outcome, Report
from motrt.export.parity.gate import Subject, climb
from motrt.export.parity.rounded_activations import explained_limit, told_apart
from motrt.export.quantize import rounded_to_8_bits
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.quantization import scales_of
from motrt.runtime.bundle import open_bundle
from motrt.runtime.onnx_session import OnnxSession
from motrt.tests.export.models import ONE, TINY, load_whole, save_whole, with_changed_weights

TWO, SINGLE = TINY.replace(num_layers=1), ONE.replace(num_layers=1)

MakeCheckpoint = Callable[[ModelConfig], Path]
CHANNEL, FACTOR = 7, 30.0
READ_IT = (".wq.", ".wk.", ".wv.", ".w1.", ".w3.", ".down_proj.")


def outlying(name: str, value: torch.Tensor) -> torch.Tensor:
    """One channel of each norm much larger, and the columns behind it as much smaller: the same function."""
    changed = value.clone()
    if name.endswith("_norm.weight"):
        changed[CHANNEL] *= FACTOR
    elif any(part in name for part in READ_IT):
        changed[:, CHANNEL] /= FACTOR
    return changed


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as it is drawn, and one of the same function with an outlying channel; one with a single modality."""
    folder = tmp_path_factory.mktemp("outlying")
    plain, one = make_checkpoint(TWO), make_checkpoint(SINGLE)
    return {
        "plain": plain,
        "outlying": with_changed_weights(plain, folder / "two", outlying),
        "outlying, one": with_changed_weights(one, folder / "one", outlying),
    }


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """int4 of each, not verified."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, checkpoint in checkpoints.items():
        export_bundle(checkpoint, folder / name, "int4", verify=False)
    return {name: folder / name for name in checkpoints}


def climbed(bundle: Path, checkpoint: Path, told: Path | None = None) -> Report:
    """The ladder's report of ``bundle``, whose manifest lies in ``told`` where it was doctored."""
    manifest = open_bundle(told or bundle).manifest
    subject = Subject(bundle / "model.onnx", manifest.config, manifest.precision, {}, (), manifest.quantization)
    return climb(subject, open_checkpoint(checkpoint), Steps())


@pytest.mark.parametrize(("name", "precision"), [("outlying", "int8"), ("outlying, one", "int4")])
def test_rounding_that_a_model_does_not_bear_is_a_loss_with_a_remedy(
    name: str, precision: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="is the model in a format that loses too much of it") as caught:
        export_bundle(checkpoints[name], tmp_path / "b", precision)
    report: Any = caught.value.report
    (failed,) = [one for one in report["findings"] if one["outcome"] == "FAIL"]
    assert failed["rung"] == LOSS and "is not the model" not in str(caught.value)
    for words in ("8 bits", "The graph is right", "--part", "--precision fp16"):
        assert words in failed["detail"]
    # PyTorch with the same rounding says how much: not another number, but this one.
    assert failed["figures"]["rounding_error"] == pytest.approx(failed["figures"]["relative_l2_max"], rel=0.3)
    assert failed["figures"]["relative_l2_max"] > failed["figures"]["limit"]
    assert not (tmp_path / "b").exists()


def test_the_remedy_that_is_named_helps(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    parts = ("attention=none", "expert=none")
    made = export_bundle(checkpoints["outlying"], tmp_path / "b", "int8", quantize_options=QuantizeOptions(parts=parts))
    assert made.report is not None and made.report.verdict in (Outcome.PASS, Outcome.AMBIGUOUS)


def test_a_fault_in_such_a_model_is_a_fault(bundles: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = load_whole(bundles["outlying"])
    first, second = (scales_of(f"layers.0.feed_forward.text.{name}.weight") for name in ("w1", "w3"))
    other = {first: second, second: first}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in other:
            node.input[0] = other[node.input[0]]
    onnx.checker.check_model(model)
    save_whole(model, tmp_path / "b")
    report = climbed(tmp_path / "b", checkpoints["outlying"], bundles["outlying"])
    assert not report.only_loses
    assert any(one.rung == "P4" and one.outcome is Outcome.FAIL for one in report.findings)
    with pytest.raises(ParityError, match="is not torch"):
        report.raise_on_failure()


@pytest.mark.parametrize(("name", "fault"), [("plain", "leaking"), ("plain", "not a number"), ("outlying", "turned")])
def test_rounded_products_that_are_wrong_are_a_fault_whatever_the_model_bears(
    name: str, fault: str, bundles: dict[str, Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only as deployed: with activations as they are nothing is wrong."""
    real = OnnxSession.execute

    def wrong(self: OnnxSession, *arguments: Any) -> Any:
        logits = real(self, *arguments)
        if self.activation_block is None:
            return logits
        if fault == "leaking":
            return np.where(np.isneginf(logits), np.float32(-30), logits)
        return np.where(np.isfinite(logits), -logits if fault == "turned" else np.float32("nan"), logits)

    monkeypatch.setattr(OnnxSession, "execute", wrong)
    report = climbed(bundles[name], checkpoints[name])
    failed = {(one.rung, "activations rounded" in one.question) for one in report.failed}
    assert ("P4", True) in failed and ("P4", False) not in failed and not report.only_loses


def asked(outcome: Outcome, question: str = "text, prefill", error: float = 0.2) -> Finding:
    return Finding("P4", question, outcome, f"relative L2 {error} over 0.05", {"relative_l2_max": error, "limit": 0.05})


def test_only_what_rounding_explains_is_put_down_to_it() -> None:
    found = [asked(Outcome.FAIL), asked(Outcome.FAIL, "audio, prefill", 0.9), asked(Outcome.PASS, "audio, early decode", 0.01)]
    explained = [
        asked(Outcome.PASS),
        asked(Outcome.FAIL, "audio, prefill", 0.9),
        asked(Outcome.PASS, "audio, early decode", 0.01),
    ]
    said = told_apart(found, explained, 0.1, 32)
    assert [(one.rung, one.outcome) for one in said] == [
        ("P4", Outcome.PASS),
        ("P4", Outcome.FAIL),
        ("P4", Outcome.PASS),
        (LOSS, Outcome.FAIL),
    ]
    assert not Report("b", "r", tuple(said), 0.0).only_loses
    assert told_apart(found[1:], explained[1:], 0.1, 32) == found[1:]


def test_rounding_that_makes_no_numbers_explains_nothing() -> None:
    assert explained_limit(float("inf")) is None and explained_limit(float("nan")) is None


def test_a_report_that_only_loses_says_so() -> None:
    lost = Finding(LOSS, "text: quantisation loses little", Outcome.FAIL, "mean KL 3 nats over 0.5")
    with pytest.raises(ParityError, match="computes what PyTorch says, in a format that loses too much"):
        Report("onnxruntime", "PyTorch", (asked(Outcome.PASS), lost), 0.0).raise_on_failure()
    with pytest.raises(ParityError, match="is not PyTorch"):
        Report("onnxruntime", "PyTorch", (asked(Outcome.FAIL), lost), 0.0).raise_on_failure()


@pytest.mark.parametrize(("width", "block"), [(64, 32), (24, 32), (33, 16)])
def test_a_block_is_rounded_by_its_own_largest_magnitude(width: int, block: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = rounded_to_8_bits(x, block)
    for row, came in zip(x, rounded, strict=True):
        for start in range(0, width, block):
            step = row[start : start + block].abs().max() / 127
            part, got = row[start : start + block], came[start : start + block]
            assert (got / step - (got / step).round()).abs().max() < 1e-9 and (part - got).abs().max() <= 0.5001 * step
    assert rounded_to_8_bits(x[:0], block).shape == (0, width)
