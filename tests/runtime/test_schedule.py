"""Schedules against what their words mean, written out as lists; and every refusal."""

from itertools import cycle, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motrt.errors import InputError
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.runtime.schedule import (
    Builder,
    Chain,
    Interleave,
    Progress,
    Schedule,
    check,
    interleave,
    next_modality,
    on_control,
    parse_schedule,
    then,
    total_tokens,
)

TINY = ModelConfig.tiny()  # text: ids 0..95, alone; audio: ids 96..127, four a frame
MANY = TINY.replace(modalities=(*TINY.modalities, Modality("speech", 10, SwigluExpert(8), codes_per_frame=3)))
FIRST_ID = {name: ids.start for name, ids in zip(MANY.modality_names, MANY.id_ranges, strict=True)}
CODES = {"text": 1, "audio": 4, "speech": 3}

names = st.sampled_from(MANY.modality_names)
counts = st.integers(1, 9)
runs = st.lists(st.tuples(names, counts, st.booleans()), min_size=1, max_size=5)  # name, how many, whether frames


def chain_of(described: list[tuple[str, int, bool]]) -> Chain:
    (name, count, is_frames), *rest = described
    chain = then(name, frames=count) if is_frames else then(name, tokens=count)
    for name, count, is_frames in rest:
        chain = chain.then(name, frames=count) if is_frames else chain.then(name, tokens=count)
    return chain


def said_by(schedule: Schedule, config: ModelConfig = MANY, limit: int = 300, prompt: tuple[int, ...] = (0,)) -> list[str]:
    """The modalities of what a model says that always says the first id of the range it is asked for."""
    said: list[str] = []
    tokens: list[int] = []
    while len(said) < limit:
        number = next_modality(schedule, Progress(config, prompt, tokens))
        if number is None:
            break
        said.append(config.modality_names[number])
        tokens.append(config.id_ranges[number].start)
    return said


# --- what they mean ----------------------------------------------------------------------------------------------------


@given(runs)
def test_a_chain_says_its_runs_one_after_the_other_and_is_finished(described: list[tuple[str, int, bool]]) -> None:
    expected = [name for name, count, is_frames in described for _ in range(count * (CODES[name] if is_frames else 1))]
    schedule = chain_of(described)
    assert said_by(schedule) == expected
    assert total_tokens(schedule, MANY) == len(expected)
    assert set(schedule.modalities()) == set(expected)


@given(runs, names)
def test_a_last_run_without_length_goes_on_to_the_limit(described: list[tuple[str, int, bool]], last: str) -> None:
    schedule = chain_of(described).then(last)
    said = said_by(schedule)
    assert len(said) == 300
    assert said[total_tokens(chain_of(described), MANY) :] == [last] * (300 - (total_tokens(chain_of(described), MANY) or 0))
    assert total_tokens(schedule, MANY) is None


@given(st.dictionaries(names, counts, min_size=1))
def test_interleaving_repeats_its_pattern_in_the_order_given(tokens: dict[str, int]) -> None:
    pattern = [name for name, count in tokens.items() for _ in range(count)]
    schedule = interleave(**tokens)
    assert said_by(schedule) == list(islice(cycle(pattern), 300))
    assert total_tokens(schedule, MANY) is None


def test_frames_count_in_the_ids_of_the_models_own_frames() -> None:
    assert total_tokens(then("audio", frames=250), ModelConfig.preset("llama-3.2-1b")) == 1000
    assert total_tokens(then("text", frames=7).then("audio", tokens=5), TINY) == 12


control_tables = st.dictionaries(st.integers(0, MANY.vocab_size - 1), names, min_size=1, max_size=6)


@given(control_tables, names | st.none(), st.data())
def test_control_ids_lead_as_reading_the_whole_history_says(
    table: dict[int, str], start: str | None, data: st.DataObject
) -> None:
    """The oracle reads everything from the front, keeping a state; the schedule looks at the last id alone."""
    any_id = st.integers(0, MANY.vocab_size - 1) | st.sampled_from(sorted(table))
    prompt = data.draw(st.lists(any_id, min_size=1, max_size=12))
    schedule = on_control(table, start)
    state = start or MANY.modality_names[MANY.modality_of(prompt[-1])]
    for token in prompt:
        state = table.get(token, state)
    tokens: list[int] = []
    for _ in range(12):
        number = next_modality(schedule, Progress(MANY, prompt, tokens))
        assert number is not None
        assert MANY.modality_names[number] == state
        controls = [token for token in table if token in MANY.id_ranges[number]]
        tokens.append(data.draw(st.sampled_from([*controls, *MANY.id_ranges[number]])))
        state = table.get(tokens[-1], state)


def test_without_a_control_id_the_prompts_last_modality_goes_on_unless_start_says_otherwise() -> None:
    assert said_by(on_control({5: "text"}), limit=3, prompt=(1, FIRST_ID["audio"])) == ["audio"] * 3
    assert said_by(on_control({5: "text"}, start="text"), limit=3, prompt=(1, FIRST_ID["audio"])) == ["text"] * 3
    assert said_by(on_control({5: "audio"}), limit=3, prompt=(5, 1, 1)) == ["audio"] * 3
    assert said_by(on_control({5: "audio"}, start="text"), limit=2, prompt=()) == ["text"] * 2


def test_nothing_to_start_from_is_refused() -> None:
    with pytest.raises(InputError, match="which modality comes first"):
        next_modality(on_control({5: "audio"}), Progress(TINY, [], []))


def test_schedules_ask_only_for_the_history_s_length_and_last_id() -> None:
    class Watched(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("the history was read through")

        __reversed__ = __iter__

    history = Watched([7] * 41)
    for schedule in (then("text", tokens=50).then("audio"), interleave(text=13, audio=26), on_control({5: "audio"})):
        assert next_modality(schedule, Progress(TINY, Watched([1, 2]), history)) in (0, 1)


def test_any_callable_is_a_schedule() -> None:
    def alternate(progress: Progress) -> str | None:
        return None if len(progress.tokens) == 4 else ("text", "audio")[len(progress.tokens) % 2]

    check(alternate, TINY)
    assert said_by(alternate, TINY) == ["text", "audio", "text", "audio"]
    assert total_tokens(alternate, TINY) is None


def test_the_builders_are_builders_and_equal_where_they_say_the_same() -> None:
    for schedule in (then("text"), interleave(text=1), on_control({1: "text"})):
        assert isinstance(schedule, Builder)
    assert then("text", tokens=2).then("audio", frames=1) == then("text", tokens=2).then("audio", frames=1)
    assert interleave(text=1, audio=2) != interleave(audio=2, text=1)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [then("video"), then("text", tokens=1).then("video", frames=2), interleave(text=1, video=2), on_control({1: "video"})],
)
def test_a_modality_the_model_does_not_have_is_refused_before_anything_is_computed(schedule: Schedule) -> None:
    with pytest.raises(InputError, match="no modality 'video': this model has text, audio"):
        check(schedule, TINY)


def test_everything_that_does_not_fit_the_model_is_named_at_once() -> None:
    with pytest.raises(InputError) as refusal:
        check(on_control({128: "video", 127: "text", 4000: "smell"}, start="touch"), TINY)
    message = str(refusal.value)
    assert all(f"no modality '{name}'" in message for name in ("video", "smell", "touch"))
    assert all(f"control id {token} is outside the vocabulary 0..127" in message for token in (128, 4000))
    assert "127 " not in message


def test_what_fits_is_let_through() -> None:
    for schedule in (then("audio", frames=1), interleave(text=1, audio=1), on_control({0: "audio", 127: "text"})):
        check(schedule, TINY)


@pytest.mark.parametrize("answer", ["video", 1, True, b"text", ("text",)])
def test_a_callable_that_answers_wrongly_is_refused_with_the_names_there_are(answer: Any) -> None:
    with pytest.raises(InputError, match="text, audio"):
        next_modality(lambda progress: answer, Progress(TINY, [1], []))


def test_an_unknown_modality_counted_in_frames_is_refused_even_unchecked() -> None:
    with pytest.raises(InputError, match="no modality 'video'"):
        next_modality(then("video", frames=3), Progress(TINY, [1], []))


def test_what_can_not_be_called_is_no_schedule() -> None:
    with pytest.raises(InputError, match="parse_schedule"):
        check("text:20", TINY)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3"])
def test_counts_below_one_are_refused(count: Any) -> None:
    for make in (lambda: then("text", tokens=count), lambda: then("text", frames=count), lambda: interleave(text=count)):
        with pytest.raises(InputError, match="at least 1"):
            make()


def test_frames_and_tokens_together_are_refused() -> None:
    with pytest.raises(InputError, match="both given"):
        then("audio", frames=1, tokens=4)


def test_a_run_after_one_without_end_is_refused() -> None:
    with pytest.raises(InputError, match="'text' has no length"):
        then("text").then("audio", frames=1)


@pytest.mark.parametrize("table", [{}, {-1: "text"}, {True: "text"}, {"5": "text"}, {5: 1}, ["text"]])
def test_control_tables_that_make_no_sense_are_refused(table: Any) -> None:
    with pytest.raises(InputError, match=r"control id|mapping"):
        on_control(table)


def test_names_that_are_no_words_and_empty_patterns_are_refused() -> None:
    for make in (lambda: then(3), lambda: interleave(), lambda: on_control({1: "text"}, start=2)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name"):
            make()


# --- the textual form --------------------------------------------------------------------------------------------------


@given(runs, names | st.none())
def test_a_chain_is_read_back_from_its_text(described: list[tuple[str, int, bool]], last: str | None) -> None:
    chain = chain_of(described)
    chain = chain if last is None else chain.then(last)
    assert parse_schedule(str(chain)) == chain


@given(st.dictionaries(names, counts, min_size=1))
def test_an_interleaved_schedule_is_read_back_from_its_text(tokens: dict[str, int]) -> None:
    assert parse_schedule(str(interleave(**tokens))) == interleave(**tokens)


def test_the_textual_form_means_what_the_builders_mean() -> None:
    assert parse_schedule("text") == then("text")
    assert parse_schedule("text:20, audio:50f") == then("text", tokens=20).then("audio", frames=50)
    assert parse_schedule("interleave:text=13, audio=26") == interleave(text=13, audio=26)
    assert parse_schedule("interleave:text=1,audio=2,text=3") == Interleave((("text", 1), ("audio", 2), ("text", 3)))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ",",
            "text:",
            "text:20,",
            "text:f",
            "text:20ff",
            "text:-1",
            "text:1.5",
            "text=20",
            "Text:1",
            "text:1:2",
            "text:0",
        ),
        *(
            "interleave:",
            "interleave:text",
            "interleave:text=0",
            "interleave:text=1,",
            "interleave:text:1",
            "interleave:text=1f",
        ),
        *("text,audio:5", "text:٣", "text 20", "text:9999999999"),
    ],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_schedule(text)


@given(st.text(alphabet="abtextudio interleave:=,f0123456789٣\n", max_size=30))
def test_whatever_text_comes_there_is_a_schedule_or_a_sentence(text: str) -> None:
    try:
        schedule = parse_schedule(text)
    except InputError as refusal:
        assert str(refusal)
    else:
        assert parse_schedule(str(schedule)) == schedule
