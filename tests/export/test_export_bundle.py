"""An export gives a bundle that is proven, or nothing at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motrt.errors import BackendError, BundleError, CheckpointError, ExportError, ParityError, UntrainedRowsError
from motrt.export import bundle_from_checkpoint
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.onnx_check import check_onnx
from motrt.export.parity.findings import Outcome
from motrt.export.steps import Advance, Steps, Unit
from motrt.export.verification import verify_bundle
from motrt.model_def.checkpoint.native import write_checkpoint
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.model_def.head_surgery import with_head
from motrt.model_def.initialize import random_tensors
from motrt.runtime.bundle import open_bundle
from motrt.runtime.known_answer import check_answer
from motrt.runtime.load import load
from motrt.runtime.onnx_session import OnnxSession
from motrt.tests.export.models import EQUAL, ONE, THREE, TIED, TINY, torch_session, with_changed_weights, write_random

MakeCheckpoint = Callable[[ModelConfig], Path]
MakeBundle = Callable[..., Path]


def leftovers(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


# The bundle, proven.

GOOD = {"tiny": TINY, "equal experts": EQUAL, "one modality": ONE, "three modalities": THREE, "tied, not routed, normed": TIED}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_export_passes_and_its_bundle_says_so(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = export_bundle(make_checkpoint(GOOD[name]), tmp_path / "b")
    assert made.report is not None and made.report.verdict is Outcome.PASS
    assert leftovers(tmp_path) == ["b"]
    manifest = open_bundle(tmp_path / "b", "hash").manifest
    assert manifest.parity is not None and manifest.parity["verdict"] == "PASS"
    assert manifest.parity["files"] == {name: one.sha256 for name, one in manifest.files.items()}
    assert {one.rung for one in made.report.findings} == {"P1", "P2", "P3", "P4", "P5"}
    with load(tmp_path / "b") as session:
        assert len(list(session.generate([1, 2, 3], max_tokens=4))) == 4


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_weights_raise_no_false_alarm(seed: int, tmp_path: Path) -> None:
    made = export_bundle(write_random(tmp_path / "model", TINY, seed), tmp_path / "b")
    assert made.report is not None and made.report.verdict is Outcome.PASS


def test_a_half_precision_export_passes_or_has_near_ties(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = export_bundle(make_checkpoint(TINY), tmp_path / "b", "fp16")
    assert made.report is not None and made.report.verdict in (Outcome.PASS, Outcome.AMBIGUOUS)
    assert {one.rung for one in made.report.findings if one.outcome is Outcome.AMBIGUOUS} <= {"P2", "P4", "P5"}


def test_verify_says_again_what_the_export_said(make_bundle: MakeBundle) -> None:
    report = verify_bundle(make_bundle(TINY))
    assert report.verdict is Outcome.PASS
    json.dumps(report.to_dict(), allow_nan=False)


def test_verify_wants_the_checkpoint_that_the_bundle_was_made_of(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its hash differs"):
        verify_bundle(make_bundle(TINY), write_random(tmp_path / "other", TINY, seed=9))


def test_a_shared_head_exported_split_has_identical_logits(make_bundle: MakeBundle, tmp_path: Path) -> None:
    weights = dict(random_tensors(TINY, 0))
    shared, read = with_head(TINY, weights.__getitem__, "shared")
    write_checkpoint(tmp_path / "shared", shared, ((name, read(name)) for name in weights_of(shared)), "float32")
    bundle = export_bundle(tmp_path / "shared", tmp_path / "b", verify=False).bundle
    assert bundle.config.head == "split"
    prompts, after = [[1, 2, 100, 3], [97, 98]], ["audio", "text"]
    with load(make_bundle(TINY)) as one, load(tmp_path / "b") as other:
        assert np.array_equal(one.prefill(prompts, after)[0], other.prefill(prompts, after)[0])


def weights_of(config: ModelConfig) -> list[str]:
    return [name for name, _ in random_tensors(config, 0)]


# A longer or shorter sequence.


@pytest.mark.parametrize("length", [1, 300])
def test_another_longest_sequence_is_proven_at_that_length(
    length: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    config = TINY.replace(num_layers=1)
    made = export_bundle(make_checkpoint(config), tmp_path / "b", max_seq_len=length)
    assert made.bundle.config == config.replace(max_seq_len=length)
    assert made.report is not None and made.report.verdict is Outcome.PASS
    load(tmp_path / "b", check="answer").close()


def test_positions_beyond_the_checkpoints_own_length_are_rotated_as_those_within(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    config = TINY.replace(num_layers=1)
    export_bundle(make_checkpoint(config), tmp_path / "b", max_seq_len=300, verify=False)
    prompt = [(7 * index) % 96 for index in range(250)]
    with load(tmp_path / "b") as graph, load(make_checkpoint(config.replace(max_seq_len=300)), backend="torch") as reference:
        np.testing.assert_allclose(graph.prefill([prompt], "text")[0], reference.prefill([prompt], "text")[0], atol=1e-5)


@pytest.mark.parametrize("length", [0, -1, (1 << 20) + 1])
def test_a_length_out_of_bounds_is_refused(length: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--max-seq-len must be in 1\.\.1048576"):
        export_bundle(tiny_checkpoint, tmp_path / "b", max_seq_len=length)
    assert leftovers(tmp_path) == []


# Precisions.


def test_bfloat16_can_not_be_proven_here_and_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="--no-verify"):
        export_bundle(tiny_checkpoint, tmp_path / "b", "bf16")
    assert leftovers(tmp_path) == []


def test_bfloat16_unproven_is_written_checked_and_marked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(tiny_checkpoint, tmp_path / "b", "bf16", verify=False)
    assert made.report is None and made.bundle.manifest.parity is None
    answer = made.bundle.manifest.answer
    assert answer is not None
    check_answer(torch_session(tiny_checkpoint, "bf16"), answer, {})  # no processor runs it, and it knows what it must say
    assert check_onnx(made.bundle.model_path, TINY, "bfloat16")["Attention"] == TINY.num_layers
    with pytest.raises(BackendError, match="bfloat16"):
        verify_bundle(tmp_path / "b")


def test_an_unknown_precision_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fp32, fp16, bf16, int8, int4, fp8 \('int3' came\)"):
        export_bundle(tiny_checkpoint, tmp_path / "b", "int3")
    assert leftovers(tmp_path) == []


def test_a_weight_too_large_for_half_precision_is_named_and_nothing_is_left(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def grow(name: str, value: torch.Tensor) -> torch.Tensor:
        return value * 1e7 if name == "output.text.weight" else value

    with_changed_weights(tiny_checkpoint, tmp_path / "model", grow)
    with pytest.raises(ExportError, match=r"output\.text\.weight does not fit float16"):
        export_bundle(tmp_path / "model", tmp_path / "b", "fp16")
    assert leftovers(tmp_path) == ["model"]


# Weights that can not be right.


def without_audio(name: str, value: torch.Tensor) -> torch.Tensor:
    if name == "tok_embeddings.weight":
        value = value.clone()
        value[96:] = 0
    return torch.zeros_like(value) if name == "output.audio.weight" else value


def test_untrained_rows_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with_changed_weights(tiny_checkpoint, tmp_path / "model", without_audio)
    with pytest.raises(UntrainedRowsError) as caught:
        export_bundle(tmp_path / "model", tmp_path / "b")
    assert str(caught.value).count("audio rows 96 to 127") == 2
    assert leftovers(tmp_path) == ["model"]


def test_untrained_rows_can_be_allowed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with_changed_weights(tiny_checkpoint, tmp_path / "model", without_audio)
    made = export_bundle(tmp_path / "model", tmp_path / "b", allow_untrained=True)
    assert made.report is not None and made.report.verdict is not Outcome.FAIL


def test_weights_that_are_no_numbers_are_refused_whatever_is_allowed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        return value * float("nan") if name == "layers.1.attention.wo.audio.weight" else value

    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wo\.audio\.weight"):
        with_changed_weights(tiny_checkpoint, tmp_path / "model", spoil)
        export_bundle(tmp_path / "model", tmp_path / "b", allow_untrained=True)
    assert "b" not in leftovers(tmp_path)


# What goes wrong leaves nothing.


def test_a_graph_that_is_not_the_model_leaves_no_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = bundle_from_checkpoint.attach_weights  # type: ignore[attr-defined]
    other = {"layers.0.attention.wk.text.weight": "layers.0.attention.wv.text.weight"}

    def attach_wrongly(model: Any, config: ModelConfig, dtype: str, read: Callable[[str], torch.Tensor]) -> None:
        attach(model, config, dtype, lambda name: read(other.get(name, name)))

    monkeypatch.setattr(bundle_from_checkpoint, "attach_weights", attach_wrongly)
    with pytest.raises(ParityError, match=r"no bundle was made:\n.*P1.*1 of \d+ differ.*wk\.text\.weight") as caught:
        export_bundle(tiny_checkpoint, tmp_path / "b")
    assert leftovers(tmp_path) == []
    assert caught.value.report is not None
    assert caught.value.report["verdict"] == "FAIL"
    failed = {one["rung"] for one in caught.value.report["findings"] if one["outcome"] == "FAIL"}
    assert {"P1", "P4"} <= failed


def test_a_graph_that_says_nan_is_a_failed_proof(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = OnnxSession.execute

    def execute_without_numbers(self: OnnxSession, *arguments: Any) -> Any:
        return execute(self, *arguments) * np.nan

    monkeypatch.setattr(OnnxSession, "execute", execute_without_numbers)
    with pytest.raises(ParityError) as caught:
        export_bundle(tiny_checkpoint, tmp_path / "b")
    assert caught.value.report is not None
    assert {one["rung"] for one in caught.value.report["findings"] if one["outcome"] == "FAIL"} >= {"P2", "P3", "P4", "P5"}
    assert leftovers(tmp_path) == []


STEPS = (
    "look at the weights",
    "hash the checkpoint",
    "trace the graph",
    "write the weights",
    "check the graph",
    "hash the bundle",
    "P1 contract and weights",
    "reference in PyTorch",
    "P2 self-consistency",
    "P3 routing laws",
    "P4 agreement with the reference",
    "P5 generation",
    "known answer",
)


class Interrupted(Steps):
    """Ends the run at the end of one step."""

    def __init__(self, title: str, failure: BaseException) -> None:
        super().__init__()
        self.title, self.failure = title, failure

    @contextmanager
    def drawn(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        yield lambda count: None
        if title == self.title:
            raise self.failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("a bug")], ids=["interrupted", "crashed"])
def test_a_run_that_ends_anywhere_leaves_nothing_and_the_next_one_succeeds(
    failure: BaseException, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for title in STEPS:
        with pytest.raises(type(failure)):
            export_bundle(tiny_checkpoint, tmp_path / "b", steps=Interrupted(title, failure))
        assert leftovers(tmp_path) == [], title
    made = export_bundle(tiny_checkpoint, tmp_path / "b")
    assert tuple(made.seconds) == STEPS  # so that the loop above has seen every one of them


def test_what_a_killed_run_left_is_cleared_by_the_next(tiny_checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".b.partial"
    partial.mkdir()
    (partial / "model.onnx.data").write_bytes(b"half")
    assert export_bundle(tiny_checkpoint, tmp_path / "b", verify=False).bundle.config == TINY
    assert leftovers(tmp_path) == ["b"]


def test_nothing_is_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("precious")
    with pytest.raises(ExportError, match="exists already"):
        export_bundle(tiny_checkpoint, tmp_path / "b")
    assert leftovers(tmp_path / "b") == ["mine"]


def test_a_tokenizer_that_can_not_be_read_is_refused_before_anything_is_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="mend the checkpoint's"):
        export_bundle(tmp_path / "model", tmp_path / "b")
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_the_smallest_model_has_its_weights_outside_the_graph(tmp_path: Path) -> None:
    smallest = ModelConfig(
        model_width=4,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=4,
        max_seq_len=8,
        head="shared",
        modalities=(Modality("text", 5, SwigluExpert(4)),),
    )
    write_random(tmp_path / "model", smallest, seed=0)
    exported = export_bundle(tmp_path / "model", tmp_path / "b")
    assert exported.report is not None
    assert exported.report.verdict is Outcome.PASS
