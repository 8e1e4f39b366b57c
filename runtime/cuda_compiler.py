"""CUDA C++ from source to kernels on the GPU that is there: NVRTC compiles, the driver loads and launches. Over ctypes alone.

NVRTC is a library of CUDA's (the wheel ``nvidia-cuda-nvrtc``; PyTorch and ``onnxruntime-gpu[cuda,cudnn]`` bring it). What it
makes is machine code for one compute capability, kept for the life of the session.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from motrt.errors import BackendError
from motrt.runtime.gpu import cuda_driver
from motrt.runtime.step_kernels import Launch

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
# Of wheels: CUDA 13's one folder, and CUDA 12's for each library.
_IN_SITE_PACKAGES = ("nvidia/cu*/lib/libnvrtc.so.1[0-9]", "nvidia/cuda_nvrtc/lib/libnvrtc.so.1[0-9]")
_BUILTINS = "libnvrtc-builtins.so.1[0-9].*"
# CUlaunchAttributeID, in cuda.h: a kernel may begin before the one ahead has ended, and waits for it by itself.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_FIRST_WITH_IT = (9, 0)


@cache
def nvrtc() -> Any:
    """The compiler's library.

    Raises:
        BackendError: where it is not to be found.
    """
    for file in _libraries():
        with contextlib.suppress(OSError):
            for part in file.parent.glob(_BUILTINS):
                ctypes.CDLL(str(part))  # it asks the loader for it by name, and finds what is loaded already
            return ctypes.CDLL(str(file))
    for name in _SONAMES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise BackendError(
        "CUDA's run-time compiler is not to be found (libnvrtc): install it with `pip install nvidia-cuda-nvrtc`, "
        "or put CUDA's libraries where the loader finds them"
    )


def _libraries() -> Iterator[Path]:
    for folder in map(Path, sys.path):
        for pattern in _IN_SITE_PACKAGES:
            yield from sorted(folder.glob(pattern), reverse=True)


def compiled(source: str, macros: dict[str, str], capability: tuple[int, int]) -> bytes:
    """Machine code of ``source`` for one compute capability.

    Raises:
        BackendError: where there is no compiler, or it refuses; with what it says.
    """
    library, program = nvrtc(), ctypes.c_void_p()
    _check(library, "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"step_kernels.cu", 0, None, None)
    try:
        major, minor = capability
        options = [
            f"--gpu-architecture=sm_{major}{minor}",
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in macros.items()),
        ]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), encoded)
        if status:
            said = _bytes(library, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).decode(errors="replace")
            raise BackendError(f"NVRTC cannot compile the step kernels for sm_{major}{minor} (error {status}): {said[:2000]}")
        return _bytes(library, "nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(library: Any, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(library, size_of, program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, get, program, buffer)
    return buffer.raw


def _check(library: Any, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        raise BackendError(f"NVRTC failed in {name}: error {status}")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class CudaModule:
    """Kernels that are loaded; unloaded when nobody holds them.

    Args:
        code: machine code for this GPU.
        stream: that they are launched on.
        capability: of this GPU.

    Raises:
        BackendError: where the driver does not take the code.
    """

    def __init__(self, code: bytes, stream: int, capability: tuple[int, int]) -> None:
        self._driver, self._stream, self._module = cuda_driver(), stream, ctypes.c_void_p()
        self._overlaps = capability >= _FIRST_WITH_IT
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._call("cuModuleLoadData", ctypes.byref(self._module), code)

    def launch(self, launch: Launch, threads: int, waits: bool) -> None:
        """Put a kernel on the stream; ``waits``: it waits for the kernel ahead by itself, and may begin before.

        Raises:
            BackendError: where the driver refuses.
        """
        values = [ctypes.c_int(int(one)) if isinstance(one, np.int32) else ctypes.c_uint64(one) for one in launch.arguments]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(threads, 1, 1)
        config = _Config(grid, block, 0, self._stream, ctypes.pointer(attribute), int(waits and self._overlaps))
        self._call("cuLaunchKernelEx", ctypes.byref(config), self._function(launch.kernel), arguments, None)

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
            self._functions[name] = function
        return self._functions[name]

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise BackendError(f"CUDA failed in {name}: {(text.value or b'error ').decode()} ({status})")

    def __del__(self) -> None:
        if self._module:
            with contextlib.suppress(Exception):  # a driver that is going down has unloaded it
                self._driver.cuModuleUnload(self._module)
