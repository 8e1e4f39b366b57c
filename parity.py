"""Parity as a library: is one session still the other, is a bundle still its checkpoint?

    import motrt
    from motrt import parity

    with motrt.load("bundle", backend="torch") as reference, motrt.load("bundle") as session:
        parity.compare(reference, session).raise_on_failure()

    parity.verify("bundle").raise_on_failure()     # the whole ladder, as `motrt verify` climbs it

Needs what exports need (``pip install 'motrt[export,cpu]'``). For pytest there is the fixture ``motrt_verify``; see
``pytest_plugin``.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np

from motrt.errors import InputError, raise_all
from motrt.export.parity.agreement import agreement_findings, evidence_of
from motrt.export.parity.agreement import compare as compare_scenarios
from motrt.export.parity.findings import Finding, Outcome
from motrt.export.parity.findings import Report as ParityReport
from motrt.export.parity.gate import in_float32
from motrt.export.parity.hostile import brought_scenarios
from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.row_noise import RowLimits, logits_by_row, measure_limits
from motrt.export.parity.scenarios import Observation, Scenario, in_batches, observe, scenarios
from motrt.export.polygraphy_files import save_outputs
from motrt.export.verification import VerifyOptions, verify_bundle
from motrt.model_def.config import ModelConfig
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import check_prompts
from motrt.runtime.tolerances import UNIT_ROUNDOFF, limit_of, row_limit
from motrt.runtime.torch_session import TorchSession

__all__ = ["Finding", "Outcome", "ParityReport", "compare", "dump", "verify"]

Sequences = Iterable[Sequence[int]]
Said = Sequence[tuple[Scenario, Sequence[Observation]]]


def compare(session_a: Session, session_b: Session, inputs: Sequences | None = None) -> ParityReport:
    """How far two sessions over the same model are apart, by predicted modality and kind of position.

    Args:
        session_a: the reference: margins and norms are its own.
        session_b: what is examined.
        inputs: sequences of ids, each of two at least: all but the last few tokens are read as a prompt, the rest fed one at a
            time, and the logits of every position compared. None: the ladder's own sequences.

    Returns:
        The findings of rung P4, and every position as evidence. Its limit is what both sessions' precisions allow.

    Raises:
        InputError: for sessions over different models, or sequences that can not be used.
    """
    started = time.perf_counter()
    if session_a.config != session_b.config:
        raise InputError("the two sessions compute different models (their configurations differ): open the same one twice")
    most = min(session_a.most_rows or _MOST_ROWS, session_b.most_rows or _MOST_ROWS)
    asked = [part for one in _asked(session_a.config, inputs) for part in in_batches(one, most)]
    said = [(one, observe(session_a, one)) for one in asked]
    limits = _limits(session_a, session_b, said)
    compared = compare_scenarios(session_b, said, limits)
    findings = agreement_findings(session_b, compared)
    evidence = {"limit": limits.worst, "positions": evidence_of(session_b, compared)}
    seconds = time.perf_counter() - started
    return ParityReport(_told(session_b), _told(session_a), tuple(findings), seconds, evidence=evidence)


def _limits(session_a: Session, session_b: Session, said: Said) -> RowLimits:
    """What two sessions may differ by, row by row where PyTorch is one of them and can be given errors.

    Elsewhere the formula speaks, and a model that amplifies rounding shows it by how far each session is from itself when it is
    asked in chunks.
    """
    precision = max(session_a.precision, session_b.precision, key=UNIT_ROUNDOFF.__getitem__)
    rounds = any(one.activation_block is not None for one in (session_a, session_b))
    reference = next((one for one in (session_a, session_b) if isinstance(one, TorchSession)), None)
    if reference is not None and not rounds:
        asked = [scenario for scenario, _ in said]
        with in_float32(reference) as noisy:
            return measure_limits(logits_by_row(reference, asked), noisy, precision, asked)
    formula = RowLimits.of_formula(session_b)
    limit = formula.worst + (0.0 if _is_exact(session_a) else limit_of(session_a))
    noise = max(_from_itself(one, said) for one in (session_a, session_b))
    return replace(formula, worst=max(limit, row_limit(session_b.config, precision, noise)))


def _from_itself(session: Session, said: Said) -> float:
    """The largest relative L2 error of a row between a prompt that is read whole and the same in chunks."""
    worst = 0.0
    for scenario, _ in said:
        whole, chunks = (observe(session, replace(scenario, chunk_size=size)) for size in (None, _CHUNK))
        errors = [compare_rows(a.logits, b.logits).relative_l2 for a, b in zip(whole, chunks, strict=True)]
        worst = max(worst, *(error for error in errors if error < inf), 0.0)
    return worst


_CHUNK = 7
_MOST_ROWS = 32


def _asked(config: ModelConfig, inputs: Sequences | None) -> list[Scenario]:
    if inputs is None:
        return list(scenarios(config))
    rows = check_prompts([list(one) for one in inputs], config)
    short = [f"sequence {number} has one id: give two at least" for number, row in enumerate(rows) if len(row) < 2]
    long = [
        f"sequence {number} has {len(row)} ids, and the model {config.max_seq_len} positions"
        for number, row in enumerate(rows)
        if len(row) > config.max_seq_len
    ]
    raise_all(InputError, "sequences that can not be compared:", [*short, *long])
    return brought_scenarios(config, rows)


def _is_exact(session: Session) -> bool:
    return session.precision in ("fp64", "fp32") and session.activation_block is None


def _told(session: Session) -> str:
    return f"{session.backend}, {session.weights or session.precision}"


def verify(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    backend: str = "onnxruntime",
    data: str | Path | None = None,
    report: str | Path | None = None,
    bisect: bool = False,
) -> ParityReport:
    """Climb the whole ladder with a finished bundle, as ``motrt verify`` does.

    Args:
        bundle: its folder.
        checkpoint: what it was made of; None: where the manifest says that lay.
        backend: ``onnxruntime``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
        data: a file of sequences to compare besides.
        report: a folder for ``report.html`` and ``report.json``.
        bisect: ask every part of the graph alone, and name the first that fails.

    Raises:
        MotrtError: as ``motrt.export.verification.verify_bundle``.
    """
    options = VerifyOptions(None if data is None else Path(data), bisect, None if report is None else Path(report))
    return verify_bundle(bundle, checkpoint, backend=backend, options=options)


def dump(session: Session, file: str | Path, inputs: Sequences | None = None) -> None:
    """Write what a session says, in polygraphy's format: one iteration for each sequence, its logits within their ranges.

    ``polygraphy inspect data FILE`` shows it; two of them are compared by ``polygraphy.comparator``.

    Args:
        session: what answers.
        file: to write, as JSON.
        inputs: as for ``compare``.
    """
    said = []
    for scenario in _asked(session.config, inputs):
        observed = observe(session, scenario)
        said.append({f"row {one.row}, position {one.position}": np.asarray(one.logits, np.float32) for one in observed})
    save_outputs(_told(session), said, Path(file))
