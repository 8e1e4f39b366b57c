"""The step kernels themselves, compiled for the host, against the PyTorch decoder; and which launches a step is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motrt.model_def.config import AdapterExpert, Modality, ModelConfig, RopeConfig, SwigluExpert
from motrt.model_def.decoder import Decoder
from motrt.model_def.graph import Graph, plan_for
from motrt.model_def.initialize import random_tensors
from motrt.model_def.operators import rope_tables
from motrt.model_def.parameters import parameters
from motrt.runtime import step_kernels
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.step_kernels import (
    MAX_ROWS,
    Addresses,
    StepKernels,
    StepShape,
    launches,
    max_rows,
    rotary_tables,
    why_not,
)
from motrt.runtime.torch_session import TorchSession
from motrt.tests.runtime.host_kernels import COMPILER, FAULTY_LINES, FAULTY_MACROS, KernelDevice, faulty_source, stored

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
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Conversation:
    """Rows whose caches the PyTorch decoder filled, and the same in a device's memory for the kernels."""

    def __init__(self, config: ModelConfig, dtype: str, rows: int, modality: int) -> None:
        self.config, self.dtype, self.device = config, dtype, KernelDevice()
        tensors = {name: value.to(NAMES[dtype]).float() for name, value in random_tensors(config, 0)}
        self.reference = TorchSession(Decoder.from_tensors(config, tensors.__getitem__, torch.float32))
        self.held = [stored(tensors[one.name].numpy(), dtype) for one in parameters(config)]
        places = {one.name: held.ctypes.data for one, held in zip(parameters(config), self.held, strict=True)}
        self.kernels = StepKernels(config, dtype, self.device, places.__getitem__)
        ids = config.id_ranges[modality]
        self.name = config.modality_names[modality]
        prompts = [[ids[(3 * row + 5 * place) % len(ids)] for place in range(7 + 9 * row)] for row in range(rows)]
        _, self.cache = self.reference.prefill(prompts, self.name)
        self.reference.reserve(self.cache, config.max_seq_len)
        self.caches = [stored(one.numpy(), dtype) for pair in self.cache.buffers for one in pair]

    def capture(self, graph: Graph) -> Any:
        addresses = [one.ctypes.data for one in self.caches]
        pairs = list(zip(addresses[::2], addresses[1::2], strict=True))
        return self.kernels.capture(graph, len(self.cache.lengths), pairs)


def step_of(config: ModelConfig, tokens: int, predicts: int) -> Graph:
    return next(one for one in plan_for("cuda", config) if (one.tokens, one.predicts) == (tokens, predicts))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rows", "dtype"),
    [*((name, 1, "bfloat16") for name in CONFIGS), ("tiny64", 1, "float16"), *(("tiny64", 3, dtype) for dtype in NAMES)],
)
@pytest.mark.parametrize("modality", [0, 1])
def test_steps_are_the_decoders(name: str, rows: int, modality: int, dtype: str) -> None:
    """Step after step over one capture, rows at different positions, the change-over with them."""
    config = CONFIGS[name]
    talk = Conversation(config, dtype, rows, modality)
    ids = config.id_ranges[modality]
    steps = {there: talk.capture(step_of(config, modality, there)) for there in (0, 1)}
    before, starts = [one.copy() for one in talk.caches], talk.cache.lengths.copy()
    limit = 0.02 if dtype == "bfloat16" else 0.004
    for number in range(3):
        there = modality if number < 2 else 1 - modality
        tokens = [ids[(11 * row + 13 * number) % len(ids)] for row in range(rows)]
        taken = StepInputs(
            *(np.array(one) for one in ([[one] for one in tokens], [], talk.cache.lengths.copy(), range(rows), []))
        )
        got = talk.kernels.run(steps[there], taken)
        expected = talk.reference.decode_step(tokens, config.modality_names[there], talk.cache)
        wanted = config.id_ranges[there]
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
        for one, right in zip(*(logits[:, wanted.start : wanted.stop] for logits in (got, expected)), strict=True):
            assert np.linalg.norm(one - right) <= limit * np.linalg.norm(right)
    for got, was, right in zip(talk.caches, before, (one for pair in talk.cache.buffers for one in pair), strict=True):
        kept = torch.from_numpy(got).view(NAMES[dtype]).float().numpy()
        for row, (start, stop) in enumerate(zip(starts, talk.cache.lengths, strict=True)):
            expected = right[row, :, start:stop].numpy()
            assert np.linalg.norm(kept[row, :, start:stop] - expected) <= limit * np.linalg.norm(expected)
            got[row, :, start:stop] = was[row, :, start:stop]
        np.testing.assert_array_equal(got, was)  # nothing else was written


def _worst_error(talk: Conversation, modality: int) -> float:
    ids, worst = talk.config.id_ranges[modality], 0.0
    step = talk.capture(step_of(talk.config, modality, modality))
    for token in (ids[5], ids[9]):
        taken = StepInputs(*(np.array(one) for one in ([[token]], [], talk.cache.lengths.copy(), [0], [])))
        (got,) = talk.kernels.run(step, taken)
        (expected,) = talk.reference.decode_step([token], talk.name, talk.cache)
        own, right = got[ids.start : ids.stop], expected[ids.start : ids.stop]
        worst = max(worst, float(np.linalg.norm(own - right) / np.linalg.norm(right)))
    return worst


@needs_compiler
def test_nothing_is_seen_where_there_is_no_fault() -> None:
    assert _worst_error(Conversation(TINY64, "float16", 1, 1), 1) < 0.004


@needs_compiler
@pytest.mark.parametrize("name", [*FAULTY_LINES, *FAULTY_MACROS])
def test_a_fault_in_them_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in FAULTY_MACROS:
        real = StepShape.macros.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(StepShape, "macros", property(lambda shape: real(shape) | FAULTY_MACROS[name]))
    else:
        (tmp_path / "kernels.cu").write_text(faulty_source(name))
        monkeypatch.setattr(step_kernels, "SOURCE", tmp_path / "kernels.cu")
    assert _worst_error(Conversation(TINY64, "float16", 1, 1), 1) > 0.02


@needs_compiler
def test_every_kernel_but_the_first_waits_for_the_one_ahead() -> None:
    talk = Conversation(TINY64, "bfloat16", 1, 0)
    talk.capture(step_of(TINY64, 0, 0))
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
