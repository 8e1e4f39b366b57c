"""GGUF files for tests, written with the library's own writer, by names spelled out here: not by the tables under test."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motrt.model_def.config import ModelConfig, SwigluExpert
from motrt.tests.model_def.foreign import State, meta_state

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'motrt[gguf]'")

_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}

Values = Mapping[str, Any]
"""Key of the header -> its value; None leaves the key out."""


def gguf_state(config: ModelConfig, native: State, tied: bool = False) -> State:
    """llama.cpp's names of the text model inside ``native``, whose head is split."""
    meta = meta_state(config, native)
    state = {"token_embd.weight": meta["tok_embeddings.weight"], "output_norm.weight": meta["norm.weight"]}
    if not tied:
        state["output.weight"] = meta["output.weight"]
    for i in range(config.num_layers):
        state |= {f"blk.{i}.{theirs}.weight": meta[f"layers.{i}.{mine}.weight"] for mine, theirs in _NAMES.items()}
    return state


def header_of(config: ModelConfig) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a Llama of these sizes, without a tokenizer."""
    expert = config.modalities[0].expert
    assert isinstance(expert, SwigluExpert)
    return {
        "general.type": "model",
        "general.name": "Tiny",
        "general.languages": ["en"],
        "general.file_type": 1,
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.model_width,
        "llama.feed_forward_length": expert.hidden_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_size,
        "llama.attention.value_length": config.head_size,
        "llama.rope.dimension_count": config.head_size,
        "llama.rope.freq_base": float(config.rope.theta),
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.vocab_size": config.modalities[0].vocab_size,
    }


def write_gguf(path: Path, header: Values, state: State, kinds: Mapping[str, str] | None = None, arch: str = "llama") -> Path:
    """A GGUF file.

    Args:
        path: the file.
        header: its keys; ``general.architecture`` is the writer's.
        state: its tensors.
        kinds: tensor -> ggml's name of the type to store it as; F32 where not said.
        arch: the architecture.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in header.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in state.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        values = np.ascontiguousarray(tensor.float().numpy())
        writer.add_tensor(name, values if kind.name == "F32" else gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)
