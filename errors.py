"""Every error this package raises on purpose.

    MotrtError                what the user can mend: the message says what was expected, what came, what to do
    ├── ConfigError           a configuration that contradicts itself, or the weights beside it
    ├── CheckpointError       a checkpoint that is missing, damaged, foreign or incomplete
    │   └── UntrainedRowsError    rows of the embedding or a head that were never trained
    ├── ExportError           a graph that can not be made, or is not the graph that was asked for
    ├── BundleError           a bundle that is missing, damaged, or of another version
    ├── InputError            ids, masks, schedules or sampling values out of range (also a ValueError)
    │   └── CapacityError         more positions than the model or the cache can hold
    ├── BackendError          a library or device that is not there
    ├── EngineClosedError     an engine that takes no more requests
    ├── BusyError             an engine whose queue is full: try again later
    └── ParityError           what runs is not the model
        └── LossError             what runs is the model, in a format that loses more of it than its budget

Anything else that escapes is a bug, and keeps its traceback. This file knows nothing of the rest of the package.
"""

from collections.abc import Sequence
from typing import Any


class MotrtError(Exception):
    """Base of every error that the user can mend."""


class ConfigError(MotrtError, ValueError):
    """A model configuration that is impossible, or does not describe the weights beside it."""


class CheckpointError(MotrtError):
    """A checkpoint that is missing, truncated, of another kind, or does not account for every key."""


class UntrainedRowsError(CheckpointError):
    """Embedding or head rows that are all zero or constant: the model can not use those ids."""


class ExportError(MotrtError):
    """The graph could not be produced, or is not the graph that the signature describes."""


class BundleError(MotrtError):
    """A bundle folder that is missing, incomplete, damaged, or written by a newer version."""


class InputError(MotrtError, ValueError):
    """A value handed to the runtime that is out of its range or of the wrong shape or dtype."""


class CapacityError(InputError):
    """More positions than the model's maximum sequence length or the cache can hold."""


class BackendError(MotrtError):
    """A library, device or data type that this machine does not have."""


class EngineClosedError(MotrtError):
    """An engine that is closing, or broken: its message says why."""


class BusyError(MotrtError):
    """As many requests are waiting as may: try again later."""


class ParityError(MotrtError):
    """What runs is not the model: the parity gate said FAIL, or a session did not give its bundle's known answer.

    Attributes:
        report: what was found, as plain JSON values: the gate's report, or every difference from the answer.
    """

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class LossError(ParityError):
    """The graph is right, and its weights are stored in a format that loses more of the model than its budget allows."""


def raise_all(error: type[MotrtError], heading: str, problems: Sequence[str]) -> None:
    """Raise ``error`` naming every problem at once; return quietly where there is none."""
    if problems:
        raise error("\n  - ".join([heading, *problems]))
