"""One completion: from a request to the engine, and from the engine's steps to an answer. Knows no HTTP.

Ray's and Triton's servers may use it too: they differ in how words travel, not in what is said.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from motrt.errors import CapacityError, InputError
from motrt.model_def.config import ModelConfig
from motrt.runtime.decoding import Step, encode
from motrt.runtime.engine import DEADLINE, Engine, Stream
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import Schedule, check, parse_schedule, then, total_tokens
from motrt.runtime.session import Session
from motrt.serve.options import ServeOptions
from motrt.serve.protocol import DEFAULT_MAX_TOKENS, Choice, Completion, CompletionRequest, Frames, Usage

Detail = Literal["stop", "schedule", "length", "deadline"]

_REASONS: dict[str, Literal["stop", "length"]] = {"stop": "stop", "schedule": "stop", "length": "length", DEADLINE: "length"}


def submit(engine: Engine, request: CompletionRequest, options: ServeOptions) -> Stream:
    """Hand a request to the engine. A text prompt is encoded here: call it where that may take its time.

    Raises:
        InputError, CapacityError, BusyError, EngineClosedError: as ``Engine.submit``, and for the server's own limits.
    """
    session = engine.session
    prompt = encode(request.prompt, session) if isinstance(request.prompt, str) else request.prompt
    if options.max_prompt_tokens is not None and len(prompt) > options.max_prompt_tokens:
        raise CapacityError(
            f"a prompt may have {options.max_prompt_tokens} tokens on this server ({len(prompt)} came): shorten it"
        )
    schedule = schedule_of(request, session.config)
    return engine.submit(
        prompt,
        schedule=schedule,
        sampling=sampling_of(request),
        max_tokens=max_tokens_of(request, schedule, session, options),
        stop_ids=request.stop_ids or (),
        priority=min(request.priority or 0, options.max_priority),  # or who asks for the most would starve the others
        seconds=min(request.timeout_seconds or options.request_seconds, options.request_seconds),
    )


def schedule_of(request: CompletionRequest, config: ModelConfig) -> Schedule | None:
    """What comes when, where the request says it.

    Raises:
        InputError: for a schedule that can not be read or does not fit the model.
    """
    if request.audio_frames is not None:
        framed = framed_modality(config)
        if framed is None:
            raise InputError("audio_frames needs a model with a modality of several codes per frame; this one has none")
        return then(framed, frames=request.audio_frames)
    if request.schedule is None:
        return None
    schedule = parse_schedule(request.schedule)
    check(schedule, config)
    return schedule


def framed_modality(config: ModelConfig) -> str | None:
    """The first modality of several codes per frame."""
    return next((one.name for one in config.modalities if one.codes_per_frame > 1), None)


def sampling_of(request: CompletionRequest) -> Sampling:
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k,
        top_p=None if request.top_p == 1 else request.top_p,
        min_p=request.min_p,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        seed=request.seed,
    )


def max_tokens_of(request: CompletionRequest, schedule: Schedule | None, session: Session, options: ServeOptions) -> int | None:
    """The most tokens of the answer; None where the schedule has an end of its own and nothing else was said.

    Raises:
        CapacityError: for more than the server allows.
    """
    planned = None if schedule is None else total_tokens(schedule, session.config)
    asked = request.max_tokens
    if asked is None and planned is None:
        asked = DEFAULT_MAX_TOKENS if options.max_tokens is None else min(DEFAULT_MAX_TOKENS, options.max_tokens)
    most = min(one for one in (asked, planned) if one is not None)
    if options.max_tokens is not None and most > options.max_tokens:
        raise CapacityError(f"an answer may have {options.max_tokens} tokens on this server ({most} were asked for)")
    return asked


@dataclass
class Answer:
    """What a stream says, put together; one object follows one request.

    Attributes:
        model: the served name.
        tokens: so far, by modality.
    """

    model: str
    stream: Stream
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    first_token: float | None = None

    def __post_init__(self) -> None:
        config = self.stream.row.config
        self.tokens = dict.fromkeys(config.modality_names, 0)
        self._framed = framed_modality(config)
        self._steps: list[Step] = []

    def hear(self, step: Step) -> Completion:
        """The piece of the stream that a step is."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self._steps.append(step)
        self.tokens[step.modality] += 1
        return self._completion([self._choice([step], step.finish)])

    @property
    def has_finished(self) -> bool:
        """Whether the last piece said how it ended."""
        return bool(self._steps) and self._steps[-1].finish is not None

    def end(self) -> Completion:
        """The piece that says how it ended, where no step could."""
        return self._completion([self._choice([], self.stream.finish)])

    def usage_piece(self) -> Completion:
        return self._completion([], self.usage())

    def whole(self) -> Completion:
        """Everything that was said."""
        return self._completion([self._choice(self._steps, self.stream.finish)], self.usage())

    def usage(self) -> Usage:
        config, prompt = self.stream.row.config, self.stream.row.prompt
        read = dict.fromkeys(config.modality_names, 0)
        for token in prompt:
            read[config.modality_names[config.modality_of(token)]] += 1
        said = sum(self.tokens.values())
        return Usage(
            prompt_tokens=len(prompt),
            completion_tokens=said,
            total_tokens=len(prompt) + said,
            prompt_tokens_details={f"{name}_tokens": count for name, count in read.items()},
            completion_tokens_details={f"{name}_tokens": count for name, count in self.tokens.items()},
        )

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(self, steps: Sequence[Step], finish: str | None) -> Choice:
        frames = [step.frame for step in steps if step.frame is not None]
        name = self._framed if len(steps) != 1 or not frames else frames[0].modality
        codes = [list(frame.codes) for frame in frames if frame.modality == name]
        reason = None if finish is None else _REASONS.get(finish)
        return Choice(
            text="".join(step.text for step in steps) + ("" if finish is None else self.stream.rest),
            token_ids=[step.token_id for step in steps],
            audio=Frames(modality=name, frames=codes) if codes and name is not None else None,
            finish_reason=reason,
            finish_detail=cast(Detail, finish) if reason is not None else None,
        )
