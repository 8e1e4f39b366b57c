r"""The tokenizer in a GGUF file's header, written as the files that ``tokenizers`` and transformers read.

Byte-level BPE (``gpt2`` there) is written exactly: vocabulary, merges, special tokens, and the pattern that cuts text before
merging, which the header only names (``pre``). A name that is not in the table is not guessed: no tokenizer is written, and the
report says why. SentencePiece (``llama`` there) is not written either: it merges by the score of what results, from the left,
where ``tokenizers`` merges by the rank of a pair, and scores do not give every pair a rank that merges the same.

Sources: the patterns by ``pre`` and the defaults that follow from it, ``llama-vocab`` of llama.cpp; the file's layout, the
serialization of ``tokenizers``. This file knows no weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "tokenizer."

_CONTROL, _USER_DEFINED = 3, 4  # of token_type: special, and taken whole out of a text without being special

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Pre:
    """What a name of ``pre`` stands for.

    Attributes:
        patterns: text is cut by each in turn.
        is_whole_first: whether a piece that is a token as a whole is taken before any merge (Llama 3).
        starts: whether a text gets the start token where the header does not say.
    """

    patterns: tuple[str, ...]
    is_whole_first: bool = False
    starts: bool = False


_SMOLLM = _Pre((r"\p{N}", _GPT2))
_BY_PRE: Mapping[str, _Pre] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat"), _Pre((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _SMOLLM),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _Pre((_LLAMA3,), True, True)),
}

_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_KNOWN = {
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.add_bos_token", "ggml.add_eos_token"),
    *(f"ggml.{key}" for key in _IDS.values()),
    *("chat_template", "ggml.add_space_prefix"),
    # Of other kinds of tokenizer, or names for tokens that the vocabulary has anyway.
    *("ggml.scores", "ggml.token_type_count", "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap", "chat_templates"),
    *(
        f"ggml.{name}_token_id"
        for name in ("separator", "seperator", "cls", "mask", "prefix", "suffix", "middle", "eot", "eom")
    ),
    *(f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}


def tokenizer_of(metadata: Mapping[str, Any], source: str) -> tuple[Mapping[str, str], str]:
    """Return the files that a header's tokenizer becomes, by name, none where there is none, and what the report says of it.

    Args:
        metadata: the header's values by key.
        source: the file's name.
    """
    values = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    problem = _problem(values)
    if problem is not None:
        return {}, (
            f"no tokenizer goes along: {source} {problem}. Put the tokenizer.json of the same model into the folder (its "
            "Hugging Face folder has one) to prompt with text"
        )
    written = json.dumps(_tokenizer(values), ensure_ascii=False)
    if (problem := _unreadable(written)) is not None:
        return {}, f"no tokenizer goes along: what {source} holds is none that `tokenizers` reads ({problem})"
    config = json.dumps(_config(values), indent=2, ensure_ascii=False) + "\n"
    count, added = len(values["ggml.tokens"]), len(_added(values))
    note = f"tokenizer: byte-level BPE, pre {values['ggml.pre']!r}, {count} tokens, {added} of which are never cut"
    return {"tokenizer.json": written, "tokenizer_config.json": config}, note


def _problem(values: Mapping[str, Any]) -> str | None:
    """Why the header's tokenizer cannot be written; None where it can."""
    model, pre = values.get("ggml.model"), values.get("ggml.pre")
    if model is None:
        return "holds none"
    if model == "llama":
        return "has a SentencePiece tokenizer, whose merges by score cannot be written exactly"
    if model != "gpt2":
        return f"has a tokenizer of kind {model!r}, which is not known here"
    if pre is None:
        return "does not say how text is cut"
    if not isinstance(pre, str) or pre not in _BY_PRE:
        return f"cuts text as {pre!r} does, which is not known here"
    unknown = sorted(key for key in values if key not in _KNOWN and not key.startswith("chat_template."))
    if unknown:
        return f"says {', '.join(PREFIX + key for key in unknown)} of it, which is not known here"
    if values.get("ggml.add_space_prefix"):
        return "puts a space before a text, which byte-level BPE here does not"
    return _wrong_list(values) or _wrong_special(values, _BY_PRE[pre])


def _wrong_list(values: Mapping[str, Any]) -> str | None:
    tokens: Any = values.get("ggml.tokens")
    merges: Any = values.get("ggml.merges")
    kinds: Any = values.get("ggml.token_type")
    if not _are(tokens, str) or not _are(merges, str):
        return "lacks its tokens or its merges"
    if len(set(tokens)) != len(tokens):
        return "has the same token twice"
    if kinds is not None and (not _are(kinds, int) or len(kinds) != len(tokens)):
        return f"tells the kind of other than its {len(tokens)} tokens"
    wrong = next((merge for merge in merges if len(parts := merge.split(" ")) != 2 or not all(parts)), None)
    return None if wrong is None else f"has a merge that is no pair of tokens ({wrong!r})"


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(one, kind) for one in values)


def _wrong_special(values: Mapping[str, Any], pre: _Pre) -> str | None:
    """Why a special token cannot be written: an id outside the vocabulary, or one that is to be put and is not named."""
    tokens = values["ggml.tokens"]
    ids = {key: values[f"ggml.{key}"] for key in _IDS.values() if f"ggml.{key}" in values}
    wrong = [f"{key} {value!r}" for key, value in ids.items() if not isinstance(value, int) or not 0 <= value < len(tokens)]
    if wrong:
        return f"has {', '.join(wrong)} in a vocabulary of {len(tokens)}"
    if _puts_start(values, pre) and "bos_token_id" not in ids:
        return "puts a start token before a text and does not name it"
    return "puts an end token behind a text and does not name it" if _puts_end(values) and "eos_token_id" not in ids else None


def _puts_start(values: Mapping[str, Any], pre: _Pre) -> bool:
    return bool(values.get("ggml.add_bos_token", pre.starts))


def _puts_end(values: Mapping[str, Any]) -> bool:
    return bool(values.get("ggml.add_eos_token", False))


def _tokenizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer.json`` as a JSON object."""
    pre = _BY_PRE[values["ggml.pre"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in pre.patterns
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(values),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": _template(values, pre),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.is_whole_first,
            "vocab": {token: number for number, token in enumerate(values["ggml.tokens"])},
            "merges": [merge.split(" ") for merge in values["ggml.merges"]],
        },
    }


def _added(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens that are taken whole out of a text: special ones, and those of the model's makers."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = values.get("ggml.token_type") or []
    return [
        {"id": number, "content": token, **plain, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(values["ggml.tokens"], kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _template(values: Mapping[str, Any], pre: _Pre) -> dict[str, Any] | None:
    """What is put before and behind a text; None where nothing is."""
    named = [
        values["ggml.tokens"][values[f"ggml.{key}"]]
        for key, is_put in (("bos_token_id", _puts_start(values, pre)), ("eos_token_id", _puts_end(values)))
        if is_put
    ]
    if not named:
        return None
    before = [{"SpecialToken": {"id": named[0], "type_id": 0}}] if _puts_start(values, pre) else []
    behind = [{"SpecialToken": {"id": named[-1], "type_id": 0}}] if _puts_end(values) else []
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    numbers = {token: number for number, token in enumerate(values["ggml.tokens"])}
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *behind],
        "pair": [*before, first, *behind, *before, second, *behind],
        "special_tokens": {token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in named},
    }


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` as a JSON object: what transformers needs beside it, and the chat template."""
    names = {name: values["ggml.tokens"][values[f"ggml.{key}"]] for name, key in _IDS.items() if f"ggml.{key}" in values}
    templates = [
        {"name": key.removeprefix("chat_template."), "template": value}
        for key, value in values.items()
        if key.startswith("chat_template.") and isinstance(value, str)
    ]
    default = values.get("chat_template")
    if templates and isinstance(default, str):
        chat: Any = [{"name": "default", "template": default}, *templates]
    else:
        chat = templates or default
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _puts_start(values, _BY_PRE[values["ggml.pre"]]),
        "add_eos_token": _puts_end(values),
        "clean_up_tokenization_spaces": False,
        **names,
        **({} if chat is None else {"chat_template": chat}),
    }


def _unreadable(written: str) -> str | None:
    """Why the library does not read what was written; None where it does."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(written)
    except Exception as failure:  # the library raises nothing narrower
        return str(failure)
    return None
