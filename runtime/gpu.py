"""Which NVIDIA GPUs this machine has, asked of the driver itself. Nothing need be installed to ask."""

import contextlib
import ctypes
from dataclasses import dataclass

from motrt.errors import BackendError

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")

# Of CUdevice_attribute, in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS = 75, 76, 16


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: the driver's name for it.
        compute_capability: ``8.9``.
        memory_bytes: all of it, used or not.
        num_multiprocessors: that it computes with.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    num_multiprocessors: int = 1

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, {self.memory_bytes / 1e9:.0f} GB)"


@dataclass(frozen=True)
class Gpus:
    """What the driver said.

    Attributes:
        found: every GPU that it shows.
        driver: the CUDA version that it supports, ``13.0``; None without a driver.
        reason: why there is none; empty where there is one.
    """

    found: tuple[Gpu, ...]
    driver: str | None
    reason: str = ""

    @property
    def first(self) -> Gpu | None:
        return self.found[0] if self.found else None


def find_gpus() -> Gpus:
    """Ask the driver; a machine without one is an answer, not an error."""
    library = _driver()
    if library is None:
        return Gpus((), None, "no NVIDIA driver is installed (libcuda.so.1 is not there)")
    status = library.cuInit(0)
    if status:
        return Gpus((), None, f"the NVIDIA driver does not start: {_explained(library, status)}")
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetCount(ctypes.byref(count))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    found = tuple(_gpu(library, number) for number in range(count.value))
    return Gpus(found, driver, "" if found else "the NVIDIA driver shows no GPU")


def cuda_driver() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        BackendError: where there is none.
    """
    library = _driver()
    if library is None:
        raise BackendError("no NVIDIA driver is installed (libcuda.so.1 is not there)")
    return library


def _driver() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _gpu(library: ctypes.CDLL, number: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), number)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_attribute(library, device, which) for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
    multiprocessors = _attribute(library, device, _MULTIPROCESSORS)
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", memory.value, multiprocessors)


def _attribute(library: ctypes.CDLL, device: ctypes.c_int, which: int) -> int:
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value


def _explained(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode(errors="replace") if text.value else f"error {status}"
