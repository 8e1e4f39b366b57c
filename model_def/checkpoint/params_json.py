"""Meta's ``params.json``: the sizes beside a Llama or Mixture-of-Transformers state. No weights, no framework.

Fields and defaults are those of Meta's ``ModelArgs``: ``dim n_layers n_heads n_kv_heads vocab_size ffn_dim_multiplier
multiple_of norm_eps rope_theta use_scaled_rope max_seq_len``; ``head_dim`` and ``rope_scaling_factor`` where written.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motrt.errors import CheckpointError, ConfigError, raise_all
from motrt.model_def.checkpoint.sizes import Sizes
from motrt.model_def.config import RopeConfig, RopeScaling


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        CheckpointError: when it is missing.
        ConfigError: when it is no JSON object.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it gives the sizes of the model, and belongs beside the weights")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise ConfigError(f"{file} is not readable JSON ({failure}): fetch or write it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} should hold a JSON object ({type(values).__name__} came)")
    return values


def read_params(file: Path) -> Sizes:
    """The sizes in ``file``.

    Raises:
        CheckpointError: when it is missing.
        ConfigError: naming every field that is missing or impossible.
    """
    values = read_json_object(file)
    problems = field_problems(
        values, required=("dim", "n_layers", "n_heads", "vocab_size"), optional=_OPTIONAL, flags=("use_scaled_rope",)
    )
    raise_all(ConfigError, f"{file}:", problems)
    dim, heads = values["dim"], values["n_heads"]
    head_size = value_or(values, "head_dim", dim // heads)
    if values.get("head_dim") is None and dim % heads:
        raise ConfigError(f"{file}: n_heads ({heads}) must divide dim ({dim}), since no head_dim is given")
    scaled = value_or(values, "use_scaled_rope", False)
    # Meta's file does not name the factor: Llama 3.2 has 32 (RopeScaling's default).
    scaling = RopeScaling(factor=float(value_or(values, "rope_scaling_factor", RopeScaling().factor))) if scaled else None
    return Sizes(
        file=file,
        model_width=dim,
        num_layers=values["n_layers"],
        num_heads=heads,
        num_kv_heads=value_or(values, "n_kv_heads", heads),
        head_size=head_size,
        vocab_size=values["vocab_size"] if values["vocab_size"] > 0 else None,
        hidden_size=None,  # the weights say it; multiple_of and ffn_dim_multiplier are how it was once chosen
        norm_eps=float(value_or(values, "norm_eps", 1e-5)),
        rope=RopeConfig(theta=float(value_or(values, "rope_theta", 500000.0)), style="interleaved", scaling=scaling),
        max_seq_len=values.get("max_seq_len"),
    )


def field_problems(
    values: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...], flags: tuple[str, ...] = ()
) -> list[str]:
    """Fields that are missing or no positive number, and flags that are neither true nor false.

    A null counts as absent, and -1 as a vocabulary not given.
    """
    problems = [f"missing field {name!r}" for name in required if values.get(name) is None]
    for name in (*required, *optional):
        value = values.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
        is_whole = isinstance(value, int) or name in _FRACTIONS
        if value is not None and not (is_number and is_whole) and not (name == "vocab_size" and value == -1):
            problems.append(f"{name} must be a positive {'number' if name in _FRACTIONS else 'whole number'} ({value!r} came)")
    # The word "false" would count as true.
    wrong = [name for name in flags if not isinstance(values.get(name), bool | None)]
    return problems + [f"{name} must be true or false ({values[name]!r} came)" for name in wrong]


_FRACTIONS = frozenset(
    (
        *("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling_factor", "rms_norm_eps"),
        *("factor", "low_freq_factor", "high_freq_factor"),
    )
)
_OPTIONAL = (
    *("n_kv_heads", "head_dim", "ffn_dim_multiplier", "multiple_of", "norm_eps"),
    *("rope_theta", "max_seq_len", "rope_scaling_factor"),
)


def value_or(values: Mapping[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else value
