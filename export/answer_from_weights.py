"""The known answer of a bundle, from the weights that it stands for: what a session must say to be let in to serve.

PyTorch computes it, and not the graph: so it does not follow a fault of the exporter or of onnxruntime, and it exists for
precisions that nothing on this machine can run. One pass over whole sequences gives all of it (steps equal one pass, says the
ladder), with one weight in memory at a time: an export that is not verified stays as small as it was.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from math import sqrt

import numpy as np
import torch

from motrt.errors import InputError
from motrt.export.parity.calibration import on_one_thread
from motrt.export.parity.gate import LARGEST_FLOAT64_REFERENCE
from motrt.export.streamed_decoder import StreamedDecoder
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.known_answer import LARGEST_CONDITIONING, KnownAnswer, Question, Said
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.tolerances import ROUNDINGS_OUTSIDE, ROUNDINGS_PER_LAYER, UNIT_ROUNDOFF
from motrt.runtime.torch_session import TorchSession

logger = logging.getLogger(__name__)

# The least errors that rows are given to see what becomes of rounding: far above those that the reference makes itself.
SMALLEST_ERRORS = {"fp64": 2.0**-30, "fp32": 2.0**-14}


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

    size = sum(one.numel for one in parameters(config))
    own = "fp64" if size < LARGEST_FLOAT64_REFERENCE else "fp32"
    dtype, error = TORCH_DTYPES[DTYPE_OF_PRECISION[own]], max(SMALLEST_ERRORS[own], UNIT_ROUNDOFF[precision])
    question = Question.usual(config)
    # One thread: the answer does not depend on the number of cores, and threads that wait for each other after every piece of
    # codes cost more than they save.
    blocks = {} if quantization is None else quantization.activation_blocks(config)
    with on_one_thread(), TorchSession(StreamedDecoder(config, counted, dtype, error, blocks)) as session:
        said, with_errors, rounded = said_thrice(session, question)
    try:
        answer = KnownAnswer.of(question, said, config, f"torch {torch.__version__}, {own}")
    except InputError as failure:
        logger.warning("the bundle carries no known answer, PyTorch itself gets no numbers from this model: %s", failure)
        return None
    conditioning = _worst(question, said, with_errors, config) / (error * _root_of_roundings(config))
    return replace(
        answer,
        conditioning=min(max(1.0, conditioning), LARGEST_CONDITIONING),
        rounded_activations=_worst(question, said, rounded, config) if blocks else None,
    )


def said_thrice(session: Session, question: Question) -> tuple[Said, Said, Said]:
    """The answer by a single pass over prompts and steps together, of three batches of the same rows.

    Rows that are shorter are padded with their last id.
    """
    config, num_steps, width = session.config, len(question.steps), question.num_positions
    rows = [(*prompt, *(step[row] for step in question.steps)) for row, prompt in enumerate(question.prompts)] * 3
    ids = np.array([[*row, *[row[-1]] * (width - len(row))] for row in rows], dtype=np.int64)
    count = len(question.prompts)
    wanted = [
        (first + row) * width + len(question.prompts[row]) - 1 + step
        for first in (0, count, 2 * count)
        for step in range(num_steps + 1)
        for row in range(count)
    ]
    predicted = [config.modality_index(name) for names in question.predicted for name in names] * 3
    inputs = StepInputs(
        input_ids=ids,
        modality_mask=modality_of_ids(ids, config),
        cache_position=np.zeros(len(rows), np.int64),
        logits_index=np.array(wanted, np.int64),
        head_mask=np.array(predicted, np.int64),
    )
    logits = session.run(inputs, session.new_cache(len(rows), width))
    parts = [logits[start : start + count] for start in range(0, len(wanted), count)]
    passes = num_steps + 1
    return parts[:passes], parts[passes : 2 * passes], parts[2 * passes :]


def _worst(question: Question, said: Said, other: Said, config: ModelConfig) -> float:
    """The largest relative L2 difference of a row of logits."""
    worst = 0.0
    for names, one_part, other_part in zip(question.predicted, said, other, strict=True):
        for name, one, two in zip(names, one_part, other_part, strict=True):
            owned = config.id_ranges[config.modality_index(name)]
            expected, came = (row[owned.start : owned.stop].astype(np.float64) for row in (one, two))
            worst = max(worst, float(np.linalg.norm(came - expected) / max(float(np.linalg.norm(expected)), 1e-30)))
    return worst


def _root_of_roundings(config: ModelConfig) -> float:
    """What independent errors of size 1 come to, says the formula of the limit."""
    return sqrt(ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE)
