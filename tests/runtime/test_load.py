"""From a path to a session: which backend, which checks, and what is missing where one can not be had."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from motrt.errors import BackendError, BundleError, CheckpointError, InputError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import init_checkpoint
from motrt.runtime import bundle as bundles
from motrt.runtime.bundle import open_bundle, record_files, write_manifest
from motrt.runtime.load import load, source_of
from motrt.tests.conftest import MakeBundle


def blocked(package: str, code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run ``code`` where importing ``package`` fails as if it were not installed."""
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


LOAD = """
import motrt
try:
    motrt.load(sys.argv[1], backend=sys.argv[2])
except motrt.MotrtError as failure:
    print(type(failure).__name__, failure)
"""


def claim(folder: Path, **changes: Any) -> None:
    """Let the manifest say something else, and of the files beside it what they are by now."""
    manifest = bundles._manifest_from(folder, bundles._read_manifest(folder))
    write_manifest(folder, replace(manifest, files=record_files(folder), **changes))


def test_auto_takes_onnxruntime_for_a_bundle_and_torch_for_a_checkpoint(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    for path, backend in ((tiny_bundle, "onnxruntime (CPU)"), (tiny_checkpoint, "torch (cpu)")):
        with load(path) as session:
            assert session.backend == backend
    with load(tiny_bundle, backend="torch") as session:
        assert session.backend == "torch (cpu)"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"backend": "abacus"},
            "backend must be one of auto, tensorrt, .*, torch \\('abacus' came\\)",
        ),
        ({"check": "glance"}, "check must be 'size', 'hash' or 'answer' \\('glance' came\\)"),
        ({"check": "hash,glance"}, "check must be 'size', 'hash' or 'answer' \\('hash,glance' came\\)"),
        ({"check": ("hash", "glance")}, "check must be 'size', 'hash' or 'answer'"),
        ({"check": ""}, "check must be 'size', 'hash' or 'answer' \\('' came\\)"),
        ({"check": ()}, "check must be 'size', 'hash' or 'answer'"),
        ({"check": None}, "check must be 'size', 'hash' or 'answer' \\(None came\\)"),
        ({"num_threads": -1}, "num_threads must be a whole number in 0"),
        ({"num_threads": 10**12}, "num_threads must be a whole number in 0"),
        ({"num_threads": "two"}, "num_threads must be a whole number in 0"),
    ],
)
def test_options_that_can_not_be_are_sentences(options: dict[str, Any], said: str, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=said):
        load(tiny_bundle, **options)


def test_a_checkpoint_that_moved_is_asked_for(bundle_copy: Path, tmp_path: Path) -> None:
    source = open_bundle(bundle_copy).manifest.source
    assert source_of(open_bundle(bundle_copy)).is_dir()
    claim(bundle_copy, source={**source, "path": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match="gone any more: say where it is"):
        load(bundle_copy, backend="torch")
    with load(bundle_copy):
        pass  # onnxruntime does not need it


def test_without_onnxruntime_the_remedy_is_said(tiny_bundle: Path) -> None:
    done = blocked("onnxruntime", LOAD, tiny_bundle, "auto")
    assert done.stdout.startswith("BackendError onnxruntime can not be imported"), done.stderr
    assert "pip install 'motrt[cpu]'" in done.stdout


def test_without_torch_its_backend_says_the_remedy_and_the_other_runs(tiny_bundle: Path) -> None:
    done = blocked("torch", LOAD, tiny_bundle, "torch")
    assert done.stdout.startswith("BackendError the torch backend needs PyTorch"), done.stderr
    assert "pip install 'motrt[export]'" in done.stdout
    assert blocked("torch", LOAD + "print('opened')", tiny_bundle, "onnxruntime").stdout == "opened\n"


def test_a_bf16_bundle_says_where_it_could_run(bundle_copy: Path) -> None:
    claim(bundle_copy, precision="bf16")
    with pytest.raises(BackendError, match="no bfloat16: run this bundle on a GPU, or export with --precision fp32 or fp16"):
        load(bundle_copy)


def test_a_graph_of_another_precision_than_the_manifests_is_refused(bundle_copy: Path) -> None:
    claim(bundle_copy, precision="fp16")
    with pytest.raises(BundleError, match="the graph is fp32 and the manifest says fp16"):
        load(bundle_copy, check="hash")


def test_a_graph_that_does_not_keep_the_contract_is_refused(bundle_copy: Path) -> None:
    import onnx

    model = onnx.load(bundle_copy / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
    model.graph.input[0].name = "tokens"
    onnx.save(model, bundle_copy / "model.onnx")
    claim(bundle_copy)
    with pytest.raises(BundleError, match=r"(?s)does not keep the graph contract; export it again:.*'input_ids' is missing"):
        load(bundle_copy)


def with_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    claim(folder)


def test_a_tokenizer_in_the_bundle_reads_prompts(bundle_copy: Path) -> None:
    with_tokenizer(bundle_copy, Tokenizer(models.WordLevel({"hello": 7, "?": 3}, unk_token="?")).to_str())
    with load(bundle_copy, check="hash") as session:
        by_text = [step.token_id for step in session.generate("hello", max_tokens=3)]
        assert by_text == [step.token_id for step in session.generate([7], max_tokens=3)]


@pytest.mark.parametrize("content", ["", "{}", "noise", '{"version": "99"}'])
def test_a_tokenizer_that_is_none_is_a_sentence(content: str, bundle_copy: Path) -> None:
    with_tokenizer(bundle_copy, content)
    with pytest.raises(BundleError, match="is no tokenizer that `tokenizers` can read"):
        load(bundle_copy)


def test_a_tokenizer_of_another_model_is_refused_before_its_ids_pass_for_audio(bundle_copy: Path) -> None:
    with_tokenizer(bundle_copy, Tokenizer(models.WordLevel({"hello": 100, "?": 3}, unk_token="?")).to_str())
    with load(bundle_copy) as session, pytest.raises(InputError, match=r"id 100 of the prompt, and .* text ids are 0\.\.95"):
        session.generate("hello", max_tokens=1)


def test_the_reference_of_a_bundle_has_the_bundles_length_and_is_the_very_checkpoint(tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "model", ModelConfig.tiny())
    export_bundle(tmp_path / "model", tmp_path / "bundle", max_seq_len=70, verify=False)
    (tmp_path / "model").rename(tmp_path / "moved")
    with load(tmp_path / "bundle", "torch", checkpoint=tmp_path / "moved") as session:
        assert session.config.max_seq_len == 70
    init_checkpoint(tmp_path / "model", ModelConfig.tiny(), seed=1)
    with pytest.raises(CheckpointError, match="its hash differs"):
        load(tmp_path / "bundle", "torch")


def test_it_is_said_where_the_checkpoint_stands_for_other_weights(
    make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture
) -> None:
    load(make_bundle(ModelConfig.tiny()), "torch").close()
    assert not caplog.messages
    load(make_bundle(ModelConfig.tiny(), "int8"), "torch").close()
    assert len(caplog.messages) == 1 and "and not the int8 weights of" in caplog.messages[0]


def test_a_provider_that_fails_is_an_error_and_no_other_takes_its_place_with_words_on_standard_output(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    asked: list[object] = []
    opened = onnxruntime.InferenceSession._create_inference_session

    def fails_once(session: object, providers: object, *rest: object) -> object:
        asked.append(providers)
        if len(asked) == 1:
            raise RuntimeError("planted")
        return opened(session, providers, *rest)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fails_once)
    with pytest.raises(BackendError, match="planted"):
        load(tiny_bundle, backend="onnxruntime")
    assert capsys.readouterr().out == ""
