"""Meta's ``params.json``: the sizes beside a Llama or Mixture-of-Transformers state. No weights, no framework.

Fields and defaults are those of Meta's ``ModelArgs`` and of the public Mixture-of-Transformers code, which added some. What
the file says of RoPE is read in ``rope.py``.
"""

from pathlib import Path

from motrt.errors import ConfigError, raise_all
from motrt.model_def.checkpoint.fields import field_problems, fixed_field_problems, read_json_object, unknown_fields, value_or
from motrt.model_def.checkpoint.rope import MetaCode, RopeChoices, meta_rope
from motrt.model_def.checkpoint.sizes import Sizes

_REQUIRED = ("dim", "n_layers", "n_heads")
_OPTIONAL = (
    *("vocab_size", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "max_seq_len"),
    *("rope_theta", "rope_scaling_factor", "rope_high_freq_factor"),
)
_FLAGS = ("use_scaled_rope", "use_qk_norm", "qk_normalization")

# How training and serving were set up, and how the feed-forward's width was once chosen.
_WITHOUT_EFFECT = frozenset(("multiple_of", "ffn_dim_multiplier", "max_batch_size", "model_parallel_size", "debug_mot"))
# Which experts there are: the weights say the same, and are believed.
_TOLD_BY_WEIGHTS = frozenset(("use_mot", "n_modalities", "use_audio_expert", "audio_expert_dim"))


def read_params(file: Path, choices: RopeChoices, code: MetaCode) -> Sizes:
    """Read the sizes in ``file``.

    Args:
        file: a ``params.json``.
        choices: what the person who converts says of RoPE.
        code: whose reading of the file holds.

    Raises:
        CheckpointError: when it is missing.
        ConfigError: naming every field that is missing, impossible, or not known.
    """
    values = read_json_object(file)
    # A Llama's vocabulary is its embedding's rows; a training state's rows are text and audio together.
    vocabulary = {"llama": (), "mot": ("vocab_size",)}[code]
    problems = field_problems(values, (*_REQUIRED, *vocabulary), _OPTIONAL, _FLAGS)
    problems += fixed_field_problems(values, {"use_qk_norm": False})  # Llama 4's, which has no weights
    problems += unknown_fields(values, {*_REQUIRED, *_OPTIONAL, *_FLAGS, *_WITHOUT_EFFECT, *_TOLD_BY_WEIGHTS})
    raise_all(ConfigError, f"{file}:", problems)
    dim, heads = values["dim"], values["n_heads"]
    if values.get("head_dim") is None and dim % heads:
        raise ConfigError(f"{file}: n_heads ({heads}) must divide dim ({dim}), since no head_dim is given")
    return Sizes(
        file=file,
        model_width=dim,
        num_layers=values["n_layers"],
        num_heads=heads,
        num_kv_heads=value_or(values, "n_kv_heads", heads),
        head_size=value_or(values, "head_dim", dim // heads),
        vocab_size=stated if (stated := value_or(values, "vocab_size", -1)) > 0 else None,
        hidden_size=values.get("hidden_dim"),
        norm_eps=float(value_or(values, "norm_eps", 1e-5)),
        rope=meta_rope(file, values, choices, code),
        max_seq_len=values.get("max_seq_len"),
        qk_norm=values.get("qk_normalization"),
    )
