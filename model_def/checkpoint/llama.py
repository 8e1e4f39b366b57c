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
from motrt.model_def.checkpoint.distributed import is_distributed
from motrt.model_def.checkpoint.fields import (
    field_problems,
    fixed_field_problems,
    read_json_object,
    shown,
    unknown_fields,
    value_or,
)
from motrt.model_def.checkpoint.gguf_file import is_gguf
from motrt.model_def.checkpoint.hub_folder import open_weights, weight_files
from motrt.model_def.checkpoint.name_table import COMPUTED, NameTable
from motrt.model_def.checkpoint.params_json import read_params
from motrt.model_def.checkpoint.quantized import quantized_config_problem
from motrt.model_def.checkpoint.raw_state import RawState
from motrt.model_def.checkpoint.rope import RopeChoices, hf_rope
from motrt.model_def.checkpoint.sizes import Sizes
from motrt.model_def.checkpoint.training_state import open_training_state, without_prefix
from motrt.model_def.file_problem import link_problem

META_WEIGHTS = "consolidated.00.pth"
META_PARAMS = "params.json"

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
    ignored=(("rope.freqs", COMPUTED),),
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
    ignored=(("model.layers.{i}.self_attn.rotary_emb.inv_freq", COMPUTED), ("model.rotary_emb.inv_freq", COMPUTED)),
)


@dataclass(frozen=True)
class LlamaBase:
    """An opened base model.

    Attributes:
        sizes: what its configuration says.
        raw: its weights.
        table: their names.
        tokenizer: its ``tokenizer.json``, or None.
        notes: what the report should say of it.
    """

    sizes: Sizes
    raw: RawState
    table: NameTable
    tokenizer: Path | None
    notes: tuple[str, ...] = ()


def open_base(folder: Path, rope: RopeChoices | None = None) -> LlamaBase:
    """Open a Llama folder of either kind.

    Args:
        folder: Meta's or Hugging Face's.
        rope: what the person who converts says of RoPE.

    Raises:
        CheckpointError: when it is neither, both, quantized, or damaged.
        ConfigError: when its configuration is impossible, no Llama's, or contradicts the weights.
    """
    if is_gguf(folder):
        raise CheckpointError(f"{folder} is a GGUF file: --gguf reads it")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: --llama takes the folder that holds the weights and their configuration"
        )
    sizes, raw, table = _open(folder, rope or RopeChoices())
    named = ((table.native(key), tensor.shape) for key, tensor in raw.tensors.items())
    sizes.refuse_contradictions({name: shape for name, shape in named if name is not None}, raw.source)
    tokenizer = tokenizer_beside(folder)
    return LlamaBase(sizes, raw, table, tokenizer, tokenizer_notes(folder))


def tokenizer_beside(folder: Path) -> Path | None:
    """Return the ``tokenizer.json`` in ``folder``, or None.

    Raises:
        CheckpointError: when it is a link that leads nowhere, say: it is meant to go along.
    """
    file = folder / "tokenizer.json"
    if problem := link_problem(file):
        raise CheckpointError(f"{file} {problem}: fetch it again, or remove it")
    return file if file.is_file() else None


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """Return a sentence where a folder's only tokenizer is of a format that is not read."""
    if tokenizer_beside(folder) is not None or not (folder / "tokenizer.model").is_file():
        return ()
    return (
        "no tokenizer goes along: tokenizer.model is not read. Put the tokenizer.json of the same model beside it "
        "(its Hugging Face folder has one) to prompt with text",
    )


def meta_weights(folder: Path) -> Path | None:
    """Return Meta's weight file in ``folder``, or None where there is none.

    Raises:
        CheckpointError: when its weights are split over several files.
    """
    found = sorted(folder.glob("consolidated.*.pth"))
    if [file.name for file in found] not in ([], [META_WEIGHTS]):
        names = ", ".join(file.name for file in found)
        raise CheckpointError(
            f"{folder} holds {names}: weights split over several files by tensor parallelism are not read, one is"
        )
    return found[0] if found else None


def _open(folder: Path, rope: RopeChoices) -> tuple[Sizes, RawState, NameTable]:
    meta, hub_files = meta_weights(folder), weight_files(folder)
    if meta is not None and hub_files:
        raise CheckpointError(
            f"{folder} holds {META_WEIGHTS} and {hub_files[0].name}: keep the set that is meant in the folder, with its "
            "configuration, and move the other away"
        )
    if meta is not None:
        raw = open_training_state(meta, lambda name: META_TABLE.native(name) is not None)
        return read_params(folder / META_PARAMS, rope, "llama"), raw, META_TABLE
    if hub_files:
        sizes = read_hf_config(folder / "config.json", rope)
        return sizes, without_prefix(open_weights(folder), lambda name: HF_TABLE.native(name) is not None), HF_TABLE
    if is_distributed(folder):
        raise CheckpointError(
            f"{folder} is a folder of torch.distributed.checkpoint, which holds no sizes: --llama expects a folder with a "
            "configuration. `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin` "
            "writes one file, to lie beside config.json; run it on files that you trust, since it unpickles them"
        )
    raise CheckpointError(
        f"{folder} holds no Llama weights: expected {META_WEIGHTS} with {META_PARAMS} (Meta), "
        "or model.safetensors or pytorch_model.bin, whole or sharded, with config.json (Hugging Face)"
    )


def read_hf_config(file: Path, choices: RopeChoices) -> Sizes:
    """Read the sizes in a Hugging Face ``config.json`` of a Llama.

    Args:
        file: a ``config.json``.
        choices: what the person who converts says of RoPE.

    Raises:
        CheckpointError: when it is missing.
        ConfigError: naming every field that is missing, impossible, not known, or of another architecture.
    """
    values = read_json_object(file)
    raise_all(ConfigError, f"{file}:", _hf_problems(values))
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("head_dim") is None and width % heads:
        raise ConfigError(
            f"{file}: num_attention_heads ({heads}) must divide hidden_size ({width}), since no head_dim is given"
        )
    head_size = value_or(values, "head_dim", width // heads)
    return Sizes(
        file=file,
        model_width=width,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=value_or(values, "num_key_value_heads", heads),
        head_size=head_size,
        vocab_size=values["vocab_size"] if values["vocab_size"] > 0 else None,
        hidden_size=values["intermediate_size"],
        norm_eps=float(value_or(values, "rms_norm_eps", 1e-6)),
        rope=hf_rope(file, values, head_size, choices),
        max_seq_len=value_or(values, "max_position_embeddings", 2048),  # LlamaConfig's default
        is_tied=value_or(values, "tie_word_embeddings", False),
        ffn_bias=value_or(values, "mlp_bias", False),
    )


def _hf_problems(values: Mapping[str, Any]) -> list[str]:
    """What is missing, mistyped, of another architecture, or unknown."""
    problems = field_problems(values, _HF_REQUIRED, _HF_OPTIONAL, _HF_FLAGS) + fixed_field_problems(values, _HF_FIXED)
    architectures = values.get("architectures")
    if architectures is not None and (not isinstance(architectures, list) or not set(map(str, architectures)) <= _LLAMAS):
        problems.append(f"architectures must be ['LlamaForCausalLM'] (got {shown(architectures)}): this decoder is a Llama's")
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        problems.append(f"layer_types must all be 'full_attention' (got {shown(kinds)}): this decoder has no other")
    if isinstance(kinds, list) and len(kinds) != values.get("num_hidden_layers"):
        problems.append(
            f"layer_types names {len(kinds)} layers, num_hidden_layers says {shown(values.get('num_hidden_layers'))}"
        )
    if values.get("sliding_window") is not None and values.get("use_sliding_window") is not False:
        problems.append(
            f"sliding_window must be null (got {shown(values['sliding_window'])}): every position is attended to here"
        )
    if values.get("auto_map") is not None:
        problems.append("auto_map names code of the checkpoint's own, which is not run here: convert a plain LlamaForCausalLM")
    for name in ("quantization_config", "quantization"):  # MLX has the latter
        if values.get(name) is not None:
            problems.append(f"{name}: {quantized_config_problem(values[name])}")
    known = {*_HF_REQUIRED, *_HF_OPTIONAL, *_HF_FLAGS, *_HF_FIXED, *_HF_CHECKED, *_HF_WITHOUT_EFFECT}
    return problems + unknown_fields(values, known)


_LLAMAS = {"LlamaForCausalLM", "LLaMAForCausalLM"}
_HF_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_HF_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    "original_max_position_embeddings",
)
_HF_FLAGS = ("tie_word_embeddings", "mlp_bias")
_HF_FIXED: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
# Read with a condition: above, or in rope.py.
_HF_CHECKED = (
    *("architectures", "layer_types", "sliding_window", "auto_map", "quantization_config", "quantization"),
    *("rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim"),
)
# Of training, of the library, of other tasks, and of generation (which older versions of transformers kept here).
_HF_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path name_or_path _commit_hash transformers_version torch_dtype dtype transformers.js_config is_llama_config
    _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation experts_implementation use_flash_attention use_bfloat16 torchscript return_dict use_return_dict
    output_attentions output_hidden_states use_cache chunk_size_feed_forward tf_legacy_loss unsloth_version unsloth_fixed
    pretraining_tp output_past seq_aux neftune_noise_alpha
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    gradient_checkpointing max_sequence_length is_decoder tie_encoder_decoder cross_attention_hidden_size
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix language
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id max_window_layers
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
    """.split()  # noqa: SIM905 - a list would take a line a name
)
