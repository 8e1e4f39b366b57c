"""TensorRT and CUDA on a machine that has neither: engines that are ONNX graphs in onnxruntime, and host memory for a device's.

What is examined with it is the session: which engine does a pass, what is bound where, what moves. Addresses are real, so a
wrong one is seen; a fake engine writes where it is told and nowhere else.
"""

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from motrt.errors import BackendError
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.model_def.signature import Signature
from motrt.runtime.bundle import Bundle, FileRecord, open_bundle, sha256_of, write_manifest
from motrt.runtime.cuda_device import CudaDevice, DeviceBuffer
from motrt.runtime.engine_record import EngineRecord, Range
from motrt.runtime.gpu import Gpu

L40 = Gpu("NVIDIA L40", "8.9", 48 * 10**9)
NUMPY = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class HostDevice(CudaDevice):
    """A device whose memory is the host's."""

    def __init__(self, num_bytes: int = 1 << 40) -> None:
        self.stream, self.left = 7, num_bytes
        self.held: dict[int, np.ndarray[Any, Any]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.num_uploads = self.num_downloads = self.num_recorded = 0

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        if num_bytes > self.left:
            raise BackendError(f"the GPU has no {num_bytes / 1e9:.2f} GB left")
        memory = np.zeros(max(1, num_bytes), np.uint8)
        self.left -= num_bytes
        self.held[memory.ctypes.data] = memory
        return DeviceBuffer(self, memory.ctypes.data, num_bytes)

    def free(self, address: int) -> None:
        self.left += self.held.pop(address).nbytes

    def memory(self) -> tuple[int, int]:
        return self.left, self.left

    def upload(self, buffer: DeviceBuffer, values: np.ndarray[Any, Any]) -> None:
        assert values.nbytes <= buffer.num_bytes
        self.num_uploads += 1
        ctypes.memmove(buffer.address, np.ascontiguousarray(values).ctypes.data, values.nbytes)

    def download(self, buffer: DeviceBuffer, values: np.ndarray[Any, Any], start: int = 0) -> None:
        assert start + values.nbytes <= buffer.num_bytes
        self.num_downloads += 1
        ctypes.memmove(values.ctypes.data, buffer.address + start, values.nbytes)

    def synchronize(self) -> None: ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As CUDA does it: what is put on the stream is noted, and not done."""
        noted: list[Callable[[], None]] = []
        self.capturing = noted
        work()
        self.capturing = None
        self.num_recorded += 1

        def again() -> None:
            for one in noted:
                one()

        return again

    def close(self) -> None: ...


class DataType(Enum):
    INT64, FLOAT, HALF, BF16 = "tensor(int64)", "tensor(float)", "tensor(float16)", "tensor(bfloat16)"


class TensorIOMode(Enum):
    INPUT, OUTPUT = 0, 1


class Logger:
    ERROR = 3

    def __init__(self, severity: int) -> None: ...


class Library:
    """What the session uses of TensorRT's module."""

    __version__ = "10.13"
    engine_host_code_allowed = False
    DataType, TensorIOMode, Logger = DataType, TensorIOMode, Logger

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.contexts: list[Context] = []

    def Runtime(self, logger: Any) -> "Library":  # noqa: N802  TensorRT's name
        return self

    def deserialize_cuda_engine(self, data: bytes) -> "Engine | None":
        return Engine(self, Path(data[4:].decode())) if data[:4] == b"ftrt" else None


class Engine:
    def __init__(self, library: Library, file: Path) -> None:
        self.library = library
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = {one.name: one for one in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, number: int) -> str:
        return str(list(self.tensors)[number])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(dim, str) else dim for dim in self.tensors[name].shape]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name].type)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.OUTPUT if name in self.outputs else TensorIOMode.INPUT

    def create_execution_context(self) -> "Context":
        self.library.contexts.append(Context(self))
        return self.library.contexts[-1]


class Context:
    """Does what it was told last, at the addresses that it was told."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.num_bindings, self.fails = 0, False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        self.num_bindings += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        if self.fails:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.engine.library.device.capturing is not None:
            self.engine.library.device.capturing.append(lambda: self._run(shapes, addresses))
        else:
            self._run(shapes, addresses)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {
            name: self._view(addresses[name], shapes[name], NUMPY[one.type]).copy() for name, one in self.engine.inputs.items()
        }
        for name in self.engine.outputs:
            if name.startswith("present_"):
                assert addresses[name] == addresses[name.replace("present", "past")], "the cache must be aliased"
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
            self._view(addresses[name], value.shape, value.dtype)[...] = value

    @staticmethod
    def _view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * count).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)


def fake_engines(
    folder: Path,
    graphs: Sequence[Graph],
    config: ModelConfig,
    precision: str,
    batch: Range = Range(1, 2, 4),  # noqa: B008
    new_tokens: Range = Range(1, 8, 16),  # noqa: B008
) -> tuple[tuple[EngineRecord, ...], dict[str, FileRecord]]:
    """Write engines that the library above can run beside their graphs; returns their records, and those of their files."""
    sizes = {"b": batch, "s": new_tokens, "n": Range(1, batch.best, batch.most)}
    engines, files = [], {}
    for graph in graphs:
        data = b"ftrt" + str((folder / graph.file_name).resolve()).encode()
        file = folder / f"{graph.name}.engine"
        file.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        files[file.name] = FileRecord(len(data), sha256)
        dims = {dim for spec in Signature.of(graph, config, "float32").inputs for dim in spec.dims}
        engines.append(
            EngineRecord(
                graph=graph.name,
                file=file.name,
                flavour="tensorrt",
                precision=precision,
                versions={"tensorrt": Library.__version__},
                gpu=L40.name,
                compute_capabilities=(L40.compute_capability,),
                ranges={dim: one for dim, one in sizes.items() if dim in dims},
                onnx_sha256=sha256_of(folder / graph.file_name),
                sha256=sha256,
            )
        )
    return tuple(engines), files


def with_fake_engines(bundle: Path) -> Bundle:
    """Give a bundle with derived graphs engines that the library above can run."""
    manifest = open_bundle(bundle).manifest
    engines, files = fake_engines(bundle, manifest.graphs, manifest.config, manifest.precision)
    write_manifest(bundle, replace(manifest, files={**manifest.files, **files}, engines=engines))
    return open_bundle(bundle, "hash")
