"""A short question, and what the model answers: stored in a bundle at its export, asked of a session before it serves.

A session may load without a word and compute something else: another version of a library, a kernel that this processor takes
for the first time, a damaged weight. A few tokens in and a few logits out find that in milliseconds, where the parity ladder
takes minutes and the checkpoint. What is asked goes through ``prefill`` and ``decode_step``, the product's own path: all rows
together, and each by itself, since kernels and engines differ by the number of rows.

The answer is the reference's (``export/answer_from_weights.py``), not what some session once said. So a session may be away
from it as far as the parity gate lets it, or less: see ``allowed``. Two measures are held against that limit:

- the relative L2 error over the ids that are stored. Where they are a sample of the modality's, the estimate scatters: k
  squares of independent normal errors sum to a chi-squared of k degrees of freedom. For k = 32 their mean is above 4 times its
  expectation once in 10^13 rows, so the estimate is allowed ``SAMPLING_ROOM`` = sqrt(4) times the limit. Where all ids are
  stored it is no estimate, and has no room.
- the difference of the norms over *all* ids of the modality, relative to the reference's. It is never more than the relative L2
  error (the triangle inequality), so it needs no room, and no id is left out.

Besides, every id of the predicted modality has a finite logit, and no other id has one. This file knows no backend.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.errors import InputError, ParityError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.runtime.session import Logits, Session
from motrt.runtime.tolerances import LARGEST_NOISE, SAFETY, limit_of, row_limit
from motrt.runtime.versions import installed_versions, version_differences

logger = logging.getLogger(__name__)

SAMPLING_ROOM = 2.0

# Ids of a modality whose logits are stored: its first and its last, and others evenly between.
NUM_STORED_IDS = 32

# What is asked at most: a prompt that holds every modality, and steps in which they take turns.
NUM_PROMPT, NUM_STEPS = 64, 8

# Beyond these it is no question of ours: answering it could take hours.
MOST_ROWS, MOST_PROMPT, MOST_STEPS, MOST_STORED_IDS = 8, 256, 64, 256

# Numbers up to this can be squared and summed without a thought.
_LARGEST = 1e30

Said = Sequence[Logits]
"""What came of a question: logits [rows, v] after the prompts, and after each step."""


@dataclass(frozen=True)
class Question:
    """Prompts, and the tokens that are fed behind them.

    Attributes:
        prompts: per row its ids.
        steps: per step, and in it per row, the id that is fed.
        predicted: after the prompts and after each step, per row: the name of the modality predicted there.

    Raises:
        InputError: when it is none.
    """

    prompts: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    predicted: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        raise_all(InputError, "this is no question:", self._problems())

    def _problems(self) -> list[str]:
        rows = len(self.prompts)
        problems = []
        if not 1 <= rows <= MOST_ROWS:
            problems.append(f"there must be 1 to {MOST_ROWS} prompts ({rows} came)")
        if not all(1 <= len(prompt) <= MOST_PROMPT for prompt in self.prompts):
            problems.append(f"a prompt must have 1 to {MOST_PROMPT} ids")
        if len(self.steps) > MOST_STEPS or any(len(step) != rows for step in self.steps):
            problems.append(f"there must be at most {MOST_STEPS} steps of one id per row")
        if not all(_is_whole(token) for row in (*self.prompts, *self.steps) for token in row):
            problems.append("ids must be whole numbers")
        if len(self.predicted) != len(self.steps) + 1 or any(len(names) != rows for names in self.predicted):
            problems.append("one modality must be named per row, after the prompts and after each step")
        if not all(isinstance(name, str) for names in self.predicted for name in names):
            problems.append("modalities must be named by words")
        return problems

    def problems_of(self, config: ModelConfig) -> list[str]:
        """Why it can not be asked of a model, as sentences; none where it can."""
        unknown = {name for names in self.predicted for name in names} - set(config.modality_names)
        problems = [f"the model has no modality {name!r}" for name in sorted(unknown)]
        if not all(0 <= token < config.vocab_size for row in (*self.prompts, *self.steps) for token in row):
            problems.append(f"ids must be in 0..{config.vocab_size - 1}")
        if self.num_positions > config.max_seq_len:
            problems.append(f"it takes {self.num_positions} positions, and the model has {config.max_seq_len}")
        return problems

    @property
    def num_positions(self) -> int:
        """Positions that the longest row takes."""
        return max(map(len, self.prompts)) + len(self.steps)

    def of_row(self, row: int) -> "Question":
        """What is asked of one row, by itself."""
        return Question(
            (self.prompts[row],),
            tuple((step[row],) for step in self.steps),
            tuple((names[row],) for names in self.predicted),
        )

    @classmethod
    def usual(cls, config: ModelConfig) -> "Question":
        """Two rows of different lengths, forwards and backwards through the modalities.

        The prompts hold a run of each modality. In the steps a modality is predicted three times and then gives way to the
        next, in the second row a step sooner: of two modalities, the rows meet every pair of one that is read and one that is
        predicted, those that stay in one twice, so that what a backend has recorded is played back, and both predict the same
        for once.
        """
        count = len(config.modalities)
        num_steps = min(max(3, 2 * count), NUM_STEPS, config.max_seq_len // 2)
        longest = min(max(6, 3 * count), NUM_PROMPT, config.max_seq_len - num_steps)
        orders = [list(range(count)), list(range(count))[::-1]]
        rows = [
            _row(config, order, length, num_steps, lead)
            for lead, (order, length) in enumerate(zip(orders, (longest, max(1, longest * 2 // 3)), strict=True))
        ]
        return cls(
            prompts=tuple(ids[:-num_steps] if num_steps else ids for ids, _ in rows),
            steps=tuple(tuple(ids[step - num_steps] for ids, _ in rows) for step in range(num_steps)),
            predicted=tuple(tuple(names[after] for _, names in rows) for after in range(num_steps + 1)),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": [list(row) for row in self.prompts],
            "steps": [list(step) for step in self.steps],
            "predicted": [list(names) for names in self.predicted],
        }


def _row(
    config: ModelConfig, order: Sequence[int], length: int, num_steps: int, lead: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids of one row, prompt and steps, and what is predicted after its prompt and each step."""
    count = len(order)
    turns = [order[((step + lead) // 3) % count] for step in range(num_steps + 1)]  # what comes behind the prompt
    modalities = [order[place * count // length] for place in range(length)] + turns[:-1]
    taken = dict.fromkeys(order, 0)
    ids = []
    for modality in modalities:
        owned = config.id_ranges[modality]
        # First, last, and others: the factor is a prime, so that few vocabularies repeat themselves.
        ids.append((owned.start, owned.stop - 1)[taken[modality]] if taken[modality] < 2 else _other(owned, taken[modality]))
        taken[modality] += 1
    return tuple(ids), tuple(config.modality_names[modality] for modality in turns)


def _other(owned: range, number: int) -> int:
    return owned.start + 7919 * number % len(owned)


@dataclass(frozen=True)
class KnownAnswer:
    """What the reference answers.

    Attributes:
        question: what it was asked.
        ids: by predicted modality, the ids whose logits are stored.
        logits: after the prompts and after each step, per row: the logits of those ids.
        rms: likewise, the root mean square of the logits of all the modality's ids.
        reference: what answered, for people.
        noise: likewise, how far rounding alone moves the row, as a relative L2 error, found at the export: it sets the row's
            limit. Empty: nobody measured it, and the formula alone speaks.
        rounding_loss: likewise, how far the row moves where products with codes round their activations to 8 bits, as a CPU's
            do; None where there are no codes.

    Raises:
        InputError: when it is none.
    """

    question: Question
    ids: Mapping[str, tuple[int, ...]]
    logits: tuple[tuple[tuple[float, ...], ...], ...]
    rms: tuple[tuple[float, ...], ...]
    reference: str
    noise: tuple[tuple[float, ...], ...] = ()
    rounding_loss: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        raise_all(InputError, "this is no answer:", self._problems())

    def _problems(self) -> list[str]:
        predicted = self.question.predicted
        missing = {name for names in predicted for name in names} - set(self.ids)
        problems = [f"no ids of {name!r} are stored" for name in sorted(missing)]
        for name, ids in self.ids.items():
            if not 1 <= len(ids) <= MOST_STORED_IDS or not all(map(_is_whole, ids)):
                problems.append(f"{name!r} must have 1 to {MOST_STORED_IDS} whole numbers as ids")
            elif any(later <= earlier for earlier, later in pairwise(ids)):
                problems.append(f"the ids of {name!r} must ascend")
        if problems:
            return problems
        wanted = [[len(self.ids[name]) for name in names] for names in predicted]
        if [[len(row) for row in rows] for rows in self.logits] != wanted or [len(one) for one in self.rms] != [
            len(one) for one in predicted
        ]:
            return ["logits and norms must be as many as are asked for"]
        numbers = [value for rows in self.logits for row in rows for value in row]
        if not all(map(_is_number, numbers)):
            problems.append("logits must be numbers")
        if not all(_is_number(value) and value >= 0 for values in self.rms for value in values):
            problems.append("norms must be numbers that are not negative")
        for name, found in (("noise", self.noise), ("rounding_loss", self.rounding_loss or ())):
            if found and [len(one) for one in found] != [len(one) for one in predicted]:
                problems.append(f"{name} must be one number per row of logits, or nothing")
            if not all(_is_number(value) and 0 <= value <= LARGEST_NOISE for values in found for value in values):
                problems.append(f"{name} must be numbers in 0..{LARGEST_NOISE:g}")
        return problems

    def problems_of(self, config: ModelConfig) -> list[str]:
        """Why it is no answer of a model, as sentences; none where it may be."""
        ranges = dict(zip(config.modality_names, config.id_ranges, strict=True))
        foreign = [
            f"ids of {name!r} are outside its range"
            for name, ids in sorted(self.ids.items())
            if name not in ranges or ids[0] not in ranges[name] or ids[-1] not in ranges[name]
        ]
        return self.question.problems_of(config) + foreign

    @classmethod
    def of(cls, question: Question, said: Said, config: ModelConfig, reference: str) -> "KnownAnswer":
        """What is kept of what a reference said.

        Raises:
            InputError: where it said no numbers.
        """
        ranges = dict(zip(config.modality_names, config.id_ranges, strict=True))
        inside = [
            [row[ranges[name].start : ranges[name].stop] for row, name in zip(rows, names, strict=True)]
            for rows, names in zip(said, question.predicted, strict=True)
        ]
        if not all((np.abs(row) <= _LARGEST).all() for rows in inside for row in rows):
            raise InputError(f"this is no answer: a logit is no number, or above {_LARGEST:g}")
        ids = {name: _spread(ranges[name]) for name in sorted({name for names in question.predicted for name in names})}
        return cls(
            question,
            ids,
            tuple(
                tuple(tuple(row[list(ids[name])].tolist()) for row, name in zip(rows, names, strict=True))
                for rows, names in zip(said, question.predicted, strict=True)
            ),
            tuple(tuple(_rms(row) for row in rows) for rows in inside),
            reference,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {
            **self.question.to_dict(),
            "ids": {name: list(ids) for name, ids in self.ids.items()},
            "logits": [[list(row) for row in rows] for rows in self.logits],
            "rms": [list(rows) for rows in self.rms],
            "reference": self.reference,
            "noise": [list(row) for row in self.noise],
            "rounding_loss": None if self.rounding_loss is None else [list(row) for row in self.rounding_loss],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KnownAnswer":
        """What ``to_dict`` gave; KeyError, TypeError, AttributeError or InputError for anything else."""
        question = Question(_nested(values["prompts"]), _nested(values["steps"]), _nested(values["predicted"]))
        ids = {str(name): tuple(ids) for name, ids in values["ids"].items()}
        logits = tuple(_nested(rows) for rows in values["logits"])
        rms, reference, loss = _nested(values["rms"]), str(values["reference"]), values["rounding_loss"]
        return cls(question, ids, logits, rms, reference, _nested(values["noise"]), None if loss is None else _nested(loss))


def _nested(values: Any) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(one) for one in values)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """NaN and infinity are none, and whatever is out of proportion."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _spread(owned: range) -> tuple[int, ...]:
    """At most ``NUM_STORED_IDS`` ids of a range: the first, the last, and others evenly between."""
    if len(owned) <= NUM_STORED_IDS:
        return tuple(owned)
    return tuple(owned[place * (len(owned) - 1) // (NUM_STORED_IDS - 1)] for place in range(NUM_STORED_IDS))


def _rms(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


@dataclass(frozen=True)
class Difference:
    """How far one row of logits is from the answer.

    Attributes:
        row: of the question.
        step: after which it came; 0: after the prompt.
        modality: predicted there.
        is_alone: whether the row was asked by itself.
        error: relative to the answer, to be held against the row's limit (see the top of this file); infinite where an id of
            the modality has no finite logit, or another id has one.
        limit: of the error.
    """

    row: int
    step: int
    modality: str
    is_alone: bool
    error: float
    limit: float

    def __str__(self) -> str:
        after = f"step {self.step}" if self.step else "the prompt"
        fed = "fed alone" if self.is_alone else "fed with the others"
        found = f"relative error {self.error:.3g}" if isfinite(self.error) else "what is no number, or ids of another modality"
        return f"{self.modality} after {after} of row {self.row}, {fed}: {found}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; null for an error that is infinite."""
        error = self.error if isfinite(self.error) else None
        return {
            "row": self.row,
            "step": self.step,
            "modality": self.modality,
            "is_alone": self.is_alone,
            "error": error,
            "limit": self.limit,
        }


def ask(session: Session, question: Question) -> Said:
    """Prompts, then steps, as any caller would feed them."""
    said, cache = session.prefill(question.prompts, question.predicted[0])
    after_steps = [
        session.decode_step(ids, names, cache) for ids, names in zip(question.steps, question.predicted[1:], strict=True)
    ]
    return [said, *after_steps]


def differences(session: Session, answer: KnownAnswer) -> list[Difference]:
    """Ask all rows together, where the session takes so many, and each by itself."""
    question = answer.question
    rows = range(len(question.prompts))
    found = []
    if len(rows) > 1 and (session.most_rows is None or session.most_rows >= len(rows)):
        said = ask(session, question)
        found += [one for row in rows for one in _compare(session, answer, row, [part[row] for part in said], False)]
    for row in rows:
        said = ask(session, question.of_row(row))
        found += _compare(session, answer, row, [part[0] for part in said], True)
    return found


def _compare(session: Session, answer: KnownAnswer, row: int, came: Sequence[Logits], is_alone: bool) -> list[Difference]:
    names = [names[row] for names in answer.question.predicted]
    errors = [
        _error(session.config, answer, name, values, answer.logits[step][row], answer.rms[step][row])
        for step, (name, values) in enumerate(zip(names, came, strict=True))
    ]
    return [
        Difference(row, step, name, is_alone, error, allowed(session, answer, row, step))
        for step, (name, error) in enumerate(zip(names, errors, strict=True))
    ]


def _error(config: ModelConfig, answer: KnownAnswer, name: str, came: Logits, expected: Sequence[float], rms: float) -> float:
    owned, ids = config.id_ranges[config.modality_index(name)], list(answer.ids[name])
    inside = came[owned.start : owned.stop]
    is_filtered = np.count_nonzero(came != -np.inf) == len(owned)
    if not (is_filtered and np.isfinite(inside).all()):
        return inf
    room = 1.0 if len(ids) == len(owned) else SAMPLING_ROOM
    unit = max(rms, 1e-30)
    return max(_rms(came[ids].astype(np.float64) - expected) / unit / room, abs(_rms(inside) - rms) / unit)


def allowed(session: Session, answer: KnownAnswer, row: int, step: int) -> float:
    """Return the largest error that ``session`` may make in one row of logits, after one step.

    Where it rounds activations to 8 bits, what that does to this very row is known. Other kernels cut other blocks and break
    ties otherwise: ``SAFETY`` times as much is allowed.
    """
    if not answer.noise:
        return limit_of(session)
    limit = row_limit(session.config, session.precision, answer.noise[step][row])
    if session.activation_block is None or answer.rounding_loss is None:
        return limit
    return limit + SAFETY * answer.rounding_loss[step][row]


def check_answer(session: Session, answer: KnownAnswer, made_with: Mapping[str, str]) -> None:
    """Refuse a session that does not give the known answer.

    Args:
        session: what is asked; it stays open.
        answer: the bundle's.
        made_with: the versions that made the bundle.

    Raises:
        ParityError: with the worst difference, its place and the limit, and what runs here in another version than it did at
            the export. The ``report`` attribute holds every difference.
    """
    started = time.perf_counter()
    found = differences(session, answer)
    worst = max(found, key=lambda one: one.error / one.limit)
    seconds = time.perf_counter() - started
    logger.info("known answer of %s: %s, limit %.3g, %.1f ms", session.backend, worst, worst.limit, 1e3 * seconds)
    if not worst.error <= worst.limit:
        raise _refusal(session, found, made_with)


def _refusal(session: Session, found: Sequence[Difference], made_with: Mapping[str, str]) -> ParityError:
    wrong = sorted((one for one in found if not one.error <= one.limit), key=lambda one: -one.error / one.limit)
    others = version_differences(made_with) or [
        "every version is the one that made the bundle: look at its files (check='hash'), at the processor and the driver"
    ]
    message = "\n  - ".join(
        [
            f"{session.backend} does not give the known answer of this bundle, so it is refused:",
            f"{wrong[0]}, where {wrong[0].limit:.3g} is allowed; {len(wrong)} of {len(found)} rows of logits are beyond it",
            *others,
            "`motrt verify` says what is wrong; install the versions that made the bundle, or export it again where it runs",
        ]
    )
    return ParityError(
        message,
        {
            "verdict": "FAIL",
            "backend": session.backend,
            "limit": wrong[0].limit,
            "differences": [one.to_dict() for one in found],
            "versions": {"here": installed_versions(), "made_with": dict(made_with)},
        },
    )
