"""A Triton repository: its configurations are Triton's own schema's and the signature's, and its loop really runs.

Triton itself is not here; a stub stands for the one module that its Python backend gives.
"""

import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import motrt
from motrt.cli import main
from motrt.errors import BundleError
from motrt.model_def.graph import plan_for
from motrt.runtime.bundle import open_bundle, record_files, sha256_of, write_manifest
from motrt.runtime.engine_record import EngineRecord
from motrt.serve.triton import DATATYPES, write_repository


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(tiny_bundle, out)
    return out


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's published model_config.proto, as its client ships it; loaded alone, for the client's package wants gRPC."""
    try:
        file = metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    except metadata.PackageNotFoundError:
        pytest.skip("tritonclient is not installed: pip install tritonclient")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configuration(model: Path, schema: Any) -> Any:
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def with_engines(bundle: Path, out: Path, flavour: str) -> Path:
    """A copy of a bundle with a file of a few bytes for every engine: enough to see where it is put."""
    shutil.copytree(bundle, out)
    manifest = open_bundle(bundle).manifest
    plan, engines = plan_for("tensorrt", manifest.config), []
    for graph in plan:
        shutil.copyfile(out / "model.onnx", out / graph.file_name)
        (out / f"{graph.name}.engine").write_bytes(b"engine " + graph.name.encode())
        hashes = sha256_of(out / graph.file_name), sha256_of(out / f"{graph.name}.engine")
        engines.append(EngineRecord(graph.name, f"{graph.name}.engine", flavour, "fp16", {}, "GPU", (), {}, *hashes))
    changed = replace(manifest, graphs=plan, engines=tuple(engines), files=record_files(out))
    write_manifest(out, changed)
    return out


def test_every_configuration_is_one_of_tritons_schema(repository: Path, schema: Any) -> None:
    models = sorted(path.name for path in repository.iterdir())
    assert models == ["motrt_generate", "motrt_graph"]
    for name in models:
        found = configuration(repository / name, schema)
        assert found.name == name and found.max_batch_size == 0


def test_the_graph_is_configured_as_its_signature_says(repository: Path, tiny_bundle: Path, schema: Any) -> None:
    found, signature = configuration(repository / "motrt_graph", schema), open_bundle(tiny_bundle).manifest.signature
    assert found.backend == "onnxruntime"
    for tensors, specs in ((found.input, signature.inputs), (found.output, signature.outputs)):
        said = [(one.name, schema.DataType.Name(one.data_type), list(one.dims)) for one in tensors]
        assert said == [(one.name, DATATYPES[one.dtype], [d if isinstance(d, int) else -1 for d in one.dims]) for one in specs]


def test_the_graph_opens_where_it_lies_with_its_weights_beside_it(repository: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(repository / "motrt_graph" / "1" / "model.onnx")
    assert session.get_outputs()[0].name == "logits"


def test_every_engine_becomes_a_model_with_its_own_signature(tiny_bundle: Path, tmp_path: Path, schema: Any) -> None:
    bundle = with_engines(tiny_bundle, tmp_path / "bundle", "tensorrt")
    names = write_repository(bundle, tmp_path / "repository")
    assert {"motrt_decode_text", "motrt_change_text_audio", "motrt_prefill"} <= set(names)
    step = configuration(tmp_path / "repository" / "motrt_decode_audio", schema)
    assert step.platform == "tensorrt_plan" and step.output[0].name == "range_logits"
    assert [one.name for one in step.input][:2] == ["input_ids", "cache_position"]
    plan = tmp_path / "repository" / "motrt_decode_audio" / "1" / "model.plan"
    assert plan.read_bytes() == b"engine decode.audio"


def test_engines_of_tensorrt_rtx_are_left_out(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_engines(tiny_bundle, tmp_path / "bundle", "tensorrt-rtx")
    assert write_repository(bundle, tmp_path / "repository") == ["motrt_generate", "motrt_graph"]


def test_a_repository_names_no_path_of_this_machine(repository: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    texts = [path.read_text() for path in repository.rglob("*") if path.name in ("config.pbtxt", "model.py")]
    assert len(texts) == 3
    assert not any(str(path) in text for text in texts for path in (tiny_bundle, repository))
    assert not [path for path in repository.rglob("*") if path.is_symlink()]


def test_what_is_no_bundle_or_exists_already_is_refused_and_nothing_is_left(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        write_repository(tmp_path / "none", tmp_path / "repository")
    (tmp_path / "there").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        write_repository(tiny_bundle, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_says_what_it_wrote(tiny_bundle: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(main, ["triton", str(tiny_bundle), str(tmp_path / "repository"), "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["models"] == ["motrt_generate", "motrt_graph"]


# The loop, in a stub of Triton's Python backend.


@dataclass
class StubTensor:
    name: str
    values: Any

    def as_numpy(self) -> Any:
        return self.values


class StubError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE = "internal", "invalid", "unavailable"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class StubResponse:
    output_tensors: list[StubTensor]
    error: StubError | None = None


@dataclass
class StubSender:
    sent: list[tuple[StubResponse | None, int]] = field(default_factory=list)
    cancel_after: int = 1 << 30

    def is_cancelled(self) -> bool:
        return len(self.sent) >= self.cancel_after

    def send(self, response: StubResponse | None = None, flags: int = 0) -> None:
        assert not (self.sent and self.sent[-1][1]), "nothing may be sent after the final flag"
        self.sent.append((response, flags))

    def tokens(self) -> list[int]:
        return [int(one.output_tensors[1].values[0]) for one, _ in self.sent if one is not None and one.error is None]


class StubRequest:
    def __init__(self, cancel_after: int = 1 << 30, **tensors: Any) -> None:
        self.tensors, self.sender = tensors, StubSender(cancel_after=cancel_after)

    def get_response_sender(self) -> StubSender:
        return self.sender


def stub_module(version_folder: Path) -> types.ModuleType:
    module: Any = types.ModuleType("triton_python_backend_utils")

    def get(request: StubRequest, name: str) -> StubTensor | None:
        return StubTensor(name, request.tensors[name]) if name in request.tensors else None

    module.get_input_tensor_by_name, module.get_model_dir = get, lambda: str(version_folder)
    module.Tensor, module.InferenceResponse, module.TritonError = StubTensor, StubResponse, StubError
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    return module  # type: ignore[no-any-return]


Run = Callable[[list[StubRequest]], None]


@pytest.fixture
def run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The repository's own model.py, as Triton loads it; requests are done when it returns."""
    version = repository / "motrt_generate" / "1"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub_module(version))
    spec = importlib.util.spec_from_file_location("model", version / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    values = {name: {"string_value": value} for name, value in {"bundle": "bundle", "backend": "auto"}.items()}
    numbers = {name: {"string_value": value} for name, value in {"threads": "1", "max_batch": "4", "max_queue": "2"}.items()}
    model.initialize({"model_config": json.dumps({"parameters": values | numbers})})

    def execute(requests: list[StubRequest]) -> None:
        model.execute(requests)
        for thread in list(model.answering):
            thread.join(timeout=60)

    yield execute
    model.finalize()


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def text(value: str) -> Any:
    return np.array([value.encode()], dtype=np.object_)


def test_tokens_come_one_by_one_as_they_do_alone_and_the_final_flag_last(run: Run, tiny_bundle: Path) -> None:
    drawn = {"temperature": np.array([0.9]), "seed": ids(7)}
    requests = [
        StubRequest(prompt_ids=ids(1, 2, 3), schedule=text("text:5,audio:2f"), max_tokens=ids(12)),
        StubRequest(prompt_ids=ids(4, 5), schedule=text("audio:9"), **drawn),
    ]
    run(requests)
    with motrt.load(tiny_bundle) as session:
        first = session.generate([1, 2, 3], schedule=motrt.then("text", tokens=5).then("audio", frames=2), max_tokens=12)
        second = session.generate(
            [4, 5], schedule=motrt.then("audio", tokens=9), sampling=motrt.Sampling(temperature=0.9, seed=7)
        )
        alone = [[step.token_id for step in one] for one in (first, second)]
    assert [one.sender.tokens() for one in requests] == alone
    for one in requests:
        assert [flags for _, flags in one.sender.sent] == [0] * (len(one.sender.sent) - 1) + [1]


def test_what_a_request_may_not_ask_is_an_error_response_with_the_final_flag(run: Run) -> None:
    wrong = [
        StubRequest(),
        StubRequest(prompt_ids=ids(1), prompt=text("both")),
        StubRequest(prompt_ids=ids(10**9)),
        StubRequest(prompt_ids=ids(1), schedule=text("smell:3")),
        StubRequest(prompt_ids=ids(1), max_tokens=ids(1, 2)),
        StubRequest(prompt=np.array([b"\xff"], dtype=np.object_)),
    ]
    run(wrong)
    for one in wrong:
        ((response, flags),) = one.sender.sent
        assert response is not None and response.error is not None and flags == 1
        assert response.error.code == StubError.INVALID_ARG


def test_more_than_the_queue_holds_is_unavailable_and_the_others_are_answered(run: Run) -> None:
    requests = [StubRequest(prompt_ids=ids(1, 2), max_tokens=ids(20)) for _ in range(12)]
    run(requests)
    last = [one.sender.sent[-1][0] for one in requests]
    refused = [one.error.code for one in last if one is not None and one.error is not None]
    assert refused and set(refused) == {StubError.UNAVAILABLE}
    answered = [one.sender.tokens() for one in requests if one.sender.tokens()]
    assert len(answered) == len(requests) - len(refused) and all(tokens == answered[0] for tokens in answered)


def test_a_request_that_is_cancelled_ends_with_the_final_flag(run: Run) -> None:
    request = StubRequest(cancel_after=3, prompt_ids=ids(1, 2), max_tokens=ids(50))
    run([request])
    assert len(request.sender.tokens()) == 3 and request.sender.sent[-1] == (None, 1)
