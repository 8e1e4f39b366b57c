"""Cut into parts, a right graph is right everywhere, and a wrong one is wrong in its place alone."""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from motrt.export.parity.bisect import Bisection, bisect, recorded_passes, row_errors
from motrt.export.parity.part_values import LOGITS, first_without_numbers, parts, record
from motrt.export.steps import Steps
from motrt.export.verification import subject_of
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.runtime.bundle import Bundle, open_bundle
from motrt.tests.export.models import (
    ONE,
    THREE,
    TIED,
    TINY,
    load_whole,
    save_whole,
    set_weight,
    torch_session,
    weight,
    write_random,
)


def asked(bundle: Bundle, decoder: Decoder, model_file: Path | None = None, folder: Path | None = None) -> Bisection:
    return bisect(model_file or bundle.model_path, bundle.config, recorded_passes(decoder), 1.0, Steps(), folder=folder)


def reference(bundle: Bundle, checkpoint: Path) -> Decoder:
    weights = subject_of(bundle).weights()
    return (
        torch_session(checkpoint, "fp64").decoder
        if weights is None
        else Decoder.from_tensors(bundle.config, weights.read, torch.float64)
    )


@pytest.mark.parametrize("config", [TINY, ONE, THREE, TIED], ids=["two", "one", "three", "tied"])
def test_part_by_part_the_decoder_computes_what_it_computes_whole(config: ModelConfig, tmp_path: Path) -> None:
    decoder = torch_session(write_random(tmp_path / "model", config, 0), "fp64").decoder
    cache = decoder.new_cache(3, 32)
    for one in recorded_passes(decoder):
        values, after = record(decoder, one.inputs, cache)
        with torch.inference_mode():
            logits, expected = decoder(*(torch.from_numpy(value) for value in one.inputs.named().values()), cache)
        np.testing.assert_array_equal(values[LOGITS], logits.numpy())
        assert all(
            torch.equal(a, b) for pair, other in zip(after, expected, strict=True) for a, b in zip(pair, other, strict=True)
        )
        cache = after


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_right_graph_is_right_in_every_part(precision: str, make_bundle: Any, tiny_checkpoint: Path) -> None:
    bundle = open_bundle(make_bundle(TINY, precision))
    found = asked(bundle, reference(bundle, tiny_checkpoint))
    assert found.first is None
    assert found.broken == ""
    assert [one.part for one in found.parts] == parts(TINY)
    assert max(one.error / one.budget for one in found.parts) < 0.5
    drift = np.array(found.drift["relative_l2"], np.float64)
    assert drift.shape == (TINY.num_layers + 1, len(found.drift["positions"]))
    assert drift.max() < found.drift["limit"]


@pytest.fixture
def wrong(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A graph whose layer 1 has a wrong output projection for audio."""
    model = load_whole(tiny_bundle)
    name = "layers.1.attention.wo.audio.weight"
    set_weight(model, name, weight(model, name) * np.float32(1.01))
    return save_whole(model, tmp_path / "wrong")


def test_a_wrong_part_is_named_with_its_modality_and_nothing_else_is(
    wrong: Path, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    found = asked(bundle, reference(bundle, tiny_checkpoint), wrong)
    assert str(found.first).startswith("layer 1, output projection, audio: relative L2 ")
    assert [str(one.part) for one in found.parts if one.is_over] == ["layer 1, output projection"]


def test_the_part_that_fails_can_be_run_by_anyone(
    wrong: Path, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle, folder = open_bundle(tiny_bundle), tmp_path / "failing"
    found = asked(bundle, reference(bundle, tiny_checkpoint), wrong, folder)
    assert found.folder == folder
    assert found.first is not None
    assert str(found.first) in (folder / "README.md").read_text(encoding="utf-8")
    ran = subprocess.run([sys.executable, "run.py"], cwd=folder, capture_output=True, text=True, check=True)
    assert "motrt" not in (folder / "run.py").read_text(encoding="utf-8")
    errors = [float(line.rsplit(" ", 1)[1]) for line in ran.stdout.splitlines()]
    assert len(errors) >= 3
    assert 1e-4 < max(errors) <= found.first.error
    onnx.checker.check_model(folder / "part.onnx")
    command = str(Path(sysconfig.get_path("scripts"), "polygraphy"))
    polygraphy = [command, "run", "part.onnx", "--onnxrt", "--load-inputs", "inputs.json"]
    good = subprocess.run([*polygraphy, "--save-outputs", "own.json"], cwd=folder, capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    same = subprocess.run([*polygraphy, "--load-outputs", "own.json"], cwd=folder, capture_output=True, text=True)
    assert same.returncode == 0, same.stdout
    other = subprocess.run([*polygraphy, "--load-outputs", "expected.json"], cwd=folder, capture_output=True, text=True)
    assert other.returncode != 0
    assert "FAILED" in other.stdout


def test_a_graph_that_is_not_built_as_it_should_be_is_told_with_the_layer(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_whole(tiny_bundle)
    scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
    scatters[2].input[1], scatters[3].input[1] = scatters[3].input[1], scatters[2].input[1]
    bundle = open_bundle(tiny_bundle)
    found = asked(bundle, reference(bundle, tiny_checkpoint), save_whole(model, tmp_path / "crossed"))
    assert "layer 1" in found.broken
    assert found.sentence().startswith("the graph is not built as the exporter builds it")


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_a_model_of_few_positions_can_be_taken_apart(length: int, tmp_path: Path) -> None:
    decoder = torch_session(write_random(tmp_path / "model", TINY.replace(max_seq_len=length, num_layers=1), 0), "fp64").decoder
    passes = recorded_passes(decoder)
    assert passes
    assert first_without_numbers(parts(decoder.config), passes[0].values) is None


def test_errors_are_by_row_and_minus_infinity_is_a_value() -> None:
    wanted = np.array([[1.0, -np.inf], [3.0, 4.0], [1.0, 1.0]])
    came = np.array([[1.0, -np.inf], [3.0, 4.5], [np.nan, 1.0]])
    assert row_errors(wanted, came).tolist() == [0.0, pytest.approx(0.1), np.inf]
    assert row_errors(wanted[:1], np.array([[1.0, 0.0]])).tolist() == [np.inf]
    assert row_errors(wanted[:1], np.zeros((1, 3))).tolist() == [np.inf]
