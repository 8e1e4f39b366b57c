"""What generated ids become for a listener: frames of audio codes. What they become for a reader: ``text_pieces``.

One object follows one row; it is pushed that row's ids as they come and knows nothing of the model, the session or other
rows. Frames are flattened in time order, ``c0 c1 c2 c3`` of frame 0, then of frame 1, all codebooks sharing the modality's
ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.errors import InputError, raise_all
from motrt.model_def.config import Modality, ModelConfig


@dataclass(frozen=True)
class AudioFrame:
    """One frame of codes, as a codec's decoder takes them.

    Attributes:
        modality: whose frame it is.
        index: how many frames of this modality the row had before.
        codes: one code per codebook, c0 first, each counted from 0.
    """

    modality: str
    index: int
    codes: tuple[int, ...]


class FrameAssembler:
    """Puts one row's ids together into frames, for every modality of more than one code per frame.

    A frame that another modality interrupts goes on where it stopped.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._ranges = config.id_ranges
        self._codes: list[list[int]] = [[] for _ in config.modalities]
        self._num_frames = [0 for _ in config.modalities]

    def push(self, token_id: int) -> AudioFrame | None:
        """Take the next unified id; give the frame that it finishes, if it finishes one.

        Raises:
            InputError: for an id outside the vocabulary.
        """
        number = self._modality_of(token_id)
        modality = self._config.modalities[number]
        if modality.codes_per_frame == 1:
            return None
        codes = self._codes[number]
        codes.append(int(token_id) - self._ranges[number].start)
        if len(codes) < modality.codes_per_frame:
            return None
        frame = AudioFrame(modality.name, self._num_frames[number], tuple(codes))
        self._num_frames[number] += 1
        codes.clear()
        return frame

    def pending(self, modality: str) -> tuple[int, ...]:
        """The codes of the frame that is not finished yet.

        Raises:
            InputError: for a modality that the model does not have.
        """
        return tuple(self._codes[_index(self._config, modality)])

    def _modality_of(self, token_id: int) -> int:
        for number, ids in enumerate(self._ranges):
            if ids.start <= token_id < ids.stop:
                return number
        raise InputError(f"id {token_id} is outside the vocabulary 0..{self._config.vocab_size - 1}")


def frames_from_tokens(config: ModelConfig, ids: Sequence[int]) -> list[AudioFrame]:
    """Every whole frame in one row's unified ids, in the order in which they are finished.

    Raises:
        InputError: for an id outside the vocabulary.
    """
    assembler = FrameAssembler(config)
    frames = (assembler.push(token_id) for token_id in ids)
    return [frame for frame in frames if frame is not None]


def flatten_frames(
    config: ModelConfig, modality: str, frames: "NDArray[np.integer[Any]] | Sequence[Sequence[int]]"
) -> list[int]:
    """The unified ids of ``frames``: what a prompt of audio is made of.

    Args:
        config: the model's.
        modality: whose frames they are.
        frames: [num_frames, codes_per_frame] codes counted from 0.

    Raises:
        InputError: for an unknown modality, another shape or dtype, and for codes out of range, saying where the first is.
    """
    number = _index(config, modality)
    codes = _checked_codes(config.modalities[number], frames)
    # [num_frames, codes_per_frame] -> [num_frames * codes_per_frame]: all codes of a frame before the next frame
    return [int(code) + config.id_ranges[number].start for code in codes.reshape(-1)]


def _checked_codes(modality: Modality, frames: Any) -> "NDArray[np.integer[Any]]":
    wanted = f"frames of {modality.name} must be whole numbers of shape [num_frames, {modality.codes_per_frame}]"
    try:
        codes = np.asarray(frames)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{wanted}: {error}") from None
    if codes.size == 0 and codes.ndim <= 2:
        return np.zeros((0, modality.codes_per_frame), np.int64)
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[1] != modality.codes_per_frame:
        raise InputError(f"{wanted} ({codes.dtype}{list(codes.shape)} came)")
    outside = np.argwhere((codes < 0) | (codes >= modality.vocab_size))
    raise_all(
        InputError,
        f"codes of {modality.name} must be in 0..{modality.vocab_size - 1}:",
        [f"{len(outside)} are not, first frame {f}, code {c}: {codes[f, c]}" for f, c in outside[:1]],
    )
    return codes


def seconds_of(config: ModelConfig, modality: str, num_frames: int) -> float | None:
    """How long ``num_frames`` sound, in seconds; None for a modality in which time means nothing.

    Raises:
        InputError: for a modality that the model does not have.
    """
    rate = config.modalities[_index(config, modality)].frames_per_second
    return None if rate is None else num_frames / rate


def _index(config: ModelConfig, modality: str) -> int:
    if modality not in config.modality_names:
        raise InputError(f"no modality {modality!r}: this model has {', '.join(config.modality_names)}")
    return config.modality_index(modality)
