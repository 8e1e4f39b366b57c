"""CUDA's run-time compiler takes the step kernels as they are, on a machine without a GPU; what is missing is said."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from motrt.errors import BackendError
from motrt.model_def.config import ModelConfig
from motrt.runtime import cuda_compiler
from motrt.runtime.cuda_compiler import compiled, nvrtc
from motrt.runtime.step_kernels import SOURCE, StepShape

TINY64 = ModelConfig.preset("tiny64")
KERNELS = ("embed", "project_heads", "attend", "project_out", "head")
EXPERT = (("swiglu_in", "swiglu_out"), ("adapter_down", "adapter_in", "adapter_out", "adapter_up"))


@pytest.fixture
def needs_nvrtc() -> None:
    try:
        nvrtc()
    except BackendError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def unremembered() -> Iterator[None]:
    nvrtc.cache_clear()
    yield
    nvrtc.cache_clear()


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize(
    ("tokens", "rows", "dtype"), [(0, 1, "bfloat16"), (1, 1, "float16"), (0, 8, "float16"), (1, 3, "bfloat16")]
)
def test_the_step_kernels_compile_for_every_generation(capability: tuple[int, int], tokens: int, rows: int, dtype: str) -> None:
    code = compiled(SOURCE.read_text("utf-8"), StepShape(TINY64, dtype, tokens, rows, 132).macros, capability)
    assert code.startswith(b"\x7fELF")
    assert [name for name in (*KERNELS, *EXPERT[tokens]) if name.encode() not in code] == []


@pytest.mark.usefixtures("needs_nvrtc")
def test_what_the_compiler_refuses_is_told_with_its_words() -> None:
    macros = StepShape(TINY64, "bfloat16", 0, 1, 132).macros
    with pytest.raises(BackendError, match=r"NVRTC cannot compile the step kernels for sm_90.*no_such_thing"):
        compiled("no_such_thing x;", macros, (9, 0))
    with pytest.raises(BackendError, match="for sm_10 "):
        compiled(SOURCE.read_text("utf-8"), macros, (1, 0))


@pytest.mark.usefixtures("unremembered")
def test_without_a_compiler_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compiler, "_libraries", lambda: iter(()))
    monkeypatch.setattr(cuda_compiler, "_SONAMES", ("libnvrtc-of-nobody.so",))
    with pytest.raises(BackendError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc()


@pytest.mark.usefixtures("unremembered")
@pytest.mark.parametrize("layout", ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"])
def test_it_is_found_where_wheels_put_it_and_its_builtins_are_loaded_first(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0"):
        (folder / name).touch()
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded.append(Path(name).name))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    nvrtc()
    assert loaded == ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]
