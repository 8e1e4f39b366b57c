"""Streamed against whole: frames, text, and the way back from frames to ids."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from motrt.errors import InputError
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.runtime.streaming import AudioFrame, FrameAssembler, TextPieces, flatten_frames, frames_from_tokens, seconds_of

TINY = ModelConfig.tiny()  # text: ids 0..95, alone; audio: ids 96..127, four a frame
MANY = TINY.replace(modalities=(*TINY.modalities, Modality("speech", 10, SwigluExpert(8), codes_per_frame=3)))
SIZES = {"audio": 32, "speech": 10}
CODES = {"audio": 4, "speech": 3}

unified_ids = st.lists(st.integers(0, MANY.vocab_size - 1), max_size=80)


# --- frames ------------------------------------------------------------------------------------------------------------


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


# --- text --------------------------------------------------------------------------------------------------------------

END = "<|end|>"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Llama 3's kind: tokens are runs of bytes, so a character may need several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["hello hello world", "你好,世界。你好", "😀😃 smile 😀"], trainer)
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    pieces = TextPieces(tokenizer)
    return [*map(pieces.push, ids), pieces.flush()]


@given(st.text(max_size=40) | st.text(alphabet="ab 你😀\ufffdé", max_size=40))
def test_pieces_and_flush_are_the_whole_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text).ids
    pieces = streamed(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids) == text
    if "\ufffd" not in text:
        assert pieces[-1] == ""  # whole characters wait for nobody
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 340), max_size=60))
def test_whatever_ids_a_model_says_the_pieces_are_the_whole_text(byte_level: Tokenizer, ids: list[int]) -> None:
    """Special ids, ids that the tokenizer lacks, and bytes that are no UTF-8 among them."""
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids)


def test_text_is_given_as_soon_as_it_is_certain(byte_level: Tokenizer) -> None:
    ids = [id_of(byte_level, byte) for byte in ("a", "Ã", "©", "b")]  # a, the two bytes of é, b
    assert streamed(byte_level, ids) == ["a", "", "é", "b", ""]


def test_flush_gives_half_a_character_and_starts_anew(byte_level: Tokenizer) -> None:
    first_half, second_half = id_of(byte_level, "Ã"), id_of(byte_level, "©")
    pieces = TextPieces(byte_level)
    assert pieces.push(first_half) == ""
    assert pieces.flush() == "\ufffd"
    assert pieces.flush() == ""
    assert pieces.push(second_half) + pieces.push(id_of(byte_level, "b")) == "\ufffdb"


def test_bytes_that_never_become_characters_do_not_hold_the_text_back_for_ever(byte_level: Tokenizer) -> None:
    never = id_of(byte_level, "ÿ")
    assert len("".join(map(TextPieces(byte_level).push, [never] * 20))) >= 17


def test_special_ids_are_left_out_unless_asked_for(byte_level: Tokenizer) -> None:
    end = id_of(byte_level, END)
    assert TextPieces(byte_level).push(end) == ""
    assert TextPieces(byte_level, skip_special_tokens=False).push(end) == END


@pytest.mark.parametrize("token_id", [-1, 5000, 2**31, 2**32, 2**70])
def test_an_id_the_tokenizer_does_not_know_is_no_text(byte_level: Tokenizer, token_id: int) -> None:
    ids = byte_level.encode("你好").ids
    assert "".join(streamed(byte_level, [ids[0], token_id, *ids[1:]])) == "你好"


def test_numpy_ids_are_ids(byte_level: Tokenizer) -> None:
    ids = np.array(byte_level.encode("hello").ids)
    assert "".join(streamed(byte_level, ids)) == "hello"


@given(st.lists(st.sampled_from(["▁a", "b", "▁", "▁cd"]), max_size=12), st.integers(0, 12))
def test_a_decoder_that_trims_the_first_space_trims_no_other_even_after_a_flush(tokens: list[str], flush_at: int) -> None:
    vocabulary = {"▁a": 0, "b": 1, "▁": 2, "▁cd": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="b"))
    tokenizer.decoder = decoders.Metaspace()
    ids = [vocabulary[token] for token in tokens]
    pieces = TextPieces(tokenizer)
    text = "".join(pieces.push(token_id) for token_id in ids[:flush_at]) + pieces.flush()
    text += "".join(pieces.push(token_id) for token_id in ids[flush_at:]) + pieces.flush()
    assert text == tokenizer.decode(ids)


def test_byte_fallback_tokens_become_characters_when_the_last_byte_is_there() -> None:
    vocabulary = {"<0xE4>": 0, "<0xBD>": 1, "<0xA0>": 2, "x": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert streamed(tokenizer, [3, 0, 1, 2, 3]) == ["x", "", "", "你", "x", ""]
