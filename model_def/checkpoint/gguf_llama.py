"""A Llama in a GGUF file, as llama.cpp converts it: weights, sizes and RoPE out of one file.

llama.cpp permutes the rows of wq and wk when it converts, so that pairs (0, 1), (2, 3) ... rotate together: the order of Meta's
own files. They stay in it, and the configuration says ``interleaved``: nothing is moved. A head that is tied to the embedding
is not stored. Llama 3's scaling of RoPE is stored as a tensor of divisors, from which the factor is read; divisors that this
scaling does not give are refused.

Every key of the header is used, known to be without effect on the forward pass, of the tokenizer, or refused by name, as in
other readers. Sources: ``llama-hparams`` and ``llama-model`` of llama.cpp (what a Llama reads, and its defaults), and
``gguf.constants`` of its Python library (the keys).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from motrt.errors import ConfigError, raise_all
from motrt.model_def.checkpoint.accounting import KeyRow
from motrt.model_def.checkpoint.fields import field_problems, shown, unknown_fields
from motrt.model_def.checkpoint.gguf_file import PLAIN, GgufFile, open_gguf_file
from motrt.model_def.checkpoint.gguf_tokenizer import PREFIX as TOKENIZER
from motrt.model_def.checkpoint.gguf_tokenizer import tokenizer_of
from motrt.model_def.checkpoint.llama import LlamaBase
from motrt.model_def.checkpoint.name_table import NameTable
from motrt.model_def.checkpoint.raw_state import RawState, RawTensor
from motrt.model_def.checkpoint.rope import Rope, RopeChoices, hf_rope
from motrt.model_def.checkpoint.sizes import Sizes
from motrt.model_def.config import RopeConfig, RopeScaling, rope_frequencies

TABLE = NameTable(
    names=(
        ("token_embd.weight", "tok_embeddings.weight"),
        ("blk.{i}.attn_norm.weight", "layers.{i}.attention_norm.weight"),
        ("blk.{i}.attn_q.weight", "layers.{i}.attention.wq.text.weight"),
        ("blk.{i}.attn_k.weight", "layers.{i}.attention.wk.text.weight"),
        ("blk.{i}.attn_v.weight", "layers.{i}.attention.wv.text.weight"),
        ("blk.{i}.attn_output.weight", "layers.{i}.attention.wo.text.weight"),
        ("blk.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
        ("blk.{i}.ffn_gate.{p:weight|bias}", "layers.{i}.feed_forward.text.w1.{p}"),
        ("blk.{i}.ffn_down.{p:weight|bias}", "layers.{i}.feed_forward.text.w2.{p}"),
        ("blk.{i}.ffn_up.{p:weight|bias}", "layers.{i}.feed_forward.text.w3.{p}"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", "output.weight"),
    )
)
HEAD = "output.weight"
ROPE_DIVISORS = "rope_freqs.weight"

_REQUIRED = (
    *("llama.embedding_length", "llama.block_count", "llama.attention.head_count", "llama.feed_forward_length"),
    *("llama.context_length", "llama.attention.layer_norm_rms_epsilon"),
)
_OPTIONAL = (
    *("llama.attention.head_count_kv", "llama.vocab_size", "llama.rope.freq_base", "llama.rope.dimension_count"),
    *("llama.attention.key_length", "llama.attention.value_length"),
)
_PER_LAYER = ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length")

# Key -> the values under which this decoder computes the same, and what any other would mean.
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "general.architecture": (("llama",), "a decoder of another architecture"),
    "general.type": (("model",), "no whole model"),
    "split.count": ((0, 1), "a part of a model that is split over several files: join them (llama-gguf-split --merge)"),
    "llama.expert_count": ((0,), "a mixture of experts"),
    "llama.expert_used_count": ((0,), "a mixture of experts"),
    "llama.rope.scaling.type": (("none", "linear"), "another scaling of RoPE"),
    "llama.rope.scaling.factor": ((0, 1), "RoPE that is scaled linearly"),
    "llama.rope.scale_linear": ((0, 1), "RoPE that is scaled linearly"),
    "llama.attention.sliding_window": ((0,), "attention over a sliding window"),
    "llama.attention.causal": ((True,), "attention to later positions"),
    "llama.use_parallel_residual": ((False,), "attention and feed-forward side by side"),
    "llama.tensor_data_layout": (("Meta AI original pth",), "rows of wq and wk in another order"),
    "llama.attn_logit_softcapping": ((0,), "attention scores that are capped"),
    "llama.final_logit_softcapping": ((0,), "logits that are capped"),
    "llama.logit_scale": ((0, 1), "logits that are scaled"),
    "llama.residual_scale": ((0, 1), "a residual stream that is scaled"),
    "llama.embedding_scale": ((0, 1), "an embedding that is scaled"),
    "llama.attention.scale": ((0,), "attention scores that are scaled in another way"),
    "llama.attention.clamp_kqv": ((0,), "queries, keys and values that are clamped"),
    "llama.attention.max_alibi_bias": ((0,), "ALiBi"),
    "llama.pooling_type": ((0,), "an embedding model"),
}
_WITHOUT_EFFECT = re.compile(
    r"general\.(alignment|file_type|quantization_version|name|author|version|organization|finetune|basename|description"
    r"|quantized_by|size_label|license(\..+)?|url|doi|uuid|repo_url|source\..+|base_model\..+|dataset\..+|datasets|tags"
    r"|languages|sampling\..+)"
    r"|quantize\.imatrix\..+|split\.(no|tensors\.count)"
    r"|llama\.rope\.scaling\.(original_context_length|finetuned)"  # of YaRN
)


@dataclass(frozen=True)
class GgufModel:
    """A Llama in a GGUF file.

    Attributes:
        base: what it is, and its weights.
        rows: what became of every key of the header.
        tokenizer: the files that its tokenizer becomes, by name; none where it can not be written exactly.
    """

    base: LlamaBase
    rows: tuple[KeyRow, ...]
    tokenizer: Mapping[str, str]


def open_gguf(path: Path, choices: RopeChoices | None = None) -> GgufModel:
    """Open a GGUF file of a Llama.

    Args:
        path: the file.
        choices: what the person who converts says of RoPE.

    Raises:
        CheckpointError: when it is damaged, or no GGUF file.
        ConfigError: naming every key by which it is another architecture's, or contradicts itself.
    """
    file = open_gguf_file(path)
    values = {key: _as_one(key, value) for key, value in file.metadata.items()}
    raise_all(ConfigError, f"{path} holds a model that this decoder does not compute:", _problems(values))
    sizes = _sizes(file, values, choices or RopeChoices())
    raw = state_of_gguf(file)
    named = ((TABLE.native(key), tensor.shape) for key, tensor in raw.tensors.items())
    sizes.refuse_contradictions({name: shape for name, shape in named if name is not None}, raw.source)
    tokenizer, why = tokenizer_of(file.metadata, path.name)
    base = LlamaBase(sizes, raw, TABLE, None, (why,))
    return GgufModel(base, _rows(file, bool(tokenizer)), tokenizer)


def _as_one(key: str, value: Any) -> Any:
    """A number that the header gives for every layer, where all of them are the same."""
    is_same = key in _PER_LAYER and isinstance(value, list) and len(set(value)) == 1
    return value[0] if is_same else value


def _problems(values: Mapping[str, Any]) -> list[str]:
    """What is missing, mistyped, of another architecture, or unknown."""
    if values.get("general.architecture") not in _FIXED["general.architecture"][0]:
        came = shown(values.get("general.architecture"))
        return [f"general.architecture must be 'llama' (got {came}): no other is read"]  # the keys are another's, too
    problems = field_problems(values, _REQUIRED, _OPTIONAL)
    problems += [
        f"{key} must be {' or '.join(map(repr, allowed))} (got {shown(values[key])}): anything else is {meaning}"
        for key, (allowed, meaning) in _FIXED.items()
        if key in values and values[key] not in allowed
    ]
    used = {*_REQUIRED, *_OPTIONAL, *_FIXED}
    others = {
        key: value for key, value in values.items() if not key.startswith(TOKENIZER) and not _WITHOUT_EFFECT.fullmatch(key)
    }
    return problems or _head_size_problems(values) + unknown_fields(others, used)


def _head_size_problems(values: Mapping[str, Any]) -> list[str]:
    """Head sizes that this decoder does not have: queries and values of different sizes, or heads rotated in part."""
    width, heads = values["llama.embedding_length"], values["llama.attention.head_count"]
    if values.get("llama.attention.key_length") is None and width % heads:
        return [f"llama.attention.head_count ({heads}) must divide llama.embedding_length ({width})"]
    head_size = values.get("llama.attention.key_length", width // heads)
    stated = {key: values.get(key) for key in ("llama.attention.value_length", "llama.rope.dimension_count")}
    return [
        f"{key} must be {head_size}, the size of a head (got {value})"
        for key, value in stated.items()
        if value is not None and value != head_size
    ]


def _sizes(file: GgufFile, values: Mapping[str, Any], choices: RopeChoices) -> Sizes:
    heads = values["llama.attention.head_count"]
    head_size = values.get("llama.attention.key_length", values["llama.embedding_length"] // heads)
    tokens = file.metadata.get(f"{TOKENIZER}ggml.tokens")
    vocab_size = values.get("llama.vocab_size", len(tokens) if isinstance(tokens, list) else None)
    return Sizes(
        file=file.path,
        model_width=values["llama.embedding_length"],
        num_layers=values["llama.block_count"],
        num_heads=heads,
        num_kv_heads=values.get("llama.attention.head_count_kv", heads),
        head_size=head_size,
        vocab_size=vocab_size,
        hidden_size=values["llama.feed_forward_length"],
        norm_eps=_as_written(values["llama.attention.layer_norm_rms_epsilon"]),
        rope=_rope(file, values, head_size, choices),
        max_seq_len=values["llama.context_length"],
        is_tied=HEAD not in file.tensors,
    )


def _rope(file: GgufFile, values: Mapping[str, Any], head_size: int, choices: RopeChoices) -> Rope:
    """RoPE as the header's base and the tensor of divisors give it; llama.cpp's base is 10000 where none is given."""
    stated = values.get("llama.rope.freq_base")
    settings: dict[str, Any] = {} if stated is None else {"rope_theta": _as_written(stated)}
    if ROPE_DIVISORS in file.tensors:
        scaling = _scaling(file, head_size, settings.get("rope_theta", choices.theta or 10000.0))
        settings |= {} if scaling is None else {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
        }  # fmt: skip
    rope = hf_rope(file.path, settings, head_size, choices)
    return replace(rope, config=replace(rope.config, style="interleaved"))


def _scaling(file: GgufFile, head_size: int, theta: float) -> RopeScaling | None:
    """The scaling whose divisors [d/2] the file stores; None where each is one.

    Raises:
        ConfigError: when they are not those of Llama 3.1 to 3.3 (low 1, high 4, original 8192) for any factor.
    """
    divisors = file.read(ROPE_DIVISORS).double()
    plain = _frequencies(theta, None, head_size)
    if divisors.shape == plain.shape and bool((divisors == 1).all()):
        return None
    factor = _as_written(float(divisors.max()))
    scaling = RopeScaling(factor=factor) if 1 < factor < float("inf") else None
    is_llama3 = scaling is not None and divisors.shape == plain.shape
    if is_llama3 and torch.allclose(divisors, plain / _frequencies(theta, scaling, head_size), rtol=1e-5, atol=0.0):
        return scaling
    raise ConfigError(
        f"{file.path}: {ROPE_DIVISORS} is {list(divisors.shape)}, {float(divisors.min()):g} to {float(divisors.max()):g}; "
        f"Llama 3.1 to 3.3 scale {head_size // 2} frequencies by low 1, high 4, original 8192, and no other is computed here"
    )


def _frequencies(theta: float, scaling: RopeScaling | None, head_size: int) -> torch.Tensor:
    return torch.tensor(rope_frequencies(RopeConfig(theta, scaling=scaling), head_size), dtype=torch.float64)


def _as_written(value: float) -> float:
    """The shortest number of the same float32: 1e-05, where the header's float32 is 9.99999974e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))


def state_of_gguf(file: GgufFile) -> RawState:
    """Return the weights in a GGUF file: as they are stored, or dequantized to float32."""
    stored = {name: one for name, one in file.tensors.items() if name != ROPE_DIVISORS}
    narrow = _narrower_dtype(file)
    tensors = {
        name: RawTensor(name, one.shape, narrow if one.type == "F32" and narrow else PLAIN[one.type])
        if one.type in PLAIN
        else RawTensor(name, one.shape, "float32", one.type, one.num_bytes)
        for name, one in stored.items()
    }
    others = {ROPE_DIVISORS: "Llama 3's scaling of RoPE, which the configuration has"} if ROPE_DIVISORS in file.tensors else {}

    def read(name: str) -> torch.Tensor:
        return file.read(name).to(getattr(torch, tensors[name].dtype))

    notes = []
    if any(one.stored for one in tensors.values()):
        notes.append(
            "dequantized weights are the numbers that the file's codes stand for, exactly: what was lost when they were "
            "quantized is lost in this model too, and nothing here can measure it"
        )
    if narrow:
        notes.append(
            f"norms are stored as F32 there, and every value is one of {narrow}, as the other weights are: kept as {narrow}"
        )
    return RawState(file.path.name, tensors, read, others, tuple(notes))


def _narrower_dtype(file: GgufFile) -> str | None:
    """The half float that all tables are stored as, where it holds the norms exactly, which GGUF has as F32."""
    tables = {one.type for one in file.tensors.values() if len(one.shape) > 1}
    wide = [one.name for one in file.tensors.values() if one.type == "F32" and one.name != ROPE_DIVISORS]
    if len(tables) != 1 or not tables <= {"F16", "BF16"} or not wide:
        return None
    narrow = PLAIN[tables.pop()]
    dtype = getattr(torch, narrow)
    return narrow if all(torch.equal(value, value.to(dtype).float()) for value in map(file.read, wide)) else None


def _rows(file: GgufFile, has_tokenizer: bool) -> tuple[KeyRow, ...]:
    """What became of every key of the header."""
    return tuple(_row(file.path.name, key, value, has_tokenizer) for key, value in file.metadata.items())


def _row(source: str, key: str, value: Any, has_tokenizer: bool) -> KeyRow:
    if key.startswith(TOKENIZER):
        return KeyRow(key, source, "loaded") if has_tokenizer else KeyRow(key, source, "ignored", "no tokenizer is written")
    if _WITHOUT_EFFECT.fullmatch(key):
        return KeyRow(key, source, "ignored", "without effect on the forward pass")
    return KeyRow(key, source, "loaded", shown(value))
