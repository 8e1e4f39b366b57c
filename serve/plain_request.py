"""A request and its steps as plain JSON values: what Ray handles and Triton's tensors carry.

The HTTP protocol that other programs speak is not this one, and lives elsewhere. Nothing here computes: values are checked
for their names and kinds, and everything else is ``Engine.submit``'s to refuse.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from motrt.errors import InputError, raise_all
from motrt.runtime.decoding import Step
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import parse_schedule

SAMPLING_NAMES = tuple(one.name for one in fields(Sampling))

# What `Engine.submit` takes under its own name.
ENGINE_NAMES = ("max_tokens", "stop_ids", "priority", "seconds")

NAMES = ("prompt", "schedule", *ENGINE_NAMES, *SAMPLING_NAMES)


def submit_options(values: Any, max_priority: int) -> dict[str, Any]:
    """The arguments of ``Engine.submit`` that a plain request stands for; null is the same as nothing.

    Args:
        values: a mapping with ``prompt`` (text or ids), and perhaps ``schedule`` (as ``parse_schedule`` reads it),
            ``max_tokens``, ``stop_ids``, ``priority``, ``seconds``, and the attributes of ``Sampling``.
        max_priority: the highest that counts; a request of a higher one is one of this.

    Raises:
        InputError: for anything else, naming every name that is unknown.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f'a request is an object, as in {{"prompt": [1, 2, 3], "max_tokens": 8}} ({type(values).__name__} came)'
        )
    unknown = [f"{name!r} is not known" for name in values if name not in NAMES]
    raise_all(InputError, f"a request has the names {', '.join(NAMES)}:", unknown)
    given = {name: value for name, value in values.items() if value is not None}
    if "prompt" not in given:
        raise InputError("a request needs a prompt: text, or ids")
    options = {name: given[name] for name in ("prompt", *ENGINE_NAMES) if name in given}
    if isinstance(options.get("priority", 0), int):
        options["priority"] = min(options.get("priority", 0), max_priority)
    options["sampling"] = Sampling(**{name: given[name] for name in SAMPLING_NAMES if name in given})
    if "schedule" in given:
        options["schedule"] = _schedule(given["schedule"])
    return options


def _schedule(text: Any) -> Any:
    if not isinstance(text, str):
        raise InputError(f"schedule must be text, as in 'text:20,audio:50f' ({type(text).__name__} came)")
    return parse_schedule(text)


def plain_step(step: Step) -> dict[str, Any]:
    """One step as JSON values; ``frame`` holds the codes of the frame that it completed, or null."""
    return {
        "index": step.index,
        "token_id": step.token_id,
        "modality": step.modality,
        "text": step.text,
        "frame": None if step.frame is None else list(step.frame.codes),
        "finish": step.finish,
    }
