"""How much a model loses by having its weights quantised: a property of the model and the format, and no fault of any graph.

Both models are PyTorch's, in float32: one holds the checkpoint's weights, the other what the codes stand for. They read the
same sequences, which the first one sampled itself: what a trained model says is what it will be asked to go on with. Nothing
of onnxruntime is in the comparison, so whatever it shows is the quantisation's own.

The limits, on the mean KL divergence by predicted modality, are a judgement and no derivation: half a nat is where a model no
longer says what it said (one token in three is another, on random weights), a twentieth where 8 bits, which lose a hundredth
of that, have gone wrong. Docs and report give the figures, so that a service can set a stricter one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.export.parity.findings import LOSS, Finding, judged
from motrt.export.parity.metrics import kl_divergence, log_softmax
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.quantization import BITS
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import Progress
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.torch_session import TorchSession

# In nats, by the fewest bits that any weight has.
LARGEST_MEAN_KL = {4: 0.5, 8: 0.05}

NUM_ROWS, NUM_TOKENS, RUN_LENGTH = 4, 48, 12

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sampled:
    """Sequences that a model said itself, and its log probabilities at every position of them but the last."""

    rows: NDArray[np.int64]
    log_probabilities: tuple[Floats, ...]


def decoder_of_codes(config: ModelConfig, weights: QuantizedWeights, precision: str = "fp32", device: str = "cpu") -> Decoder:
    """The decoder that holds what codes stand for."""
    return Decoder.from_tensors(config, weights.read, TORCH_DTYPES[DTYPE_OF_PRECISION[precision]], device)


def measure_losses(config: ModelConfig, checkpoint: Checkpoint, weights: QuantizedWeights, steps: Steps) -> list[Finding]:
    """One finding per predicted modality: KL divergence, top-1 agreement and the ratio of perplexities on sampled sequences.

    Args:
        config: what the graph computes.
        checkpoint: what it was made of.
        weights: what the graph holds.
        steps: told of progress. The two models are in memory one after the other.
    """
    if config.max_seq_len < 4:
        return []
    with (
        steps.step("sample from the checkpoint's model"),
        TorchSession.open(checkpoint, "fp32", max_seq_len=config.max_seq_len) as session,
    ):
        sampled = sample(session)
    with (
        steps.step("the same through what the codes stand for"),
        TorchSession(decoder_of_codes(config, weights)) as session,
    ):
        return loss_findings(session, sampled, min((BITS[one.how.stored] for one in weights.coded), default=8))


def sample(session: Session, seed: int = 11) -> Sampled:
    """Let ``session`` say a few sequences in which the modalities take turns, and say again how likely each token was."""
    config = session.config
    count = min(NUM_TOKENS, config.max_seq_len - 1)
    names = config.modality_names
    prompts = [[ids.start + (seed * (row + 1)) % len(ids)] for row in range(NUM_ROWS) for ids in (_ids_of(config, row),)]

    def turns(progress: Progress) -> str | None:
        done = len(progress.tokens)
        first = config.modality_of(progress.prompt[0])
        return names[(first + done // RUN_LENGTH) % len(names)] if done < count else None

    said: list[list[int]] = [list(prompt) for prompt in prompts]
    samplings = [Sampling(temperature=1.0, seed=seed + row) for row in range(NUM_ROWS)]
    for step in session.generate(prompts, schedule=turns, sampling=samplings):
        said[step.row].append(step.token_id)
    rows = np.array(said, np.int64)
    return Sampled(rows, tuple(log_softmax(one) for one in _logits(session, rows)))


def _ids_of(config: ModelConfig, row: int) -> range:
    return config.id_ranges[row % len(config.modalities)]


def loss_findings(session: Session, sampled: Sampled, bits: int) -> list[Finding]:
    """How ``session`` differs from the model that said ``sampled``, by predicted modality."""
    config = session.config
    next_ids = sampled.rows[:, 1:].flatten()
    predicted = modality_of_ids(next_ids, config)
    figures: dict[int, list[tuple[float, bool, float]]] = {}
    for token, modality, expected, logits in zip(
        next_ids, predicted, sampled.log_probabilities, _logits(session, sampled.rows), strict=True
    ):
        came, at = log_softmax(logits), int(token) - config.id_ranges[modality].start
        lost = (kl_divergence(expected, came), int(np.argmax(expected)) == int(np.argmax(came)), float(expected[at] - came[at]))
        figures.setdefault(int(modality), []).append(lost)
    return [
        _judge(config.modality_names[modality], found, LARGEST_MEAN_KL[bits]) for modality, found in sorted(figures.items())
    ]


def _judge(name: str, found: Sequence[tuple[float, bool, float]], limit: float) -> Finding:
    kl, same, log_ratios = (np.array(column, np.float64) for column in zip(*found, strict=True))
    mean = float(kl.mean())
    problems = []
    if not mean <= limit:
        problems.append(
            f"mean KL {mean:.3g} nats over {limit:g}: the graph is right and the format loses too much of this model; take "
            "--precision int8, smaller blocks (--block-size), or keep a part (--part head=int8)"
        )
    return judged(
        LOSS,
        f"{name}: quantisation loses little",
        problems,
        rows=len(found),
        kl_mean=mean,
        kl_max=float(kl.max()),
        kl_limit=limit,
        top_1_agreement=float(same.mean()),
        perplexity_ratio=exp(min(float(log_ratios.mean()), 700.0)),
    )


def _logits(session: Session, rows: NDArray[np.int64]) -> Iterator[Floats]:
    """Logits of every position but the last of each row, within the range of the modality that comes next."""
    config = session.config
    for row in rows:
        ids = row[None, :-1]
        predicted = modality_of_ids(row[1:], config)
        wanted = np.arange(ids.shape[1], dtype=np.int64)
        inputs = StepInputs(ids, modality_of_ids(ids, config), np.zeros(1, np.int64), wanted, predicted)
        logits = session.run(inputs, session.new_cache(1, ids.shape[1]))
        for modality, values in zip(predicted, logits, strict=True):
            owned = config.id_ranges[modality]
            yield values[owned.start : owned.stop]
