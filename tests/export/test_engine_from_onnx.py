"""Engines built without a GPU: they parse, keep the contract, hold their weights; what can not be built is a sentence."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motrt.errors import BackendError, BundleError, ExportError, InputError
from motrt.export import bundle_from_checkpoint, engine_from_onnx
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.engine_from_onnx import EngineOptions, build_engine, known_capabilities, refuse_options, weight_bytes
from motrt.export.inspection import inspect
from motrt.export.onnx_from_module import attach_weights, write_onnx
from motrt.export.steps import Advance, Steps, Unit
from motrt.export.trt_profile import Sizes, parse_range, profile_for, ranges_for
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import PRESETS
from motrt.model_def.graph import Graph, plan_for
from motrt.model_def.signature import Signature
from motrt.runtime import gpu, tensorrt_library
from motrt.runtime.bundle import open_bundle, sha256_of, write_manifest
from motrt.runtime.engine_record import EngineRecord, Range
from motrt.runtime.gpu import Gpu, Gpus
from motrt.tests.conftest import Trace
from motrt.tests.export.models import TIED, TINY, write_random

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

RTX = EngineOptions("tensorrt-rtx", Sizes(Range(1, 2, 4), Range(1, 16, 32)), ("8.9",))
PLAN = plan_for("tensorrt-rtx", TINY)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model for RTX GPUs; proven elsewhere."""
    out = tmp_path_factory.mktemp("rtx") / "b"
    export_bundle(tiny_checkpoint, out, "fp16", verify=False, target="tensorrt-rtx", engine_options=RTX)
    return out


def test_every_graph_of_the_plan_has_its_engine(bundle: Path) -> None:
    manifest = open_bundle(bundle, "hash").manifest
    assert manifest.target == "tensorrt-rtx" and manifest.graphs == PLAN
    assert [one.graph for one in manifest.engines] == [graph.name for graph in PLAN]
    for engine, graph in zip(manifest.engines, PLAN, strict=True):
        data = (bundle / engine.file).read_bytes()
        assert data[1:4] == b"trt"
        assert weight_bytes(graph, TINY, 2) <= len(data)
        assert engine.sha256 == sha256_of(bundle / engine.file) and engine.onnx_sha256 == sha256_of(bundle / graph.file_name)
        assert engine.layers["KV_CACHE_UPDATE"] == 2 * TINY.num_layers
        assert engine.layers["ATTENTION_INPUT"] == engine.layers["ATTENTION_OUTPUT"] == TINY.num_layers
        assert engine.compute_capabilities == ("8.9",) and engine.parity is None
        assert engine.versions["tensorrt_rtx"] == tensorrt_rtx.__version__


def test_inspect_tells_the_plan_and_every_engine(bundle: Path) -> None:
    found = inspect(bundle)
    assert [one["name"] for one in found["plan"]] == [*(graph.name for graph in PLAN), "model"]
    assert found["plan"][1]["tokens"] == found["plan"][1]["predicts"] == "audio"
    assert found["plan"][1]["engine"] == "decode.audio.engine" and found["plan"][-1]["engine"] is None
    assert found["engines"][-1]["ranges"] == {"b": [1, 2, 4], "n": [1, 2, 4], "s": [1, 16, 32]}


@pytest.mark.parametrize("stored", ["int8", "int4", "fp8"])
def test_engines_hold_codes_where_the_graph_does(stored: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    export_bundle(tiny_checkpoint, out, stored, verify=False, target="tensorrt-rtx", engine_options=RTX)
    manifest = open_bundle(out, "hash").manifest
    assert manifest.precision == "fp16" and manifest.weights == stored and manifest.quantization is not None
    for engine, graph in zip(manifest.engines, PLAN, strict=True):
        coded = [one for one in graph.parameters(TINY) if manifest.quantization.format_of(one) is not None]
        assert engine.layers["DEQUANTIZE"] == len(coded) > 0
        assert engine.precision == "fp16"
    # TensorRT takes int8 by output alone: in blocks it would hold what the codes stand for.
    sizes = {how.block_size for one in coded if (how := manifest.quantization.format_of(one)) is not None}
    assert sizes == {"int8": {None}, "int4": {32}, "fp8": {None}}[stored]


def test_an_engine_of_codes_is_smaller_by_what_the_codes_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's engines are all kernels; here weights outweigh them."""
    config = TINY.replace(modalities=(replace(TINY.modalities[0], vocab_size=16384), TINY.modalities[1]), num_layers=1)
    checkpoint = write_random(tmp_path / "model", config, 0)
    step = next(graph for graph in plan_for("tensorrt-rtx", config) if graph.name == "decode.text")
    monkeypatch.setattr(bundle_from_checkpoint, "plan_for", lambda target, config, operators: (step,))
    sizes = {}
    for precision in ("fp16", "int4"):
        out = tmp_path / precision
        export_bundle(checkpoint, out, precision, verify=False, target="tensorrt-rtx", engine_options=RTX)
        sizes[precision] = (out / "decode.text.engine").stat().st_size
    head = config.model_width * 16384  # by far the largest weight: two bytes a number, or a half and a share of a scale
    assert sizes["fp16"] - sizes["int4"] > 1.3 * head, sizes


def test_two_engines_exchanged_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    first, second = copy / "decode.text.engine", copy / "decode.audio.engine"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(BundleError, match=r"decode.audio.engine"):
        open_bundle(copy)
    # The same sizes, so that only the hash can tell.
    size = min(len(one), len(other))
    first.write_bytes(one[: size - 1] + bytes([one[size - 1] ^ 1]) + one[size:])
    second.write_bytes(other)
    with pytest.raises(BundleError, match=r"decode\.text\.engine is not the file that was exported"):
        open_bundle(copy, "hash")


def test_a_truncated_engine_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    file = copy / "prefill.engine"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"prefill.engine has \d+ bytes"):
        open_bundle(copy)


def test_a_record_comes_back_from_its_json(bundle: Path) -> None:
    for engine in open_bundle(bundle).manifest.engines:
        assert EngineRecord.from_dict(engine.to_dict()) == engine


def test_engines_of_a_tied_model_in_bf16(make_checkpoint: Any, tmp_path: Path) -> None:
    config = TIED.replace(num_layers=1)
    made = export_bundle(make_checkpoint(config), tmp_path / "b", "bf16", verify=False, target="tensorrt-rtx")
    assert {one.precision for one in made.bundle.manifest.engines} == {"bf16"}
    assert all(one.compute_capabilities == () for one in made.bundle.manifest.engines)


# Profiles


@pytest.mark.parametrize("graph", PLAN, ids=lambda graph: graph.name)
def test_a_profile_has_every_input_in_the_dims_of_the_signature(graph: Graph) -> None:
    signature = Signature.of(graph, TINY, "float16")
    ranges = ranges_for(graph, signature, RTX.sizes)
    profile = profile_for(signature, ranges)
    assert list(profile) == [spec.name for spec in signature.inputs]
    for spec in signature.inputs:
        for shape, choose in zip(profile[spec.name], ("least", "best", "most"), strict=True):
            assert shape == tuple(getattr(ranges[dim], choose) if isinstance(dim, str) else dim for dim in spec.dims)


def test_a_pass_is_never_longer_than_the_cache() -> None:
    graph = Graph("prefill", "select", capacity=20)
    ranges = ranges_for(graph, Signature.of(graph, TINY, "float16"), Sizes(new_tokens=Range(1, 128, 512)))
    assert ranges["s"] == Range(1, 20, 20)


def test_sizes_are_read_from_the_command_line() -> None:
    assert parse_range("4,16") == Range(1, 4, 16)
    assert parse_range("2") == Range(1, 2, 2)
    for text in ("", "0", "2,1", "1,2,3", "a", "1,-2", "9" * 400, "1,99999999"):
        with pytest.raises(InputError, match="BEST,MOST"):
            parse_range(text)


def test_an_engine_takes_one_row_and_one_token_whatever_was_said() -> None:
    """The last id of a prompt may come alone, and a step of mixed modalities has one token per row."""
    graph = PLAN[-1]
    sizes = Sizes(Range(4, 4, 4), Range(16, 16, 16))
    ranges = ranges_for(graph, Signature.of(graph, TINY, "float16"), sizes)
    assert {dim: one.least for dim, one in ranges.items()} == {"b": 1, "n": 1, "s": 1}


def test_the_weights_of_an_audio_step_are_a_third_of_a_text_step_at_full_size() -> None:
    config = PRESETS["llama-3.2-1b"]
    text, audio = plan_for("tensorrt", config)[:2]
    assert weight_bytes(text, config, 2) > 3 * weight_bytes(audio, config, 2)


# What can not be built


def graph_with_gather(tmp_path: Path, checkpoint: Path, trace: Trace) -> Graph:
    """The canonical graph where a graph for prompts should be."""
    graph = Graph("prefill", "select", capacity=TINY.max_seq_len)
    model = trace(TINY, "float16")
    attach_weights(model, TINY, "float16", open_checkpoint(checkpoint).read)
    write_onnx(model, tmp_path)
    (tmp_path / "model.onnx").rename(tmp_path / graph.file_name)
    return graph


def test_a_graph_that_can_not_be_parsed_names_node_module_and_operator(
    tmp_path: Path, tiny_checkpoint: Path, trace: Trace
) -> None:
    graph = graph_with_gather(tmp_path, tiny_checkpoint, trace)
    with pytest.raises(ExportError, match="NonZero, node decoder/NonZero of module decoder: "):
        build_engine(tmp_path / graph.file_name, graph, TINY, "float16", RTX, Steps())
    assert not list(tmp_path.glob("*.engine"))


def test_a_graph_that_is_not_its_signature_is_refused(bundle: Path) -> None:
    text, audio = PLAN[:2]
    with pytest.raises(ExportError, match=r"range_logits.*should be"):
        build_engine(bundle / text.file_name, audio, TINY, "float16", RTX, Steps())


def test_a_layer_that_was_taken_apart_is_seen(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_from_onnx._layers
    monkeypatch.setattr(engine_from_onnx, "_layers", lambda network: real(network) | {"ATTENTION_OUTPUT": 1})
    with pytest.raises(ExportError, match="1 layers of kind ATTENTION_OUTPUT, 2 were expected"):
        build_engine(bundle / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Steps())


def test_an_engine_of_the_wrong_size_is_seen(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    monkeypatch.setattr(engine_from_onnx, "weight_bytes", lambda *_: 1 << 30)
    with pytest.raises(ExportError, match="bytes; with weights of 1073741824"):
        build_engine(copy / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Steps())


def test_what_the_builder_says_stands_in_the_error(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines without their weights are not built on a machine without a GPU."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    def configuration(loaders: Any, profile: Any, *others: Any) -> Any:
        return CreateConfigRTX(profiles=[profile], strip_plan=True)

    monkeypatch.setattr(engine_from_onnx, "_configuration", configuration)
    with pytest.raises(ExportError, match=r"can not build decode\.text: .*[A-Za-z]{4}"):
        build_engine(copied / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Steps())
    assert not list(copied.glob("*.engine"))


def test_too_little_memory_is_told_with_a_figure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_from_onnx, "_available_bytes", lambda: 5 * 10**8)
    with pytest.raises(BackendError, match=r"takes about 1\.1 GB of memory and 0\.5 GB are free"):
        build_engine(bundle / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Steps())


class Heard(Steps):
    """Steps whose advances go to a function."""

    def __init__(self, hear: Advance) -> None:
        super().__init__()
        self.hear = hear

    @contextmanager
    def drawn(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        assert total == 1000 and unit == "parts"
        yield self.hear


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """The bundle's graphs without engines, to build anew."""
    return Path(shutil.copytree(bundle, tmp_path / "b", ignore=shutil.ignore_patterns("*.engine")))


def test_an_interrupt_ends_the_build(copied: Path) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(copied / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Heard(interrupt))
    assert not list(copied.glob("*.engine"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_build_wherever_it_comes(number: signal.Signals, copied: Path) -> None:
    def raise_it(which: int, frame: Any) -> None:
        raise SystemExit(which)

    before = signal.signal(number, raise_it)
    sent: list[int] = []

    def send(count: int) -> None:
        if not sent:
            sent.append(count)
            os.kill(os.getpid(), number)

    try:
        with pytest.raises(SystemExit) as end:
            build_engine(copied / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Heard(send))
    finally:
        assert signal.signal(number, before) is raise_it
    assert end.value.code == number


def test_the_bar_of_a_build_goes_to_its_end(copied: Path) -> None:
    told: list[int] = []
    build_engine(copied / PLAN[0].file_name, PLAN[0], TINY, "float16", RTX, Heard(told.append))
    assert sum(told) == 1000 and len(told) > 2


def test_options_that_a_flavour_does_not_have_are_refused() -> None:
    with pytest.raises(ExportError, match="--target tensorrt-rtx computes in fp16 or bf16"):
        refuse_options(RTX, "fp32")
    for options, said in (
        (EngineOptions("tensorrt-rtx", version_compatible=True), "--version-compatible is not for"),
        (EngineOptions("tensorrt-rtx", hardware_compatible=True), "--hardware-compatible is not for"),
        (EngineOptions("tensorrt-rtx", timing_cache=Path("x")), "--timing-cache is not for"),
        (EngineOptions("tensorrt", compute_capabilities=("8.9",)), "--compute-capability is not for"),
    ):
        with pytest.raises(InputError, match=said):
            refuse_options(options, "fp16")


@pytest.mark.parametrize("came", ["9.0", "8", "x", "8.9.1"])
def test_an_unknown_compute_capability_is_refused_with_those_that_are_known(came: str) -> None:
    known = ", ".join(known_capabilities(tensorrt_rtx))
    assert "8.9" in known
    with pytest.raises(InputError, match=f"builds for compute capability {known}, not for {came}"):
        refuse_options(EngineOptions("tensorrt-rtx", compute_capabilities=(came,)), "fp16")


def test_a_flavour_that_is_not_installed_says_what_is_missing_and_what_works() -> None:
    with pytest.raises(BackendError, match=r"tensorrt can not be imported.*--target tensorrt-rtx builds on any machine"):
        refuse_options(EngineOptions("tensorrt"), "fp16")


def test_the_datacentre_flavour_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "tensorrt_module", lambda flavour: tensorrt_rtx)
    monkeypatch.setattr(tensorrt_library, "find_gpus", lambda: Gpus((), None, "no NVIDIA driver is installed"))
    with pytest.raises(BackendError, match="builds on the GPU that will run the engines, and no NVIDIA driver is installed"):
        refuse_options(EngineOptions("tensorrt"), "fp16")


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_driver", lambda: None)
    assert gpu.find_gpus() == Gpus((), None, "no NVIDIA driver is installed (libcuda.so.1 is not there)")


# Whether an engine can run here


def test_an_engine_says_what_differs_here(bundle: Path) -> None:
    engine = open_bundle(bundle).manifest.engines[0]
    version = {"tensorrt_rtx": tensorrt_rtx.__version__}
    assert engine.differences(version, "NVIDIA L40", "8.9") == []
    assert engine.differences({"tensorrt_rtx": "9.9"}, "NVIDIA L40", "8.9") == [
        f"it was built by tensorrt_rtx {tensorrt_rtx.__version__}, and 9.9 is installed here"
    ]
    assert engine.differences(version, "NVIDIA H200", "9.0") == [
        "it was built for compute capability 8.9, and NVIDIA H200 has 9.0"
    ]
    assert engine.differences({"tensorrt": "10.13"}, "NVIDIA L40", "8.9") == [
        "it was built by tensorrt-rtx, and tensorrt 10.13 would run it"
    ]


def test_a_request_beyond_the_profile_names_the_dim_and_its_range(bundle: Path) -> None:
    engine = open_bundle(bundle).manifest.engines[-1]
    assert engine.refusals({"b": 4, "s": 32}) == []
    assert engine.refusals({"b": 5, "s": 33}) == [
        "rows: 5 asked, the engine takes 1 to 4",
        "new tokens per row: 33 asked, the engine takes 1 to 32",
    ]


def test_a_manifest_whose_engine_is_of_another_graph_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    manifest = open_bundle(copy).manifest
    first, *others = manifest.engines
    write_manifest(copy, replace(manifest, engines=(replace(first, graph="prefill"), *others)))
    with pytest.raises(BundleError, match=r"decode\.text\.engine was built of another graph than prefill"):
        open_bundle(copy)


def test_the_memory_of_a_gpu_is_told_for_people() -> None:
    assert str(Gpu("NVIDIA L4", "8.9", 24 * 10**9)) == "NVIDIA L4 (compute capability 8.9, 24 GB)"
