"""A user's own sequences, from a file of JSON lines: ``[1, 2, 3]``, ``{"ids": [1, 2, 3]}`` or ``{"text": "..."}``.

Every line that can not be used is named with its number, all at once.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motrt.errors import InputError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.runtime.step_inputs import as_whole_numbers
from motrt.runtime.tokenizer import encode_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Every sequence is computed twice and more at full size: this many tokens are an hour's work there.
MOST_BYTES, MOST_TOKENS = 1 << 26, 1 << 17

# The last token of a sequence is only predicted, and one before it must be fed as a decode step's or a prompt's.
SHORTEST = 2

MOST_NAMED = 20

_FORMS = 'a line is [1, 2, 3], {"ids": [1, 2, 3]} or, where the bundle carries a tokenizer, {"text": "..."}'


def read_token_file(file: Path, config: ModelConfig, tokenizer: "Tokenizer | None" = None) -> tuple[NDArray[np.int64], ...]:
    """The sequences of ``file``, each with at least two ids of the model's and no more than it has positions.

    Args:
        file: of JSON lines; empty lines are passed over.
        config: whose ids they are.
        tokenizer: for lines of text.

    Raises:
        InputError: for a file that is missing, too large or empty, or naming every line that is none of the above.
    """
    sequences, problems = [], []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        ids, problem = _sequence(line, config, tokenizer)
        if ids is None:
            problems.append(f"line {number}: {problem}")
        else:
            sequences.append(ids)
    more = len(problems) - MOST_NAMED
    problems = [*problems[:MOST_NAMED], *([f"and {more} lines more"] if more > 0 else [])]
    raise_all(InputError, f"{file} has lines that are no sequence of this model's; {_FORMS}:", problems)
    if not sequences:
        raise InputError(f"{file} holds no sequence: {_FORMS}")
    total = sum(map(len, sequences))
    if total > MOST_TOKENS:
        raise InputError(f"{file} holds {total} tokens, and at most {MOST_TOKENS} are compared: give a part of it")
    return tuple(sequences)


def _lines(file: Path) -> list[str]:
    try:
        if not file.is_file():
            raise InputError(f"{file} {'is not a file' if file.exists() else 'does not exist'}: give a file of JSON lines")
        if file.stat().st_size > MOST_BYTES:
            raise InputError(f"{file} has {file.stat().st_size} bytes, and at most {MOST_BYTES} are read: give a part of it")
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as failure:
        raise InputError(f"{file} is not UTF-8 text ({failure}): give a file of JSON lines") from None


def _sequence(line: str, config: ModelConfig, tokenizer: "Tokenizer | None") -> tuple[NDArray[np.int64] | None, str]:
    """The ids, or why there are none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as failure:
        return None, f"not JSON ({failure})"
    listed = value.get("ids") if isinstance(value, dict) else value
    if isinstance(value, dict) and set(value) == {"text"}:
        if tokenizer is None:
            return None, "text, and the bundle carries no tokenizer: give ids"
        if not isinstance(value["text"], str):
            return None, "text must be a string"
        try:
            listed = encode_text(tokenizer, value["text"]).ids
        except InputError as failure:
            return None, str(failure)
    elif isinstance(value, dict) and set(value) != {"ids"}:
        return None, f"an object of {', '.join(sorted(map(str, value)))[:80] or 'nothing'}, where ids or text should be alone"
    return _checked(listed, config)


def _checked(listed: Any, config: ModelConfig) -> tuple[NDArray[np.int64] | None, str]:
    ids = as_whole_numbers(listed) if isinstance(listed, list) and not any(isinstance(one, bool) for one in listed) else None
    if ids is None:
        return None, f"ids must be a list of whole numbers ({str(listed)[:60]} came)"
    if len(ids) < SHORTEST:
        return None, f"{len(ids)} ids, and at least {SHORTEST} are needed"
    if len(ids) > config.max_seq_len:
        return None, f"{len(ids)} ids, and the model has {config.max_seq_len} positions"
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(wrong):
        return None, f"id {wrong[0]} is not in 0..{config.vocab_size - 1} ({len(wrong)} such)"
    return ids, ""
