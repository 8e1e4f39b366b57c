"""The tokenizer that may lie beside a model: read, and asked for ids. It is foreign code, and any fault of it is a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from motrt.errors import BundleError, InputError, MotrtError


@contextmanager
def tokenizer_faults(error: type[MotrtError], doing: str) -> Iterator[None]:
    """Turn whatever the tokenizer raises into ``error``: a panic of its native code, too, which is no ``Exception``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failure:
        raise error(f"the tokenizer failed {doing}: {str(failure) or type(failure).__name__}") from failure


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``, which gives all ids of a text and no others.

    Truncation and padding that a training run has left in the file are its own: a prompt must not be cut or filled by them.

    Raises:
        BundleError: when the library can not read it.
    """
    try:
        with tokenizer_faults(BundleError, "to open"):
            tokenizer: Tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
    except BundleError as failure:
        raise BundleError(
            f"{path} is no tokenizer that `tokenizers` can read ({failure.__cause__}): mend the checkpoint's, and export again"
        ) from None


def encode_text(tokenizer: Tokenizer, text: str) -> Encoding:
    """The ids of ``text`` and where they come from.

    Raises:
        InputError: when the tokenizer can not encode it.
    """
    with tokenizer_faults(InputError, "at turning this text into ids"):
        return tokenizer.encode(text)


def doubled_start(encoded: Encoding) -> str | None:
    """The special token that the tokenizer puts before a text which begins with it already; None where none is doubled."""
    ids, added = encoded.ids, len(list(takewhile(bool, encoded.special_tokens_mask)))
    return encoded.tokens[added] if added < len(ids) and ids[added] in ids[:added] else None
