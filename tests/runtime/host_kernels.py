"""The step kernels compiled for the host, and a device that runs them: what a GPU does but for its timing."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.graph import plan_for
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import parameters
from motrt.runtime import step_kernels
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.step_kernels import CapturedStep, Launch, StepKernels, as_stored
from motrt.runtime.torch_session import TorchSession
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
    "one part of the keys left out where parts are put together": (
        "totals[s] = s < num_splits",
        "totals[s] = s + 1 < num_splits",
    ),
    "what a block counted is left for the next layer": ("counters[b * KV_HEADS + head] = 0;", ";"),
    "one warp's keys left out": ("for (int w = 0; w < WARPS; ++w) {", "for (int w = 1; w < WARPS; ++w) {"),
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


class Conversation:
    """Rows whose caches the PyTorch decoder filled, and the same in a device's memory for the kernels.

    Args:
        config: the model's.
        dtype: of the kernels' weights and cache; PyTorch computes in float32, over weights rounded to it.
        rows: of the batch, one prompt longer than the other.
        modality: of every token.
        read: gives a weight by its name; None: random ones.
        shortest: tokens of the first prompt.
        num_multiprocessors: of the device: how many parts of the keys attention can take.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        rows: int,
        modality: int,
        read: Callable[[str], torch.Tensor] | None = None,
        shortest: int = 7,
        num_multiprocessors: int = 2,
    ) -> None:
        self.config, self.modality, self.name = config, modality, config.modality_names[modality]
        self.device = KernelDevice()
        self.device.num_multiprocessors = num_multiprocessors
        found = random_tensors(config, 0) if read is None else ((one.name, read(one.name)) for one in parameters(config))
        tensors = {name: value.to(TORCH_DTYPES[dtype]).float() for name, value in found}
        self.reference = TorchSession(Decoder.from_tensors(config, tensors.__getitem__, torch.float32))
        self._held = {name: as_stored(value.numpy(), dtype) for name, value in tensors.items()}
        self.kernels = StepKernels(config, dtype, self.device, lambda name: int(self._held[name].ctypes.data))
        self._ids = config.id_ranges[modality]
        prompts = [[self._ids[(3 * row + 5 * at) % len(self._ids)] for at in range(shortest + 9 * row)] for row in range(rows)]
        _, self.cache = self.reference.prefill(prompts, self.name)
        self.reference.reserve(self.cache, config.max_seq_len)
        self.caches = [as_stored(one.numpy(), dtype) for pair in self.cache.buffers for one in pair]

    def capture(self, predicts: int) -> CapturedStep:
        addresses = [one.ctypes.data for one in self.caches]
        graphs = plan_for("cuda", self.config)
        graph = next(one for one in graphs if (one.tokens, one.predicts) == (self.modality, predicts))
        return self.kernels.capture(graph, len(self.cache.lengths), list(zip(addresses[::2], addresses[1::2], strict=True)))

    def step(self, captured: CapturedStep, number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The same tokens through kernels and PyTorch: logits [b, v] of each."""
        rows = range(len(self.cache.lengths))
        ids = [self._ids[(11 * row + 13 * number) % len(self._ids)] for row in rows]
        fed: list[Any] = [[[one] for one in ids], [], self.cache.lengths.copy(), rows, []]
        got = self.kernels.run(captured, StepInputs(*map(np.array, fed)))
        return got, self.reference.decode_step(ids, self.config.modality_names[captured.predicts], self.cache)

    def errors(self, captured: CapturedStep, number: int) -> tuple[list[float], int]:
        """Relative L2 of each row over the ids that it may yield, and in how many rows the best id is the same."""
        ids = self.config.id_ranges[captured.predicts]
        got, expected = (logits[:, ids.start : ids.stop] for logits in self.step(captured, number))
        errors = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        return errors.tolist(), int((got.argmax(1) == expected.argmax(1)).sum())
