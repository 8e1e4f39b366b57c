"""Text ids become pieces of text as soon as it is certain: put together, they are what the tokenizer says of all ids at once.

One object follows one row. A piece that was given can not be taken back, and decoders look ahead: a byte may finish a
character, or spoil the run of bytes that it stands in. So this file knows tokenizers' decoders well enough to tell where later
ids can change nothing, decodes up to there, and goes on behind a few ids of context; what it does not know waits for the end
of its phase. Every id is decoded a bounded number of times, whatever a model says.

tokenizers' own ``DecodeStream`` is not used: it cuts runs of bytes, can not be asked at the end for what it still holds, holds
everything back for as long as a model says bytes that are no UTF-8, and raises for ids beyond 32 bits.
"""

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from reprlib import repr as brief
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from motrt.errors import BackendError
from motrt.runtime.tokenizer import tokenizer_faults

_NUM_TOKENIZER_IDS = 2**32  # tokenizers skips ids that it does not know, and raises for those that its ids can not hold

# Decoders whose text for a token depends on that token and on whether it is the first; ``ByteFallback`` on the run of bytes.
_LOCAL = {"Replace", "Strip", "ByteFallback", "Metaspace", "WordPiece"}
# What may stand behind them, where all is one string.
_AFTER = {"Fuse", "Strip"}
# Characters that ``Strip`` may take from the beginning of all text: that many ids are no context.
_MOST_STRIPPED = 4

Settings = Mapping[str, Any]


class TextPieces:
    """Turns one row's text ids into text as it becomes certain, never half a character.

    Args:
        tokenizer: whose ids will be pushed: the text range's, counted from its start.
        skip_special_tokens: whether ids such as the end of the text are left out of it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._chain = _decoders_of(tokenizer)
        self._left_out: set[str] = set()
        if self._chain is not None and skip_special_tokens:
            self._left_out = {one.content for one in tokenizer.get_added_tokens_decoder().values() if one.special}
        is_bytes = self._chain is not None and [one["type"] for one in self._chain] == ["ByteLevel"]
        self._pieces: _Characters | _Window = _Characters() if is_bytes else _Window(self._decode, _opener(self._chain))

    def push(self, token_id: int) -> str:
        """The text that this id made certain: often a word, sometimes nothing. An id that the tokenizer lacks is nothing.

        Raises:
            BackendError: when the tokenizer can not decode it.
        """
        if not 0 <= token_id < _NUM_TOKENIZER_IDS:
            return ""
        token = "" if self._chain is None else self._tokenizer.id_to_token(int(token_id))
        if token is None or token in self._left_out:
            return ""
        return self._pieces.push(int(token_id), token)

    def flush(self) -> str:
        """What is still held back, at the end or where another modality takes over: half a character shows as U+FFFD.

        What was half must not join what comes later, which then stands for itself.

        Raises:
            BackendError: when the tokenizer can not decode it.
        """
        return self._pieces.flush()

    def _decode(self, ids: Sequence[int]) -> str:
        with tokenizer_faults(BackendError, f"at turning ids {brief(ids)} into text"):
            return self._tokenizer.decode(ids, skip_special_tokens=self._skips)


class _Characters:
    """For tokens that are runs of bytes (``ByteLevel``): at most three bytes wait for the rest of their character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(_bytes_of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """For every other decoder: the ids that are not certain yet, behind a few that are.

    Of the text of these ids so many characters were given; ids that could have stood before them would change nothing in what
    is left. An open id is one whose text later ids may change; the next that is not open closes it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_open: Callable[[str], bool]) -> None:
        self._decode, self._is_open = decode, is_open
        self._ids: list[int] = []
        self._num_given = 0
        self._is_waiting = self._ends_open = self._was_cut = False
        self._look_at = 0  # while nothing was said at all: that many ids are decoded next

    def push(self, token_id: int, token: str) -> str:
        self._ends_open, was_cut, self._was_cut = self._is_open(token), self._was_cut, False
        if was_cut and self._ends_open:  # it must not join the half that was flushed
            self._ids, self._num_given = [], 0
        self._ids.append(token_id)
        self._is_waiting = True
        if self._ends_open or len(self._ids) < self._look_at:
            return ""
        piece = self._look()
        if self._num_given == 0:
            self._look_at = 2 * len(self._ids)
        elif not piece and not was_cut:
            self._ids.pop()  # behind text that has ended, an id without text changes nothing
        elif len(self._ids) > 2 * (_MOST_STRIPPED + 2):
            self._move_on()
        return piece

    def flush(self) -> str:
        self._was_cut = self._was_cut or (self._is_waiting and self._ends_open)
        return self._look() if self._is_waiting else ""

    def _look(self) -> str:
        text = self._decode(self._ids)
        piece = text[self._num_given :]
        self._num_given += len(piece)
        self._is_waiting, self._look_at = False, 0
        return piece

    def _move_on(self) -> None:
        """The newest ids alone stay, as context: they have text, whatever is taken from a beginning."""
        newest = self._ids[-(_MOST_STRIPPED + 2) :]
        num_given = len(self._decode(newest))
        if num_given:
            self._ids, self._num_given = newest, num_given


def _decoders_of(tokenizer: Tokenizer) -> list[Settings] | None:
    """The tokenizer's decoders in their order, as ``tokenizer.json`` has them; None where they are not to be had."""
    try:
        return [] if tokenizer.decoder is None else _flat(json.loads(tokenizer.decoder.__getstate__()))
    except Exception:  # written in Python, say: tokenizers raises plain Exception
        return None


def _flat(decoder: Settings) -> list[Settings]:
    return [one for part in decoder["decoders"] for one in _flat(part)] if decoder["type"] == "Sequence" else [decoder]


def _opener(chain: Sequence[Settings] | None) -> Callable[[str], bool]:
    """Whether later ids may change the text of a token, for each decoder that is known; for another, they always may."""
    kinds = [one["type"] for one in chain or ()]
    if chain is None or not _is_known(chain, kinds):
        return lambda token: True
    if kinds == ["BPEDecoder"]:  # the last token's suffix is left out, every other's becomes a space
        suffix = str(chain[0]["suffix"])
        return lambda token: token == suffix or suffix in token.removesuffix(suffix)
    if "ByteFallback" in kinds:  # a run that is no UTF-8 becomes U+FFFD from its first byte on
        return lambda token: len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return lambda token: False


def _is_known(chain: Sequence[Settings], kinds: Sequence[str]) -> bool:
    if kinds == ["BPEDecoder"]:
        return bool(chain[0]["suffix"])
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    if not (_LOCAL.issuperset(kinds[:fused]) and _AFTER.issuperset(kinds[fused:])):
        return False
    trims = [one for one in chain[fused:] if one["type"] == "Strip"]
    if any(one["stop"] for one in trims) or sum(one["start"] for one in trims) > _MOST_STRIPPED:
        return False
    if "ByteFallback" not in kinds:
        return True
    # What is no byte must not become one before bytes are looked for: with a space in it, it does not.
    before = chain[: kinds.index("ByteFallback")]
    return kinds.count("ByteFallback") == 1 and all(one["type"] == "Replace" and " " in one["content"] for one in before)


@cache
def _byte_of_character() -> dict[str, int]:
    """By character, the byte that it stands for in ``ByteLevel``: printable ones for themselves, others from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {one: ord(one) for one in alphabet if ord(one) < 256}
    others = sorted(set(range(256)).difference(own.values()))
    return own | dict(zip([one for one in alphabet if ord(one) >= 256], others, strict=True))


def _bytes_of(token: str) -> bytes:
    """A token of an alphabet of bytes; one that is not of it, an added one, stands for itself."""
    found = [_byte_of_character().get(one) for one in token]
    return token.encode() if None in found else bytes(one for one in found if one is not None)
