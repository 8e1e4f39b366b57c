"""What is said over HTTP: OpenAI's completions, with audio beside the text. Every value has bounds.

An unknown field is refused by name: a misspelt ``audio_frames`` that were passed over would give text without a word of
why. Fields of OpenAI's that ask for what is not here (several answers, log probabilities, ...) are refused with a sentence,
unless they say "no". The defaults are OpenAI's: temperature 1, and 16 tokens where nothing else says how many.

This file knows no engine and no server.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator

DEFAULT_MAX_TOKENS = 16

MOST_PROMPT_CHARACTERS = MOST_PROMPT_IDS = 1 << 20
MOST_STOP_IDS = 64
MOST_ID = 2**31 - 1
MOST_TOKENS = 2**31 - 1

_PROMPT_FORMS = "a prompt is text or a list of token ids: one of them, or a list that holds just one"

# OpenAI's fields for what this server does not do: the values that ask for nothing, and what to say to the others.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "n must be 1: send a request for each answer, with seeds of their own"),
    "best_of": ((1,), "best_of must be 1: answers are not ranked here"),
    "echo": ((False,), "echo is not supported: put the prompt before the answer yourself"),
    "logprobs": ((), "logprobs are not supported: leave the field out"),
    "suffix": (("",), "suffix is not supported: leave the field out"),
    "stop": (([],), "stop as text is not supported: give the token ids to stop at in stop_ids"),
    "presence_penalty": ((0,), "presence_penalty is not supported: use repetition_penalty"),
    "frequency_penalty": ((0,), "frequency_penalty is not supported: use repetition_penalty"),
    "logit_bias": (({},), "logit_bias is not supported: leave the field out"),
}


def _one_prompt(value: Any) -> str | list[int]:
    """Text or ids, taken out of the list that holds them alone."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) != 1:
            raise ValueError(f"a request holds one prompt ({len(value)} came): send a request for each")
        value = value[0]
    if isinstance(value, str):
        if not 1 <= len(value) <= MOST_PROMPT_CHARACTERS:
            raise ValueError(f"a text prompt has 1 to {MOST_PROMPT_CHARACTERS} characters ({len(value)} came)")
        if not _is_text(value):
            raise ValueError("a text prompt is Unicode, and this one holds half of a surrogate pair: send the whole character")
        return value
    if not isinstance(value, list):
        raise ValueError(_PROMPT_FORMS)
    if not 1 <= len(value) <= MOST_PROMPT_IDS or not all(type(one) is int and 0 <= one <= MOST_ID for one in value):
        raise ValueError(f"token ids are 1 to {MOST_PROMPT_IDS} whole numbers in 0..{MOST_ID}; {_PROMPT_FORMS}")
    return value


def _is_text(value: str) -> bool:
    """Whether it holds no half of a pair of surrogates, which JSON can carry and UTF-8 can not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_TEXT = {"type": "string", "minLength": 1, "maxLength": MOST_PROMPT_CHARACTERS}
_ID = {"type": "integer", "minimum": 0, "maximum": MOST_ID}
_IDS = {"type": "array", "items": _ID, "minItems": 1, "maxItems": MOST_PROMPT_IDS}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        _IDS,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 1},
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": 1},
    ]
}

_OnePrompt = Annotated[Any, PlainValidator(_one_prompt), WithJsonSchema(_PROMPT_SCHEMA)]


class _Strict(BaseModel):
    """Takes no value for another: not "1" for 1, not true for 1, not NaN for a number."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """What a stream holds besides its tokens."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds the usage and no choice.")
    include_obfuscation: bool | None = Field(None, description="Taken, and without effect.")


class CompletionRequest(_Strict):
    """One prompt, and how to go on."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] = Field(description="The served model's name.")
    prompt: _OnePrompt = Field(description="Text (where the bundle has a tokenizer), or unified token ids.")
    max_tokens: int | None = Field(
        None, ge=0, le=MOST_TOKENS, description=f"Where nothing says how many: {DEFAULT_MAX_TOKENS}, or what the schedule asks."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stream: bool | None = Field(None, description="Answer by server-sent events.")
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=256)] | None = Field(None, description="Taken, and without effect.")

    # What OpenAI's has not.
    schedule: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = Field(
        None, description="Which modality comes when: text:20,audio:50f, or interleave:text=13,audio=26."
    )
    audio_frames: int | None = Field(None, ge=1, le=MOST_TOKENS, description="Go on in audio for so many frames.")
    stop_ids: Annotated[list[Annotated[int, Field(ge=0, le=MOST_ID)]], Field(max_length=MOST_STOP_IDS)] | None = Field(
        None, description="Token ids after which the answer ends."
    )
    top_k: int | None = Field(None, ge=1, le=MOST_ID)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    priority: int | None = Field(
        None,
        ge=-100,
        le=100,
        description="Higher ones leave the queue first; default 0. What the server allows is the highest.",
    )
    timeout_seconds: float | None = Field(None, gt=0, le=86400, description="What has come by then is the answer.")

    # What this server does not do: see _REFUSED.
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, int], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_here(cls, values: Any) -> Any:
        if isinstance(values, dict):
            refused = [
                sentence
                for name, (harmless, sentence) in _REFUSED.items()
                if values.get(name) is not None and not any(_is_same(values[name], one) for one in harmless)
            ]
            if refused:
                raise ValueError("; ".join(refused))
        return values

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "CompletionRequest":
        if self.schedule is not None and self.audio_frames is not None:
            raise ValueError("give one of schedule and audio_frames: both say what comes next")
        return self


def _is_same(value: Any, other: Any) -> bool:
    """Equal, and no truth value for a number."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class Frames(BaseModel):
    """Audio as a codec's decoder takes it."""

    modality: str
    frames: list[list[int]] = Field(description="[frames, codes per frame], each code counted from 0.")


class Choice(BaseModel):
    """An answer, or the next piece of one."""

    index: Literal[0] = 0
    text: str = ""
    token_ids: list[int] = Field(description="Unified ids of all modalities, in the order in which they were generated.")
    audio: Frames | None = None
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None
    finish_detail: Literal["stop", "schedule", "length", "deadline"] | None = Field(
        None, description="stop: at a stop id; schedule: all was said; length: at max_tokens; deadline: time was up."
    )


class Usage(BaseModel):
    """What was read and said, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] = Field(description="By modality: text_tokens, audio_tokens.")
    completion_tokens_details: dict[str, int]


class Completion(BaseModel):
    """An answer; of a stream, a piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "motrt"


class ModelList(BaseModel):
    """The one model that is served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What was wrong, as a sentence and as a word."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """What every answer of 400 and above holds."""

    error: ErrorDetail


class ModalityFacts(BaseModel):
    """A modality's share of the unified ids: first_id, and those after it, below end_id."""

    name: str
    first_id: int
    end_id: int
    codes_per_frame: int
    frames_per_second: float | None


class EngineFacts(BaseModel):
    """The engine at this moment, and what it serves."""

    model: str
    backend: str
    weights: str
    ready: bool
    reason: str = Field(description="Why it is not ready; empty where it is.")
    state: dict[str, int | str] = Field(
        description="waiting, running, reading, cache_positions, cache_filled, steps, rows_stepped, failure."
    )
    options: dict[str, int] = Field(description="max_batch, max_queue, prefill_chunk.")
    limits: dict[str, int] = Field(description="positions, max_prompt_tokens, max_tokens.")
    modalities: list[ModalityFacts]
    has_tokenizer: bool


def problems_of(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One sentence of all that pydantic found, and the first field's name. Nothing of the values is repeated."""
    said: dict[str, None] = {}
    for one in errors:
        place = [str(part) for part in one.get("loc", ()) if part != "body"]
        message = str(one["msg"]).removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            said[f"{_printable(place[-1])} is no field of a request: leave it out, or mend its name"] = None
        elif one["type"] == "missing":
            said[f"{place[-1]} is missing" if place else "the body is missing: send JSON, as application/json"] = None
        elif one["type"] == "model_attributes_type":
            said["the body must be a JSON object, sent as application/json"] = None
        else:
            said[f"{'.'.join(place[:2])}: {message}" if place else message] = None
    first = next((str(one["loc"][1]) for one in errors if len(one.get("loc", ())) > 1), None)
    return "; ".join(list(said)[:8]), None if first is None else _printable(first)


def _printable(name: str) -> str:
    return name[:64].encode("ascii", "backslashreplace").decode()
