"""The tokenizer in a GGUF header gives the ids of an independent byte-level BPE; what cannot be written exactly is not."""

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from motrt.model_def.checkpoint.assemble import convert_gguf
from motrt.model_def.checkpoint.gguf_tokenizer import tokenizer_of
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.gguf_files import gguf_state, header_of, write_gguf

PAGE = """It's 2026, THEY'LL say "don't": 3.14159 + 1,000,000.\tTabs\tand    runs   of spaces   \n\n\n  lines \r\n
def f(x): return x**2  # code\n\tfor (;;) { a[i] ^= 0xFF; }   Café déjà vu, Ελληνικά, русский, 中文字符, हिन्दी.
😀 👍🏽 🇩🇪 ½ Ⅷ ① ٣٤٥ … — “quotes” 'S 's the theme of these then the end  """


@cache
def alphabet() -> dict[int, str]:
    """GPT-2's letter for every byte: printable Latin-1 as it is, the others from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def spelled(text: str) -> str:
    return "".join(alphabet()[byte] for byte in text.encode())


def header(**changes: Any) -> dict[str, Any]:
    """A vocabulary of all bytes, some merges, and special tokens; a None leaves a key out."""
    merges = [
        "t h",
        "th e",
        "Ġ t",
        "Ġ the",
        "h e",
        "Ġt he",
        "Ġ Ġ",
        "ĠĠ Ġ",
        "i n",
        "e s",
        "1 2",
        "0 0",
        "00 0",
        "l l",
        "' s",
        "' S",
        "3 .",
        "Ã ©",
    ]
    whole = ["Ġthese"]  # a token that no merge leads to
    tokens = ["<|start|>", "<|end|>", *alphabet().values(), *(merge.replace(" ", "") for merge in merges), *whole, "<note>"]
    tokens = list(dict.fromkeys(tokens))
    kinds = [3 if token.startswith("<|") else 4 if token == "<note>" else 1 for token in tokens]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    made = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    made |= {f"tokenizer.{key}": value for key, value in changes.items()}
    return {key: value for key, value in made.items() if value is not None}


def ggml(**changes: Any) -> dict[str, Any]:
    return header(**{f"ggml.{key}": value for key, value in changes.items()})


def encoder(values: dict[str, Any]) -> Tokenizer:
    files, note = tokenizer_of(values, "m.gguf")
    assert files, note
    return Tokenizer.from_str(files["tokenizer.json"])


# An independent byte-level BPE: llama.cpp's patterns with Python's re, and merges by their rank.


@cache
def category(letter: str) -> str:
    """The characters of a general category, as the inside of a class."""
    inside = [number for number in range(sys.maxunicode + 1) if unicodedata.category(chr(number)).startswith(letter)]
    ranges: list[list[int]] = []
    for number in inside:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)


def pattern(text: str) -> "re.Pattern[str]":
    for letter in "LN":
        inside = category(letter)
        text = re.sub(rf"\\p\{{{letter}\}}", lambda _: "\0", text)
        parts, is_class = [], False
        for one in re.split(r"(\0|(?<!\\)\[|(?<!\\)\])", text):
            is_class = {"[": True, "]": False}.get(one, is_class)
            parts.append((inside if is_class else f"[{inside}]") if one == "\0" else one)
        text = "".join(parts)
    return re.compile(text)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"smollm": (r"\p{N}", GPT2), "gpt-2": (GPT2,), "llama-bpe": (LLAMA3,)}


def cut(pieces: list[str], by: str) -> Iterator[str]:
    """Every match and every gap between two."""
    for piece in pieces:
        at = 0
        for match in pattern(by).finditer(piece):
            yield from (part for part in (piece[at : match.start()], match[0]) if part)
            at = match.end()
        if at < len(piece):
            yield piece[at:]


def expected_ids(values: dict[str, Any], text: str, pre: str, whole_first: bool) -> list[int]:
    pieces = [text]
    for by in PATTERNS[pre]:
        pieces = list(cut(pieces, by))
    numbers = {token: number for number, token in enumerate(values["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(values["tokenizer.ggml.merges"])}
    found: list[int] = []
    for piece in map(spelled, pieces):
        symbols = [piece] if whole_first and piece in numbers else list(piece)
        while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
            best = min(pairs, key=lambda pair: ranks[pair])
            at = next(place for place in range(len(symbols)) if tuple(symbols[place : place + 2]) == best)
            symbols[at : at + 2] = ["".join(best)]
        found += [numbers[symbol] for symbol in symbols]
    return found


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_page_has_the_ids_of_an_independent_encoder(pre: str) -> None:
    values = ggml(pre=pre)
    ids = encoder(values).encode(PAGE, add_special_tokens=False).ids
    assert ids == expected_ids(values, PAGE, pre, whole_first=pre == "llama-bpe")
    assert encoder(values).decode(ids) == PAGE


def test_the_three_ways_of_cutting_differ() -> None:
    assert len({tuple(encoder(ggml(pre=pre)).encode(PAGE, add_special_tokens=False).ids) for pre in PATTERNS}) == 3


def test_special_tokens_are_taken_whole_and_shown_as_special() -> None:
    made = encoder(ggml())
    numbers = {token: number for number, token in enumerate(ggml()["tokenizer.ggml.tokens"])}
    ids = made.encode("<|start|>in<note><|end|>").ids
    assert ids == [0, numbers["in"], numbers["<note>"], 1]
    assert made.decode(ids) == "in<note>"
    assert made.get_vocab_size() == len(numbers)


@pytest.mark.parametrize(
    ("changes", "start", "end"),
    [
        ({"pre": "smollm"}, [], []),
        ({"pre": "smollm", "add_bos_token": True}, [0], []),
        ({"pre": "smollm", "add_eos_token": True}, [], [1]),
        ({"pre": "smollm", "add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"pre": "llama-bpe"}, [0], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_start_and_end_are_put_as_the_header_says_or_llama_cpp_does(
    changes: dict[str, Any], start: list[int], end: list[int]
) -> None:
    made = encoder(ggml(**changes))
    middle = made.encode("the end", add_special_tokens=False).ids
    assert made.encode("the end").ids == [*start, *middle, *end]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ggml.model": "llama"}, "has a SentencePiece tokenizer, whose merges by score cannot be written exactly"),
        ({"ggml.model": "bert"}, "has a tokenizer of kind 'bert', which is not known here"),
        ({"ggml.model": None}, "holds none"),
        ({"ggml.pre": "deepseek-llm"}, "cuts text as 'deepseek-llm' does, which is not known here"),
        ({"ggml.pre": ["smollm"]}, "cuts text as ['smollm'] does"),
        ({"ggml.pre": None}, "does not say how text is cut"),
        ({"ggml.add_space_prefix": True}, "puts a space before a text"),
        ({"ggml.new_rule": 1}, "says tokenizer.ggml.new_rule of it, which is not known here"),
        ({"ggml.merges": None}, "lacks its tokens or its merges"),
        ({"ggml.merges": ["the"]}, "a merge that is no pair of tokens ('the')"),
        ({"ggml.merges": ["x yz"]}, "none that `tokenizers` reads"),
        ({"ggml.tokens": ["a", "a"]}, "has the same token twice"),
        ({"ggml.token_type": [1]}, "tells the kind of other than its"),
        ({"ggml.eos_token_id": 100_000}, "has eos_token_id 100000 in a vocabulary of"),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": None}, "puts a start token before a text and does not name it"),
    ],
)
def test_what_cannot_be_written_exactly_is_said_and_not_written(changes: dict[str, Any], said: str) -> None:
    files, note = tokenizer_of(header(**changes), "m.gguf")
    assert files == {}
    assert said in note
    assert note.startswith("no tokenizer goes along")


def test_the_files_lie_beside_the_weights_and_the_report_says_so(tmp_path: Path) -> None:
    tokens = ggml()["tokenizer.ggml.tokens"]
    config = ModelConfig.tiny()
    text = config.modalities[0]
    config = config.replace(modalities=(type(text)("text", len(tokens), text.expert),), head="shared")
    native = dict(random_tensors(config, 1))
    native["output.text.weight"] = native["output.weight"]
    values = header(**{"chat_template": "{{ messages }}", "chat_template.tool_use": "{{ tools }}"})
    path = write_gguf(tmp_path / "m.gguf", header_of(config) | values, gguf_state(config, native))
    assembly = convert_gguf(path)
    assembly.write(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tokenizer_path == tmp_path / "out" / "tokenizer.json"
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() == len(tokens)
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {name: told[name] for name in ("bos_token", "eos_token", "add_bos_token")} == {
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "add_bos_token": False,
    }
    assert told["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    assert any(note.startswith("tokenizer: byte-level BPE, pre 'smollm'") for note in assembly.accounting.notes)
    assert {row.outcome for row in assembly.accounting.rows if row.key.startswith("tokenizer.")} == {"loaded"}


def test_a_model_whose_tokenizer_is_not_known_is_converted_without_one(tmp_path: Path) -> None:
    config = ModelConfig.tiny()
    values = header(**{"ggml.pre": "unheard-of", "ggml.tokens": [f"t{number}" for number in range(96)]})
    path = write_gguf(tmp_path / "m.gguf", header_of(config) | values, gguf_state(config, dict(random_tensors(config, 1))))
    assembly = convert_gguf(path)
    assembly.write(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert {row.outcome for row in assembly.accounting.rows if row.key.startswith("tokenizer.")} == {"ignored"}
