"""The generation loop against a loop of full passes, and row by row against itself alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from motrt.errors import CapacityError, InputError
from motrt.model_def.config import ModelConfig
from motrt.runtime.decoding import Step
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import Progress, Schedule, interleave, on_control, parse_schedule, then
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.streaming import frames_from_tokens

TEXT, AUDIO, MIXED = [5, 17, 80], [100, 101, 102, 103, 104], [1, 2, 100, 101, 7]
WARM = Sampling(temperature=1.0, seed=7)


class Parrot(Session):
    """A session of no weights: the likeliest next id of a modality is the last id read, one further round its range.

    It keeps what was written into the cache, so that tests see what each step fed.
    """

    backend, precision = "parrot", "fp32"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.passes: list[StepInputs] = []

    def make_buffers(self, batch_size: int, capacity: int) -> Any:
        return [{} for _ in range(batch_size)]

    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        return buffers

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        self.passes.append(inputs)
        for (row, column), token in np.ndenumerate(inputs.input_ids):
            cache.buffers[row][int(inputs.cache_position[row]) + column] = int(token)
        logits = np.full((len(inputs.logits_index), self.config.vocab_size), -np.inf, np.float32)
        for wanted, (flat, head) in enumerate(zip(inputs.logits_index, inputs.head_mask, strict=True)):
            owned = self.config.id_ranges[head]
            logits[wanted, owned.start : owned.stop] = 0
            logits[wanted, owned.start + (int(inputs.input_ids.flat[flat]) + 1) % len(owned)] = 9
        return logits

    def release(self) -> None:
        pass


@pytest.fixture
def parrot() -> Parrot:
    return Parrot(ModelConfig.tiny())


def ids_of(steps: Iterator[Step] | Sequence[Step], row: int = 0) -> list[int]:
    return [step.token_id for step in steps if step.row == row]


def by_full_passes(session: Session, prompt: Sequence[int], modalities: Sequence[str]) -> list[int]:
    """Greedy ids, every one from a pass over everything so far: no cache is kept."""
    said = list(prompt)
    for modality in modalities:
        logits, _ = session.prefill([said], modality)
        said.append(int(np.argmax(logits[0])))
    return said[len(prompt) :]


@pytest.mark.parametrize("prompt", [TEXT, AUDIO, MIXED])
@pytest.mark.parametrize(
    ("schedule", "modalities"),
    [
        (then("text", tokens=5).then("audio", frames=2).then("text", tokens=3), ["text"] * 5 + ["audio"] * 8 + ["text"] * 3),
        (interleave(text=2, audio=3), ["text", "text", "audio", "audio", "audio"] * 3 + ["text"]),
        (lambda progress: ("audio", "text")[len(progress.tokens) % 2], ["audio", "text"] * 8),
    ],
    ids=["then", "interleave", "every token"],
)
def test_what_is_generated_is_what_full_passes_say(
    prompt: list[int], schedule: Schedule, modalities: list[str], reference: Session, onnx: Session
) -> None:
    expected = by_full_passes(reference, prompt, modalities)
    for session in (reference, onnx):
        steps = list(session.generate(prompt, schedule=schedule, max_tokens=16))
        assert ids_of(steps) == expected
        assert [step.modality for step in steps] == modalities
        assert [step.index for step in steps] == list(range(16))


def test_the_step_before_a_change_over_uses_the_next_modalitys_head_and_its_own_expert(parrot: Parrot) -> None:
    list(parrot.generate(TEXT, schedule=then("audio", tokens=2).then("text", tokens=2)))
    masks = [(one.modality_mask[0, -1], one.head_mask[0]) for one in parrot.passes]
    assert masks == [(0, 1), (1, 1), (1, 0), (0, 0)]


def test_control_ids_change_the_modality_after_them(parrot: Parrot) -> None:
    schedule = on_control({82: "audio", 100: "text"})
    steps = list(parrot.generate(TEXT, schedule=schedule, max_tokens=12))
    # 81, 82, and then audio from (82 + 1) % 32 on, round its range up to 100
    expected = [81, 82, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124]
    assert ids_of(steps) == expected
    steps = list(parrot.generate([*TEXT, 82, 98], schedule=schedule, max_tokens=4))
    assert ids_of(steps) == [99, 100, 5, 6]


def test_rows_end_where_their_own_schedule_ends(parrot: Parrot) -> None:
    def as_long_as_the_first_id(progress: Progress) -> str | None:
        return "text" if len(progress.tokens) < progress.prompt[0] else None

    steps = list(parrot.generate([[3, 50], [0, 60], [1, 70], [5, 80]], schedule=as_long_as_the_first_id))
    assert [len(ids_of(steps, row)) for row in range(4)] == [3, 0, 1, 5]
    assert ids_of(steps, 3) == [81, 82, 83, 84, 85]
    assert [step.row for step in steps] == [0, 2, 3, 0, 3, 0, 3, 3, 3]
    assert [(step.row, step.finish) for step in steps if step.finish] == [(2, "schedule"), (0, "schedule"), (3, "schedule")]


def test_rows_that_rest_are_fed_an_active_rows_id(parrot: Parrot) -> None:
    def two_four_or_none(progress: Progress) -> str | None:
        return "text" if len(progress.tokens) < (2, 4, 0)[progress.prompt[0]] else None

    list(parrot.generate([[0, 10], [1, 20], [2, 30]], schedule=two_four_or_none))
    fed = [one.input_ids[:, 0].tolist() for one in parrot.passes[1:]]
    assert fed == [[11, 21, 11], [22, 22, 22], [23, 23, 23]]
    assert [one.cache_position.tolist() for one in parrot.passes[1:]] == [[2, 2, 2], [3, 3, 2], [3, 4, 2]]


def test_a_stop_id_is_said_and_ends_its_row_alone(parrot: Parrot) -> None:
    steps = list(parrot.generate([[5], [50]], max_tokens=6, stop_ids=[8, 99]))
    assert ids_of(steps, 0) == [6, 7, 8]
    assert ids_of(steps, 1) == [51, 52, 53, 54, 55, 56]
    assert [(step.row, step.index, step.finish) for step in steps if step.finish] == [(0, 2, "stop"), (1, 5, "length")]


@pytest.mark.parametrize(
    ("options", "count", "finish"),
    [
        ({"max_tokens": 3}, 3, "length"),
        ({"max_tokens": np.int64(3)}, 3, "length"),
        ({"schedule": then("text", tokens=3)}, 3, "schedule"),
        ({"schedule": then("text", tokens=9), "max_tokens": 3}, 3, "length"),
        ({"schedule": then("text", tokens=3), "max_tokens": 9}, 3, "schedule"),
        ({"schedule": then("text", tokens=3), "max_tokens": 3}, 3, "schedule"),
        ({"schedule": then("text", tokens=3), "stop_ids": [8]}, 3, "stop"),
        ({}, 127, "length"),
    ],
)
def test_the_last_step_says_why_it_is_the_last(options: dict[str, Any], count: int, finish: str, parrot: Parrot) -> None:
    steps = list(parrot.generate([5], **options))
    assert len(steps) == count
    assert [step.finish for step in steps] == [None] * (count - 1) + [finish]


def test_no_tokens_are_no_steps_and_no_work(parrot: Parrot) -> None:
    assert list(parrot.generate(TEXT, max_tokens=0)) == []
    assert list(parrot.generate([5] * 128, max_tokens=0)) == []
    assert list(parrot.generate(TEXT, schedule=lambda progress: None)) == []
    assert parrot.passes == []


def test_a_prompt_may_leave_room_for_one_token(onnx: Session) -> None:
    steps = list(onnx.generate([5] * 127))
    assert [(step.index, step.finish) for step in steps] == [(0, "length")]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([5] * 128, {}),
        ([5] * 128, {"max_tokens": 1}),
        ([5] * 129, {}),
        ([5] * 100, {"max_tokens": 29}),
        ([5] * 100, {"schedule": then("audio", frames=8)}),
        ([[5], [5] * 120], {"max_tokens": 9}),
    ],
)
def test_more_than_the_model_holds_is_refused_when_it_is_asked(prompt: Any, options: dict[str, Any], parrot: Parrot) -> None:
    with pytest.raises(CapacityError, match="shorten the prompt"):
        parrot.generate(prompt, **options)
    assert parrot.passes == []


def test_frames_come_in_order_with_the_token_that_finishes_them(onnx: Session) -> None:
    steps = list(onnx.generate(TEXT, schedule=then("audio", frames=3), sampling=WARM))
    assert [step.index for step in steps if step.frame] == [3, 7, 11]
    frames = [step.frame for step in steps if step.frame]
    assert frames == frames_from_tokens(onnx.config, ids_of(steps))
    codes = [step.token_id - 96 for step in steps]
    assert [list(frame.codes) for frame in frames] == [codes[0:4], codes[4:8], codes[8:12]]
    assert [frame.index for frame in frames] == [0, 1, 2]


def test_a_frame_that_the_prompt_began_is_finished(parrot: Parrot) -> None:
    steps = list(parrot.generate([*TEXT, 96, 97, 98, 99, 100, 101, 102], max_tokens=5))
    frames = [step.frame for step in steps if step.frame]
    assert [(step.index, step.frame is not None) for step in steps if step.frame] == [(0, True), (4, True)]
    assert [(frame.index, frame.codes) for frame in frames] == [(1, (4, 5, 6, 7)), (2, (8, 9, 10, 11))]


def test_a_frame_that_text_interrupts_goes_on_after_it(parrot: Parrot) -> None:
    steps = list(parrot.generate([96], schedule=interleave(audio=3, text=2), max_tokens=8))
    (frame,) = [step.frame for step in steps if step.frame]
    assert frame.codes == tuple(token - 96 for token in [96, *ids_of(steps)[:3]])


def bytes_tokenizer() -> Tokenizer:
    """An id for every byte that emoji, accents and spaces are made of, so that characters are split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[-96:]
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture
def speaking(parrot: Parrot) -> Parrot:
    parrot.tokenizer = bytes_tokenizer()
    return parrot


class Reciter(Parrot):
    """Says given ids, one after the other, whatever it reads."""

    script: Sequence[int] = ()

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        logits[:, self.script[len(self.passes) - 1]] = 99
        return logits


def recited(text: str, schedule: Schedule | None = None, cut: int = 0) -> tuple[list[Step], list[int]]:
    """A generation that says ``text``, without its last ``cut`` bytes."""
    session = Reciter(ModelConfig.tiny())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters_for(text))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    session.tokenizer, script = tokenizer, tokenizer.encode(text).ids
    session.script = script[: len(script) - cut]
    return list(session.generate([0], schedule=schedule, max_tokens=len(session.script))), script


def letters_for(text: str) -> list[str]:
    """The byte-level alphabet's letters for the bytes of ``text``."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return sorted({letter for piece, _ in pieces for letter in piece})


@pytest.mark.parametrize("text", ["a", "grüß dich", "😀 and 👩‍👩‍👧", "漢字", "a\n\n b"])
def test_text_comes_in_whole_characters(text: str) -> None:
    steps, script = recited(text)
    assert ids_of(steps) == script
    assert "".join(step.text for step in steps) == text
    assert all("\ufffd" not in step.text for step in steps)


def test_half_a_character_at_the_end_is_shown_as_such_and_not_kept() -> None:
    steps, _ = recited("ok 😀", cut=1)
    assert [step.text for step in steps][:3] == ["o", "k", " "]
    assert set("".join(step.text for step in steps[3:])) == {"\ufffd"}


def test_half_a_character_before_audio_does_not_join_the_text_after_it(speaking: Parrot) -> None:
    schedule = interleave(text=1, audio=1)
    steps = list(speaking.generate([40], schedule=schedule, max_tokens=8))
    assert all(step.text == "" for step in steps if step.modality == "audio")
    assert all(step.text for step in steps if step.modality == "text")


def test_without_a_tokenizer_text_is_not_made_up(parrot: Parrot) -> None:
    assert {step.text for step in parrot.generate(TEXT, max_tokens=3)} == {""}


SETTINGS: list[Any] = [
    None,
    WARM,
    Sampling(temperature=0.9, top_k=5, repetition_penalty=1.3, seed=3),
    {"audio": Sampling(temperature=2.0, top_p=0.8, seed=1)},
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_a_row_says_the_same_alone_and_in_any_batch(sampling: Any, onnx: Session) -> None:
    prompts, schedule = [TEXT, AUDIO, MIXED, [3]], then("text", tokens=6).then("audio", frames=2)
    together = list(onnx.generate(prompts, schedule=schedule, sampling=sampling))
    backwards = list(onnx.generate(prompts[::-1], schedule=schedule, sampling=sampling))
    for number, prompt in enumerate(prompts):
        alone = ids_of(onnx.generate(prompt, schedule=schedule, sampling=sampling))
        assert ids_of(together, number) == alone
        assert ids_of(backwards, len(prompts) - 1 - number) == alone


def test_a_seed_says_the_same_again_and_another_seed_does_not(onnx: Session) -> None:
    def said(seed: int | None) -> list[int]:
        return ids_of(onnx.generate(TEXT, sampling=Sampling(temperature=1.5, seed=seed), max_tokens=30))

    assert said(1) == said(1)
    assert said(1) != said(2)
    assert said(None) != said(None)


def test_rows_take_their_own_sampling_and_modalities_theirs(onnx: Session) -> None:
    schedule = then("text", tokens=8).then("audio", tokens=8)
    hot = Sampling(temperature=3.0, seed=5)
    each: list[Any] = [Sampling(), hot, {"text": Sampling(), "audio": hot}]
    together = list(onnx.generate([TEXT] * 3, schedule=schedule, sampling=each))
    for row, sampling in enumerate(each):
        assert ids_of(together, row) == ids_of(onnx.generate(TEXT, schedule=schedule, sampling=sampling))
    greedy, warm, mixed = (ids_of(together, row) for row in range(3))
    assert greedy[:8] == mixed[:8] != warm[:8]
    assert greedy[8:] != mixed[8:]


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_any_batch_and_any_schedule_of_runs_keep_their_promises(prompts: list[list[int]], data: st.DataObject) -> None:
    runs = data.draw(st.lists(st.tuples(st.sampled_from(["text", "audio"]), st.integers(1, 5)), min_size=1, max_size=4))
    schedule = parse_schedule(",".join(f"{name}:{count}" for name, count in runs))
    modalities = [name for name, count in runs for _ in range(count)]
    session = Parrot(ModelConfig.tiny())
    steps = list(session.generate(prompts, schedule=schedule, sampling=Sampling(temperature=1.0, seed=1)))
    assert [step.row for step in steps] == list(range(len(prompts))) * len(modalities)
    for row, prompt in enumerate(prompts):
        mine = [step for step in steps if step.row == row]
        assert [step.modality for step in mine] == modalities
        assert all(session.config.modality_of(step.token_id) == (step.modality == "audio") for step in mine)
        assert mine == [
            Step(**{**vars(step), "row": row})
            for step in Parrot(session.config).generate(prompt, schedule=schedule, sampling=Sampling(temperature=1.0, seed=1))
        ]


@pytest.mark.parametrize(
    "prompt", [(5, 17, 80), np.array(TEXT), np.array(TEXT, np.uint8), [TEXT], np.array([TEXT]), [np.array(TEXT)], range(3, 6)]
)
def test_prompts_may_be_sequences_and_arrays_of_any_kind(prompt: Any, parrot: Parrot) -> None:
    last = 5 if isinstance(prompt, range) else 80
    assert ids_of(parrot.generate(prompt, max_tokens=2)) == [last + 1, last + 2]


def test_text_and_ids_may_be_prompts_of_one_batch(parrot: Parrot) -> None:
    parrot.tokenizer = Tokenizer(models.WordLevel({"hello": 40, "?": 3}, unk_token="?"))
    batch: list[str | Sequence[int]] = ["hello", [5, 6], "what"]
    steps = list(parrot.generate(batch, max_tokens=1))
    assert [step.token_id for step in steps] == [41, 7, 4]


def test_each_row_goes_on_in_the_modality_of_its_prompts_end(parrot: Parrot) -> None:
    steps = list(parrot.generate([TEXT, AUDIO], max_tokens=2))
    assert [step.modality for step in steps] == ["text", "audio"] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "hello"}, "carries no tokenizer: give the prompt as ids"),
        ({"prompt": ["hello", [1]]}, "carries no tokenizer"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [[]]}, "prompt 0 is empty"),
        ({"prompt": np.array([], np.int64)}, "the prompt is empty"),
        ({"prompt": None}, "a prompt is text, ids, or a batch"),
        ({"prompt": 5}, "a prompt is text, ids, or a batch"),
        ({"prompt": np.array(5)}, "a prompt is text, ids, or a batch"),
        ({"prompt": b"ab"}, "a prompt is text, ids, or a batch"),
        ({"prompt": {1, 2}}, "a prompt is text, ids, or a batch"),
        ({"prompt": [1, [2]]}, "must be a flat sequence of whole numbers"),
        ({"prompt": [1.0]}, "must be a flat sequence of whole numbers"),
        ({"prompt": [128]}, r"ids must be in 0\.\.127 \(128 came"),
        ({"prompt": [-1]}, r"ids must be in 0\.\.127 \(-1 came"),
        ({"max_tokens": -1}, "max_tokens must be a whole number"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"max_tokens": True}, "max_tokens must be a whole number"),
        ({"stop_ids": [128]}, r"stop_ids must be whole numbers in 0\.\.127"),
        ({"stop_ids": [-1]}, "stop_ids must be whole numbers"),
        ({"stop_ids": ["a"]}, "stop_ids must be whole numbers"),
        ({"stop_ids": 5}, "stop_ids must be whole numbers"),
        ({"stop_ids": "12"}, "stop_ids must be whole numbers"),
        ({"schedule": "text:5"}, "a schedule must be callable"),
        ({"schedule": then("smell", tokens=3)}, "no modality 'smell'"),
        ({"sampling": 5}, "sampling must be a Sampling"),
        ({"sampling": [Sampling(), Sampling()]}, "sampling must be one for all rows, or 1"),
        ({"sampling": {"smell": Sampling()}}, "no modality 'smell'"),
        ({"sampling": {"text": 0.5}}, "must be a Sampling"),
    ],
)
def test_what_can_not_be_is_refused_when_it_is_asked_and_nothing_is_computed(
    arguments: dict[str, Any], said: str, parrot: Parrot
) -> None:
    with pytest.raises(InputError, match=said):
        parrot.generate(**({"prompt": TEXT} | arguments))
    assert parrot.passes == []


@pytest.mark.parametrize("answer", ["smell", 1, b"text", ["text"]])
def test_a_callable_that_answers_wrongly_is_told_so(answer: Any, parrot: Parrot) -> None:
    steps = parrot.generate(TEXT, schedule=lambda progress: "text" if len(progress.tokens) < 2 else answer)
    with pytest.raises(InputError, match=r"this model has text, audio"):
        list(steps)


def test_nothing_is_computed_before_the_first_step_is_taken_nor_after_the_last(parrot: Parrot) -> None:
    steps = parrot.generate(TEXT, max_tokens=3)
    assert len(parrot.passes) == 0
    list(steps)
    assert len(parrot.passes) == 3


def test_a_generation_left_halfway_leaves_the_session_as_good_as_new(onnx: Session) -> None:
    expected = ids_of(onnx.generate(TEXT, max_tokens=10))
    left = onnx.generate([AUDIO, MIXED], max_tokens=10)
    next(left)
    other = onnx.generate(TEXT, max_tokens=10)
    assert [next(other).token_id for _ in range(5)] == expected[:5]
    left.close()  # type: ignore[attr-defined]
    assert [step.token_id for step in other] == expected[5:]
