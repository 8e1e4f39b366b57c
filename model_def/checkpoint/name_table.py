"""How one format's names become the native ones: a table of patterns that a person can read, and the matching of it.

A pattern is a name with places in braces. ``{i}`` is a layer's number; ``{m}`` on the foreign side is a modality's number
and stands for ``{modality}`` on the native side; ``{w:a|b}`` is one of the words given, and ``{w}`` the same word on the
other side.
This file knows no format: each stands in a file of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

TEXT, AUDIO = "text", "audio"
COMPUTED = "computed from the configuration"
"""Why a stored RoPE table is not needed."""

MODALITY_NUMBERS = {"0": TEXT, "1": AUDIO}

_PLACE = re.compile(r"\{(\w+)(?::([^}]*))?\}")
# Six digits are more layers than any model has, and few enough that every such number can be read.
LAYER_NUMBER = "0|[1-9][0-9]{0,5}"
_PLACES = {"i": LAYER_NUMBER, "m": "|".join(MODALITY_NUMBERS), "modality": "|".join(MODALITY_NUMBERS.values())}


@dataclass(frozen=True)
class NameTable:
    """One format's names.

    Attributes:
        names: (foreign pattern, native pattern) pairs; the first that matches counts.
        ignored: (foreign pattern, why it is not needed) pairs.
    """

    names: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...] = ()

    def native(self, key: str) -> str | None:
        """The native name of a foreign key, or None where the table has none."""
        return _translate(self._forward, key)

    def foreign(self, name: str) -> str | None:
        """The foreign key that a native name would have had, or None."""
        return _translate(self._backward, name)

    def reason_to_ignore(self, key: str) -> str | None:
        """Why a foreign key is not needed, or None where it is not among those."""
        return next((reason for pattern, reason in self._ignored if pattern.fullmatch(key)), None)

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compiled(foreign), native) for foreign, native in self.names]

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compiled(native, _words(foreign)), foreign) for foreign, native in self.names]

    @cached_property
    def _ignored(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compiled(pattern), reason) for pattern, reason in self.ignored]


def _translate(rules: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, other in rules:
        if match := pattern.fullmatch(name):
            return _filled(other, match.groupdict())
    return None


def _compiled(pattern: str, words: Mapping[str, str] | None = None) -> re.Pattern[str]:
    """A pattern as a regular expression; ``words`` are the choices that the other side of its row gives."""
    literals = _PLACE.split(pattern)  # literal, place, words, literal, place, words, ... literal
    parts = [re.escape(literals[0])]
    for place, choice, literal in zip(literals[1::3], literals[2::3], literals[3::3], strict=True):
        choices = choice or (words or {}).get(place) or _PLACES.get(place, r".+")
        parts += [f"(?P<{place}>{choices})", re.escape(literal)]
    return re.compile("".join(parts))


def _words(pattern: str) -> dict[str, str]:
    return {place: choice for place, choice in _PLACE.findall(pattern) if choice}


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    numbers = {modality: number for number, modality in MODALITY_NUMBERS.items()}
    known = dict(values)
    if "m" in known:
        known["modality"] = MODALITY_NUMBERS[known["m"]]
    elif "modality" in known:
        known["m"] = numbers[known["modality"]]
    return _PLACE.sub(lambda place: known[place[1]], pattern)
