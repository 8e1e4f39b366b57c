"""Pieces of text, put together, against the tokenizer's own text of all ids at once: for every kind of decoder."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from motrt.errors import BackendError
from motrt.runtime.text_pieces import TextPieces

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


# Every kind of decoder, over one vocabulary: all bytes, a special token, one of two added ones, and whatever decoders look at.

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
WORDS = (
    "a",
    "b",
    "▁",
    "▁a",
    "▁▁",
    "##b",
    "##",
    "",
    ".",
    " '",
    "'s",
    "a</w>",
    "</w>",
    "b</w>c",
    "é",
    "世",
    "\ufffd",
    "|",
    "<pad>",
)
LETTERS = ("Ġ", "ÿ", "Ã", "©", "ä", "ĸ", "ð", "Ł", "ĺ", "Ģ")  # of the byte-level alphabet
VOCABULARY = {token: number for number, token in enumerate([*BYTES, *WORDS, *LETTERS, "<0xZZ>", "ab"])}

SPACES, BYTE_RUNS, ONE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
STREAMED: dict[str, Any] = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "byte level in a sequence": decoders.Sequence([decoders.ByteLevel()]),
    "Llama 2, Mistral": decoders.Sequence([SPACES, BYTE_RUNS, ONE, decoders.Strip(" ", 1, 0)]),
    "Gemma": decoders.Sequence([SPACES, BYTE_RUNS, ONE]),
    "bytes alone": BYTE_RUNS,
    "bytes that nothing joins": decoders.Sequence([SPACES, BYTE_RUNS, decoders.Strip(" ", 1, 0)]),
    "three spaces stripped": decoders.Sequence([SPACES, BYTE_RUNS, ONE, decoders.Strip(" ", 3, 0)]),
    "WordPiece": decoders.WordPiece(),
    "WordPiece, not cleaned up": decoders.WordPiece(cleanup=False),
    "Metaspace": decoders.Metaspace(),
    "Metaspace, nothing prepended": decoders.Metaspace(prepend_scheme="never"),
    "Metaspace, then stripped": decoders.Sequence([decoders.Metaspace(), ONE, decoders.Strip("a", 2, 0)]),
    "BPE": decoders.BPEDecoder(),
    "a pattern": decoders.Sequence([decoders.Replace(Regex("a+"), "▁"), decoders.Metaspace()]),
}
WAITED_FOR: dict[str, Any] = {
    "CTC": decoders.CTC(),
    "a pattern over all text": decoders.Sequence([ONE, decoders.Replace("ab", "X")]),
    "bytes in the making": decoders.Sequence([decoders.Replace("▁", ""), BYTE_RUNS, ONE]),
    "byte level after bytes": decoders.Sequence([BYTE_RUNS, decoders.ByteLevel()]),
}
ALL = {**STREAMED, **WAITED_FOR}


def tokenizer_with(decoder: Any) -> Tokenizer:
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens([END])
    made.add_tokens([AddedToken("<|é 世|>")])
    return made


byte_ids = st.sampled_from([*b" A", *"世界é😀".encode(), 0x80, 0xED, 0xA0, 0xF4, 0xFF])
characters = st.text(alphabet="世界é😀a ", min_size=1, max_size=4).map(lambda text: list(text.encode()))
any_ids = st.one_of(byte_ids.map(lambda one: [one]), characters, st.integers(256, len(VOCABULARY) + 4).map(lambda one: [one]))
said_ids = st.lists(any_ids, max_size=25).map(lambda parts: [one for part in parts for one in part])


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("kind", ALL)
@given(ids=said_ids)
@settings(max_examples=30, deadline=None)
def test_whatever_the_decoder_the_pieces_are_the_text_of_all_ids_at_once(kind: str, skips: bool, ids: list[int]) -> None:
    tokenizer = tokenizer_with(ALL[kind])
    pieces = TextPieces(tokenizer, skip_special_tokens=skips)
    assert "".join(map(pieces.push, ids)) + pieces.flush() == tokenizer.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("kind", STREAMED)
@given(ids=said_ids, words=st.lists(st.sampled_from(["a", "▁a", "b"]), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_a_phase_that_ends_in_a_word_is_no_seam(kind: str, ids: list[int], words: list[str]) -> None:
    """What another modality interrupts is the text that it would have been."""
    tokenizer = tokenizer_with(STREAMED[kind])
    before, after = [*ids, VOCABULARY["a"]], [*(VOCABULARY[word] for word in words), *ids]
    pieces = TextPieces(tokenizer)
    text = "".join(map(pieces.push, before)) + pieces.flush() + "".join(map(pieces.push, after)) + pieces.flush()
    assert text == tokenizer.decode([*before, *after])


@pytest.mark.parametrize("kind", ALL)
@given(first=said_ids, second=said_ids)
@settings(max_examples=20, deadline=None)
def test_each_phase_is_its_own_text_but_for_what_is_done_to_the_first_word(
    kind: str, first: list[int], second: list[int]
) -> None:
    tokenizer = tokenizer_with(ALL[kind])
    pieces = TextPieces(tokenizer)
    said = "".join(map(pieces.push, first)) + pieces.flush()
    assert said == tokenizer.decode(first)
    then = "".join(map(pieces.push, second)) + pieces.flush()
    if kind in ("Gemma", "bytes alone", "byte level", "Metaspace, nothing prepended") or kind in WAITED_FOR:
        assert then == tokenizer.decode(second)


@pytest.mark.parametrize(("text", "kind"), [("世界", "Llama 2, Mistral"), ("é😀世", "Gemma"), ("世" * 500, "Llama 2, Mistral")])
def test_neighbouring_characters_of_bytes_are_themselves(text: str, kind: str) -> None:
    assert "".join(streamed(tokenizer_with(STREAMED[kind]), text.encode())) == text


def test_a_run_of_bytes_comes_when_it_has_ended() -> None:
    """One more byte could still make all of it U+FFFD."""
    tokenizer = tokenizer_with(STREAMED["Gemma"])
    word = VOCABULARY["a"]
    assert streamed(tokenizer, [word, *"世".encode(), word]) == ["a", "", "", "", "世a", ""]
    assert streamed(tokenizer, [word, *"世".encode()]) == ["a", "", "", "", "世"]
    assert streamed(tokenizer, [word, *"世".encode(), 0xFF, word])[-2:] == ["\ufffd" * 4 + "a", ""]


@pytest.mark.parametrize("kind", [one for one in STREAMED if one != "none"])
def test_words_come_as_they_are_said(kind: str) -> None:
    pieces = TextPieces(tokenizer_with(STREAMED[kind]))
    assert [pieces.push(VOCABULARY[word]) for word in ("b", "ab", "a", "|") * 20].count("") <= 1  # of a first word


class Counted:
    """Counts the ids that a tokenizer is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.num_ids = tokenizer, 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.num_ids += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


SAYINGS: dict[str, Callable[[int], int]] = {
    "a byte that is no UTF-8": lambda place: 0xFF,
    "a letter that is no UTF-8": lambda place: VOCABULARY["ÿ"],
    "halves of characters": lambda place: 0xE4,
    "characters of bytes": lambda place: "世界".encode()[place % 6],
    "a long run, then words": lambda place: 0xFF if place < 400 else VOCABULARY["a"],
    "spaces": lambda place: VOCABULARY["▁"],
    "ids without text": lambda place: VOCABULARY[""],
    "ids without text behind a run": lambda place: 0xFF if place < 398 else VOCABULARY["a" if place < 400 else ""],
    "special ids": lambda place: len(VOCABULARY),
    "words": lambda place: VOCABULARY["▁a"],
    "any": lambda place: random.Random(place).randrange(len(VOCABULARY)),
}


@pytest.mark.parametrize("saying", SAYINGS)
@pytest.mark.parametrize("kind", ALL)
def test_every_id_is_decoded_a_few_times_however_many_there_are(kind: str, saying: str) -> None:
    ids = [SAYINGS[saying](place) for place in range(800)]
    counted: Any = Counted(tokenizer_with(ALL[kind]))
    pieces = TextPieces(counted)
    text = "".join(map(pieces.push, ids)) + pieces.flush()
    assert text == tokenizer_with(ALL[kind]).decode(ids)
    assert counted.num_ids <= 16 * len(ids)


def test_a_decoder_that_panics_is_a_sentence() -> None:
    """The native code panics there, which is no Exception in Python."""
    tokenizer = tokenizer_with(decoders.Strip(" ", 1, 2))
    with pytest.raises(BackendError, match="the tokenizer failed at turning ids"):
        streamed(tokenizer, [VOCABULARY[""]])


def test_a_decoder_written_in_python_is_waited_for() -> None:
    class Shouting:
        def decode(self, tokens: list[str]) -> str:
            return "".join(tokens).upper()

        def decode_chain(self, tokens: list[str]) -> list[str]:
            return [self.decode(tokens)]

    tokenizer = tokenizer_with(decoders.Decoder.custom(Shouting()))
    assert streamed(tokenizer, [VOCABULARY["a"], VOCABULARY["b"]]) == ["", "", "AB"]
