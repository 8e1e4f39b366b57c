"""Which backends can be used on this machine, found out by letting each compute something whose answer is known.

That a library can be imported says little: a driver that is too old, a wheel without its libraries, a GPU that is not
supported all show only when something runs.
"""

import contextlib
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from motrt.errors import MotrtError
from motrt.runtime.gpu import find_gpus
from motrt.runtime.tensorrt_library import tensorrt_module
from motrt.runtime.versions import refuse_older

# Best first: what ``auto`` takes, where it can be used and the bundle has what it needs.
ORDER = ("tensorrt", "tensorrt-rtx", "cuda", "onnxruntime", "torch")

# The ONNX file of y = x @ x for x [2, 2] float32, at the opset that bundles need; made by tests/runtime/test_backends.py.
SQUARE = bytes.fromhex(
    "080a12003a450a110a01780a017812017922064d61744d756c12067371756172655a130a0178120e0a0c080112080a0208020a020802"
    "62130a0179120e0a0c080112080a0208020a02080242040a001018"
)
_ASKED = np.array([[1, 2], [3, 4]], np.float32)
_KNOWN = np.array([[7, 10], [15, 22]], np.float32)


@dataclass(frozen=True)
class Probe:
    """Whether one backend can be used here.

    Attributes:
        backend: its name.
        reason: why it can not; empty where it can.
        detail: what runs it, where it can.
    """

    backend: str
    reason: str
    detail: str = ""

    @property
    def is_usable(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "usable": self.is_usable, "reason": self.reason, "detail": self.detail}


@cache
def probe(backend: str) -> Probe:
    """Let ``backend`` compute, once for the process; whatever goes wrong is the reason."""
    try:
        return Probe(backend, "", _PROBES[backend]())
    except Exception as failure:  # the libraries' own exceptions share no base, and none may end the search
        kind = "" if isinstance(failure, MotrtError) else f"{type(failure).__name__}: "
        return Probe(backend, f"{kind}{failure}")


def probe_all() -> tuple[Probe, ...]:
    """Every backend, best first."""
    return tuple(probe(backend) for backend in ORDER)


class _UnusableError(MotrtError):
    """Why a probe ended."""


def _expect(came: Any, wanted: Any) -> None:
    if not np.array_equal(np.asarray(came), wanted):
        raise _UnusableError(f"it computes {np.asarray(came).tolist()} where the answer is {wanted.tolist()}")


def _onnxruntime(provider: str = "CPUExecutionProvider") -> str:
    import onnxruntime as ort

    import motrt.runtime.onnx_session  # noqa: F401  the sentence about a missing package is there

    refuse_older(onnxruntime=ort.__version__)
    if provider not in ort.get_available_providers():
        instead = "install `motrt[gpu]` in place of `motrt[cpu]`"
        raise _UnusableError(f"onnxruntime {ort.__version__} is built without CUDA: {instead}")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it says, the reason says
    if provider != "CPUExecutionProvider" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    session = ort.InferenceSession(SQUARE, options, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise _UnusableError(f"onnxruntime {ort.__version__} fell back to the CPU: it finds no CUDA or cuDNN libraries")
    _expect(session.run(None, {"x": _ASKED})[0], _KNOWN)
    return f"onnxruntime {ort.__version__}"


def _cuda() -> str:
    gpus = find_gpus()
    if gpus.first is None:
        raise _UnusableError(gpus.reason)
    return f"{_onnxruntime('CUDAExecutionProvider')} on {gpus.first}"


def _torch() -> str:
    try:
        import torch
    except ImportError as missing:
        raise _UnusableError(f"PyTorch can not be imported ({missing}): install `motrt[export]`") from None
    refuse_older(torch=torch.__version__)
    _expect((torch.from_numpy(_ASKED) @ torch.from_numpy(_ASKED)).numpy(), _KNOWN)
    return f"torch {torch.__version__}"


def _tensorrt(flavour: str) -> str:
    gpus = find_gpus()
    if gpus.first is None:
        raise _UnusableError(gpus.reason)
    module = tensorrt_module(flavour)
    _expect(_squared_by_tensorrt(module, flavour), _KNOWN)
    return f"{module.__name__} {module.__version__} on {gpus.first}"


def _squared_by_tensorrt(module: Any, flavour: str) -> Any:
    """The known answer by an engine that is built here and now."""
    from motrt.runtime.cuda_device import CudaDevice

    log = module.Logger(module.Logger.ERROR)
    engine = module.Runtime(log).deserialize_cuda_engine(_square_engine(module, flavour, log, is_for_here=True))
    if engine is None:
        raise _UnusableError("TensorRT does not load the engine that it has just built: is this GPU supported?")
    device = CudaDevice()
    try:
        return _squared_on(engine.create_execution_context(), device)
    finally:
        device.close()


def _squared_on(context: Any, device: Any) -> Any:
    buffers = {name: device.allocate(_ASKED.nbytes) for name in ("x", "y")}
    device.upload(buffers["x"], _ASKED)
    for name, buffer in buffers.items():
        context.set_tensor_address(name, buffer.address)
    if not context.execute_async_v3(device.stream):
        raise _UnusableError("TensorRT does not run the engine that it has just built")
    came = np.empty_like(_ASKED)
    device.download(buffers["y"], came)
    return came


def _square_engine(module: Any, flavour: str, log: Any, is_for_here: bool) -> Any:
    builder = module.Builder(log)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", module.DataType.FLOAT, _ASKED.shape)
    plain = module.MatrixOperation.NONE
    y = network.add_matrix_multiply(x, plain, x, plain).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if flavour == "tensorrt-rtx" and is_for_here:
        config.num_compute_capabilities = 1
        config.set_compute_capability(module.ComputeCapability.CURRENT, 0)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise _UnusableError("TensorRT builds no engine here: is this GPU supported?")
    return data


_PROBES = {
    "tensorrt": lambda: _tensorrt("tensorrt"),
    "tensorrt-rtx": lambda: _tensorrt("tensorrt-rtx"),
    "cuda": _cuda,
    "onnxruntime": _onnxruntime,
    "torch": _torch,
}
