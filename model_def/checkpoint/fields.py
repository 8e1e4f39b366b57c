"""The fields of a foreign configuration: read as JSON, checked for type, and none passed over in silence.

Every reader of a configuration names the fields that it uses and those that are known to be without effect on the forward
pass; any other is refused by name (``unknown_fields``), because a setting that is dropped gives a model that runs and is wrong.
Standard library alone.
"""

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from motrt.errors import CheckpointError, ConfigError
from motrt.model_def.file_problem import file_problem


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        CheckpointError: when it is missing.
        ConfigError: when it is no JSON object.
    """
    if problem := file_problem(file):
        raise CheckpointError(f"{file} {problem}: it gives the sizes of the model, and belongs beside the weights")
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as failure:
        raise ConfigError(f"{file} is not readable JSON ({failure}): fetch or write it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} should hold a JSON object ({type(values).__name__} came)")
    return values


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    doubled = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if doubled is not None:
        raise ValueError(f"{doubled!r} stands there twice")
    return dict(pairs)


def field_problems(
    values: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...], flags: tuple[str, ...] = ()
) -> list[str]:
    """Return what is wrong with these fields: missing, no positive number, or a flag that is neither true nor false.

    A null counts as absent, and -1 as a vocabulary not given.
    """
    problems = [f"missing field {name!r}" for name in required if values.get(name) is None]
    for name in dict.fromkeys((*required, *optional)):
        value = values.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
        is_whole = name in _FRACTIONS or (isinstance(value, int) and value <= _LARGEST_SIZE)
        if value is not None and not (is_number and is_whole) and not (name == "vocab_size" and value == -1):
            problems.append(
                f"{name} must be a positive {'number' if name in _FRACTIONS else 'whole number'} ({shown(value)} came)"
            )
    # The word "false" would count as true.
    wrong = [name for name in flags if not isinstance(values.get(name), bool | None)]
    return problems + [f"{name} must be true or false ({shown(values[name])} came)" for name in wrong]


def unknown_fields(values: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return a problem for each field that is neither null nor ``known``."""
    return [
        f"{name} ({shown(value)}) is not known here, so whether it changes the model cannot be told: "
        "remove it from the file if it has no effect on the forward pass"
        for name, value in values.items()
        if value is not None and name not in known
    ]


def fixed_field_problems(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """Return a problem for each field that is given and is not the one value that this decoder can have."""
    return [
        f"{name} must be {wanted!r} (got {shown(values[name])}): this decoder has no other"
        for name, wanted in fixed.items()
        if values.get(name) is not None and values[name] != wanted
    ]


def shown(value: Any) -> str:
    """Return ``value`` as an error shows it, short."""
    text = json.dumps(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def value_or(values: Mapping[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else value


_LARGEST_SIZE = (1 << 31) - 1
_FRACTIONS = frozenset(
    (
        *("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling_factor", "rope_high_freq_factor", "rms_norm_eps"),
        *("factor", "low_freq_factor", "high_freq_factor"),
        *("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"),
    )
)
