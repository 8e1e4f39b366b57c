"""How a server may be set up, and with which keys."""

from pathlib import Path
from typing import Any

import pytest

from motrt.errors import InputError
from motrt.serve.options import ServeOptions, read_keys


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("max_body_bytes", 0),
        ("requests_per_minute", -1),
        ("threads", -1),
        ("max_tokens", 0),
        ("body_seconds", 0),
        ("drain_seconds", -1),
        ("request_seconds", float("nan")),
        ("model_name", ""),
        ("check", "trust"),
        ("check", ("hash", "trust")),
        ("check", ()),
        ("backend", "abacus"),
        ("max_batch", 0),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        ServeOptions(**{name: value})


def test_keys_are_known_again_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("first-key-of-sixteen\n\nsecond-key-of-sixteen\n")
    keys = read_keys(path)
    assert keys.number_of(b"first-key-of-sixteen") == 0
    assert keys.number_of(b"second-key-of-sixteen") == 1
    assert keys.number_of(b"") is keys.number_of(b"first-key-of-sixteen\n") is None


@pytest.mark.parametrize(
    ("text", "why"), [("", "no key"), ("\n \n", "no key"), ("short\n", "at least 16"), ("é" * 20, "ASCII")]
)
def test_a_file_of_keys_that_protects_nothing_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=why) as refused:
        read_keys(path)
    assert "short" not in str(refused.value)


def test_a_file_of_keys_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can not be read"):
        read_keys(tmp_path / "none")
