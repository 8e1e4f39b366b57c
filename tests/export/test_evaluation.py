"""An evaluation gives the perplexity of PyTorch's own cross entropy, tells two models apart, and keeps what it found."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models

import motrt
from motrt.cli import main
from motrt.errors import BundleError, InputError, ParityError
from motrt.export.evaluation import EvaluateOptions, evaluate, log_probabilities, measure
from motrt.export.inspection import inspect
from motrt.export.verification import verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint, write_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import init_checkpoint, random_tensors
from motrt.runtime.bundle import MANIFEST_FILE, open_bundle, record_evaluation
from motrt.runtime.evaluation_record import Evaluation, ModalityFigures
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.torch_session import TorchSession
from motrt.tests.conftest import MakeBundle
from motrt.tests.runtime.test_bundle import rewrite

CONFIG = ModelConfig.tiny()
TEXT_ROWS = CONFIG.modalities[0].vocab_size
IDS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 100)


def write_lines(path: Path, *sequences: Any) -> Path:
    path.write_text("".join(json.dumps(np.asarray(one).tolist()) + "\n" for one in sequences))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "ids.jsonl", IDS)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "model"
    init_checkpoint(out, CONFIG, seed=9)
    return out


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "b"))


def reference_logits(checkpoint: Path, ids: np.ndarray) -> torch.Tensor:
    """Logits of the whole chunk in one plain forward pass, [s, v]."""
    opened = open_checkpoint(checkpoint)
    with TorchSession(Decoder.from_tensors(opened.config, opened.read, torch.float64)) as session:
        rows = []
        for end in range(1, len(ids)):
            following = opened.config.modality_names[opened.config.modality_of(int(ids[end]))]
            rows.append(torch.from_numpy(session.prefill([ids[:end].tolist()], following)[0][0]))
    return torch.stack(rows)


def test_perplexity_is_that_of_pytorchs_cross_entropy(tiny_checkpoint: Path, data: Path) -> None:
    found = evaluate(tiny_checkpoint, EvaluateOptions(data=data, context=40))
    losses: dict[str, list[float]] = {"text": [], "audio": []}
    for start in (0, 40, 80):
        chunk = IDS[start : start + 40]
        targets = torch.from_numpy(chunk[1:])
        each = torch.nn.functional.cross_entropy(reference_logits(tiny_checkpoint, chunk), targets, reduction="none")
        for target, loss in zip(targets.tolist(), each.tolist(), strict=True):
            losses["text" if target < TEXT_ROWS else "audio"].append(loss)
    assert {name: one.predictions for name, one in found.modalities.items()} == {name: len(one) for name, one in losses.items()}
    for name, values in losses.items():
        expected = float(np.mean(values))
        assert found.modalities[name].loss == pytest.approx(expected, rel=1e-5)
        assert found.modalities[name].perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_uniform_models_perplexity_is_its_number_of_ids(tmp_path: Path, data: Path) -> None:
    values = {name: torch.zeros_like(one) if name.startswith("output.") else one for name, one in random_tensors(CONFIG, 1)}
    write_checkpoint(tmp_path / "uniform", CONFIG, values.items(), "float32")
    found = evaluate(tmp_path / "uniform", EvaluateOptions(data=data))
    sizes = {one.name: one.vocab_size for one in CONFIG.modalities}
    assert {name: one.perplexity for name, one in found.modalities.items()} == pytest.approx(sizes, rel=1e-12)


def test_against_itself_nothing_differs(tiny_bundle: Path, data: Path) -> None:
    found = evaluate(tiny_bundle, EvaluateOptions(data=data, against=tiny_bundle, num_threads=1))
    for one in found.modalities.values():
        assert (one.kl_mean, one.kl_max, one.top_1_agreement) == (0.0, 0.0, 1.0)
        assert one.against_perplexity == one.perplexity


def test_a_bundle_is_near_its_checkpoint_and_far_from_another(
    tiny_bundle: Path, tiny_checkpoint: Path, other_checkpoint: Path, data: Path
) -> None:
    near = evaluate(tiny_bundle, EvaluateOptions(data=data, against=tiny_checkpoint)).modalities
    far = evaluate(tiny_bundle, EvaluateOptions(data=data, against=other_checkpoint)).modalities
    alone = evaluate(other_checkpoint, EvaluateOptions(data=data)).modalities
    for name in CONFIG.modality_names:
        same, other = near[name], far[name]
        assert same.kl_max is not None and same.kl_max < 1e-6
        assert same.top_1_agreement == 1.0
        assert other.kl_mean is not None and other.kl_mean > 0.1
        assert other.top_1_agreement is not None and other.top_1_agreement < 0.5
        assert other.against_perplexity == alone[name].perplexity


def test_the_divergence_is_of_the_other_models_distribution_from_ours(
    tiny_checkpoint: Path, other_checkpoint: Path, data: Path
) -> None:
    found = evaluate(tiny_checkpoint, EvaluateOptions(data=data, context=100, against=other_checkpoint))
    ours, theirs = (torch.log_softmax(reference_logits(path, IDS), dim=-1) for path in (tiny_checkpoint, other_checkpoint))
    is_text = torch.from_numpy(IDS[1:]) < TEXT_ROWS
    ours, theirs = ours[is_text, :TEXT_ROWS], theirs[is_text, :TEXT_ROWS]
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    text = found.modalities["text"]
    assert text.kl_mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert text.kl_max == pytest.approx(float(expected.max()), rel=1e-4)
    assert text.top_1_agreement == float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())


def test_a_chunk_longer_than_a_pass_gives_the_same(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with motrt.load(tiny_checkpoint, backend="torch") as session:
        whole = [values for _, _, values in log_probabilities(session, IDS)]
        monkeypatch.setattr(type(session), "longest_pass", 7)
        pieces = [values for _, _, values in log_probabilities(session, IDS)]
    assert len(pieces) == len(whole) == len(IDS) - 1
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_logits_of_one_pass_alone_are_held(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []
    with motrt.load(tiny_checkpoint, backend="torch") as session:
        run = session.run

        def counted(inputs: StepInputs, cache: KVCache) -> Logits:
            wanted.append(len(inputs.logits_index))
            return run(inputs, cache)

        monkeypatch.setattr(session, "run", counted)
        measure(session, [IDS[:30], IDS[30:60]])
    assert wanted == [29, 29]


def test_sequences_are_cut_into_chunks_and_no_further_than_asked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "lines", IDS[:50], IDS[50:61], IDS[61:])
    found = evaluate(tiny_checkpoint, EvaluateOptions(data=lines, context=20, max_tokens=65))
    # 20 20 10, 11, 4
    assert found.num_ids == 65
    assert sum(one.predictions for one in found.modalities.values()) == 65 - 5
    found = evaluate(
        tiny_checkpoint, EvaluateOptions(data=lines, context=20, max_tokens=62)
    )  # a last chunk of one id is left out
    assert found.num_ids == 61
    assert found.context == 20
    assert evaluate(tiny_checkpoint, EvaluateOptions(data=lines)).context == 128


def test_text_is_read_with_the_models_tokenizer(tmp_path: Path, make_checkpoint: Callable[[ModelConfig], Path]) -> None:
    shutil.copytree(make_checkpoint(CONFIG), tmp_path / "model")
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    Tokenizer(models.BPE(vocab=letters, merges=[])).save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "words.txt").write_text("the quick brown fox")
    ids = [letters[one] for one in "the quick brown fox"]
    from_text = evaluate(tmp_path / "model", EvaluateOptions(text=tmp_path / "words.txt"))
    from_ids = evaluate(tmp_path / "model", EvaluateOptions(data=write_lines(tmp_path / "ids", ids)))
    assert from_text.modalities == from_ids.modalities
    assert from_text.ids_sha256 == from_ids.ids_sha256
    assert (from_text.text, from_text.num_ids) == ("words.txt", 19)
    (tmp_path / "words.txt").write_text("x")
    with pytest.raises(InputError, match="at least 2 ids of a sequence are needed"):
        evaluate(tmp_path / "model", EvaluateOptions(text=tmp_path / "words.txt"))
    beyond = {"a": 0, "b": 5000}
    Tokenizer(models.BPE(vocab=beyond, merges=[])).save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "words.txt").write_text("abab")
    with pytest.raises(InputError, match="gives id 5000, and the model's end at 127"):
        evaluate(tmp_path / "model", EvaluateOptions(text=tmp_path / "words.txt"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one of a text and a file of ids"),
        ({"text": "words", "data": "ids"}, "give one of a text and a file of ids"),
        ({"text": "words"}, "carries no tokenizer: give ids with --data"),
        ({"data": "absent"}, "does not exist"),
        ({"data": "outside"}, "id 128 is not in 0..127"),
        ({"data": "short"}, "1 ids, and at least 2 are needed"),
        ({"data": "ids", "context": 1}, "a chunk must have 2 to 128 ids"),
        ({"data": "ids", "context": 129}, "a chunk must have 2 to 128 ids"),
        ({"data": "ids", "context": 65, "against": "shorter"}, "a chunk must have 2 to 64 ids"),
        ({"data": "ids", "against": "wider"}, "has other ids, so that nothing can be compared: text 97, audio 32"),
        ({"data": "ids", "record": True}, "is no bundle: figures are recorded in a bundle's manifest"),
    ],
)
def test_what_can_not_be_evaluated_is_said(
    options: dict[str, Any], said: str, tiny_checkpoint: Path, tmp_path: Path, make_checkpoint: Callable[[ModelConfig], Path]
) -> None:
    (tmp_path / "words").write_text("some words")
    write_lines(tmp_path / "ids", IDS)
    write_lines(tmp_path / "outside", [1, 128])
    write_lines(tmp_path / "short", [1])
    text, audio = CONFIG.modalities
    wider = make_checkpoint(CONFIG.replace(modalities=(type(text)("text", 97, text.expert), audio)))
    paths = {"text", "data", "against"}
    given = {name: tmp_path / value if name in paths else value for name, value in options.items()}
    if "against" in options:
        given["against"] = {"wider": wider, "shorter": make_checkpoint(CONFIG.replace(max_seq_len=64))}[options["against"]]
    with pytest.raises(InputError, match=said):
        evaluate(tiny_checkpoint, EvaluateOptions(**given))


def test_logits_that_are_no_numbers_are_not_measured(tmp_path: Path, data: Path) -> None:
    values = dict(random_tensors(CONFIG, 1))
    values["norm.weight"] = torch.full_like(values["norm.weight"], float("nan"))
    write_checkpoint(tmp_path / "nan", CONFIG, values.items(), "float32")
    with pytest.raises(ParityError, match="gives logits that are no numbers"):
        evaluate(tmp_path / "nan", EvaluateOptions(data=data))


def test_figures_of_the_checkpoint_are_not_passed_off_as_a_bundles(
    tiny_bundle: Path, tiny_checkpoint: Path, data: Path
) -> None:
    with pytest.raises(InputError, match="backend torch runs the checkpoint that"):
        evaluate(tiny_bundle, EvaluateOptions(data=data, backend="torch"))
    assert evaluate(tiny_checkpoint, EvaluateOptions(data=data, backend="torch")).backend.startswith("torch")


# What a bundle keeps.


def test_figures_are_recorded_in_the_manifest_and_shown(bundle_copy: Path, tiny_checkpoint: Path, data: Path) -> None:
    before = open_bundle(bundle_copy, "hash").manifest
    found = evaluate(bundle_copy, EvaluateOptions(data=data, against=tiny_checkpoint, record=True))
    bundle = open_bundle(bundle_copy, "hash")
    assert bundle.manifest.evaluations == (found,)
    assert bundle.manifest.files == before.files
    assert (bundle.manifest.source, bundle.manifest.answer) == (before.source, before.answer)
    assert sorted(one.name for one in bundle_copy.iterdir()) == sorted([MANIFEST_FILE, *before.files])
    assert inspect(bundle_copy)["evaluations"] == [found.to_dict()]
    shown = CliRunner().invoke(main, ["inspect", str(bundle_copy)])
    assert f"ids.jsonl, 100 ids in chunks of 128, {found.backend}" in " ".join(shown.output.split())
    assert f"{found.modalities['audio'].perplexity:.2f}" in shown.output
    assert verify_bundle(bundle_copy).verdict == "PASS"


def test_the_same_evaluation_takes_the_place_of_the_earlier_one(bundle_copy: Path, data: Path) -> None:
    options = EvaluateOptions(data=data, context=20, record=True)
    for _ in range(2):
        evaluate(bundle_copy, options)
    evaluate(bundle_copy, EvaluateOptions(data=data, context=30, record=True))
    assert [one.context for one in open_bundle(bundle_copy).manifest.evaluations] == [20, 30]


def test_a_manifest_keeps_a_bounded_number(bundle_copy: Path) -> None:
    for number in range(103):
        figures = {"text": ModalityFigures(1, 0.0, 1.0)}
        record_evaluation(open_bundle(bundle_copy), Evaluation("t", str(number), 2, 2, "b", None, figures))
    kept = [one.ids_sha256 for one in open_bundle(bundle_copy).manifest.evaluations]
    assert kept == [str(number) for number in range(3, 103)]


ABSENT = object()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ids", "x"),
        ("modalities", [1]),
        ("modalities", {"text": {"loss": 1}}),
        ("against", "a model whose figures are not there"),
        ("against", ABSENT),
    ],
)
def test_an_evaluation_that_is_none_is_refused_with_the_manifest(name: str, value: Any, bundle_copy: Path, data: Path) -> None:
    changed = evaluate(bundle_copy, EvaluateOptions(data=data)).to_dict() | {name: value}
    if value is ABSENT:
        del changed[name]
    rewrite(bundle_copy, lambda values: values.update(evaluations=[changed]))
    with pytest.raises(BundleError, match="is no manifest of this version"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_figures_are_finite(number: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        ModalityFigures.from_dict({"predictions": 1, "loss": number, "perplexity": 1.0}, is_compared=False)


# On the command line.


def test_the_command_prints_a_table_or_a_document(bundle_copy: Path, tiny_checkpoint: Path, data: Path) -> None:
    command = ["evaluate", str(bundle_copy), "--data", str(data), "--against", str(tiny_checkpoint), "--context", "50"]
    told = CliRunner().invoke(main, command)
    assert told.exit_code == 0, told.output
    assert "ids.jsonl, 100 ids in chunks of 50, onnxruntime (CPU), fp32" in " ".join(told.output.split())
    document = json.loads(CliRunner().invoke(main, [*command, "--json", "--record"]).stdout)
    assert document["modalities"].keys() == {"text", "audio"}
    assert document["modalities"]["text"]["top_1_agreement"] == 1.0
    assert open_bundle(bundle_copy).manifest.evaluations[0].to_dict() == {k: v for k, v in document.items() if k != "model"}
    wrong = CliRunner().invoke(main, ["evaluate", str(bundle_copy)])
    assert wrong.exit_code == 2
    assert "give one of --text and --data" in wrong.output


def test_evaluating_a_bundle_loads_neither_torch_nor_onnx(make_bundle: MakeBundle, data: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from motrt.export.evaluation import EvaluateOptions, evaluate\n"
        f"evaluate(Path({str(make_bundle(CONFIG))!r}), EvaluateOptions(data=Path({str(data)!r})))\n"
        "print(*sorted({'torch', 'onnx'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []
