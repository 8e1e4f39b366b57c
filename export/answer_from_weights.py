"""The known answer of a bundle, from the weights that it stands for: what a session must say to be let in to serve.

PyTorch computes it, and not the graph: so it does not follow a fault of the exporter or of onnxruntime, and it exists for
precisions that nothing on this machine can run. One pass over whole sequences gives all of it (steps equal one pass, says the
ladder), with one weight in memory at a time: an export that is not verified stays as small as it was. A second pass tells how
far rounding moves each row.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import torch

from motrt.errors import InputError
from motrt.export.streamed_decoder import StreamedDecoder
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.quantization import Quantization
from motrt.runtime.known_answer import KnownAnswer, Question, Said
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.tolerances import UNIT_ROUNDOFF, bounded_noise
from motrt.runtime.torch_session import TorchSession

logger = logging.getLogger(__name__)

# How often the question is asked with errors, for the noise of its rows: each time costs a pass, and memory for one.
NUM_NOISY_GROUPS = 8


def known_answer(
    config: ModelConfig,
    read: Read,
    precision: str,
    quantization: Quantization | None = None,
    on_weight: Callable[[int], None] = lambda numel: None,
) -> KnownAnswer | None:
    """What the model says to the usual question; None where it says no numbers, which is logged.

    Args:
        config: what the bundle computes.
        read: its weights, by the names of ``parameters(config)``; what codes stand for, where there are codes.
        precision: that the bundle computes in: errors as large as its rounding show how much the model amplifies it.
        quantization: of those weights; a CPU rounds what it multiplies by codes.
        on_weight: told the elements of each weight that is read.
    """

    def counted(name: str) -> torch.Tensor:
        value = read(name)
        on_weight(value.numel())
        return value

    question = Question.usual(config)
    # One thread: the answer does not depend on the number of cores, and threads that wait for each other after every piece of
    # codes cost more than they save.
    blocks = {} if quantization is None else quantization.activation_blocks(config)
    with on_one_thread(), TorchSession(StreamedDecoder(config, counted, torch.float64)) as session:
        (exact,) = said_in_groups(session, question, 1)
    groups = NUM_NOISY_GROUPS + 1
    disturbed = StreamedDecoder(config, counted, torch.float32, UNIT_ROUNDOFF[precision], groups, blocks)
    with on_one_thread(), TorchSession(disturbed) as session:
        *noisy, rounded = said_in_groups(session, question, groups)
    try:
        answer = KnownAnswer.of(question, exact, config, f"torch {torch.__version__}, fp64")
    except InputError as failure:
        logger.warning("the bundle carries no known answer, PyTorch itself gets no numbers from this model: %s", failure)
        return None
    squares = [_relative_errors(question, exact, one, config) for one in noisy]
    return replace(
        answer,
        noise=tuple(
            tuple(sqrt(sum(e * e for e in row) / len(row)) for row in zip(*rows, strict=True))
            for rows in zip(*squares, strict=True)
        ),
        rounding_loss=_relative_errors(question, exact, rounded, config) if blocks else None,
    )


def said_in_groups(session: Session, question: Question, num_groups: int) -> list[Said]:
    """Ask ``question`` by a single pass over prompts and steps together, of a batch that holds its rows ``num_groups`` times.

    Rows that are shorter are padded with their last id.
    """
    config, num_steps, width = session.config, len(question.steps), question.num_positions
    rows = [(*prompt, *(step[row] for step in question.steps)) for row, prompt in enumerate(question.prompts)] * num_groups
    ids = np.array([[*row, *[row[-1]] * (width - len(row))] for row in rows], dtype=np.int64)
    count = len(question.prompts)
    wanted = [
        (group * count + row) * width + len(question.prompts[row]) - 1 + step
        for group in range(num_groups)
        for step in range(num_steps + 1)
        for row in range(count)
    ]
    predicted = [config.modality_index(name) for names in question.predicted for name in names] * num_groups
    inputs = StepInputs(
        input_ids=ids,
        modality_mask=modality_of_ids(ids, config),
        cache_position=np.zeros(len(rows), np.int64),
        logits_index=np.array(wanted, np.int64),
        head_mask=np.array(predicted, np.int64),
    )
    logits = session.run(inputs, session.new_cache(len(rows), width))
    passes = [logits[start : start + count] for start in range(0, len(wanted), count)]
    size = num_steps + 1
    return [passes[start : start + size] for start in range(0, len(passes), size)]


def _relative_errors(question: Question, said: Said, other: Said, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    """Return the relative L2 difference of each row of logits, by step and row; at most the largest number that is stored."""
    return tuple(
        tuple(
            _relative_error(one, two, config.id_ranges[config.modality_index(name)])
            for name, one, two in zip(names, ones, twos, strict=True)
        )
        for names, ones, twos in zip(question.predicted, said, other, strict=True)
    )


def _relative_error(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any], owned: range) -> float:
    wanted, got = (row[owned.start : owned.stop].astype(np.float64) for row in (expected, actual))
    return bounded_noise(float(np.linalg.norm(got - wanted)) / max(float(np.linalg.norm(wanted)), 1e-30))


@contextmanager
def on_one_thread() -> Iterator[None]:
    """PyTorch on one thread, for as long as this is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
