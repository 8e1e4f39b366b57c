"""``motrt evaluate``: how well a bundle or a checkpoint predicts a text, and how far it is from another model on it.

A text is read in chunks, each with an empty cache: every id but a chunk's first is predicted from those before it in the chunk.
Bundles run as they are deployed, checkpoints in PyTorch; of two models both are in memory, and the logits of one pass. No heavy
package is imported: where bundles are served, they are evaluated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motrt.errors import InputError, ParityError
from motrt.export.parity.metrics import Floats, kl_divergence, log_softmax
from motrt.export.parity.token_file import read_token_file
from motrt.export.steps import Advance, Steps
from motrt.model_def.config import ModelConfig
from motrt.runtime.bundle import is_bundle, open_bundle, record_evaluation
from motrt.runtime.evaluation_record import Evaluation, ModalityFigures
from motrt.runtime.load import load
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.tokenizer import encode_text

Ids = NDArray[np.int64]

USUAL_CONTEXT = 300
MOST_TEXT_BYTES = 1 << 28
_LARGEST_LOSS = 700.0  # e to the power of more is no number


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how.

    Attributes:
        text: a file of text, for a model with a tokenizer; or
        data: a file of sequences (``parity.token_file``).
        context: ids of a chunk, at most; None: 300, or what the model holds.
        max_tokens: read no more ids than this; None: all.
        against: another bundle or checkpoint to compare with.
        backend: what runs a bundle; ``auto``: the best that is here. ``torch`` runs checkpoints alone.
        num_threads: onnxruntime's; 0: one per core.
        record: write the figures into the bundle's manifest.
    """

    text: Path | None = None
    data: Path | None = None
    context: int | None = None
    max_tokens: int | None = None
    against: Path | None = None
    backend: str = "auto"
    num_threads: int = 0
    record: bool = False


def evaluate(path: str | Path, options: EvaluateOptions, steps: Steps | None = None) -> Evaluation:
    """Measure how well the model at ``path`` predicts a text.

    Args:
        path: a bundle, or a native checkpoint.
        options: the text, and how it is read.
        steps: told of progress.

    Returns:
        Perplexity by predicted modality; with another model, its perplexity, the divergence, and how often the best ids agree.

    Raises:
        InputError: for a text that can not be used, a context that the model does not hold, models with other ids, figures to
            be recorded in what is no bundle, or a bundle in backend torch; before anything is computed.
        ParityError: when a model gives logits that are no numbers.
        BundleError, CheckpointError, BackendError: as ``load``.
    """
    where, steps = Path(path), steps or Steps()
    if (options.text is None) == (options.data is None):
        raise InputError("give one of a text and a file of ids")
    if options.record and not is_bundle(where):
        raise InputError(f"{where} is no bundle: figures are recorded in a bundle's manifest")
    if options.backend == "torch" and is_bundle(where):
        raise InputError(
            f"backend torch runs the checkpoint that {where} was made of, and its figures would not be the bundle's: evaluate "
            "the checkpoint itself, or choose another backend"
        )
    text = None if options.text is None else _read_text(options.text)
    with ExitStack() as opened:
        with steps.step(f"open {where.name}"):
            session = opened.enter_context(load(where, options.backend, num_threads=options.num_threads))
        sequences = _sequences(text, options.data, session)
        other = None
        if options.against is not None:
            with steps.step(f"open {options.against.name}"):
                other = opened.enter_context(load(options.against, num_threads=options.num_threads))
            _refuse_other_ids(session.config, other.config, options.against)
        context = _context(options.context, [one.config for one in (session, other) if one is not None])
        chunks = _chunks(sequences, context, options.max_tokens)
        with steps.step("evaluate", sum(map(len, chunks)), "parts") as advance:
            figures = measure(session, chunks, other, advance)
        backend = f"{session.backend}, {session.weights or session.precision}"
    file = options.text or options.data
    found = Evaluation(
        text="" if file is None else file.name,
        ids_sha256=hashlib.sha256(b"".join(one.astype("<i8").tobytes() for one in chunks)).hexdigest(),
        num_ids=sum(map(len, chunks)),
        context=context,
        backend=backend,
        against=None if options.against is None else options.against.resolve().name,
        modalities=figures,
    )
    if options.record:
        record_evaluation(open_bundle(where), found)
    return found


def measure(
    session: Session,
    chunks: Sequence[Ids],
    other: Session | None = None,
    advance: Advance = lambda count: None,
) -> dict[str, ModalityFigures]:
    """Return the figures of ``session`` on ``chunks``, by predicted modality.

    Args:
        session: the model.
        chunks: ids, each chunk at least two.
        other: the model to compare with, which has the same ids.
        advance: told the ids of each chunk that is done.

    Raises:
        ParityError: when a model gives logits that are no numbers.
    """
    config = session.config
    sums = [_Sums() for _ in config.modalities]
    for ids in chunks:
        theirs = None if other is None else log_probabilities(other, ids)
        for modality, target, ours in log_probabilities(session, ids):
            sums[modality].add(ours, target, None if theirs is None else next(theirs)[2])
        advance(len(ids))
    return {name: one.figures() for name, one in zip(config.modality_names, sums, strict=True) if one.losses}


def log_probabilities(session: Session, ids: Ids) -> Iterator[tuple[int, int, Floats]]:
    """Read one chunk with an empty cache; in passes, where it is longer than a session's longest.

    Yields:
        For every id but the first: its modality, its place among that modality's ids, and the log probabilities of those, in
        float64, from the ids before it.
    """
    config, inputs = session.config, ids[:-1]
    cache = session.new_cache(1, len(inputs))
    for start in range(0, len(inputs), session.longest_pass):
        part = inputs[None, start : start + session.longest_pass]
        targets = ids[start + 1 : start + 1 + part.shape[1]]
        predicted = modality_of_ids(targets, config)
        wanted = np.arange(part.shape[1], dtype=np.int64)
        logits = session.run(StepInputs(part, modality_of_ids(part, config), cache.lengths.copy(), wanted, predicted), cache)
        cache.lengths[0] += part.shape[1]
        for row, target, modality in zip(logits, targets.tolist(), predicted.tolist(), strict=True):
            owned = config.id_ranges[modality]
            values = row[owned.start : owned.stop]
            if not np.isfinite(values).all():
                raise ParityError(
                    f"{session.backend} gives logits that are no numbers, at id {start} to {start + len(targets)} of a chunk: "
                    "nothing can be measured. `motrt inspect` looks for NaN and infinities in weights; fp16 may have overflowed"
                )
            yield modality, target - owned.start, log_softmax(values)


@dataclass
class _Sums:
    """What is kept of each position that predicts one modality."""

    losses: list[float] = field(default_factory=list)
    their_losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)

    def add(self, ours: Floats, target: int, theirs: Floats | None) -> None:
        self.losses.append(-float(ours[target]))
        if theirs is not None:
            self.their_losses.append(-float(theirs[target]))
            self.divergences.append(kl_divergence(theirs, ours))
            self.agreements.append(int(np.argmax(ours)) == int(np.argmax(theirs)))

    def figures(self) -> ModalityFigures:
        loss = float(np.mean(self.losses))
        alone = ModalityFigures(len(self.losses), loss, perplexity_of(loss))
        if not self.their_losses:
            return alone
        return replace(
            alone,
            against_perplexity=perplexity_of(float(np.mean(self.their_losses))),
            kl_mean=float(np.mean(self.divergences)),
            kl_max=max(self.divergences),
            top_1_agreement=float(np.mean(self.agreements)),
        )


def perplexity_of(loss: float) -> float:
    return exp(min(loss, _LARGEST_LOSS))


def _context(asked: int | None, configs: Sequence[ModelConfig]) -> int:
    most = min(config.max_seq_len for config in configs)
    if asked is None:
        return min(USUAL_CONTEXT, most)
    if not 2 <= asked <= most:
        raise InputError(f"a chunk must have 2 to {most} ids, for which there are positions ({asked} came)")
    return asked


def _sequences(text: str | None, data: Path | None, session: Session) -> tuple[Ids, ...]:
    if data is not None:
        return read_token_file(data, session.config, session.tokenizer)
    if session.tokenizer is None:
        raise InputError("the model carries no tokenizer: give ids with --data, or lay a tokenizer.json beside the checkpoint")
    ids = np.array(encode_text(session.tokenizer, text or "").ids, dtype=np.int64)
    if len(ids) and ids.max() >= session.config.vocab_size:
        raise InputError(
            f"the tokenizer gives id {ids.max()}, and the model's end at {session.config.vocab_size - 1}: is it the model's?"
        )
    return (ids,)


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"{file} {'is not a file' if file.exists() else 'does not exist'}: give a file of text")
    if file.stat().st_size > MOST_TEXT_BYTES:
        raise InputError(f"{file} has {file.stat().st_size} bytes, and at most {MOST_TEXT_BYTES} are read: give a part of it")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as failure:
        raise InputError(f"{file} is not UTF-8 text ({failure})") from None


def _chunks(sequences: Sequence[Ids], context: int, max_tokens: int | None) -> list[Ids]:
    """Cut sequences into chunks, as far as ``max_tokens`` goes. A chunk of one id predicts nothing, and is left out."""
    chunks: list[Ids] = []
    left = sum(map(len, sequences)) if max_tokens is None else max_tokens
    for ids in sequences:
        taken = ids[:left]
        left -= len(taken)
        chunks += [taken[start : start + context] for start in range(0, len(taken), context)]
    chunks = [one for one in chunks if len(one) > 1]
    if not chunks:
        raise InputError("nothing is predicted: at least 2 ids of a sequence are needed")
    return chunks


def _refuse_other_ids(config: ModelConfig, other: ModelConfig, where: Path) -> None:
    expected, came = (", ".join(f"{each.name} {each.vocab_size}" for each in one.modalities) for one in (config, other))
    if expected != came:
        raise InputError(f"{where} has other ids, so that nothing can be compared: {came}, where {expected} were expected")
