"""8-bit activations that move a model far are a loss and no fault; faults are faults, in such a model too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from motrt.errors import LossError, ParityError
from motrt.export.bundle_from_checkpoint import QuantizeOptions, export_bundle
from motrt.export.parity.findings import LOSS, Finding, Outcome, Report
from motrt.export.parity.gate import Subject, climb
from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.quantization_loss import deployed_decoder
from motrt.export.parity.scenarios import observe, scenarios
from motrt.export.quantize import rounded_to_8_bits
from motrt.export.steps import Steps
from motrt.export.verification import subject_of
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.quantization import scales_of
from motrt.runtime.bundle import open_bundle
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.torch_session import TorchSession
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
def test_rounding_that_moves_a_model_far_is_no_fault(
    name: str, precision: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The reference rounds as the graph does: what is left is far less than the rounding itself."""
    report = export_bundle(checkpoints[name], tmp_path / "b", precision, max_loss=10.0).report
    assert report is not None and report.verdict is not Outcome.FAIL and report.loss == "within"
    rounded = [
        float(one.figures["relative_l2_max"])
        for one in report.findings
        if is_rounded(one) and one.rung == "P4" and "limit" in one.figures
    ]
    lost = largest_loss(tmp_path / "b", checkpoints[name])
    assert lost > 0.05 and max(rounded) < lost


def is_rounded(finding: Finding) -> bool:
    return "activations rounded" in finding.question


def largest_loss(bundle: Path, checkpoint: Path) -> float:
    """The largest relative L2 error that rounded activations make, in PyTorch."""
    opened = open_bundle(bundle)
    weights = subject_of(opened).weights()
    assert weights is not None
    rows = scenarios(opened.config)
    blocks = weights.quantization.activation_blocks(opened.config)
    with (
        TorchSession(deployed_decoder(opened.config, weights.read, {})) as exact,
        TorchSession(deployed_decoder(opened.config, weights.read, blocks)) as rounded,
    ):
        pairs = [(a, b) for one in rows for a, b in zip(observe(exact, one), observe(rounded, one), strict=True)]
    return max(compare_rows(a.logits, b.logits).relative_l2 for a, b in pairs)


def test_a_loss_over_its_budget_names_the_parts_that_lose_most(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LossError, match="is the model, in a format that loses more of it than --max-loss") as caught:
        export_bundle(checkpoints["plain"], tmp_path / "b", "int4", max_loss=1e-6)
    report: Any = caught.value.report
    assert report["verdict"] in ("PASS", "AMBIGUOUS") and report["loss"] == "over"
    failed = [one for one in report["findings"] if one["outcome"] == "FAIL"]
    assert {one["rung"] for one in failed} == {LOSS}
    for words in ("expert.text", "attention.audio", "head.text", "embedding", "activations", "--part", "--max-loss"):
        assert words in failed[0]["detail"]
    assert not (tmp_path / "b").exists()


def test_a_part_that_is_not_quantized_loses_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    parts = QuantizeOptions(parts=("attention=none", "expert=none", "head=none", "embedding=int8"))
    with pytest.raises(LossError) as caught:
        export_bundle(checkpoints["plain"], tmp_path / "b", "int8", quantize_options=parts, max_loss=1e-12)
    assert "quantized alone loses embedding" in str(caught.value) and "expert" not in str(caught.value)


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
    with pytest.raises(ParityError, match="is not torch") as caught:
        report.raise_on_failure()
    assert not isinstance(caught.value, LossError)


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


def asked(outcome: Outcome, rung: str = "P4") -> Finding:
    return Finding(rung, "text, prefill", outcome, "much")


def test_a_loss_is_no_fault_and_a_fault_no_loss() -> None:
    def report(*findings: Finding) -> Report:
        return Report("onnxruntime", "PyTorch", findings, 0.0)

    right, wrong, lost, kept = asked(Outcome.PASS), asked(Outcome.FAIL), asked(Outcome.FAIL, LOSS), asked(Outcome.PASS, LOSS)
    assert [
        (one.verdict, one.loss) for one in (report(right), report(right, kept), report(right, lost), report(wrong, lost))
    ] == [
        (Outcome.PASS, None),
        (Outcome.PASS, "within"),
        (Outcome.PASS, "over"),
        (Outcome.FAIL, "over"),
    ]
    with pytest.raises(LossError, match="computes what PyTorch says, in a format that loses more of this model"):
        report(right, lost).raise_on_failure()
    with pytest.raises(ParityError, match="is not PyTorch") as caught:
        report(wrong, lost).raise_on_failure()
    assert not isinstance(caught.value, LossError)
    report(right, kept).raise_on_failure()


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
