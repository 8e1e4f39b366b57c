"""The script that makes files for measurements makes files that convert: to one and the same model, whichever the formats."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from motrt.errors import UntrainedRowsError
from motrt.model_def.checkpoint.assemble import Assembly, convert_llama, convert_mot
from motrt.model_def.config import ModelConfig
from motrt.model_def.health import diagnose, refuse_untrained
from motrt.model_def.initialize import random_tensors

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_checkpoints.py"
TINY = ModelConfig.tiny()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoints", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(script: ModuleType, out: Path, kind: str, *options: str) -> Path:
    ran = CliRunner().invoke(script.main, ["--kind", kind, "--out", str(out), "--dtype", "float32", *options])
    assert ran.exit_code == 0, ran.output
    return out


def assembled(assembly: Assembly) -> Assembly:
    assembly.accounting.raise_unless_clean()
    return assembly


@pytest.mark.parametrize("options", [(), ("--head", "shared"), ("--qk-norm",)])
def test_a_training_state_converts_to_the_random_model(script: ModuleType, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = made(script, tmp_path / "mot", "mot", *options)
    assembly = assembled(convert_mot(out / "state.pt", out / "params.json"))
    config = TINY.replace(head="shared" if "shared" in options else "split", qk_norm="--qk-norm" in options)
    assert assembly.config == config.replace(max_seq_len=assembly.config.max_seq_len)
    assert all(torch.equal(assembly.read(name), value) for name, value in random_tensors(config, 0))
    refuse_untrained(diagnose(assembly.config, assembly.read))


def test_the_parts_convert_to_one_healthy_model(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHARD_BYTES", 50_000)
    music = made(script, tmp_path / "musicgen", "musicgen")
    adapter = made(script, tmp_path / "adapter", "adapter") / "adapter.pt"
    expected = dict(random_tensors(TINY, 0))
    for kind, options in (("llama-meta", ()), ("llama-hf", ("--untied",))):
        assembly = assembled(convert_llama(made(script, tmp_path / kind, kind, *options), music, adapter))
        for name, value in expected.items():
            is_made_up = ".audio." in name and (".attention." in name or name.endswith(".bias"))
            is_permuted = kind == "llama-hf" and (".wq." in name or ".wk." in name)
            assert is_made_up or is_permuted or torch.equal(assembly.read(name), value), name
        refuse_untrained(diagnose(assembly.config, assembly.read))
    assert (tmp_path / "llama-hf" / "model.safetensors.index.json").is_file()


def test_a_tied_folder_with_scaled_rope_converts(script: ModuleType, tmp_path: Path) -> None:
    assembly = assembled(convert_llama(made(script, tmp_path / "hf", "llama-hf", "--scaled-rope")))
    assert assembly.config.tied_embeddings
    assert assembly.config.rope.scaling is not None and assembly.config.rope.scaling.factor == 32.0


def test_untrained_audio_rows_are_refused(script: ModuleType, tmp_path: Path) -> None:
    out = made(script, tmp_path / "mot", "mot", "--untrained-audio")
    assembly = assembled(convert_mot(out / "state.pt", out / "params.json"))
    with pytest.raises(UntrainedRowsError, match=r"audio rows 96 to 127 of tok_embeddings\.weight \(all 32"):
        refuse_untrained(diagnose(assembly.config, assembly.read))


def test_an_existing_folder_is_a_sentence(script: ModuleType, tmp_path: Path) -> None:
    ran = CliRunner().invoke(script.main, ["--kind", "mot", "--out", str(tmp_path)])
    assert ran.exit_code == 1
    assert "exists already" in ran.output
