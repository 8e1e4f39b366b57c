"""The little of CUDA that sessions need: memory, a stream, copies, kernels, recorded graphs; over polygraphy's binding.

One file, so that a session can be examined on a machine without a GPU by giving it a device of another kind.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from motrt.errors import BackendError
from motrt.runtime.cuda_compiler import CudaModule, compiled
from motrt.runtime.gpu import Gpu, find_gpus
from motrt.runtime.versions import refuse_older

_OLDEST_COMPILED_FOR = (8, 0)
_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may go on allocating


class DeviceBuffer:
    """Memory of a device, freed when nobody holds it."""

    def __init__(self, device: "CudaDevice", address: int, num_bytes: int) -> None:
        self.device, self.address, self.num_bytes = device, address, num_bytes

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # a driver that is going down has freed it
            self.device.free(self.address)


class _Recorded:
    """A recorded graph, freed when nobody holds it."""

    def __init__(self, device: "CudaDevice", executable: ctypes.c_void_p) -> None:
        self.device, self.executable = device, executable

    def __call__(self) -> None:
        self.device.launch(self.executable)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.device.forget(self.executable)


class CudaDevice:
    """The first GPU, and one stream on it.

    Raises:
        BackendError: when CUDA's runtime library is not to be had, or does not start.
    """

    def __init__(self) -> None:
        refuse_older("polygraphy")
        try:
            from polygraphy import cuda
            from polygraphy.logger import G_LOGGER

            G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1  # it prints where machines read; the errors here say it
            self._cuda = cuda.wrapper()
        except Exception as failure:  # polygraphy's own exception, or the loader's
            raise BackendError(
                f"CUDA's runtime library does not start ({failure}): install polygraphy, and put libcudart where the loader "
                "finds it (the wheel nvidia-cuda-runtime brings one)"
            ) from None
        self._kinds = cuda.MemcpyKind
        with _told("starting on the GPU"):
            self.stream = int(self._cuda.create_stream())

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        """Zeroed memory.

        Raises:
            BackendError: when there is not so much; what was there before stays as it was.
        """
        try:
            address = int(self._cuda.malloc(max(1, num_bytes)))
        except Exception as failure:
            free, total = self.memory()
            raise BackendError(
                f"the GPU has no {num_bytes / 1e9:.2f} GB left ({free / 1e9:.2f} of {total / 1e9:.2f} GB are free): take fewer "
                "rows, or export with a smaller --max-seq-len"
            ) from failure
        buffer = DeviceBuffer(self, address, num_bytes)
        self.zero(address, num_bytes)
        return buffer

    def free(self, address: int) -> None:
        self._cuda.free(address)

    def memory(self) -> tuple[int, int]:
        """Free bytes, and all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def upload(self, buffer: DeviceBuffer, values: np.ndarray[Any, Any]) -> None:
        """Copy ``values`` to the beginning of ``buffer``, in the order of the stream."""
        data = np.ascontiguousarray(values)
        with _told("copying to the GPU"):
            self._cuda.memcpy(buffer.address, data.ctypes.data, data.nbytes, self._kinds.HostToDevice, self.stream)

    def download(self, buffer: DeviceBuffer, values: np.ndarray[Any, Any], start: int = 0) -> None:
        """Fill ``values`` from byte ``start`` of ``buffer`` on; returns when they are there."""
        with _told("computing, or copying from the GPU"):
            self._cuda.memcpy(values.ctypes.data, buffer.address + start, values.nbytes, self._kinds.DeviceToHost, self.stream)
            self._cuda.stream_synchronize(self.stream)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy from one address of the device to another, in the order of the stream."""
        with _told("copying on the GPU"):
            self._cuda.memcpy(target, source, num_bytes, self._kinds.DeviceToDevice, self.stream)

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill memory of the device with zeros, in the order of the stream."""
        self._call("cudaMemsetAsync", _pointer(address), ctypes.c_int(0), ctypes.c_size_t(num_bytes), _pointer(self.stream))

    def finish(self) -> None:
        """Return when everything on the stream is done."""
        with _told("computing, or copying on the GPU"):
            self._cuda.stream_synchronize(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What ``work`` puts on the stream, as one call that does it again: a CUDA graph.

        Raises:
            BackendError: when the work can not be recorded.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", _pointer(self.stream), ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # the first failure is the one to tell
                self._call("cudaStreamEndCapture", _pointer(self.stream), ctypes.byref(graph))
                self._call("cudaGraphDestroy", graph)
            raise
        self._call("cudaStreamEndCapture", _pointer(self.stream), ctypes.byref(graph))
        try:
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cudaGraphDestroy", graph)
        return _Recorded(self, executable)

    def compile(self, source: str, macros: dict[str, str]) -> CudaModule:
        """Kernels of CUDA C++ for this GPU, which are launched on this stream.

        Raises:
            BackendError: where they cannot be compiled or loaded.
        """
        if self.capability < _OLDEST_COMPILED_FOR:
            raise BackendError(f"the step kernels are for compute capability 8.0 and newer, and this is {self._gpu}")
        return self.load(compiled(source, macros, self.capability))

    def load(self, code: bytes) -> CudaModule:
        """Kernels of machine code for this GPU.

        Raises:
            BackendError: where the driver does not take it.
        """
        self.memory()  # any call of the runtime's: a thread's first call of the driver finds no context otherwise
        return CudaModule(code, self.stream, self.capability)

    @property
    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability."""
        major, minor = map(int, self._gpu.compute_capability.split("."))
        return major, minor

    @property
    def num_multiprocessors(self) -> int:
        return self._gpu.num_multiprocessors

    @cached_property
    def _gpu(self) -> Gpu:
        gpus = find_gpus()
        if gpus.first is None:
            raise BackendError(gpus.reason)
        return gpus.first

    def launch(self, executable: ctypes.c_void_p) -> None:
        """Put a recorded graph on the stream."""
        self._call("cudaGraphLaunch", executable, _pointer(self.stream))

    def forget(self, executable: ctypes.c_void_p) -> None:
        """Free a recorded graph."""
        self._call("cudaGraphExecDestroy", executable)

    def close(self) -> None:
        self._cuda.destroy_stream(self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda.handle, name)(*arguments)
        if status:
            raise BackendError(f"CUDA failed in {name}: error {status}")


@contextlib.contextmanager
def _told(doing: str) -> Iterator[None]:
    """Polygraphy's exceptions as this package's."""
    try:
        yield
    except Exception as failure:
        raise BackendError(f"CUDA failed while {doing}: {failure}") from failure


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
