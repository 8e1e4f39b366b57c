"""motrt: export, run and prove routed text/audio expert models.

    import motrt

    with motrt.load("bundle") as session:
        for step in session.generate([1, 2, 3], schedule=motrt.then("audio", frames=50)):
            if step.frame:
                play(step.frame.codes)

Importing this, and opening a bundle, needs numpy, tokenizers and onnxruntime: neither torch nor onnx.
"""

from motrt.errors import MotrtError
from motrt.runtime.decoding import Step
from motrt.runtime.engine import Engine, EngineOptions
from motrt.runtime.load import load
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import interleave, on_control, then
from motrt.runtime.session import Session
from motrt.runtime.streaming import AudioFrame

__version__ = "0.1.0"

__all__ = [
    "AudioFrame",
    "Engine",
    "EngineOptions",
    "MotrtError",
    "Sampling",
    "Session",
    "Step",
    "__version__",
    "interleave",
    "load",
    "on_control",
    "then",
]
