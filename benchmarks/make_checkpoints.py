"""Writes foreign checkpoints with random values, in the formats and sizes in which they are found, to measure conversion with.

    python benchmarks/make_checkpoints.py --kind llama-meta --preset llama-3.2-1b --out /somewhere/llama
    python benchmarks/make_checkpoints.py --kind musicgen   --preset llama-3.2-1b --out /somewhere/musicgen
    python benchmarks/make_checkpoints.py --kind adapter    --preset llama-3.2-1b --out /somewhere/adapter
    motrt convert model --llama /somewhere/llama --musicgen /somewhere/musicgen --adapter /somewhere/adapter/adapter.pt

All kinds of one preset and seed are parts of the same model. Safetensors are streamed; what torch.save writes is held in
memory once (3.8 GB for the full-size training state in bfloat16). Nothing here is used by the package.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from motrt.errors import CheckpointError, MotrtError
from motrt.model_def.atomic_folder import new_folder
from motrt.model_def.checkpoint import llama, mot
from motrt.model_def.checkpoint.container import TORCH_DTYPES, StoredTensor, begin_container, plan_container, write_tensor
from motrt.model_def.checkpoint.native import shard_names
from motrt.model_def.config import PRESETS, AdapterExpert, ModelConfig, SwigluExpert
from motrt.model_def.initialize import random_tensor
from motrt.model_def.parameters import EMBEDDING, SHARED_HEAD, Parameter, parameters, split_head

SHARD_BYTES = 1_500_000_000
MUSICGEN_LAYERS_MORE = 0.5  # MusicGen-small has 24 layers for the 16 of Llama-3.2-1B

KINDS = ("llama-meta", "llama-hf", "musicgen", "adapter", "mot")


@dataclass(frozen=True)
class Made:
    """The model whose parts are written: its weights are drawn when they are asked for.

    Attributes:
        config: the routed model.
        seed: of its values.
        dtype: in which they are stored.
        scaled_rope: whether configurations say so.
        tied: whether Hugging Face's folder ties the head.
        untrained_audio: whether audio rows of the tables are zero.
    """

    config: ModelConfig
    seed: int
    dtype: str
    scaled_rope: bool
    tied: bool
    untrained_audio: bool

    def weight(self, name: str) -> torch.Tensor:
        table = {parameter.name: parameter for parameter in parameters(self.config)}
        tensor = random_tensor(self.config, table[name], self.seed, self.dtype)
        audio = self.config.id_ranges[1]
        if self.untrained_audio and name in (EMBEDDING, SHARED_HEAD):
            tensor[audio.start :] = 0
        return torch.zeros_like(tensor) if self.untrained_audio and name == split_head("audio") else tensor

    def text_rows(self) -> int:
        return self.config.modalities[0].vocab_size

    def other(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that is no part of the model: what converters must ignore."""
        return random_tensor(self.config, Parameter(name, shape, "expert"), self.seed, self.dtype)


@click.command()
@click.option("--kind", type=click.Choice(KINDS), required=True, help="Format to write.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--preset", type=click.Choice([name for name, one in PRESETS.items() if len(one.modalities) > 1]), default="tiny")
@click.option("--head", type=click.Choice(["split", "shared"]), default="split", help="Head of the mot state.")
@click.option("--qk-norm", is_flag=True, help="The mot state normalises queries and keys.")
@click.option("--scaled-rope", is_flag=True, help="Configurations ask for Llama-3.2 RoPE scaling.")
@click.option("--tied/--untied", default=True, help="Whether llama-hf ties its head (as Llama-3.2-1B does).")
@click.option("--untrained-audio", is_flag=True, help="Audio rows are zero, as after an expansion: export must refuse them.")
@click.option("--dtype", type=click.Choice(list(TORCH_DTYPES)), default="bfloat16")
@click.option("--seed", type=int, default=0)
def main(
    kind: str,
    out: Path,
    preset: str,
    head: Any,
    qk_norm: bool,
    scaled_rope: bool,
    tied: bool,
    untrained_audio: bool,
    dtype: str,
    seed: int,
) -> None:
    """Write one foreign checkpoint of random values."""
    is_mot = kind == "mot"
    config = ModelConfig.preset(preset).replace(head=head if is_mot else "split", qk_norm=qk_norm and is_mot)
    made = Made(config, seed, dtype, scaled_rope, tied, untrained_audio)
    writers = {
        "llama-meta": write_llama_meta,
        "llama-hf": write_llama_hf,
        "musicgen": write_musicgen,
        "adapter": write_adapter,
        "mot": write_mot,
    }
    began = time.perf_counter()
    try:
        with new_folder(out, None, CheckpointError) as folder:
            writers[kind](folder, made)
    except MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{out}: {kind}, {preset}, {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")


def write_llama_meta(folder: Path, made: Made) -> None:
    """``consolidated.00.pth`` and ``params.json``."""
    torch.save(dict(_text_weights(made)), folder / llama.META_WEIGHTS)
    _write_params(folder, made)


def write_llama_hf(folder: Path, made: Made) -> None:
    """Sharded safetensors and ``config.json``, rows of wq and wk permuted for half-rotation."""
    shapes = dict(_hf_shapes(made))
    _write_safetensors(folder, shapes, made.dtype, _hf_tensors(made))
    config, expert = made.config, made.config.modalities[0].expert
    assert isinstance(expert, SwigluExpert)
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.model_width,
        "intermediate_size": expert.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "vocab_size": made.text_rows(),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling if made.scaled_rope else None,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": made.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": made.dtype,
    }
    _write_json(folder / "config.json", values)


def write_musicgen(folder: Path, made: Made) -> None:
    """``model.safetensors`` and ``config.json``; more layers than are needed, and the rest of the model in outline."""
    config, audio = made.config, made.config.modalities[1]
    expert = audio.expert
    assert isinstance(expert, AdapterExpert)
    layers = config.num_layers + round(config.num_layers * MUSICGEN_LAYERS_MORE)
    shapes = dict(_musicgen_shapes(layers, expert.width, expert.hidden_size, audio.vocab_size, audio.codes_per_frame))
    _write_safetensors(folder, shapes, made.dtype, ((key, _musicgen_tensor(made, key, shapes[key])) for key in shapes))
    values = {
        "architectures": ["MusicgenForConditionalGeneration"],
        "model_type": "musicgen",
        "decoder": {
            "activation_function": "gelu",
            "hidden_size": expert.width,
            "ffn_dim": expert.hidden_size,
            "num_hidden_layers": layers,
            "num_codebooks": audio.codes_per_frame,
            "vocab_size": audio.vocab_size,
        },
        "audio_encoder": {"model_type": "encodec", "sampling_rate": 32000, "upsampling_ratios": [8, 5, 4, 4]},
        "text_encoder": {"model_type": "t5"},
    }
    _write_json(folder / "config.json", values)


def write_adapter(folder: Path, made: Made) -> None:
    """``adapter.pt``: the projections, and the audio rows of the embedding and of the head."""
    names = [one.name for one in parameters(made.config) if ".down_proj." in one.name or ".up_proj." in one.name]
    state = {str(mot.TABLE.foreign(name)): made.weight(name) for name in names}
    state[EMBEDDING] = made.weight(EMBEDDING)[made.text_rows() :].clone()
    state[str(mot.TABLE.foreign(split_head("audio")))] = made.weight(split_head("audio"))
    torch.save({"adapter_state_dict": state, "step": 10_000, "loss": 2.75}, folder / "adapter.pt")


def write_mot(folder: Path, made: Made) -> None:
    """``state.pt``, its weights under ``model_state_dict``, and ``params.json``."""
    state = {str(mot.TABLE.foreign(one.name)): made.weight(one.name) for one in parameters(made.config)}
    for layer in range(made.config.num_layers):
        for m in range(len(made.config.modalities)):
            for unused in ("attention.local_experts_attention_norm", "feed_forward.local_experts_ffn_norm"):
                state[f"layers.{layer}.{unused}.{m}.weight"] = torch.ones(
                    made.config.model_width, dtype=TORCH_DTYPES[made.dtype]
                )
    torch.save({"model_state_dict": state, "step": 10_000}, folder / "state.pt")
    _write_params(folder, made)


def _text_names(made: Made) -> list[str]:
    return [one.name for one in parameters(made.config) if ".audio." not in one.name]


def _text_weights(made: Made) -> Iterator[tuple[str, torch.Tensor]]:
    """Meta's (name, value) pairs of the text model."""
    for name in _text_names(made):
        value = made.weight(name)
        if name == split_head("text"):
            yield "output.weight", value
        elif name == EMBEDDING:
            yield "tok_embeddings.weight", value[: made.text_rows()].clone()
        else:
            yield str(llama.META_TABLE.foreign(name)), value


def _hf_name(name: str) -> str:
    return str(llama.HF_TABLE.foreign(SHARED_HEAD if name == split_head("text") else name))


def _hf_names(made: Made) -> list[str]:
    return [name for name in _text_names(made) if not (made.tied and name == split_head("text"))]


def _hf_shapes(made: Made) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = {one.name: one.shape for one in parameters(made.config)} | {EMBEDDING: (made.text_rows(), made.config.model_width)}
    return ((_hf_name(name), shapes[name]) for name in _hf_names(made))


def _hf_tensors(made: Made) -> Iterator[tuple[str, torch.Tensor]]:
    for name in _hf_names(made):
        value = made.weight(name)
        if name == EMBEDDING:
            # A tied table is a head too: logits of order one need rows as small as a head's.
            rows = value[: made.text_rows()]
            value = rows * (2 * made.config.model_width**-0.5) if made.tied else rows.clone()
        elif ".wq." in name or ".wk." in name:
            value = _half_rotation_rows(value, made.config.head_size)
        yield _hf_name(name), value


def _half_rotation_rows(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    pairs = weight.reshape(-1, head_size // 2, 2, weight.shape[1])  # [h * d, m] -> [h, d/2, 2, m]
    return pairs.transpose(1, 2).reshape(weight.shape)


def _musicgen_shapes(layers: int, width: int, hidden: int, codes: int, codebooks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    decoder = "decoder.model.decoder."
    for i in range(layers):
        for attention in ("self_attn", "encoder_attn"):
            for product in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield f"{decoder}layers.{i}.{attention}.{product}.weight", (width, width)
        for norm in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            yield f"{decoder}layers.{i}.{norm}.weight", (width,)
            yield f"{decoder}layers.{i}.{norm}.bias", (width,)
        yield f"{decoder}layers.{i}.fc1.weight", (hidden, width)
        yield f"{decoder}layers.{i}.fc2.weight", (width, hidden)
    for codebook in range(codebooks):
        yield f"{decoder}embed_tokens.{codebook}.weight", (codes + 1, width)
        yield f"decoder.lm_heads.{codebook}.weight", (codes, width)
    yield f"{decoder}layer_norm.weight", (width,)
    yield f"{decoder}layer_norm.bias", (width,)
    yield "enc_to_dec_proj.weight", (width, 768)
    yield "enc_to_dec_proj.bias", (width,)
    yield "text_encoder.shared.weight", (64, 768)
    yield "text_encoder.encoder.block.0.layer.0.SelfAttention.q.weight", (768, 768)
    yield "audio_encoder.encoder.layers.0.conv.weight", (64, 1, 7)
    yield "audio_encoder.quantizer.layers.0.codebook.embed", (codes, 128)


def _musicgen_tensor(made: Made, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    parts = key.split(".")
    if parts[-2] in ("fc1", "fc2") and int(parts[4]) < made.config.num_layers:
        return made.weight(f"layers.{parts[4]}.feed_forward.audio.{parts[-2]}.weight")
    return made.other(key, shape)


def _write_safetensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str, tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Containers of at most SHARD_BYTES, written tensor by tensor; an index where there are several."""
    groups = shard_names(shapes, TORCH_DTYPES[dtype].itemsize, SHARD_BYTES)
    count = len(groups)
    slots: dict[str, StoredTensor] = {}
    for number, group in enumerate(groups, 1):
        file = folder / ("model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
        opening, planned = plan_container(file, group, dtype)
        begin_container(file, opening, planned.values())
        slots |= planned
    for name, tensor in tensors:
        write_tensor(slots[name], tensor)
    if count > 1:
        index = {"metadata": {}, "weight_map": {name: slot.file.name for name, slot in slots.items()}}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_params(folder: Path, made: Made) -> None:
    config, expert = made.config, made.config.modalities[0].expert
    assert isinstance(expert, SwigluExpert)
    values = {
        "dim": config.model_width,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": made.text_rows(),
        "ffn_dim_multiplier": expert.hidden_size / (config.model_width * 8 / 3),
        "multiple_of": min(256, expert.hidden_size),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "use_scaled_rope": made.scaled_rope,
    }
    _write_json(folder / "params.json", values)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
