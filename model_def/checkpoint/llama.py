"""Llama base weights: Meta's ``consolidated.00.pth`` with ``params.json``, or Hugging Face safetensors with ``config.json``.

The two hold the same model in different rows: Meta's rotate interleaved pairs, Hugging Face's rotate halves, and their wq and
wk rows are permuted to match. Neither is permuted here: the configuration carries the style. Hugging Face may tie the head to
the embedding and then stores none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motrt.errors import CheckpointError, ConfigError, raise_all
from motrt.model_def.checkpoint.name_table import NameTable
from motrt.model_def.checkpoint.params_json import field_problems, read_json_object, read_params, value_or
from motrt.model_def.checkpoint.raw_state import (
    RawState,
    load_pickle,
    safetensors_files,
    state_from_mapping,
    state_from_safetensors,
)
from motrt.model_def.checkpoint.sizes import Sizes
from motrt.model_def.config import RopeConfig, RopeScaling

META_WEIGHTS = "consolidated.00.pth"
META_PARAMS = "params.json"

_COMPUTED = "computed from the configuration"

META_TABLE = NameTable(
    names=(
        ("tok_embeddings.weight", "tok_embeddings.weight"),
        ("layers.{i}.attention_norm.weight", "layers.{i}.attention_norm.weight"),
        ("layers.{i}.attention.{w:wq|wk|wv|wo}.weight", "layers.{i}.attention.{w}.text.weight"),
        ("layers.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
        ("layers.{i}.feed_forward.{w:w1|w2|w3}.weight", "layers.{i}.feed_forward.text.{w}.weight"),
        ("norm.weight", "norm.weight"),
        ("output.weight", "output.weight"),
    ),
    ignored=(("rope.freqs", _COMPUTED),),
)

HF_TABLE = NameTable(
    names=(
        ("model.embed_tokens.weight", "tok_embeddings.weight"),
        ("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
        ("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.wq.text.weight"),
        ("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attention.wk.text.weight"),
        ("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attention.wv.text.weight"),
        ("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.wo.text.weight"),
        ("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
        ("model.layers.{i}.mlp.gate_proj.{p:weight|bias}", "layers.{i}.feed_forward.text.w1.{p}"),
        ("model.layers.{i}.mlp.down_proj.{p:weight|bias}", "layers.{i}.feed_forward.text.w2.{p}"),
        ("model.layers.{i}.mlp.up_proj.{p:weight|bias}", "layers.{i}.feed_forward.text.w3.{p}"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", "output.weight"),
    ),
    ignored=(("model.layers.{i}.self_attn.rotary_emb.inv_freq", _COMPUTED),),
)


@dataclass(frozen=True)
class LlamaBase:
    """An opened base model.

    Attributes:
        sizes: what its configuration says.
        raw: its weights.
        table: their names.
        tokenizer: its ``tokenizer.json``, or None.
    """

    sizes: Sizes
    raw: RawState
    table: NameTable
    tokenizer: Path | None


def open_base(folder: Path) -> LlamaBase:
    """Open a Llama folder of either kind.

    Raises:
        CheckpointError: when it is neither, or damaged.
        ConfigError: when its configuration is impossible, no Llama's, or contradicts the weights.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: --llama takes the folder that holds the weights and their configuration"
        )
    tokenizer = folder / "tokenizer.json"
    base = _open(folder, tokenizer if tokenizer.is_file() else None)
    named = ((base.table.native(key), tensor.shape) for key, tensor in base.raw.tensors.items())
    shapes = {name: shape for name, shape in named if name is not None}
    base.sizes.refuse_contradictions(shapes, base.raw.source)
    return base


def _open(folder: Path, tokenizer: Path | None) -> LlamaBase:
    meta = sorted(folder.glob("consolidated.*.pth"))
    if [file.name for file in meta] == [META_WEIGHTS]:
        raw = state_from_mapping(META_WEIGHTS, load_pickle(meta[0]), str(meta[0]))
        return LlamaBase(read_params(folder / META_PARAMS), raw, META_TABLE, tokenizer)
    files = safetensors_files(folder)
    if files:
        raw = state_from_safetensors(folder.name, files)
        return LlamaBase(read_hf_config(folder / "config.json"), raw, HF_TABLE, tokenizer)
    if meta:
        names = ", ".join(file.name for file in meta)
        raise CheckpointError(
            f"{folder} holds {names}: weights split over several files by tensor parallelism are not read, one is"
        )
    raise CheckpointError(
        f"{folder} holds no Llama weights: expected {META_WEIGHTS} with {META_PARAMS} (Meta), "
        "or model.safetensors, whole or sharded, with config.json (Hugging Face)"
    )


def read_hf_config(file: Path) -> Sizes:
    """The sizes in a Hugging Face ``config.json`` of a Llama.

    Raises:
        CheckpointError: when it is missing.
        ConfigError: naming every field that is missing, impossible, or of another architecture.
    """
    values = read_json_object(file)
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    problems = field_problems(values, required, optional, flags=("tie_word_embeddings",)) + _foreign_features(values)
    raise_all(ConfigError, f"{file}:", problems)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("head_dim") is None and width % heads:
        raise ConfigError(
            f"{file}: num_attention_heads ({heads}) must divide hidden_size ({width}), since no head_dim is given"
        )
    return Sizes(
        file=file,
        model_width=width,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=value_or(values, "num_key_value_heads", heads),
        head_size=value_or(values, "head_dim", width // heads),
        vocab_size=values["vocab_size"] if values["vocab_size"] > 0 else None,
        hidden_size=values["intermediate_size"],
        norm_eps=float(value_or(values, "rms_norm_eps", 1e-6)),
        rope=_rope(file, values),
        max_seq_len=values.get("max_position_embeddings"),
        is_tied=value_or(values, "tie_word_embeddings", False),
    )


def _foreign_features(values: Mapping[str, Any]) -> list[str]:
    """What this decoder does not have: better refused than dropped."""
    plain = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "partial_rotary_factor": 1.0}
    return [
        f"{name} must be {wanted!r} ({values[name]!r} came): this decoder has no other"
        for name, wanted in plain.items()
        if values.get(name) is not None and values[name] != wanted
    ]


def _rope(file: Path, values: Mapping[str, Any]) -> RopeConfig:
    """RoPE as older (``rope_theta``, ``rope_scaling``) and newer (``rope_parameters``) configurations write it."""
    newer = values.get("rope_parameters") or {}
    scaling = newer or values.get("rope_scaling") or {}
    if not isinstance(newer, dict) or not isinstance(scaling, dict):
        raise ConfigError(f"{file}: rope_parameters and rope_scaling must be JSON objects or null")
    theta = value_or(newer, "rope_theta", value_or(values, "rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=float(theta), style="half")
    if kind != "llama3":
        raise ConfigError(f"{file}: RoPE scaling must be 'llama3' or 'default' ({kind!r} came): this decoder has no other")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    raise_all(ConfigError, f"{file}: RoPE scaling:", field_problems(scaling, fields, ()))
    factor, low, high, original = (scaling[name] for name in fields)
    return RopeConfig(theta=float(theta), style="half", scaling=RopeScaling(float(factor), float(low), float(high), original))
