"""The Mixture-of-Transformers training state (``.pt``, ``.pth``) with its ``params.json``.

``params.json``'s ``vocab_size`` is the *text* vocabulary: rows of the tables beyond it are audio. Number m = 0 is text, 1 is
audio. Which experts there are and how large, whether attention is routed, whether queries and keys are normalised, and whether
the head is split are read off the keys and shapes. RoPE is interleaved, and not scaled unless that is asked for.
"""

from pathlib import Path

from motrt.errors import ConfigError
from motrt.model_def.checkpoint.name_table import AUDIO, COMPUTED, TEXT, NameTable
from motrt.model_def.checkpoint.raw_state import RawState
from motrt.model_def.checkpoint.sizes import Shapes, Sizes, expert_of
from motrt.model_def.checkpoint.training_state import open_training_state
from motrt.model_def.config import (
    ENCODEC_CODEBOOKS,
    ENCODEC_FRAMES_PER_SECOND,
    Expert,
    Modality,
    ModelConfig,
)
from motrt.model_def.parameters import EMBEDDING, SHARED_HEAD, split_head

# Norms behind the experts: read by Meta's published modules, stored and left out by training code built on them. Neither can
# be told from the file, so only values that were never trained are passed over.
UNIT_NORM = "one everywhere, as it was initialised: a norm behind the experts that the training code does not use"

TABLE = NameTable(
    names=(
        ("tok_embeddings.weight", "tok_embeddings.weight"),
        ("layers.{i}.attention_norm.weight", "layers.{i}.attention_norm.weight"),
        ("layers.{i}.ffn_norm.weight", "layers.{i}.ffn_norm.weight"),
        ("layers.{i}.attention.local_experts_{w:wq|wk|wv|wo}.{m}.weight", "layers.{i}.attention.{w}.{modality}.weight"),
        (
            "layers.{i}.attention.local_experts_{w:q|k}_normalization.{m}.weight",
            "layers.{i}.attention.{w}_norm.{modality}.weight",
        ),
        ("layers.{i}.attention.{w:wq|wk|wv|wo}.weight", "layers.{i}.attention.{w}.shared.weight"),
        ("layers.{i}.attention.{w:q|k}_normalization.weight", "layers.{i}.attention.{w}_norm.shared.weight"),
        (
            "layers.{i}.feed_forward.local_experts.{m}.{w:w1|w2|w3}.{p:weight|bias}",
            "layers.{i}.feed_forward.{modality}.{w}.{p}",
        ),
        (
            "layers.{i}.feed_forward.local_experts.{m}.{w:down_proj|up_proj}.weight",
            "layers.{i}.feed_forward.{modality}.{w}.weight",
        ),
        (
            "layers.{i}.feed_forward.local_experts.{m}.expert.{w:fc1|fc2}.{p:weight|bias}",
            "layers.{i}.feed_forward.{modality}.{w}.{p}",
        ),
        ("norm.weight", "norm.weight"),
        ("output.weight", "output.weight"),
        ("text_output.weight", "output.text.weight"),
        ("audio_output.weight", "output.audio.weight"),
    ),
    ignored=(
        ("layers.{i}.attention.local_experts_attention_norm.{m}.weight", UNIT_NORM),
        ("layers.{i}.feed_forward.local_experts_ffn_norm.{m}.weight", UNIT_NORM),
        ("rope.freqs", COMPUTED),
        ("freqs_cis", COMPUTED),
    ),
)


def open_state(path: Path) -> RawState:
    """Open the state in ``path``, mapped and not read.

    Raises:
        CheckpointError: when it is damaged, foreign, or would run code.
    """
    return open_training_state(path, lambda name: TABLE.native(name) is not None)


def native_shapes(raw: RawState) -> dict[str, tuple[int, ...]]:
    """Native name -> dims of every key that the table knows."""
    named = ((TABLE.native(key), tensor.shape) for key, tensor in raw.tensors.items())
    return {name: shape for name, shape in named if name is not None}


def config_of(sizes: Sizes, raw: RawState) -> ModelConfig:
    """The configuration that ``params.json`` and the weights describe together.

    Raises:
        ConfigError: when they contradict each other, or the weights hold no text expert.
    """
    shapes = native_shapes(raw)
    sizes.refuse_contradictions(shapes, raw.source)
    text, audio = expert_of(shapes, TEXT), expert_of(shapes, AUDIO)
    if text is None:
        is_llama = any(name in raw.tensors for name in ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.up_proj.weight"))
        advice = "it is a Llama: convert its folder with --llama" if is_llama else "is it a Mixture-of-Transformers state?"
        raise ConfigError(f"{raw.source} holds no text expert (feed_forward.local_experts.0): {advice}")
    vocab_sizes = _vocab_sizes(sizes, shapes, raw.source, has_audio=audio is not None)
    return sizes.config(
        _modalities(vocab_sizes, text, audio),
        head="shared" if SHARED_HEAD in shapes or split_head(TEXT) not in shapes else "split",
        routed_attention=not any(".shared." in name for name in shapes),
        qk_norm=any(".q_norm." in name or ".k_norm." in name for name in shapes),
    )


def _modalities(vocab_sizes: tuple[int, int], text: Expert, audio: Expert | None) -> tuple[Modality, ...]:
    first = Modality(TEXT, vocab_sizes[0], text)
    return (first,) if audio is None else (first, audio_modality(vocab_sizes[1], audio))


def audio_modality(vocab_size: int, expert: Expert) -> Modality:
    """Audio as EnCodec at 32 kHz tells it: four codes a frame, 50 frames a second."""
    return Modality(AUDIO, vocab_size, expert, ENCODEC_CODEBOOKS, ENCODEC_FRAMES_PER_SECOND)


def _vocab_sizes(sizes: Sizes, shapes: Shapes, source: str, has_audio: bool) -> tuple[int, int]:
    """Rows of the text and of the audio vocabulary."""
    if EMBEDDING not in shapes or not shapes[EMBEDDING]:
        raise ConfigError(f"{source} holds no {EMBEDDING}: is it a Mixture-of-Transformers state?")
    rows = shapes[EMBEDDING][0]
    text = sizes.vocab_size if sizes.vocab_size is not None else _rows(shapes, split_head(TEXT), rows)
    if has_audio and rows <= text:
        raise ConfigError(
            f"{sizes.file}: vocab_size is the text vocabulary, {text}; {source} has an audio expert and {rows} embedding rows, "
            "which leaves none for audio: vocab_size must be smaller by the audio vocabulary"
        )
    if not has_audio and rows != text:
        raise ConfigError(f"{sizes.file}: vocab_size says {text}, {source} has {rows} embedding rows and no audio expert")
    return text, rows - text


def _rows(shapes: Shapes, name: str, default: int) -> int:
    return shapes[name][0] if shapes.get(name) else default
