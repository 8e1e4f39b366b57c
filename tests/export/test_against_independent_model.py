"""From a training state to ``model.onnx`` in plain onnxruntime, against an implementation that shares no code with either.

Nothing of ``motrt.runtime`` runs here: inputs and outputs go by the contract's names, as anybody would write them.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.checkpoint.assemble import convert_mot
from motrt.model_def.checkpoint.native import write_checkpoint
from motrt.model_def.config import ModelConfig, RopeConfig, RopeScaling
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.tests.export.independent_model import Array, IndependentModel, independent
from motrt.tests.model_def.foreign import mot_state, write_mot

LIMIT = 2e-4
USUAL = 2e-5  # float32 came to 3e-6 at most here: a graph that lost digits should not pass unseen

CAPACITY, LENGTH = 32, 20

SPLIT = ModelConfig.tiny()
SHARED = ModelConfig.tiny(head="shared")
NORMED = ModelConfig.tiny(qk_norm=True)
NORMED_SHARED = ModelConfig.tiny(qk_norm=True, head="shared")
HALVES = ModelConfig.tiny(rope=RopeConfig(theta=10000.0, style="half", scaling=RopeScaling(8.0, 1.0, 4.0, 64)))
CONFIGS = {"split": SPLIT, "shared": SHARED, "q/k norm": NORMED, "q/k norm, shared": NORMED_SHARED, "halves": HALVES}


@dataclass(frozen=True)
class Case:
    """One sequence, known through and through."""

    ids: NDArray[np.int64]
    modality: NDArray[np.int64]
    predicted: NDArray[np.int64]
    logits: Array


@dataclass(frozen=True)
class Plain:
    """A graph in plain onnxruntime, its cache in plain arrays."""

    session: Any
    config: ModelConfig

    def empty(self, batch: int) -> list[NDArray[np.float32]]:
        shape = (batch, self.config.num_kv_heads, CAPACITY, self.config.head_size)
        return [np.zeros(shape, np.float32) for _ in range(2 * self.config.num_layers)]

    def run(self, ids: Any, mask: Any, position: Any, index: Any, head: Any, cache: list[Any]) -> tuple[Any, list[Any]]:
        names = [f"past_{what}.{layer}" for layer in range(self.config.num_layers) for what in ("key", "value")]
        feeds = {"input_ids": ids, "modality_mask": mask, "cache_position": position, "logits_index": index, "head_mask": head}
        feeds = {name: np.asarray(value, np.int64) for name, value in feeds.items()} | dict(zip(names, cache, strict=True))
        wanted = ["logits", *(name.replace("past", "present") for name in names)]
        logits, *present = self.session.run(wanted, feeds)
        return logits, present

    def read(self, case: Case, widths: list[int]) -> Any:
        """Every position's logits, read in passes of these widths."""
        cache, found, start = self.empty(1), [], 0
        for width in widths:
            part = slice(start, start + width)
            logits, cache = self.run(
                case.ids[None, part], case.modality[None, part], [start], np.arange(width), case.predicted[part], cache
            )
            found.append(logits)
            start += width
        assert start == LENGTH
        return np.concatenate(found)


def plain_session(model: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # past and present are separate arrays here, which it remarks on
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def native_state(config: ModelConfig, seed: int = 11) -> dict[str, torch.Tensor]:
    return dict(random_tensors(config, seed))


def cases(model: IndependentModel, seed: int = 3) -> list[Case]:
    """Three sequences with change-overs both ways, the head's mask apart from the experts'."""
    chance = np.random.default_rng(seed)
    text, audio = model.vocab_sizes
    found = []
    for pattern in ([0] * 7 + [1] * 9 + [0] * 4, [1] * 10 + [0] * 10, list(chance.integers(0, 2, LENGTH))):
        modality = np.array(pattern, np.int64)
        ids = np.where(modality == 0, chance.integers(0, text, LENGTH), text + chance.integers(0, audio, LENGTH))
        predicted = np.append(modality[1:], 1)
        predicted[::6] = 1 - predicted[::6]  # neither what stands there nor what follows: only what was asked for
        found.append(Case(ids, modality, predicted, model.logits(ids.tolist(), modality.tolist(), predicted.tolist())))
    return found


def assert_equal(expected: Array, came: Any, limit: float = USUAL) -> None:
    assert np.array_equal(np.isneginf(expected), np.isneginf(came))
    inside = np.isfinite(expected)
    assert np.isfinite(came[inside]).all()
    error = np.abs(came[inside] - expected[inside]).max()
    assert error <= limit <= LIMIT


@pytest.fixture(scope="module", params=CONFIGS)
def examined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plain, list[Case]]:
    """The graph exported from a training state, and what the independent model says of that very state."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("independent")
    native = native_state(config)
    if config.rope.style == "interleaved":
        convert_mot(*write_mot(folder, config, native)).write(folder / "model")
    else:  # no training state rotates halves: the same weights on the native road
        write_checkpoint(folder / "model", config, native.items(), "float32")
    export_bundle(folder / "model", folder / "bundle", "fp32", verify=False)
    oracle = independent(mot_state(config, native), config)
    return Plain(plain_session(folder / "bundle" / "model.onnx"), config), cases(oracle)


@pytest.mark.parametrize("widths", [[20], [1] * 20, [6, 5, 1, 8], [13, 1, 1, 1, 4]], ids=["whole", "steps", "chunks", "mixed"])
def test_the_graph_equals_the_independent_model(examined: tuple[Plain, list[Case]], widths: list[int]) -> None:
    plain, sequences = examined
    for case in sequences:
        assert_equal(case.logits, plain.read(case, widths))


def test_rows_at_different_positions_equal_the_independent_model(examined: tuple[Plain, list[Case]]) -> None:
    plain, sequences = examined
    starts = np.array([9, 2, 0])
    ends = starts + 6
    cache = plain.empty(3)
    for row, (case, start) in enumerate(zip(sequences, starts, strict=True)):
        if start:
            alone = [one[row : row + 1] for one in cache]
            part = slice(0, start)
            _, filled = plain.run(case.ids[None, part], case.modality[None, part], [0], [0], [0], alone)
            for whole, one in zip(cache, filled, strict=True):
                whole[row] = one[0]
    ids = np.stack([case.ids[a:b] for case, a, b in zip(sequences, starts, ends, strict=True)])
    mask = np.stack([case.modality[a:b] for case, a, b in zip(sequences, starts, ends, strict=True)])
    wanted = [(2, 5), (0, 0), (1, 3), (0, 5)]  # neither all of them nor in order
    index = [row * 6 + column for row, column in wanted]
    head = [sequences[row].predicted[starts[row] + column] for row, column in wanted]
    logits, _ = plain.run(ids, mask, starts, index, head, cache)
    expected = np.stack([sequences[row].logits[starts[row] + column] for row, column in wanted])
    assert_equal(expected, logits)


def test_padding_and_stale_slots_are_never_seen(examined: tuple[Plain, list[Case]]) -> None:
    """The whole buffer is filled with noise first: only what was written may matter."""
    plain, (case, *_) = examined
    chance = np.random.default_rng(0)
    noise = [chance.normal(size=one.shape).astype(np.float32) * 9 for one in plain.empty(1)]
    logits, _ = plain.run(case.ids[None], case.modality[None], [0], np.arange(LENGTH), case.predicted, noise)
    assert_equal(case.logits, logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_equals_the_independent_model_to_the_last_digits_of_float64(name: str) -> None:
    config = CONFIGS[name]
    native = native_state(config)
    decoder = Decoder.from_tensors(config, native.__getitem__, torch.float64)
    for case in cases(independent(mot_state(config, native), config)):
        arguments = [
            torch.as_tensor(one) for one in (case.ids[None], case.modality[None], [0], np.arange(LENGTH), case.predicted)
        ]
        logits, _ = decoder(*arguments, decoder.new_cache(1, CAPACITY))
        assert logits.dtype == torch.float64
        assert_equal(case.logits, logits.numpy(), 1e-10)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_the_decoder_runs_in_less_precision_and_stays_near(dtype: torch.dtype, limit: float) -> None:
    native = native_state(NORMED)
    decoder = Decoder.from_tensors(NORMED, native.__getitem__, dtype)
    for case in cases(independent(mot_state(NORMED, native), NORMED)):
        arguments = [
            torch.as_tensor(one) for one in (case.ids[None], case.modality[None], [0], np.arange(LENGTH), case.predicted)
        ]
        logits, cache = decoder(*arguments, decoder.new_cache(1, CAPACITY))
        assert logits.dtype == torch.float32 and cache[0][0].dtype == dtype
        inside = np.isfinite(case.logits)
        error = np.linalg.norm(logits.numpy()[inside] - case.logits[inside]) / np.linalg.norm(case.logits[inside])
        assert error <= limit


CHANGES: dict[str, dict[str, Any]] = {"halves": {"halves": True}, "theta": {"theta": 10000.0}, "epsilon": {"epsilon": 1e-3}}


@pytest.mark.parametrize("change", CHANGES)
def test_the_independent_model_is_sharp_enough_to_see_a_wrong_number(change: str) -> None:
    oracle = independent(mot_state(SPLIT, native_state(SPLIT)), SPLIT)
    case, other = cases(oracle)[0], cases(dataclasses.replace(oracle, **CHANGES[change]))[0]
    inside = np.isfinite(case.logits)
    assert np.abs(other.logits[inside] - case.logits[inside]).max() > LIMIT
