"""What a request may hold."""

import json

import pytest
from pydantic import ValidationError

from motrt.serve.protocol import CompletionRequest, problems_of


def read(**values: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": [1], **values})


def sentence(**values: object) -> str:
    with pytest.raises(ValidationError) as refused:
        read(**values)
    return problems_of(refused.value.errors())[0]


@pytest.mark.parametrize(("came", "taken"), [("hi", "hi"), (["hi"], "hi"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])])
def test_a_prompt_is_text_or_ids_or_a_list_that_holds_one_of_them(came: object, taken: object) -> None:
    assert read(prompt=came).prompt == taken


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_several_prompts_are_refused_with_what_to_do(prompt: object) -> None:
    assert "send a request for each" in sentence(prompt=prompt)


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], None, 1, 1.5, True, {}, [True], [1.0], [-1], [2**31], [None], "\ud800"])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    assert sentence(prompt=prompt)


@pytest.mark.parametrize(
    "field", ["n", "best_of", "echo", "logprobs", "suffix", "stop", "presence_penalty", "frequency_penalty", "logit_bias"]
)
def test_what_is_not_supported_is_refused_by_name_and_null_is_not(field: str) -> None:
    asked = {"echo": True, "suffix": "x", "stop": ["x"], "logit_bias": {"1": 1}}.get(field, 2)
    assert field in sentence(**{field: asked})
    assert getattr(read(**{field: None}), field) is None


def test_asking_for_what_is_the_case_anyway_is_no_fault() -> None:
    read(n=1, best_of=1, echo=False, suffix="", stop=[], presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="me")


def test_an_unknown_field_is_refused_by_its_name() -> None:
    assert "audio_frame is no field" in sentence(audio_frame=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "4"),
        ("max_tokens", True),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_k", 0),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("priority", 101),
        ("timeout_seconds", 0),
        ("stop_ids", [-1]),
        ("stop_ids", list(range(65))),
        ("schedule", ""),
        ("audio_frames", 0),
        ("stream", 1),
        ("n", True),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"include_obfuscation": 0}),
    ],
)
def test_every_value_has_bounds_and_its_name_is_said(field: str, value: object) -> None:
    assert field in sentence(**{field: value})


def test_schedule_and_audio_frames_are_not_both_taken() -> None:
    assert "give one of schedule and audio_frames" in sentence(schedule="text:2", audio_frames=2)


def test_no_value_of_a_client_is_repeated_in_what_is_said_of_it() -> None:
    said = sentence(temperature="my secret", seed="my secret", prompt={"my secret": 1})
    assert "temperature" in said
    assert "my secret" not in said


def test_the_schema_can_be_written_as_json() -> None:
    assert json.dumps(CompletionRequest.model_json_schema())
