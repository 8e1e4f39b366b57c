"""Foreign checkpoints for tests, written from a native state by names spelled out here: not by the tables under test.

Each writer is the inverse of a converter, so that a model written in a foreign format and converted must come back.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from motrt.model_def.config import AdapterExpert, ModelConfig, SwigluExpert

State = dict[str, torch.Tensor]


def mot_state(config: ModelConfig, native: State) -> State:
    """The training state's names; the two sets of norms that are stored and unused come along."""
    state = {"tok_embeddings.weight": native["tok_embeddings.weight"], "norm.weight": native["norm.weight"]}
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        for norm in ("attention_norm.weight", "ffn_norm.weight"):
            state[layer + norm] = native[layer + norm]
        for m, modality in enumerate(config.modalities):
            for w in ("wq", "wk", "wv", "wo") if config.routed_attention else ():
                state[f"{layer}attention.local_experts_{w}.{m}.weight"] = native[f"{layer}attention.{w}.{modality.name}.weight"]
            if config.qk_norm and config.routed_attention:
                for w in ("q", "k"):
                    key = f"{layer}attention.local_experts_{w}_normalization.{m}.weight"
                    state[key] = native[f"{layer}attention.{w}_norm.{modality.name}.weight"]
            experts = f"{layer}feed_forward.local_experts.{m}."
            mine = f"{layer}feed_forward.{modality.name}."
            if isinstance(modality.expert, SwigluExpert):
                state |= {f"{experts}{w}.weight": native[f"{mine}{w}.weight"] for w in ("w1", "w2", "w3")}
            else:
                state |= {f"{experts}{w}.weight": native[f"{mine}{w}.weight"] for w in ("down_proj", "up_proj")}
                kinds = ("weight", "bias") if modality.expert.bias else ("weight",)
                state |= {f"{experts}expert.{w}.{p}": native[f"{mine}{w}.{p}"] for w in ("fc1", "fc2") for p in kinds}
            state[f"{layer}attention.local_experts_attention_norm.{m}.weight"] = torch.ones(config.model_width)
            state[f"{layer}feed_forward.local_experts_ffn_norm.{m}.weight"] = torch.ones(config.model_width)
        for w in () if config.routed_attention else ("wq", "wk", "wv", "wo"):
            state[f"{layer}attention.{w}.weight"] = native[f"{layer}attention.{w}.shared.weight"]
    if config.head == "shared":
        state["output.weight"] = native["output.weight"]
    else:
        state |= {f"{one.name}_output.weight": native[f"output.{one.name}.weight"] for one in config.modalities}
    return state


def params_of(config: ModelConfig) -> dict[str, Any]:
    """Meta's params.json; the vocabulary is the text's."""
    return {
        "dim": config.model_width,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.modalities[0].vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_seq_len": config.max_seq_len,
    }


def write_json(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def write_mot(folder: Path, config: ModelConfig, native: State, nested: bool = True) -> tuple[Path, Path]:
    """A training state and its params.json."""
    state = mot_state(config, native)
    torch.save({"model_state_dict": state, "step": 7} if nested else state, folder / "state.pt")
    return folder / "state.pt", write_json(folder / "params.json", params_of(config))


def meta_state(config: ModelConfig, native: State) -> State:
    """Meta's names of the text model inside ``native``, whose head is split."""
    vt = config.modalities[0].vocab_size
    state = {"tok_embeddings.weight": native["tok_embeddings.weight"][:vt].clone(), "norm.weight": native["norm.weight"]}
    state["output.weight"] = native["output.text.weight"]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        state |= {layer + norm: native[layer + norm] for norm in ("attention_norm.weight", "ffn_norm.weight")}
        state |= {f"{layer}attention.{w}.weight": native[f"{layer}attention.{w}.text.weight"] for w in ("wq", "wk", "wv", "wo")}
        state |= {f"{layer}feed_forward.{w}.weight": native[f"{layer}feed_forward.text.{w}.weight"] for w in ("w1", "w2", "w3")}
    return state


def write_llama_meta(folder: Path, config: ModelConfig, native: State) -> Path:
    folder.mkdir()
    torch.save(meta_state(config, native), folder / "consolidated.00.pth")
    write_json(folder / "params.json", params_of(config))
    return folder


_HF = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def write_llama_hf(folder: Path, config: ModelConfig, native: State, tied: bool = False, **changes: Any) -> Path:
    """Hugging Face's names; the rows of wq and wk are taken as they are (the style says how they rotate)."""
    meta = meta_state(config, native)
    state = {"model.embed_tokens.weight": meta["tok_embeddings.weight"], "model.norm.weight": meta["norm.weight"]}
    if not tied:
        state["lm_head.weight"] = meta["output.weight"]
    for i in range(config.num_layers):
        state |= {f"model.layers.{i}.{theirs}.weight": meta[f"layers.{i}.{mine}.weight"] for mine, theirs in _HF.items()}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    expert = config.modalities[0].expert
    assert isinstance(expert, SwigluExpert)
    values = {
        "model_type": "llama",
        "hidden_size": config.model_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.modalities[0].vocab_size,
        "intermediate_size": expert.hidden_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    write_json(folder / "config.json", values | changes)
    return folder


def write_musicgen(folder: Path, config: ModelConfig, native: State, extra_layers: int = 1, pickled: bool = False) -> Path:
    """fc1 and fc2 without biases, more layers than are needed, and some of the rest that must be ignored."""
    expert = config.modalities[1].expert
    assert isinstance(expert, AdapterExpert)
    decoder = "decoder.model.decoder."
    state = {f"{decoder}embed_tokens.0.weight": torch.zeros(config.modalities[1].vocab_size + 1, expert.width)}
    state["text_encoder.shared.weight"] = torch.zeros(5, 3)
    state["audio_encoder.quantizer.layers.0.codebook.embed"] = torch.zeros(4, 2)
    for i in range(config.num_layers + extra_layers):
        source = min(i, config.num_layers - 1)
        for w in ("fc1", "fc2"):
            state[f"{decoder}layers.{i}.{w}.weight"] = native[f"layers.{source}.feed_forward.audio.{w}.weight"].clone()
        state[f"{decoder}layers.{i}.self_attn.q_proj.weight"] = torch.zeros(expert.width, expert.width)
        state[f"{decoder}layers.{i}.final_layer_norm.bias"] = torch.zeros(expert.width)
    folder.mkdir()
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    write_json(
        folder / "config.json", {"model_type": "musicgen", "decoder": {"activation_function": "gelu", "num_codebooks": 4}}
    )
    return folder


def write_adapter(path: Path, state: State) -> Path:
    torch.save({"adapter_state_dict": state, "step": 1200, "loss": 2.5}, path)
    return path
