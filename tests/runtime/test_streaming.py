"""Streamed against whole: frames, and the way back from frames to ids."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motrt.errors import InputError
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.runtime.streaming import AudioFrame, FrameAssembler, flatten_frames, frames_from_tokens, seconds_of

TINY = ModelConfig.tiny()  # text: ids 0..95, alone; audio: ids 96..127, four a frame
MANY = TINY.replace(modalities=(*TINY.modalities, Modality("speech", 10, SwigluExpert(8), codes_per_frame=3)))
SIZES = {"audio": 32, "speech": 10}
CODES = {"audio": 4, "speech": 3}

unified_ids = st.lists(st.integers(0, MANY.vocab_size - 1), max_size=80)


def frames_by_slicing(ids: list[int], modality: str) -> list[AudioFrame]:
    """Pick one modality's ids out of the whole list, then cut them up."""
    owned = MANY.id_ranges[MANY.modality_index(modality)]
    codes = [token_id - owned.start for token_id in ids if token_id in owned]
    whole = len(codes) // CODES[modality]
    cut = [tuple(codes[n * CODES[modality] : (n + 1) * CODES[modality]]) for n in range(whole)]
    return [AudioFrame(modality, n, frame) for n, frame in enumerate(cut)]


@given(unified_ids)
def test_streamed_frames_are_the_whole_lists_frames(ids: list[int]) -> None:
    assembler = FrameAssembler(MANY)
    streamed = [frame for frame in map(assembler.push, ids) if frame is not None]
    assert streamed == frames_from_tokens(MANY, ids)
    for modality in CODES:
        assert [frame for frame in streamed if frame.modality == modality] == frames_by_slicing(ids, modality)


@given(unified_ids)
def test_what_is_pending_is_what_no_frame_has_yet(ids: list[int]) -> None:
    assembler = FrameAssembler(MANY)
    for token_id in ids:
        assembler.push(token_id)
    for modality in CODES:
        owned = MANY.id_ranges[MANY.modality_index(modality)]
        codes = [token_id - owned.start for token_id in ids if token_id in owned]
        assert assembler.pending(modality) == tuple(codes[len(codes) // CODES[modality] * CODES[modality] :])
    assert assembler.pending("text") == ()


def test_a_frame_goes_on_after_text_came_between_and_is_given_with_its_last_code() -> None:
    assembler = FrameAssembler(TINY)
    assert [assembler.push(token_id) for token_id in (96, 97, 5, 6, 98)] == [None] * 5
    assert assembler.pending("audio") == (0, 1, 2)
    assert assembler.push(127) == AudioFrame("audio", 0, (0, 1, 2, 31))
    assert assembler.pending("audio") == ()


@given(st.sampled_from(["audio", "speech"]), st.data())
def test_flattened_frames_come_back_as_they_were(modality: str, data: st.DataObject) -> None:
    code = st.integers(0, SIZES[modality] - 1)
    frames = data.draw(st.lists(st.tuples(*[code] * CODES[modality]), max_size=10))
    ids = flatten_frames(MANY, modality, frames)
    assert all(type(token_id) is int for token_id in ids)
    assert [frame.codes for frame in frames_from_tokens(MANY, ids)] == frames
    assert flatten_frames(MANY, modality, np.array(frames, np.int16).reshape(-1, CODES[modality])) == ids


def test_a_frame_is_flattened_code_by_code_not_codebook_by_codebook() -> None:
    assert flatten_frames(TINY, "audio", [[0, 1, 2, 3], [4, 5, 6, 7]]) == [96, 97, 98, 99, 100, 101, 102, 103]
    assert flatten_frames(TINY, "text", [[3], [4]]) == [3, 4]


@pytest.mark.parametrize(
    "frames",
    [
        *([[0, 1, 2]], [0, 1, 2, 3], [[0, 1, 2, 3], [4, 5]], [[[0, 1, 2, 3]]]),
        *([[0.0, 1.0, 2.0, 3.0]], [[True] * 4], [["0"] * 4], [[2**70, 0, 0, 0]], 7, None),
    ],
)
def test_frames_of_another_shape_or_dtype_are_refused(frames: Any) -> None:
    with pytest.raises(InputError, match=r"whole numbers of shape \[num_frames, 4\]"):
        flatten_frames(TINY, "audio", frames)


@pytest.mark.parametrize(("frames", "place"), [([[0] * 4, [0, 0, 32, 0]], "frame 1, code 2: 32"), ([[-1] * 4], "code 0: -1")])
def test_codes_out_of_range_are_refused_with_their_place(frames: list[list[int]], place: str) -> None:
    with pytest.raises(InputError, match=place):
        flatten_frames(TINY, "audio", frames)


@pytest.mark.parametrize("token_id", [-1, 128, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(InputError, match=r"outside the vocabulary 0\.\.127"):
        FrameAssembler(TINY).push(token_id)


def test_a_modality_the_model_does_not_have_is_refused_by_name() -> None:
    for ask in (
        lambda: flatten_frames(TINY, "video", []),
        lambda: FrameAssembler(TINY).pending("video"),
        lambda: seconds_of(TINY, "video", 1),
    ):
        with pytest.raises(InputError, match="no modality 'video': this model has text, audio"):
            ask()


def test_fifty_frames_are_one_second_and_text_takes_no_time() -> None:
    assert seconds_of(ModelConfig.preset("llama-3.2-1b"), "audio", 50) == 1.0
    assert seconds_of(TINY, "audio", 75) == 1.5
    assert seconds_of(TINY, "text", 50) is None
