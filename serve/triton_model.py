"""The model ``motrt_generate`` inside Triton's Python backend: each request's tokens are sent as they come.

Triton's own module, ``triton_python_backend_utils``, exists inside Triton alone, so it is imported when Triton calls.
``execute`` hands requests to the engine and returns: whatever Triton brings meanwhile joins the same batch.
"""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motrt.errors import BusyError, EngineClosedError, InputError, MotrtError
from motrt.model_def.signature import TensorSpec
from motrt.runtime.engine import EngineOptions, Stream
from motrt.serve.plain_request import plain_step, submit_options
from motrt.serve.replica import Replica

logger = logging.getLogger(__name__)

# Where the bundle lies in the model's own folder, which is all that Triton fetches of a repository elsewhere.
BUNDLE_FOLDER = "bundle"

# A request: a prompt as text or as ids, and what else ``plain_request`` knows; each may be left out.
INPUTS = (
    TensorSpec("prompt", "string", (1,)),
    TensorSpec("prompt_ids", "int64", ("n",)),
    TensorSpec("schedule", "string", (1,)),
    TensorSpec("max_tokens", "int64", (1,)),
    TensorSpec("stop_ids", "int64", ("n",)),
    TensorSpec("priority", "int64", (1,)),
    TensorSpec("seconds", "float64", (1,)),
    TensorSpec("temperature", "float64", (1,)),
    TensorSpec("top_k", "int64", (1,)),
    TensorSpec("top_p", "float64", (1,)),
    TensorSpec("min_p", "float64", (1,)),
    TensorSpec("repetition_penalty", "float64", (1,)),
    TensorSpec("seed", "int64", (1,)),
)

# A response per token; ``frame`` has no codes where none was completed, ``finish`` is empty until the last.
OUTPUTS = (
    TensorSpec("index", "int64", (1,)),
    TensorSpec("token_id", "int64", (1,)),
    TensorSpec("modality", "string", (1,)),
    TensorSpec("text", "string", (1,)),
    TensorSpec("frame", "int64", ("n",)),
    TensorSpec("finish", "string", (1,)),
)

# How long requests may go on when Triton unloads the model.
DRAIN_SECONDS = 30.0


class TritonPythonModel:
    """What Triton makes one of per instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle, ask it for its known answer, warm up: Triton calls the model ready when this returns."""
        import triton_python_backend_utils as pb_utils

        self.triton = pb_utils
        settings = {name: one["string_value"] for name, one in json.loads(args["model_config"])["parameters"].items()}
        options = EngineOptions(max_batch=int(settings["max_batch"]), max_queue=int(settings["max_queue"]))
        folder = Path(pb_utils.get_model_dir()).parent / settings["bundle"]  # get_model_dir: the version's folder
        # Repositories that were written before these two were known lack them.
        self.max_priority = int(settings.get("max_priority", "0"))
        self.replica = Replica(folder, settings["backend"], int(settings["threads"]), options, settings.get("check", ""))
        self.answering: set[threading.Thread] = set()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand each request to the engine; a thread of its own sends what comes of it."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                stream = self.replica.engine.submit(**submit_options(self._values(request), self.max_priority))
            except MotrtError as failure:
                self._send_error(sender, failure)
                continue
            thread = threading.Thread(target=self._answer, args=(stream, sender), name="motrt-answer", daemon=True)
            self.answering.add(thread)
            thread.start()

    def finalize(self) -> None:
        """Let requests finish for a while, then end them."""
        self.replica.close(DRAIN_SECONDS)
        for thread in list(self.answering):
            thread.join()

    def _values(self, request: Any) -> dict[str, Any]:
        """A plain request of the tensors that came."""
        values: dict[str, Any] = {}
        for spec in INPUTS:
            tensor = self.triton.get_input_tensor_by_name(request, spec.name)
            if tensor is not None:
                values[spec.name] = _value(spec, tensor.as_numpy())
        ids = values.pop("prompt_ids", None)
        if ids is not None and "prompt" in values:
            raise InputError("a request has a prompt or prompt_ids: both came")
        return values if ids is None else {**values, "prompt": ids}

    def _answer(self, stream: Stream, sender: Any) -> None:
        try:
            for step in stream:
                if sender.is_cancelled():
                    stream.cancel()
                    break
                sender.send(self.triton.InferenceResponse(output_tensors=self._tensors(plain_step(step))))
            sender.send(flags=self.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except MotrtError as failure:
            self._send_error(sender, failure)
        except Exception:  # what Triton refuses to send, say: nobody is there to hear of it
            logger.exception("request %d could not be answered", stream.number)
        finally:
            stream.cancel()
            self.answering.discard(threading.current_thread())

    def _tensors(self, step: Mapping[str, Any]) -> list[Any]:
        return [self.triton.Tensor(spec.name, _array(spec, step[spec.name])) for spec in OUTPUTS]

    def _send_error(self, sender: Any, failure: MotrtError) -> None:
        codes = self.triton.TritonError
        code = codes.INTERNAL
        if isinstance(failure, InputError):
            code = codes.INVALID_ARG
        elif isinstance(failure, BusyError | EngineClosedError):
            code = codes.UNAVAILABLE
        response = self.triton.InferenceResponse(output_tensors=[], error=self.triton.TritonError(str(failure), code))
        sender.send(response, flags=self.triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _value(spec: TensorSpec, came: Any) -> Any:
    """A tensor of a request as a plain value: text, a number, or a list where the dim is free."""
    values = came.reshape(-1).tolist()
    if isinstance(spec.dims[0], str):
        return values
    if len(values) != 1:
        raise InputError(f"{spec.name} must be one value ({len(values)} came)")
    try:
        return values[0].decode("utf-8") if isinstance(values[0], bytes) else values[0]
    except UnicodeDecodeError as failure:
        raise InputError(f"{spec.name} must be UTF-8 text ({failure})") from None


def _array(spec: TensorSpec, value: Any) -> Any:
    """A plain value as a tensor of a response; nothing is an empty text, or no codes."""
    if spec.dtype == "string":
        return np.array([(value or "").encode("utf-8")], dtype=np.object_)
    return np.array([] if value is None else value, dtype=np.int64).reshape(-1)
