"""MusicGen (Hugging Face): the audio feed-forward is its decoder's fc1 and fc2, of as many of its first layers as are needed.

Everything else in the folder (its attention, norms, embeddings, text encoder, audio encoder) is ignored, line by line.
MusicGen's linears have no bias.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motrt.errors import CheckpointError, ConfigError
from motrt.model_def.checkpoint.fields import read_json_object
from motrt.model_def.checkpoint.hub_folder import open_weights
from motrt.model_def.checkpoint.name_table import LAYER_NUMBER, NameTable
from motrt.model_def.checkpoint.quantized import quantized_config_problem
from motrt.model_def.checkpoint.raw_state import RawState
from motrt.model_def.config import ENCODEC_CODEBOOKS, ENCODEC_FRAMES_PER_SECOND

TABLE = NameTable(
    names=(("decoder.model.decoder.layers.{i}.{w:fc1|fc2}.{p:weight|bias}", "layers.{i}.feed_forward.audio.{w}.{p}"),),
)

NOT_NEEDED = "only the decoder's fc1 and fc2 are used"

_FIRST_CODEBOOK = "decoder.model.decoder.embed_tokens.0.weight"


@dataclass(frozen=True)
class MusicGen:
    """An opened MusicGen.

    Attributes:
        raw: its weights.
        vocab_size: codes of one codebook; None where neither configuration nor weights tell.
        codes_per_frame: codebooks.
        frames_per_second: of its audio encoder.
    """

    raw: RawState
    vocab_size: int | None
    codes_per_frame: int
    frames_per_second: float

    def num_layers(self) -> int:
        """How many decoder layers it has."""
        pattern = re.compile(rf"decoder\.model\.decoder\.layers\.({LAYER_NUMBER})\.fc1\.weight")
        found = (pattern.match(key) for key in self.raw.tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)


def open_musicgen(folder: Path) -> MusicGen:
    """Open a MusicGen folder.

    Raises:
        CheckpointError: when it holds no MusicGen weights, or damaged ones.
        ConfigError: when its configuration names another activation than GELU.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: --musicgen takes the folder that holds the weights and config.json")
    raw = open_weights(folder)
    if not any(TABLE.native(key) for key in raw.tensors):
        raise CheckpointError(f"{folder} holds no decoder.model.decoder.layers.*.fc1: it is not a Hugging Face MusicGen")
    file = folder / "config.json"
    values = read_json_object(file) if file.is_file() else {}
    decoder, encoder = _object(values, "decoder"), _object(values, "audio_encoder")
    if values.get("quantization_config") is not None:
        raise ConfigError(f"{file}: quantization_config: {quantized_config_problem(values['quantization_config'])}")
    activation = decoder.get("activation_function", "gelu")
    if activation != "gelu":
        raise ConfigError(f"{file}: decoder.activation_function must be 'gelu', the exact one ({activation!r} came)")
    return MusicGen(raw, _vocab_size(decoder, raw), _codebooks(decoder), _frame_rate(encoder))


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _vocab_size(decoder: dict[str, Any], raw: RawState) -> int | None:
    if isinstance(decoder.get("vocab_size"), int):
        return int(decoder["vocab_size"])
    # The table has one row more than there are codes: the token that begins and pads.
    table = raw.tensors.get(_FIRST_CODEBOOK)
    return table.shape[0] - 1 if table is not None and table.shape else None


def _codebooks(decoder: dict[str, Any]) -> int:
    found = decoder.get("num_codebooks")
    return found if isinstance(found, int) else ENCODEC_CODEBOOKS


def _frame_rate(encoder: dict[str, Any]) -> float:
    """Samples a second over samples a frame."""
    rate, ratios = encoder.get("sampling_rate"), encoder.get("upsampling_ratios")
    if (
        not isinstance(rate, int | float)
        or not isinstance(ratios, list)
        or not all(isinstance(r, int) and r > 0 for r in ratios)
    ):
        return ENCODEC_FRAMES_PER_SECOND
    hop = 1
    for ratio in ratios:
        hop *= ratio
    return rate / hop
