"""The step kernels themselves, compiled for the host, against the PyTorch decoder; and which launches a step is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from motrt.model_def.config import AdapterExpert, Modality, ModelConfig, RopeConfig, SwigluExpert
from motrt.model_def.operators import rope_tables
from motrt.model_def.parameters import parameters
from motrt.runtime import step_kernels
from motrt.runtime.step_kernels import (
    MAX_ROWS,
    Addresses,
    StepShape,
    launches,
    max_rows,
    rotary_tables,
    why_not,
)
from motrt.tests.runtime.host_kernels import COMPILER, FAULTY_LINES, FAULTY_MACROS, Conversation, faulty_source

TINY64 = ModelConfig.preset("tiny64")
TINY = ModelConfig.tiny()
EQUAL = SwigluExpert(96, bias=True)
CONFIGS = {
    "tiny64": TINY64,
    "halves turned, biases": TINY.replace(
        rope=RopeConfig(style="half"), modalities=(Modality("text", 96, EQUAL), Modality("audio", 32, AdapterExpert(24, 56)))
    ),
    "one head tied, attention shared": TINY.replace(head="shared", tied_embeddings=True, routed_attention=False),
    "keys of every head": TINY.replace(num_kv_heads=TINY.num_heads, head="shared"),
}
NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LIMITS = {"bfloat16": 0.02, "float16": 0.004}
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rows", "dtype"),
    [*((name, 1, "bfloat16") for name in CONFIGS), ("tiny64", 1, "float16"), *(("tiny64", 3, dtype) for dtype in NAMES)],
)
@pytest.mark.parametrize("modality", [0, 1])
def test_steps_are_the_decoders(name: str, rows: int, modality: int, dtype: str) -> None:
    """Step after step over one capture, rows at different positions, the change-over with them."""
    talk = Conversation(CONFIGS[name], dtype, rows, modality)
    captured = {there: talk.capture(there) for there in (modality, 1 - modality)}
    before, starts = [one.copy() for one in talk.caches], talk.cache.lengths.copy()
    limit = LIMITS[dtype]
    for number, there in enumerate((modality, modality, 1 - modality)):
        ids = CONFIGS[name].id_ranges[there]
        got, expected = talk.step(captured[there], number)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
        for one, right in zip(*(logits[:, ids.start : ids.stop] for logits in (got, expected)), strict=True):
            assert np.linalg.norm(one - right) <= limit * np.linalg.norm(right)
    for got, was, right in zip(talk.caches, before, (one for pair in talk.cache.buffers for one in pair), strict=True):
        kept = torch.from_numpy(got).view(NAMES[dtype]).float().numpy()
        for row, (start, stop) in enumerate(zip(starts, talk.cache.lengths, strict=True)):
            expected = right[row, :, start:stop].numpy()
            assert np.linalg.norm(kept[row, :, start:stop] - expected) <= limit * np.linalg.norm(expected)
            got[row, :, start:stop] = was[row, :, start:stop]
        np.testing.assert_array_equal(got, was)  # nothing else was written


# Keys of one block, of several blocks that share a row, and of the parts' last ones alone.
LENGTHS = (7, 32, 33, 150, 239)


@needs_compiler
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_is_the_same_however_many_blocks_share_the_keys(length: int) -> None:
    """Steps that each see one key more, two rows of different lengths beside each other."""
    talk = Conversation(TINY64, "float16", 2, 0, shortest=length, num_multiprocessors=8)
    assert StepShape(TINY64, "float16", 0, 2, 8).splits == 8
    captured = talk.capture(0)
    for number in range(3):
        errors, _ = talk.errors(captured, number)
        assert max(errors) <= LIMITS["float16"]


def _worst_error(length: int = 150) -> float:
    talk = Conversation(TINY64, "float16", 1, 1, shortest=length, num_multiprocessors=8)
    captured = talk.capture(1)
    return max(talk.errors(captured, number)[0][0] for number in range(2))


@needs_compiler
def test_nothing_is_seen_where_there_is_no_fault() -> None:
    assert _worst_error() < LIMITS["float16"]


@needs_compiler
@pytest.mark.parametrize("name", [*FAULTY_LINES, *FAULTY_MACROS])
def test_a_fault_in_them_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in FAULTY_MACROS:
        real = StepShape.macros.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(StepShape, "macros", property(lambda shape: real(shape) | FAULTY_MACROS[name]))
    else:
        (tmp_path / "kernels.cu").write_text(faulty_source(name))
        monkeypatch.setattr(step_kernels, "SOURCE", tmp_path / "kernels.cu")
    assert _worst_error(7 if name == "the newest key not seen" else 150) > 2 * LIMITS["float16"]


@needs_compiler
def test_every_kernel_but_the_first_waits_for_the_one_ahead() -> None:
    talk = Conversation(TINY64, "bfloat16", 1, 0)
    talk.capture(0)
    assert [waits for _, waits in talk.device.launched] == [False] + [True] * (len(talk.device.launched) - 1)


def test_a_step_is_five_kernels_a_layer_or_seven() -> None:
    found = []
    for tokens in (0, 1):
        shape = StepShape(TINY64, "bfloat16", tokens, 1, 132)
        at = Addresses(lambda name: 1, 1, 1, dict.fromkeys(shape.workspace, 1), 1, 1, [(1, 1)] * TINY64.num_layers, 1)
        found.append(len(launches(shape, tokens, at)))
    assert found == [2 + 5 * TINY64.num_layers, 2 + 7 * TINY64.num_layers]


def test_the_rotary_tables_are_the_references() -> None:
    for dtype, kind in NAMES.items():
        for ours, right in zip(rotary_tables(TINY, dtype), rope_tables(TINY.rope, 16, 128, kind), strict=True):
            expected = right.view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(ours.view(np.uint16), expected)


BY_NAME: dict[str, tuple[ModelConfig, str, Callable[[list[str]], list[str]]]] = {
    "not for float32": (TINY64, "float32", lambda names: names),
    "is not on the device": (TINY64, "bfloat16", lambda names: names[1:]),
    "no norms of queries": (TINY64.replace(qk_norm=True), "bfloat16", lambda names: names),
    "multiples of 8: width of audio 36": (
        TINY64.replace(modalities=(TINY64.modalities[0], Modality("audio", 32, AdapterExpert(36, 64)))),
        "bfloat16",
        lambda names: names,
    ),
    "head sizes of 8, 16": (
        TINY64.replace(model_width=240, num_heads=10, num_kv_heads=2, head_size=24),
        "float16",
        lambda names: names,
    ),
}


@pytest.mark.parametrize("words", BY_NAME)
def test_what_they_cannot_do_is_said(words: str) -> None:
    config, dtype, kept = BY_NAME[words]
    assert words in why_not(config, dtype, kept([one.name for one in parameters(config)]))


def test_they_can_do_the_presets() -> None:
    for name in ("tiny", "tiny64", "small", "llama-3.2-1b", "llama-3.2-1b-text"):
        config = ModelConfig.preset(name)
        assert why_not(config, "bfloat16", [one.name for one in parameters(config)]) == ""
        assert max_rows(config) == MAX_ROWS
