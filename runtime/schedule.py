"""Which modality comes next: a schedule is asked before every token, and answers with a name, or None when it is finished.

A schedule knows what was said so far and nothing of the model that says it. Any callable of ``Progress`` will do; the
builders here are small frozen values which, besides, can be checked, counted and printed before anything is computed::

    then("text", tokens=20).then("audio", frames=250)     then one modality, then another
    interleave(text=13, audio=26)                         the same pattern, over and over
    on_control({128010: "audio", 128011: "text"})         an id says what comes after it

Every builder answers in the time of its own length, never of the history's: it looks at how many tokens there are, and at
the last one.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from motrt.errors import InputError, raise_all
from motrt.model_def.config import ModelConfig


@dataclass(frozen=True)
class Progress:
    """What one row has said so far.

    Attributes:
        config: the model's.
        prompt: unified ids of the prompt.
        tokens: unified ids generated since. Sequences are read, not copied: do not keep them beyond the call.
    """

    config: ModelConfig
    prompt: Sequence[int]
    tokens: Sequence[int]


Schedule = Callable[[Progress], str | None]


@runtime_checkable
class Builder(Protocol):
    """A schedule that can be known beforehand."""

    def __call__(self, progress: Progress) -> str | None: ...

    def modalities(self) -> tuple[str, ...]:
        """The names it may answer with, each once."""

    def problems(self, config: ModelConfig) -> list[str]:
        """Why it can not serve this model, besides names that the model does not have."""

    def total_tokens(self, config: ModelConfig) -> int | None:
        """How many tokens it asks for; None where only a limit or a stop id ends it."""


@dataclass(frozen=True)
class Segment:
    """A run of one modality.

    Attributes:
        modality: its name.
        frames: how long, in frames of the modality's ``codes_per_frame`` ids.
        tokens: how long, in ids. With neither, until a limit or a stop id ends it.
    """

    modality: str
    frames: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        problems = [] if _is_name(self.modality) else [f"a modality is a name ({self.modality!r} came)"]
        problems += [
            f"{unit} must be a whole number of at least 1 ({count!r} came)"
            for unit, count in (("frames", self.frames), ("tokens", self.tokens))
            if count is not None and not _is_whole(count)
        ]
        if self.frames is not None and self.tokens is not None:
            problems.append("frames and tokens were both given: one of them says how long, leave the other out")
        raise_all(InputError, f"a run of {self.modality!r}:", problems)

    def length(self, config: ModelConfig) -> int | None:
        """Ids in this run; None where it has no end of its own."""
        if self.frames is None:
            return self.tokens
        if self.modality not in config.modality_names:
            raise InputError(_no_such(self.modality, config))
        return self.frames * config.modalities[config.modality_index(self.modality)].codes_per_frame

    def __str__(self) -> str:
        count = "" if self.tokens is None else f":{self.tokens}"
        return self.modality + (count if self.frames is None else f":{self.frames}f")


@dataclass(frozen=True)
class Chain:
    """Runs that follow each other; finished after the last. Made by ``then``."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        endless = [segment.modality for segment in self.segments[:-1] if segment.frames is None and segment.tokens is None]
        raise_all(
            InputError,
            "a schedule that never gets to its end:",
            [
                f"the run of {name!r} has no length, so what follows it would never come: give frames or tokens"
                for name in endless
            ],
        )

    def then(self, modality: str, *, frames: int | None = None, tokens: int | None = None) -> "Chain":
        """This chain with one more run at its end; arguments and errors as of the function ``then``."""
        return Chain((*self.segments, Segment(modality, frames, tokens)))

    def __call__(self, progress: Progress) -> str | None:
        left = len(progress.tokens)
        for segment in self.segments:
            length = segment.length(progress.config)
            if length is None or left < length:
                return segment.modality
            left -= length
        return None

    def modalities(self) -> tuple[str, ...]:
        return _once(segment.modality for segment in self.segments)

    def problems(self, config: ModelConfig) -> list[str]:
        return []

    def total_tokens(self, config: ModelConfig) -> int | None:
        lengths = [segment.length(config) for segment in self.segments]
        return None if None in lengths else sum(length for length in lengths if length is not None)

    def __str__(self) -> str:
        return ",".join(map(str, self.segments))


@dataclass(frozen=True)
class Interleave:
    """A pattern of runs that repeats without end. Made by ``interleave``."""

    pattern: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        problems = [
            f"{name!r} must have a whole number of tokens of at least 1 ({count!r} came)"
            for name, count in self.pattern
            if not _is_whole(count)
        ]
        if not self.pattern:
            problems.append("no modality came: name each with its number of tokens, as in interleave(text=13, audio=26)")
        raise_all(InputError, "an interleaved schedule:", problems)

    def __call__(self, progress: Progress) -> str:
        left = len(progress.tokens) % sum(count for _, count in self.pattern)
        for name, count in self.pattern:
            if left < count:
                return name
            left -= count
        raise AssertionError("the remainder is below the pattern's length")

    def modalities(self) -> tuple[str, ...]:
        return _once(name for name, _ in self.pattern)

    def problems(self, config: ModelConfig) -> list[str]:
        return []

    def total_tokens(self, config: ModelConfig) -> None:
        return None

    def __str__(self) -> str:
        return "interleave:" + ",".join(f"{name}={count}" for name, count in self.pattern)


@dataclass(frozen=True)
class OnControl:
    """Control ids say what comes after them. Made by ``on_control``."""

    modality_after: tuple[tuple[int, str], ...]
    start: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"a control id is a whole number of at least 0 and leads to a modality's name ({token!r}: {name!r} came)"
            for token, name in self.modality_after
            if not (_is_whole(token, least=0) and _is_name(name))
        ]
        if not self.modality_after:
            problems.append("no control id came: give a mapping from id to modality name")
        if not (self.start is None or _is_name(self.start)):
            problems.append(f"start is a modality's name, or None ({self.start!r} came)")
        raise_all(InputError, "a schedule by control ids:", problems)

    def __call__(self, progress: Progress) -> str:
        if len(progress.tokens) == 0:
            return self._first(progress)
        last = int(progress.tokens[-1])
        # A run goes on in the modality of its last token: this schedule is what gave it that modality.
        return self._after(last) or _owner(progress.config, last)

    def _after(self, token: int) -> str | None:
        return next((name for control, name in self.modality_after if control == token), None)

    def _first(self, progress: Progress) -> str:
        controls = {control for control, _ in self.modality_after}
        last_control = next((token for token in reversed(progress.prompt) if int(token) in controls), None)
        chosen = self.start if last_control is None else self._after(int(last_control))
        if chosen is not None:
            return chosen
        if len(progress.prompt) == 0:
            raise InputError("nothing says which modality comes first: give a prompt, or on_control(..., start=...)")
        return _owner(progress.config, int(progress.prompt[-1]))

    def modalities(self) -> tuple[str, ...]:
        names = [name for _, name in self.modality_after]
        return _once(names if self.start is None else [self.start, *names])

    def problems(self, config: ModelConfig) -> list[str]:
        return [
            f"control id {token} is outside the vocabulary 0..{config.vocab_size - 1}"
            for token, _ in self.modality_after
            if token >= config.vocab_size
        ]

    def total_tokens(self, config: ModelConfig) -> None:
        return None


def then(modality: str, *, frames: int | None = None, tokens: int | None = None) -> Chain:
    """A run of one modality; chain more with ``.then(...)``.

    Args:
        modality: its name.
        frames: how long, in frames of the modality's ``codes_per_frame`` ids each (EnCodec: 4; text: 1).
        tokens: how long, in ids. With neither frames nor tokens it lasts until a limit or a stop id, and nothing may follow.

    Raises:
        InputError: for counts below 1, for both counts, and for a run after one that has no end.
    """
    return Chain((Segment(modality, frames, tokens),))


def interleave(**tokens_by_modality: int) -> Interleave:
    """Runs of so many tokens each, in the order given, over and over until a limit or a stop id.

    Raises:
        InputError: for counts below 1, or none at all.
    """
    return Interleave(tuple(tokens_by_modality.items()))


def on_control(modality_after: Mapping[int, str], start: str | None = None) -> OnControl:
    """After a control id the next tokens are of the modality that it stands for, until the next control id.

    Control ids in the prompt count: the last one there says what is generated first. Otherwise ``start`` does, and without
    it the modality of the prompt's last token. The prompt is looked through once, from its end, before the first token;
    after that the last token alone says how to go on.

    Args:
        modality_after: unified control id -> modality name.
        start: the first modality where no control id in the prompt says it.

    Raises:
        InputError: for ids that are no whole numbers, or none at all.
    """
    if not isinstance(modality_after, Mapping):
        raise InputError(f"on_control takes a mapping from id to modality name ({type(modality_after).__name__} came)")
    return OnControl(tuple(modality_after.items()), start)


def check(schedule: Schedule, config: ModelConfig) -> None:
    """Refuse, before anything is computed, a schedule that can not serve ``config``.

    A callable that is no ``Builder`` can only be checked as it answers: see ``next_modality``.

    Raises:
        InputError: naming every modality that the model does not have, and every control id outside its vocabulary.
    """
    if not callable(schedule):
        raise InputError(
            f"a schedule must be callable ({type(schedule).__name__} came): make one with then, interleave or on_control, "
            "or parse_schedule from text"
        )
    if isinstance(schedule, Builder):
        problems = [_no_such(name, config) for name in schedule.modalities() if name not in config.modality_names]
        raise_all(InputError, "the schedule does not fit the model:", problems + schedule.problems(config))


def total_tokens(schedule: Schedule, config: ModelConfig) -> int | None:
    """How many tokens ``schedule`` asks for; None where only a limit or a stop id ends it, or nobody can know."""
    return schedule.total_tokens(config) if isinstance(schedule, Builder) else None


def next_modality(schedule: Schedule, progress: Progress) -> int | None:
    """The number of the modality that comes next; None when the schedule is finished.

    Raises:
        InputError: when the schedule answers with anything but None or a name that the model has.
    """
    name = schedule(progress)
    if name is None:
        return None
    names = progress.config.modality_names
    if not isinstance(name, str):
        raise InputError(
            f"a schedule must answer with a modality's name, or None when finished ({name!r} came): "
            f"this model has {', '.join(names)}"
        )
    if name not in names:
        raise InputError(f"the schedule answered wrongly: {_no_such(name, progress.config)}")
    return names.index(name)


def parse_schedule(text: str) -> Chain | Interleave:
    """The schedule that a command line says: ``text:20,audio:50f``, ``text``, or ``interleave:text=13,audio=26``.

    Runs are separated by commas; a number after the colon counts ids, a number with an ``f`` frames. What ``str`` gives of
    a chain or an interleaved schedule is read back to an equal one.

    Raises:
        InputError: for anything else, saying which part.
    """
    head, colon, pattern = text.partition(":")
    if colon and head.strip() == "interleave":
        return _parse_interleave(pattern)
    return Chain(tuple(_parse_segment(part.strip()) for part in text.split(",")))


# Nine digits are more positions than any model has, and int() is never handed a number that it refuses.
_RUN = re.compile(r"(?P<name>[a-z][a-z0-9_]*)(:(?P<count>[0-9]{1,9})(?P<frames>f?))?")
_SHARE = re.compile(r"(?P<name>[a-z][a-z0-9_]*)=(?P<count>[0-9]{1,9})")
_FORMS = "write runs as 'text:20,audio:50f' (ids, or frames with an f), or a pattern as 'interleave:text=13,audio=26'"


def _parse_segment(part: str) -> Segment:
    found = _RUN.fullmatch(part)
    if found is None:
        raise InputError(f"{part!r} is no run of a schedule: {_FORMS}")
    count = None if found["count"] is None else int(found["count"])
    return Segment(found["name"], frames=count) if found["frames"] else Segment(found["name"], tokens=count)


def _parse_interleave(pattern: str) -> Interleave:
    counts: list[tuple[str, int]] = []
    for part in pattern.split(","):
        found = _SHARE.fullmatch(part.strip())
        if found is None:
            raise InputError(f"{part.strip()!r} is no part of an interleaved schedule: {_FORMS}")
        counts.append((found["name"], int(found["count"])))
    return Interleave(tuple(counts))


def _no_such(name: object, config: ModelConfig) -> str:
    return f"no modality {name!r}: this model has {', '.join(config.modality_names)}"


def _owner(config: ModelConfig, token: int) -> str:
    return config.modality_names[config.modality_of(token)]


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
