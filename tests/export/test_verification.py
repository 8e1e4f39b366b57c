"""``verify`` beyond the ladder: a user's own sequences, the report, the parts, and every input that can not be used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from motrt.errors import BundleError, CheckpointError, InputError
from motrt.export.parity.findings import Outcome
from motrt.export.parity.hostile import hostile_scenarios, remarkable_ids
from motrt.export.parity.scenarios import observe
from motrt.export.parity.token_file import MOST_TOKENS, read_token_file
from motrt.export.verification import VerifyOptions, verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime.bundle import open_bundle, write_manifest
from motrt.runtime.load import open_session
from motrt.tests.export.models import ONE, THREE, TINY, torch_session, with_changed_weights

GOOD = '[1, 2, 3, 100, 101]\n\n{"ids": [4, 5, 6]}\n'

BAD_LINES = {
    "[1]": "1 ids, and at least 2",
    '{"ids": [1, 99999]}': "id 99999 is not in 0..127",
    "[-1, 2]": "id -1 is not in 0..127",
    "three": "not JSON",
    "[" * 100_000: "not JSON",
    '{"tokens": [1, 2]}': "an object of tokens",
    '{"text": "hello"}': "carries no tokenizer",
    "[1, 2.5]": "whole numbers",
    "[true, 1]": "whole numbers",
    "[[1, 2], [3, 4]]": "whole numbers",
    '"123"': "whole numbers",
    "null": "whole numbers",
    f"[1, {10**30}]": "whole numbers",
    str([1] * 1000): "the model has",
}


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    file = tmp_path / "sequences.jsonl"
    file.write_text(GOOD, encoding="utf-8")
    return file


def test_a_file_of_sequences_is_read_line_by_line(sequences: Path) -> None:
    assert [one.tolist() for one in read_token_file(sequences, TINY)] == [[1, 2, 3, 100, 101], [4, 5, 6]]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_sequence_is_named_with_its_number(line: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f"[1, 2]\n{line}\n[3, 4]\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: ") as told:
        read_token_file(file, TINY)
    assert BAD_LINES[line] in str(told.value)
    assert len(str(told.value)) < 1000


def test_every_bad_line_is_named_at_once_and_many_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("x\n" * 50, encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1: [\s\S]*line 20: [\s\S]*and 30 lines more"):
        read_token_file(file, TINY)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        (b"", "holds no sequence"),
        (b"\xff\xfe[", "is not UTF-8"),
        (b"[1,2]\n" * MOST_TOKENS, "at most"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "sequences.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_token_file(file, TINY)


def test_a_folder_is_no_file_of_sequences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_token_file(tmp_path, TINY)


def test_a_verification_with_everything_wanted_writes_its_report(tiny_bundle: Path, sequences: Path, tmp_path: Path) -> None:
    options = VerifyOptions(sequences, bisect=True, report=tmp_path / "deep" / "report")
    report = verify_bundle(tiny_bundle, options=options)
    assert report.verdict is Outcome.PASS
    told = json.loads((tmp_path / "deep" / "report" / "report.json").read_text(encoding="utf-8"))
    assert told["schema"] == "motrt.parity/2"
    assert told["verdict"] == "PASS"
    assert told["notes"] == []
    assert {"your sequence 1", "your sequence 2", "sampled from the model"} <= {one["scenario"] for one in told["positions"]}
    assert {one["phase"] for one in told["positions"]} >= {"after change-over", "change-over", "prefill", "late decode"}
    assert told["bisect"]["first"] is None
    assert len(told["bisect"]["parts"]) == 3 + 8 * TINY.num_layers
    assert len(told["drift"]["relative_l2"]) == TINY.num_layers + 1
    assert f"{told['noise']['rows']} rows" in told["explanation"][-1]
    assert "<html" in (tmp_path / "deep" / "report" / "report.html").read_text(encoding="utf-8")


def test_bad_sequences_are_told_before_the_reference_is_opened(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        verify_bundle(tiny_bundle, tmp_path / "no-checkpoint", options=VerifyOptions(tmp_path / "bad.jsonl"))


def test_a_report_that_can_not_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is a file"):
        verify_bundle(tmp_path / "no-bundle", options=VerifyOptions(report=tmp_path / "report"))
    assert (tmp_path / "report").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("backend", ["torch", "auto", "Cuda"])
def test_what_runs_no_bundle_is_not_quietly_replaced(backend: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """``torch`` would be the reference beside itself, and ``auto`` anything; it is said before a bundle is read."""
    with pytest.raises(InputError, match=f"tensorrt, tensorrt-rtx, cuda, onnxruntime \\('{backend}' came\\)"):
        verify_bundle(tmp_path / "none", backend=backend)
    with pytest.raises(InputError, match="backend must be one of"):
        open_session(open_bundle(tiny_bundle), backend)


def test_another_runtime_than_the_manifests_is_noted(tiny_bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bundle"
    copied.mkdir()
    for file in tiny_bundle.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    manifest = open_bundle(copied).manifest
    write_manifest(copied, type(manifest)(**{**vars(manifest), "versions": {**manifest.versions, "onnxruntime": "1.0.0"}}))
    notes: Any = verify_bundle(copied).evidence["notes"]
    assert [note.split(" ")[0] for note in notes] == ["onnxruntime"]
    assert "1.0.0 made the bundle" in notes[0]


def test_another_checkpoint_is_refused_by_its_hash(tiny_bundle: Path, make_checkpoint: Any) -> None:
    with pytest.raises(CheckpointError, match="hash differs"):
        verify_bundle(tiny_bundle, make_checkpoint(ONE))


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        verify_bundle(tmp_path)


def test_a_reference_without_numbers_is_told_with_the_part_that_makes_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights that are numbers, and overflow: nothing but running them tells."""
    from motrt.export.parity.gate import ask

    def blown(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.fill_(3e38) if name == "layers.1.feed_forward.audio.fc1.weight" else value

    session = torch_session(with_changed_weights(tiny_checkpoint, tmp_path / "blown", blown))
    with pytest.raises(CheckpointError, match=r"gives no number, first in .* \(layer 1, experts\): the checkpoint's"):
        ask(session)


# What is fed.


@pytest.mark.parametrize("config", [TINY, ONE, THREE], ids=["two", "one", "three"])
def test_hostile_inputs_hold_what_they_promise(config: Any, make_checkpoint: Any) -> None:
    read = open_checkpoint(make_checkpoint(config)).read
    found = {one.name: one for one in hostile_scenarios(config, remarkable_ids(config, read))}
    count = len(config.modalities)
    assert len(found["rows of one token"].rows) == count**2
    assert all(len(set(row.tolist())) == 1 for row in found["the same id over and over"].rows)
    last = found["the last positions"]
    assert last.start + len(last.rows[0]) - 1 == config.max_seq_len
    if count > 1:
        (patterns,) = (one for name, one in found.items() if name.startswith("every pattern"))
        seen = {tuple(config.modality_of(int(token)) for token in row[:-1]) for row in patterns.rows}
        assert len(seen) == len(patterns.rows) == sum(count**length for length in range(2, 7))


def test_remarkable_ids_are_the_ones_that_stand_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def outlying(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "tok_embeddings.weight":
            value[7] *= 50
            value[100, 3] = 40.0
        return value

    changed = open_checkpoint(with_changed_weights(tiny_checkpoint, tmp_path / "outliers", outlying))
    found = remarkable_ids(TINY, changed.read)
    assert found[0][0] == 7
    assert 100 in found[1]


def test_the_last_positions_are_within_what_the_model_knows(tiny_checkpoint: Path) -> None:
    session = torch_session(tiny_checkpoint)
    remarkable = remarkable_ids(TINY, open_checkpoint(tiny_checkpoint).read)
    (last,) = (one for one in hostile_scenarios(TINY, remarkable) if one.name == "the last positions")
    assert max(one.position for one in observe(session, last)) == TINY.max_seq_len - 1
