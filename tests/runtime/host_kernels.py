"""The step kernels compiled for the host, and a device that runs them: what a GPU does but for its timing."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from motrt.runtime import step_kernels
from motrt.runtime.step_kernels import Launch
from motrt.tests.runtime.fake_tensorrt import HostDevice

HEADER = Path(__file__).with_name("host_cuda.h")
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)

# Faults to plant in the step kernels: in what they are compiled with, and in a line of theirs.
FAULTY_MACROS = {
    "halves rotated where pairs are": {"IS_INTERLEAVED": "0"},
    "softmax not scaled": {"SOFTMAX_SCALE": "1.0f"},
    "an epsilon of another size": {"NORM_EPS": "1e-1f"},
}
FAULTY_LINES = {
    "keys and values exchanged": ("head < HEADS + KV_HEADS ? keys : values", "head < HEADS + KV_HEADS ? values : keys"),
    "the newest key not seen": ("int(positions[b]) + 1", "int(positions[b])"),
    "the residual dropped": ("= before + sums[0]", "= sums[0]"),
    "SiLU for GELU": ("IS_GELU ? gelu(value)", "IS_GELU ? silu(value)"),
    "one part of the keys left out": ("for (int w = 0; w < WARPS; ++w) {", "for (int w = 1; w < WARPS; ++w) {"),
}


def faulty_source(name: str) -> str:
    """The kernels with one of ``FAULTY_LINES``."""
    right, wrong = FAULTY_LINES[name]
    source = step_kernels.SOURCE.read_text("utf-8")
    assert source.count(right) == 1, right
    return source.replace(right, wrong)


@cache
def _library(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        file, made = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        file.write_text(source)
        flags = [
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-U_FORTIFY_SOURCE",
            "-fno-strict-aliasing",
            f'-DHOST_CUDA="{HEADER}"',
        ]
        # Or a template's statics, which are a block's memory, would be one for all libraries, whatever their sizes.
        flags += ["-fno-gnu-unique"] if Path(COMPILER).name == "g++" else []
        done = subprocess.run([COMPILER, *flags, *options, str(file), "-o", str(made)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return ctypes.CDLL(str(made))


class HostModule:
    """The kernels of one set of sizes."""

    def __init__(self, device: "KernelDevice", source: str, macros: dict[str, str]) -> None:
        self._device = device
        self._library = _library(source, tuple(f"-D{name}={value}" for name, value in macros.items()))

    def launch(self, launch: Launch, threads: int, waits: bool) -> None:
        self._device.launched.append((launch, waits))
        if self._device.capturing is not None:
            self._device.capturing.append(lambda: self._now(launch, threads))
        else:
            self._now(launch, threads)

    def _now(self, launch: Launch, threads: int) -> None:
        values = (ctypes.c_uint64 * len(launch.arguments))(*(int(one) for one in launch.arguments))
        kernel = ctypes.cast(getattr(self._library, launch.kernel), ctypes.c_void_p)
        status = self._library.host_launch(kernel, values, len(values), *launch.grid, threads)
        assert status == 0, f"{launch.kernel}: {('', 'it hangs', 'it does not wait for the kernel ahead')[status]}"


class KernelDevice(HostDevice):
    """A device of few multiprocessors, so that warps go on to further rows, whose memory is the host's."""

    num_multiprocessors = 2

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Launch, bool]] = []
        self.num_finished = 0

    def compile(self, source: str, macros: dict[str, str]) -> Any:
        return HostModule(self, source, macros)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(target, source, num_bytes)

    def zero(self, address: int, num_bytes: int) -> None:
        ctypes.memset(address, 0, num_bytes)

    def finish(self) -> None:
        self.num_finished += 1


def stored(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """As a device holds them: bit patterns of bfloat16, or float16."""
    if dtype == "float16":
        return np.ascontiguousarray(values, np.float16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
