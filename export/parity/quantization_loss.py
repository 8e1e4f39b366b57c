"""How much a model loses by quantization: a property of the model and the format, and no fault of any graph.

Both models are PyTorch's, in float32: one holds the checkpoint's weights, the other the dequantized ones, and rounds its
activations as the deployed products do. They read the same sequences: a user's own where there are any (``--data``), else some
that the first one sampled itself, since what a trained model writes is what it will be asked to go on with: each modality by
itself, and all in their order. Other turns are asked of a user's data alone: text behind audio, of a model that was never
trained on it, moves by nats where nothing else does. Nothing of onnxruntime is in the comparison, so whatever it shows is the
quantization's own.

The budget is on the mean KL divergence by predicted modality, in nats (``--max-loss``). The defaults are a judgement and no
derivation: half a nat is where a model no longer writes what it wrote, a twentieth where 8 bits, which lose a hundredth of
that, have gone wrong. Over budget, every part is quantized alone, which tells the parts that lose most.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from motrt.export.parity.findings import LOSS, Finding, judged
from motrt.export.parity.metrics import kl_divergence, log_softmax
from motrt.export.parity.rounded_activations import RoundingDecoder
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.head_surgery import Read, with_head
from motrt.model_def.parameters import Parameter
from motrt.model_def.quantization import BITS
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import Progress
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.torch_session import TorchSession

# In nats, by the fewest bits that any weight has.
LARGEST_MEAN_KL = {4: 0.5, 8: 0.05}

NUM_ROWS, NUM_TOKENS = 4, 48

# Of a user's sequences: more would take longer than everything else.
MOST_POSITIONS = 2048

Floats = NDArray[np.floating[Any]]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Expected:
    """Sequences, and a model's log probabilities at every position of them but the last.

    Attributes:
        rows: each [length], two ids at least.
        log_probabilities: of what comes next, within the range of its modality; of all rows one after another.
    """

    rows: tuple[Int64, ...]
    log_probabilities: tuple[Floats, ...]


def deployed_decoder(config: ModelConfig, read: Read, blocks: Mapping[str, int]) -> Decoder:
    """Return the decoder in float32 as a CPU runs it: activations rounded to 8 bits before the products of ``blocks``."""
    decoder = RoundingDecoder.from_tensors(config, read, torch.float32)
    assert isinstance(decoder, RoundingDecoder)
    decoder.round_before(blocks)
    return decoder


def measure_losses(
    config: ModelConfig,
    checkpoint: Checkpoint,
    weights: QuantizedWeights,
    steps: Steps,
    brought: Sequence[Int64] = (),
    budget: float | None = None,
    rounds: bool = True,
) -> list[Finding]:
    """Measure KL divergence, top-1 agreement and the ratio of perplexities: one finding per predicted modality.

    Args:
        config: what the graph computes.
        checkpoint: what it was made of.
        weights: what the graph holds.
        steps: told of progress. The two models are in memory one after the other.
        brought: a user's sequences; none: some are sampled.
        budget: of the mean KL divergence, in nats; None: by the fewest bits of a weight.
        rounds: whether products round their activations to 8 bits, as onnxruntime's do on a CPU.
    """
    if config.max_seq_len < 4:
        return []
    budget = LARGEST_MEAN_KL[min((BITS[one.how.stored] for one in weights.coded), default=8)] if budget is None else budget
    with (
        steps.step("sample from the checkpoint's model" if not brought else "the checkpoint's model on your sequences"),
        TorchSession.open(checkpoint, "fp32", max_seq_len=config.max_seq_len) as session,
    ):
        expected = expected_of(session, brought if brought else sampled_rows(session))
    blocks = weights.quantization.activation_blocks(config) if rounds else {}
    with (
        steps.step("the same with quantized weights"),
        TorchSession(deployed_decoder(config, weights.read, blocks)) as session,
    ):
        found = losses_of(session, expected)
    over = [name for name, one in found.items() if not one.kl_mean <= budget]
    by_part: dict[str, float] = {}
    if over:
        _, read = with_head(checkpoint.config, checkpoint.read, config.head)
        with steps.step("quantize one part at a time"):
            by_part = _losses_by_part(config, read, weights, blocks, expected)
    return [one.finding(budget, by_part) for one in found.values()]


@dataclass(frozen=True)
class Loss:
    """What one predicted modality loses.

    Attributes:
        modality: its name.
        kls: of each position, in nats.
        same: of each position, whether the best id is the same.
        log_ratios: of each position, the log probability that the token lost.
    """

    modality: str
    kls: Floats
    same: Floats
    log_ratios: Floats

    @property
    def kl_mean(self) -> float:
        return float(self.kls.mean())

    def finding(self, budget: float, by_part: Mapping[str, float]) -> Finding:
        """Return the verdict, and where it is over budget the parts that lose most and what mends it."""
        problems = []
        if not self.kl_mean <= budget:
            problems.append(f"mean KL {self.kl_mean:.3g} nats over the budget of {budget:g}: {_remedy(by_part)}")
        return judged(
            LOSS,
            f"{self.modality}: what quantization loses",
            problems,
            rows=len(self.kls),
            kl_mean=self.kl_mean,
            kl_max=float(self.kls.max()),
            kl_limit=budget,
            top_1_agreement=float(self.same.mean()),
            perplexity_ratio=exp(min(float(self.log_ratios.mean()), 700.0)),
        )


def _remedy(by_part: Mapping[str, float]) -> str:
    worst = sorted(by_part, key=lambda part: -by_part[part])
    told = ", ".join(f"{part} {by_part[part]:.2g}" for part in worst)
    mends = f"keep {worst[0]} in more bits (--part {worst[0]}=int8, or none)" if worst and worst[0] != ACTIVATIONS else ""
    if worst and worst[0] == ACTIVATIONS:
        mends = (
            "the products' 8-bit activations lose most: take --precision fp16, or keep the parts that outlying channels feed"
        )
    return (
        f"the graph is right, and its format loses too much of this model. Each part quantized alone loses {told} nats; "
        f"{mends}, take --precision int8 or smaller blocks (--block-size), or allow more (--max-loss)"
    )


ACTIVATIONS = "activations"


def _losses_by_part(
    config: ModelConfig, read: Read, weights: QuantizedWeights, blocks: Mapping[str, int], expected: Expected
) -> dict[str, float]:
    """Return the mean KL of the model with one part of its weights quantized, by part; and with rounded activations alone."""
    parts: dict[str, set[str]] = {}
    for coded in weights.coded:
        for one in coded.parts:
            parts.setdefault(_selector(one), set()).add(one.name)
    found = {}
    for part, names in parts.items():
        found[part] = _mean_kl(config, _either(weights.read, read, names), {}, expected)
    if blocks:
        found[ACTIVATIONS] = _mean_kl(config, read, blocks, expected)
    return found


def _selector(one: Parameter) -> str:
    return one.part if one.modality is None else f"{one.part}.{one.modality}"


def _either(first: Read, second: Read, names: Iterable[str]) -> Read:
    chosen = frozenset(names)
    return lambda name: first(name) if name in chosen else second(name)


def _mean_kl(config: ModelConfig, read: Read, blocks: Mapping[str, int], expected: Expected) -> float:
    with TorchSession(deployed_decoder(config, read, blocks)) as session:
        return float(np.concatenate([one.kls for one in losses_of(session, expected).values()]).mean())


def sampled_rows(session: Session, num_rows: int = NUM_ROWS, num_tokens: int = NUM_TOKENS, seed: int = 11) -> list[Int64]:
    """Let ``session`` write a few sequences: each modality by itself, and then all of them in their order."""
    config, names = session.config, session.config.modality_names
    count, num_alone = min(num_tokens, config.max_seq_len - 1), len(names)
    firsts = [*config.id_ranges, *[config.id_ranges[0]] * max(num_rows - num_alone, 1)]
    said = [[ids.start + seed * (row + 1) % len(ids)] for row, ids in enumerate(firsts)]
    samplings = [Sampling(temperature=1.0, seed=seed + row) for row in range(len(said))]

    def in_order(progress: Progress) -> str | None:
        done = len(progress.tokens)
        return names[done * len(names) // count] if done < count else None

    for rows, schedule in ((slice(num_alone), None), (slice(num_alone, None), in_order)):
        prompts = [list(one) for one in said[rows]]
        for step in session.generate(prompts, schedule=schedule, sampling=samplings[rows], max_tokens=count):
            said[rows][step.row].append(step.token_id)
    return [np.array(row, np.int64) for row in said]


def expected_of(session: Session, rows: Sequence[Int64]) -> Expected:
    """Return the log probabilities that ``session`` gives to what comes next in ``rows``; of many, the first positions."""
    kept: list[Int64] = []
    room = MOST_POSITIONS
    for row in rows:
        if room > 1:
            kept.append(row[:room])
            room -= len(kept[-1])
    return Expected(tuple(kept), tuple(log_softmax(one) for one in _logits(session, kept)))


def losses_of(session: Session, expected: Expected) -> dict[str, Loss]:
    """Compare ``session`` with the model that gave ``expected``, by predicted modality."""
    config = session.config
    next_ids = np.concatenate([row[1:] for row in expected.rows])
    figures: dict[int, list[tuple[float, bool, float]]] = {}
    for token, modality, wanted, logits in zip(
        next_ids,
        modality_of_ids(next_ids, config),
        expected.log_probabilities,
        _logits(session, expected.rows),
        strict=True,
    ):
        actual, at = log_softmax(logits), int(token) - config.id_ranges[modality].start
        lost = (kl_divergence(wanted, actual), int(np.argmax(wanted)) == int(np.argmax(actual)), float(wanted[at] - actual[at]))
        figures.setdefault(int(modality), []).append(lost)
    return {
        config.modality_names[modality]: Loss(
            config.modality_names[modality], *(np.array(column, np.float64) for column in zip(*found, strict=True))
        )
        for modality, found in sorted(figures.items())
    }


def _logits(session: Session, rows: Sequence[Int64]) -> Iterator[Floats]:
    """Yield the logits of every position but the last of each row, within the range of the modality that comes next."""
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
