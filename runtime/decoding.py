"""The generation loop: prompt in, steps out. One orchestrator, row by row independent.

A row's tokens depend on its prompt, its schedule, its sampling and its seed, never on which other rows share its batch.
The change-over is here: the head that predicts a token is the *next* token's modality's, asked of the schedule before
each step.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.errors import CapacityError, InputError
from motrt.model_def.config import ModelConfig
from motrt.runtime import schedule as schedules
from motrt.runtime.sampling import Sampling, SamplingByModality, draw, fresh_seed, sampling_for, uniform
from motrt.runtime.schedule import Progress, Schedule, then
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import as_whole_numbers, check_prompts
from motrt.runtime.streaming import AudioFrame, FrameAssembler
from motrt.runtime.text_pieces import TextPieces
from motrt.runtime.tokenizer import doubled_start, encode_text

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Sequence[str | Sequence[int]]


@dataclass(frozen=True)
class Step:
    """One generated token of one row.

    Attributes:
        row: which prompt of the batch.
        index: how many tokens the row generated before.
        token_id: unified id.
        modality: whose id it is.
        text: the text that became certain with it ("" where none did, or no tokenizer is there).
        frame: the frame that it completed, for modalities whose ids come in frames.
        finish: None while the row goes on; ``schedule`` when the schedule ended, ``stop`` at a stop id, ``length`` at
            the most tokens asked for or the model's maximum.
    """

    row: int
    index: int
    token_id: int
    modality: str
    text: str = ""
    frame: AudioFrame | None = None
    finish: str | None = None


def generate(
    session: Session,
    prompt: Prompt,
    *,
    schedule: Schedule | None = None,
    sampling: SamplingByModality | Sequence[SamplingByModality] | None = None,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[Step]:
    """Say what comes after each prompt.

    Everything is checked when this is called; computing starts with the first step that is taken.

    Args:
        session: what computes.
        prompt: text (where the bundle has a tokenizer), ids, or a batch of either.
        schedule: which modality comes next; None goes on in the modality of each prompt's last id.
        sampling: how ids are chosen: one for all rows and modalities, one by modality, or a sequence of either, one per
            row. Greedy where not said. Rows that share a seed share their chance: give each its own to see variety.
        max_tokens: per row; None: what the schedule asks for, or as many as the model can hold.
        stop_ids: ids after which a row is finished (the id itself is still yielded).

    Yields:
        A Step per row and token, rows in order within a step.

    Raises:
        InputError: for prompts, schedules, sampling values or limits that can not be.
        CapacityError: when prompt and tokens are more than the model holds; before anything is computed.
    """
    return _run(session, prepare_rows(session, prompt, schedule, sampling, max_tokens, stop_ids))


def prepare_rows(
    session: Session,
    prompt: Prompt,
    schedule: Schedule | None = None,
    sampling: SamplingByModality | Sequence[SamplingByModality] | None = None,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
) -> list["Row"]:
    """Check everything that ``generate`` takes, and make a row of each prompt; arguments and errors are its own."""
    config = session.config
    session.refuse_closed()
    prompts = [row.tolist() for row in check_prompts(_ids_of(prompt, session), config)]
    plan = schedule if schedule is not None else _continue(prompts, config)
    schedules.check(plan, config)
    limits = _limits(prompts, schedules.total_tokens(plan, config), max_tokens, config)
    stops = as_whole_numbers(stop_ids)
    if stops is None or (stops.size and not (stops.min() >= 0 and stops.max() < config.vocab_size)):
        raise InputError(f"stop_ids must be whole numbers in 0..{config.vocab_size - 1} ({brief(stop_ids)} came)")
    per_row = _sampling_per_row(sampling, len(prompts), config)
    return [
        Row(number, prompt, chosen, limit, session, plan, frozenset(stops.tolist()))
        for number, (prompt, chosen, limit) in enumerate(zip(prompts, per_row, limits, strict=True))
    ]


def _run(session: Session, rows: list["Row"]) -> Iterator[Step]:
    config = session.config
    going = [row for row in rows if row.begins()]
    if not going:
        return
    names = [config.modality_names[row.next_modality or 0] for row in rows]
    logits, cache = session.prefill([row.prompt for row in rows], names)
    logits = logits[[row.number for row in going]]
    while True:
        for row, its_logits in zip(going, logits, strict=True):
            yield row.take(its_logits)
        going = [row for row in going if row.finish is None]
        if not going:
            return
        names = [config.modality_names[row.next_modality or 0] for row in going]
        newest = [row.newest for row in rows]
        logits = session.decode_step(newest, names, cache, active=[row.number for row in going])


class Row:
    """One prompt's progress: what it said, whose turn is next, and how its tokens become text and frames.

    Made by ``prepare_rows``, which checks everything. Knows no other row, and no cache.

    Attributes:
        number: which prompt of the batch it is.
        prompt: its ids.
        limit: the most tokens that it may say.
        tokens: what it said.
        finish: why it ended; None while it goes on.
        next_modality: the number of the modality that comes next; None where it is finished, or has not been asked.
    """

    def __init__(
        self,
        number: int,
        prompt: list[int],
        sampling: dict[str, Sampling],
        limit: int,
        session: Session,
        schedule: Schedule,
        stop_ids: frozenset[int],
    ) -> None:
        self.number, self.prompt, self.limit = number, prompt, limit
        self._schedule, self._stop_ids = schedule, stop_ids
        self.config = session.config
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.next_modality: int | None = None
        self._sampling = sampling
        self._seeds = {name: fresh_seed() if one.seed is None else one.seed for name, one in sampling.items()}
        self._frames = FrameAssembler(self.config)
        self._pieces = TextPieces(session.tokenizer) if session.tokenizer is not None else None
        self._seen: dict[int, set[int]] = {index: set() for index in range(len(self.config.modalities))}
        for token in prompt:
            self._remember(token)
            self._frames.push(token)  # a frame that the prompt began is finished by what is generated

    @property
    def newest(self) -> int:
        """The id to feed next; of a row that is finished, or never began, nobody looks."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    def begins(self) -> bool:
        """Whether anything comes after the prompt at all; asks the schedule for the first modality."""
        return self.limit > 0 and self._ask() is not None

    def _ask(self) -> int | None:
        self.next_modality = schedules.next_modality(self._schedule, Progress(self.config, self.prompt, self.tokens))
        return self.next_modality

    def take(self, logits: NDArray[np.float32]) -> Step:
        """Choose the next token from its logits [v], and find out whether it was the last."""
        modality = self.next_modality
        assert modality is not None
        name = self.config.modality_names[modality]
        ids, chosen = self.config.id_ranges[modality], self._sampling[name]
        chance = 0.0 if chosen.is_greedy else uniform(self._seeds[name], len(self.tokens))
        seen = self._seen[modality] if chosen.repetition_penalty != 1 else ()
        token = ids.start + draw(logits[ids.start : ids.stop], chosen, uniform=chance, seen=seen)
        self.tokens.append(token)
        self._remember(token)
        self.finish = self._finish(token)
        return Step(
            row=self.number,
            index=len(self.tokens) - 1,
            token_id=token,
            modality=name,
            text=self._text(token, modality),
            frame=self._frames.push(token),
            finish=self.finish,
        )

    def _finish(self, token: int) -> str | None:
        if token in self._stop_ids:
            return "stop"
        if self._ask() is None:
            return "schedule"
        return "length" if len(self.tokens) >= self.limit else None

    def _text(self, token: int, modality: int) -> str:
        """Text ids are the first modality's: the tokenizer's range starts at 0."""
        if self._pieces is None or modality != 0:
            return ""
        piece = self._pieces.push(token)
        goes_on = self.finish is None and self.next_modality == 0
        return piece if goes_on else piece + self._pieces.flush()

    def rest(self) -> str:
        """The text that is still held back, for a row that is ended from outside."""
        return "" if self._pieces is None else self._pieces.flush()

    def _remember(self, token: int) -> None:
        modality = self.config.modality_of(token)
        self._seen[modality].add(token - self.config.id_ranges[modality].start)


def _ids_of(prompt: Prompt, session: Session) -> list[Sequence[int]]:
    if isinstance(prompt, str):
        return [encode(prompt, session)]
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes) or getattr(prompt, "ndim", 1) == 0:
        raise InputError(f"a prompt is text, ids, or a batch of either ({type(prompt).__name__} came)")
    batch: list[Any] = list(prompt)
    if batch and not isinstance(batch[0], str | Sequence | np.ndarray):
        return [batch]
    if not batch:
        raise InputError("the prompt is empty: give at least one id (a beginning-of-text id, say)")
    return [encode(one, session) if isinstance(one, str) else one for one in batch]


def encode(text: str, session: Session) -> list[int]:
    """The ids of a text prompt.

    Raises:
        InputError: when the bundle carries no tokenizer, or one that is not this model's, when the tokenizer can not encode
            the text, or the text gives no id.
    """
    if session.tokenizer is None:
        raise InputError("this bundle carries no tokenizer: give the prompt as ids, or export from a checkpoint with one")
    encoded = encode_text(session.tokenizer, text)
    ids: list[int] = encoded.ids
    if not ids:
        raise InputError("the prompt is empty: the tokenizer makes no id of it")
    num_text_ids = session.config.modalities[0].vocab_size
    if max(ids) >= num_text_ids:
        raise InputError(
            f"the tokenizer makes id {max(ids)} of the prompt, and the model's text ids are 0..{num_text_ids - 1}: put the "
            "tokenizer that the model was trained with beside its checkpoint, and export again"
        )
    if not session.told_of_doubled_start and (doubled := doubled_start(encoded)) is not None:
        session.told_of_doubled_start = True
        logger.warning(
            "the prompt's text begins with %s, and the tokenizer puts one before every text: the model reads two. Leave it out "
            "of the text, or give ids, where that is not meant",
            doubled,
        )
    return ids


def _continue(prompts: Sequence[Sequence[int]], config: ModelConfig) -> Schedule:
    """Each row goes on in the modality of its prompt's last id."""
    if len({config.modality_of(prompt[-1]) for prompt in prompts}) == 1:
        return then(config.modality_names[config.modality_of(prompts[0][-1])])
    return lambda progress: config.modality_names[config.modality_of(progress.prompt[-1])]


def _limits(prompts: Sequence[Sequence[int]], planned: int | None, max_tokens: int | None, config: ModelConfig) -> list[int]:
    """The most tokens each row may generate."""
    is_whole = isinstance(max_tokens, int | np.integer) and not isinstance(max_tokens, bool)
    if max_tokens is not None and not (is_whole and max_tokens >= 0):
        raise InputError(f"max_tokens must be a whole number of at least 0 ({max_tokens!r} came)")
    asked = min((limit for limit in (planned, max_tokens) if limit is not None), default=None)
    longest = max(len(prompt) for prompt in prompts)
    if asked is None and longest == config.max_seq_len:
        raise CapacityError(
            f"a prompt of {longest} ids fills every position that this model holds per row, and nothing can come after it: "
            "shorten the prompt, or export with a larger --max-seq-len"
        )
    if longest + (asked or 0) > config.max_seq_len:
        raise CapacityError(
            f"a prompt of {longest} ids and {asked or 0} tokens after it are more than the {config.max_seq_len} positions "
            "that this model holds per row: shorten the prompt, ask for fewer tokens, or export with a larger --max-seq-len"
        )
    return [config.max_seq_len - len(prompt) if asked is None else asked for prompt in prompts]


def _sampling_per_row(
    sampling: SamplingByModality | Sequence[SamplingByModality] | None, count: int, config: ModelConfig
) -> list[dict[str, Sampling]]:
    if not isinstance(sampling, Sequence):
        return [sampling_for(sampling, config)] * count
    if len(sampling) != count:
        raise InputError(f"sampling must be one for all rows, or {count}, one per row ({len(sampling)} came)")
    return [sampling_for(one, config) for one in sampling]
