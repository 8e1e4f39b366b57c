"""What a ``tokenizer.json`` brings along beside its vocabulary, and what its native code may do, are no matter of a prompt."""

import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors

import motrt
from motrt.errors import BundleError, InputError
from motrt.export.parity.token_file import read_token_file
from motrt.model_def.config import ModelConfig
from motrt.runtime.decoding import encode
from motrt.runtime.tokenizer import doubled_start, encode_text, read_tokenizer, tokenizer_faults

PROMPT = "the quick brown fox"
LETTERS = {letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", " "])}


def of_letters(*special: str) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    made.add_special_tokens(list(special))
    return made


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("setting", ["truncation", "padding", "both", "stride"])
def test_a_prompt_is_neither_cut_nor_filled_by_what_a_training_run_has_saved(
    setting: str, direction: str, tmp_path: Path
) -> None:
    made, file = of_letters(), tmp_path / "tokenizer.json"
    whole = made.encode(PROMPT).ids
    if setting in ("truncation", "both"):
        made.enable_truncation(8, direction=direction)
    if setting == "stride":
        made.enable_truncation(8, stride=4, direction=direction)
    if setting in ("padding", "both"):
        made.enable_padding(direction=direction, length=48, pad_token="<pad>")
    made.save(str(file))
    saved = file.read_bytes()
    assert Tokenizer.from_file(str(file)).encode(PROMPT).ids != whole
    assert read_tokenizer(file).encode(PROMPT).ids == whole
    assert file.read_bytes() == saved


def test_a_users_sequences_are_whole_too(tmp_path: Path) -> None:
    made = of_letters()
    made.enable_truncation(8)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines").write_text(f'{{"text": "{PROMPT}"}}\n')
    (read,) = read_token_file(tmp_path / "lines", ModelConfig.tiny(), read_tokenizer(tmp_path / "tokenizer.json"))
    assert len(read) == len(PROMPT)


def test_a_line_that_the_tokenizer_can_not_encode_is_named(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"text": "abc"}\n{"text": "\\ud800"}\n')
    with pytest.raises(InputError, match="2: the tokenizer failed at turning this text into ids"):
        read_token_file(tmp_path / "lines", ModelConfig.tiny(), of_letters())


@pytest.mark.parametrize("content", ["{}", "[", "", '{"model": {"type": "Nothing"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_with_its_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer.json is no tokenizer that `tokenizers` can read \(.+\)"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_text_that_can_not_be_encoded_is_the_askers() -> None:
    """No word for it in the vocabulary, nor one for the unknown; and half a character."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    for text in ("b", "\ud800"):
        with pytest.raises(InputError, match=r"the tokenizer failed at turning this text into ids: .+"):
            encode_text(words, text)


class PanicException(BaseException):
    """As native code's panics are in Python."""


@pytest.mark.parametrize(("failure", "said"), [(PanicException("index 3"), "index 3"), (RuntimeError(), "RuntimeError")])
def test_any_fault_of_a_tokenizer_is_a_sentence(failure: BaseException, said: str) -> None:
    with pytest.raises(InputError, match=f"the tokenizer failed here: {said}"), tokenizer_faults(InputError, "here"):
        raise failure


def test_an_interrupt_is_no_fault_of_the_tokenizer() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_faults(InputError, "here"):
        raise KeyboardInterrupt


# A start token, from the tokenizer and from the text.


@pytest.mark.parametrize(
    ("single", "text", "doubled"),
    [
        ("<s> $A", "abc", None),
        ("<s> $A", "<s>abc", "<s>"),
        ("<s> $A </s>", "<s>abc", "<s>"),
        ("<s> $A", "abc<s>", None),
        ("<s> $A", "", None),
        ("<s> $A", "<s>", "<s>"),
        ("$A </s>", "<s>abc", None),
        ("$A", "<s><s>abc", None),
        ("<s> <pad> $A", "<s>abc", "<s>"),
    ],
)
def test_a_start_that_is_doubled_is_found(single: str, text: str, doubled: str | None) -> None:
    made = of_letters("<s>", "</s>", "<pad>")
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2), ("<pad>", 0)])
    encoded = made.encode(text)
    assert doubled_start(encoded) == doubled


def test_a_doubled_start_is_told_once_for_a_session_and_changes_nothing(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = of_letters("<s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with motrt.load(tiny_bundle) as session, caplog.at_level(logging.WARNING):
        session.tokenizer = made
        assert encode("abc", session) == [1, 3, 4, 5] and not caplog.records
        assert [encode("<s>abc", session) for _ in range(3)] == [[1, 1, 3, 4, 5]] * 3
    assert [one.message for one in caplog.records if "begins with <s>" in one.message] == [caplog.records[-1].message]
