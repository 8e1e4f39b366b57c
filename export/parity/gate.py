"""Climb the ladder, rung by rung, and say whether what runs is the model.

The reference runs first and is let go before the backend is loaded: the two are never in memory together. For the laws that
replace weights (P3) a second session stands beside the first.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from motrt.errors import BackendError, CheckpointError
from motrt.export.parity.agreement import Compared, agreement_findings, compare, evidence_of, noise_of
from motrt.export.parity.bisect import Bisection, RecordedPass, bisect, recorded_passes
from motrt.export.parity.calibration import Calibration, calibrate, expected_difference, explanation
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.contract import contract_findings
from motrt.export.parity.derived import derived_contract_findings, named_for, own_consistency_findings, served, use_finding
from motrt.export.parity.findings import Finding, Outcome, Report
from motrt.export.parity.generation import (
    Generated,
    Greedy,
    Plan,
    generate_plans,
    generation_findings,
    greedy,
    judge_generated,
    plans,
)
from motrt.export.parity.hostile import brought_scenarios, hostile_scenarios, remarkable_ids, sampled_scenario
from motrt.export.parity.part_values import first_without_numbers, parts
from motrt.export.parity.quantization_loss import decoder_of_codes, measure_losses
from motrt.export.parity.replacement import OnnxReplacement
from motrt.export.parity.rounded_activations import explained_limit, largest_rounding_error, told_apart
from motrt.export.parity.routing_laws import PlainAnswers, Replacement, absence_of, answers_of, law_findings, swap_of
from motrt.export.parity.scenarios import (
    NUM_DECODE_STEPS,
    Int64,
    Observation,
    Scenario,
    in_batches,
    observe_together,
    scenarios,
)
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Session
from motrt.runtime.tolerances import limit_of, rounded_activations_limit
from motrt.runtime.torch_session import TorchSession

# On a GPU steps are cheap, and errors of half precision have further to travel.
NUM_GPU_STEPS = 64

# Below this many parameters the reference runs in float64: it costs nothing there, and leaves one side without error.
LARGEST_FLOAT64_REFERENCE = 10_000_000


# Rows of one batch: more would only take memory.
MOST_ROWS = 32

OpenSession = TypeVar("OpenSession", bound=Session)


@dataclass(frozen=True)
class Subject:
    """What is examined: ONNX files and what they claim to compute.

    Attributes:
        model_file: ``model.onnx``, its external data beside it.
        config: what the graphs compute.
        precision: of weights and cache.
        files: sha256 by name of the files examined, for the report.
        graphs: those derived of the canonical one, beside it.
        quantization: the format of the graphs' weights.
    """

    model_file: Path
    config: ModelConfig
    precision: str
    files: Mapping[str, str]
    graphs: tuple[Graph, ...] = ()
    quantization: Quantization | None = None

    def open(
        self, num_threads: int, graphs: Sequence[Graph] = (CANONICAL,), exact: bool = True, **replacements: Any
    ) -> OnnxSession:
        """A session over some of the graphs, ``exact`` but for what its precision rounds; see ``OnnxSession``."""
        return OnnxSession(
            self.model_file,
            self.config,
            num_threads,
            graphs=graphs,
            quantization=self.quantization,
            exact_activations=exact,
            **replacements,
        )

    def replacement(self, num_threads: int, graphs: Sequence[Graph] = (CANONICAL,)) -> OnnxReplacement:
        """The same with weights replaced, for the laws that are seen so."""
        opened = partial(self.open, num_threads, graphs)
        return OnnxReplacement(self.model_file, self.config, self.dtype, opened, self.quantization, graphs)

    def weights(self) -> QuantizedWeights | None:
        """What the graphs hold in the place of the checkpoint's weights; None where they hold those."""
        return None if self.quantization is None else QuantizedWeights(self.model_file, self.config, self.quantization)

    @property
    def dtype(self) -> str:
        return DTYPE_OF_PRECISION[self.precision]


@dataclass(frozen=True)
class Extras:
    """What is asked beside the ladder.

    Attributes:
        brought: a user's own sequences, to be compared besides.
        is_dissected: whether every part of the graph is asked alone, which names the place of a fault.
        failing_part: the folder to write the first part that fails into; None: nowhere.
    """

    brought: tuple[Int64, ...] = ()
    is_dissected: bool = False
    failing_part: Path | None = None


@dataclass(frozen=True)
class Expectation:
    """What the reference said to everything that will be asked, and to itself."""

    name: str
    scenarios: tuple[tuple[Scenario, list[Observation]], ...]
    plans: tuple[tuple[Plan, Greedy], ...]
    calibration: Calibration
    passes: Mapping[Graph, Sequence[RecordedPass]] = field(default_factory=dict)

    def taken_by(self, session: OpenSession) -> OpenSession:
        """``session``, allowed what this model does to rounding."""
        session.conditioning = self.calibration.conditioning
        return session


def climb(subject: Subject, checkpoint: Checkpoint, steps: Steps, num_threads: int = 0, extras: Extras | None = None) -> Report:
    """P1 to P5 for onnxruntime on the CPU against PyTorch.

    Args:
        subject: what is examined.
        checkpoint: what it was made of.
        steps: told of progress.
        num_threads: onnxruntime's; 0: one per core.
        extras: what is asked besides.
    """
    extras = extras or Extras()
    started = time.perf_counter()
    config, quantization = subject.config, subject.quantization
    findings = _contract(subject, checkpoint, steps)
    losses: list[Finding] = []
    if (weights := subject.weights()) is not None:
        losses = measure_losses(config, checkpoint, weights, steps)
    with steps.step("reference in PyTorch"):
        # An operator that holds several parts can not be taken apart; its graph is compared as a whole.
        apart = [graph for graph in subject.graphs if graph.operators == "standard"]
        expected = reference(config, checkpoint, weights=weights, extras=extras, graphs=(CANONICAL, *apart))
    with expected.taken_by(subject.open(num_threads)) as session:
        with steps.step("P2 self-consistency"):
            findings += asked("P2", lambda: consistency_findings(session))
        with steps.step("P3 routing laws"):
            answers: list[PlainAnswers] = []
            findings += asked("P3", partial(_laws_and_answers, session, answers))
            for said in answers:
                findings += asked("P3", partial(_laws_of_weights, said, subject.replacement(num_threads)))
        with steps.step("P4 agreement with the reference"):
            compared: list[Compared] = []
            findings += asked("P4", lambda: _agreement(session, expected.scenarios, compared))
        with steps.step("P5 generation"):
            generated = generate_plans(session, expected.plans)
            findings += [judge_generated(one, noise_of(compared)) for one in generated]
        block = None if quantization is None else quantization.activation_block(config)
        backend, evidence = session.backend, _evidence(session, expected, compared, generated, block)
    for graph in subject.graphs:
        with steps.step(f"P2 to P5 of {graph.name}"):
            findings += named_for(graph, _climb_derived(subject, graph, expected, num_threads))
    if block is not None:
        with steps.step("P2 to P4 with rounded activations"):
            is_right = not any(one.outcome is Outcome.FAIL for one in findings)
            findings += _climb_rounded(subject, expected, num_threads, is_right)
    if extras.is_dissected:
        findings += [_not_dissected(graph) for graph in subject.graphs if graph.operators != "standard"]
        evidence |= _dissected(subject.model_file, config, expected, steps, num_threads, extras.failing_part)
    findings += losses
    return Report(backend, expected.name, tuple(findings), time.perf_counter() - started, subject.files, evidence)


def _contract(subject: Subject, checkpoint: Checkpoint, steps: Steps) -> list[Finding]:
    """P1 of every graph: what is stored, whoever runs it."""
    config, dtype, quantization = subject.config, subject.dtype, subject.quantization
    with steps.step("P1 contract and weights", checkpoint.num_bytes) as advance:
        findings = contract_findings(subject.model_file, config, dtype, checkpoint, advance, quantization)
        for graph in subject.graphs:
            own = derived_contract_findings(subject.model_file, graph, config, dtype, quantization)
            findings += named_for(graph, own)
    return findings


def _evidence(
    session: Session,
    expected: Expectation,
    compared: Sequence[Compared],
    generated: Sequence[Generated],
    block: int | None,
) -> dict[str, Any]:
    """What a report for people shows beside the findings; ``block``: of activations that are rounded where it is deployed."""
    rounded = None if block is None else rounded_activations_limit(session.config, block)
    limit = limit_of(session)
    return {
        "limit": limit,
        "explanation": explanation(session.config, session.precision, limit, expected.calibration, rounded),
        "calibration": expected.calibration.to_dict(),
        "positions": evidence_of(session, compared),
        "greedy": [one.to_dict(session.config) for one in generated],
    }


def asked(rung: str, ask: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``ask`` finds; where a pass can not be done at all, that is the finding, and not the end of the climb."""
    try:
        return ask()
    except BackendError as failure:
        return [Finding(rung, "every pass can be done", Outcome.FAIL, str(failure).strip())]


def _agreement(
    session: Session,
    references: Sequence[tuple[Scenario, Sequence[Observation]]],
    compared: list[Compared],
    limit_alone: bool = False,
) -> list[Finding]:
    """P4; ``compared`` is given every position, for the rungs behind it."""
    compared += compare(session, references)
    return agreement_findings(session, compared, limit_alone=limit_alone)


def _climb_derived(subject: Subject, graph: Graph, expected: Expectation, num_threads: int) -> list[Finding]:
    """P2 to P5 of one derived graph, the canonical one behind it for what it does not serve."""
    with expected.taken_by(subject.open(num_threads, (graph, CANONICAL))) as session:
        findings = asked("P2", lambda: own_consistency_findings(session, graph))
        answers: list[PlainAnswers] = []
        if not graph.is_step:  # prompts of any mix; the weights that a step must not read are not in it at all
            findings += asked("P3", partial(_laws_and_answers, session, answers))
        wanted = served(graph, [scenario for scenario, _ in expected.scenarios], subject.config)
        chosen = {id(one) for one in wanted}  # scenarios hold arrays, which do not compare to one answer
        references = [(scenario, said) for scenario, said in expected.scenarios if id(scenario) in chosen]
        compared: list[Compared] = []
        findings += asked("P4", lambda: _agreement(session, references, compared))
        findings += generation_findings(session, expected.plans, noise_of(compared))
        findings.append(use_finding(session.passes[graph.name]))
    # Two graphs with every weight, twice, would be more memory than anything else takes: the first two are closed by now.
    replacement = subject.replacement(num_threads, (graph, CANONICAL))
    for said in answers:
        findings += asked("P3", partial(_laws_of_weights, said, replacement))
    return findings


def _climb_rounded(subject: Subject, expected: Expectation, num_threads: int, is_right: bool) -> list[Finding]:
    """P2 to P4 of the canonical graph as it is deployed: its products round activations to 8 bits.

    Weights and routing were asked of it without that, as tightly as of any graph; what is asked here is that the rounding costs
    no more than rounding can. Where it does, and the graph ``is_right`` without it, the model may be one that rounding costs
    more: PyTorch is asked how much, and what that explains is a loss, and no fault.
    """
    found = _asked_rounded(subject, expected, num_threads)
    weights, quantization = subject.weights(), subject.quantization
    if not is_right or weights is None or quantization is None or all(one.outcome is not Outcome.FAIL for one in found):
        return found
    blocks = quantization.activation_blocks(subject.config)
    error = largest_rounding_error(subject.config, weights, blocks, expected.scenarios)
    limit = explained_limit(error)
    if limit is None:
        return found
    return told_apart(found, _asked_rounded(subject, expected, num_threads, limit), error, max(blocks.values()))


def _asked_rounded(subject: Subject, expected: Expectation, num_threads: int, limit: float | None = None) -> list[Finding]:
    """The questions of ``_climb_rounded``, with ``limit`` for a row's relative L2 error and nothing else, where one is given.

    A near-tie that falls the other way is no question any more.
    """
    with expected.taken_by(subject.open(num_threads, exact=False)) as session:
        if limit is not None:
            session.conditioning *= limit / limit_of(session)
        found = asked("P2", lambda: consistency_findings(session)) + asked("P3", lambda: law_findings(session))
        found += asked("P4", lambda: _agreement(session, expected.scenarios, [], limit_alone=limit is not None))
    settled = {Outcome.AMBIGUOUS: Outcome.PASS}
    return [
        replace(one, question=f"{one.question}, activations rounded", outcome=settled.get(one.outcome, one.outcome))
        for one in found
    ]


def climb_session(
    open_it: Callable[[], Session],
    config: ModelConfig,
    checkpoint: Checkpoint,
    steps: Steps,
    files: Mapping[str, str],
    extras: Extras | None = None,
    subject: Subject | None = None,
    other_ways: Mapping[str, Callable[[], Session]] | None = None,
) -> Report:
    """P1 to P5 for any other backend against PyTorch, which runs on the same GPU where it can: in float32, without TF32.

    Args:
        open_it: opens what is examined; once to see that it can be, and again when the reference is gone.
        config: what it computes.
        checkpoint: what it was made of.
        steps: told of progress.
        files: sha256 by name of the files examined, for the report.
        extras: what is asked besides.
        subject: the graphs that the backend's files are made of, for P1; None: nothing of theirs is asked.
        other_ways: by name, how the same backend can be opened otherwise, as it would open itself where something is missing;
            each is asked P2 to P5, too.
    """
    extras = extras or Extras()
    started = time.perf_counter()
    with steps.step("open what is examined"), open_it() as session:
        most_rows = session.most_rows
    findings: list[Finding] = []
    weights = None if subject is None else subject.weights()
    if subject is not None:
        findings = _contract(subject, checkpoint, steps)
    if weights is not None:
        findings += measure_losses(config, checkpoint, weights, steps)
    with steps.step("reference in PyTorch"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        expected = reference(config, checkpoint, device, NUM_GPU_STEPS, most_rows, weights, extras)
    with expected.taken_by(open_it()) as session:
        own, evidence = _climbed_session(session, expected, steps)
        findings, backend = findings + own, session.backend
        missing = getattr(session, "no_kernels", "")  # why it ran as it would otherwise, at any time of the climb
    if other_ways and missing:
        findings.append(Finding("P4", "the step kernels were examined", Outcome.SKIPPED, f"they did not run here: {missing}"))
    for name, open_otherwise in (other_ways or {}).items() if not missing else ():
        with expected.taken_by(open_otherwise()) as session:
            own, _ = _climbed_session(session, expected, steps, f", {name}")
            findings += [replace(one, question=f"{one.question}, {name}") for one in own]
    # What no backend on the CPU computes in cannot be taken apart there.
    if extras.is_dissected and subject is not None and subject.precision != "bf16":
        evidence |= _dissected(subject.model_file, config, expected, steps, 0, extras.failing_part)
    return Report(backend, expected.name, tuple(findings), time.perf_counter() - started, files, evidence)


def _climbed_session(
    session: Session, expected: Expectation, steps: Steps, how: str = ""
) -> tuple[list[Finding], dict[str, Any]]:
    """P2 to P5 of an open session, and the evidence."""
    with steps.step(f"P2 self-consistency{how}"):
        findings = asked("P2", lambda: consistency_findings(session))
    with steps.step(f"P3 routing laws{how}"):
        findings += asked("P3", lambda: law_findings(session))
    with steps.step(f"P4 agreement with the reference{how}"):
        compared: list[Compared] = []
        findings += asked("P4", lambda: _agreement(session, expected.scenarios, compared))
    with steps.step(f"P5 generation{how}"):
        generated = generate_plans(session, expected.plans)
        findings += [judge_generated(one, noise_of(compared)) for one in generated]
    passes: Mapping[str, int] = getattr(session, "passes", {})
    findings += [replace(use_finding(count), graph=name) for name, count in passes.items() if name != CANONICAL.name]
    return findings, _evidence(session, expected, compared, generated, session.activation_block)


def _not_dissected(graph: Graph) -> Finding:
    why = "its operators hold several parts each, and the canonical graph was; export with --operators standard to ask it too"
    return Finding("P1", "its parts can be asked alone", Outcome.SKIPPED, why, graph=graph.name)


def _dissected(
    model_file: Path, config: ModelConfig, expected: Expectation, steps: Steps, num_threads: int, folder: Path | None
) -> dict[str, Any]:
    """Every graph taken apart; the canonical one first, and the first that has a fault is told."""
    found: list[Bisection] = []
    for graph, passes in expected.passes.items():
        file = model_file.parent / graph.file_name
        known = any(one.first or one.broken for one in found)  # one folder is enough
        place = None if known else folder
        found.append(bisect(file, config, passes, expected.calibration, steps, num_threads, graph, place))
    told = next((one for one in found if one.first or one.broken), found[0])
    return {"drift": dict(found[0].drift), "bisect": told.to_dict()}


def reference(
    config: ModelConfig,
    checkpoint: Checkpoint,
    device: str = "cpu",
    num_steps: int = NUM_DECODE_STEPS,
    most_rows: int | None = None,
    weights: QuantizedWeights | None = None,
    extras: Extras | None = None,
    graphs: Sequence[Graph] = (CANONICAL,),
) -> Expectation:
    """Ask the PyTorch decoder everything, then let go of it.

    Where weights are quantised it holds what their codes stand for: what is left is not the quantisation's loss, but a fault.
    """
    size = sum(parameter.numel for parameter in parameters(config))
    precision = "fp64" if size < LARGEST_FLOAT64_REFERENCE else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False
    extras = extras or Extras()
    chosen = [*hostile_scenarios(config, remarkable_ids(config, checkpoint.read)), *brought_scenarios(config, extras.brought)]
    if weights is not None:
        opened = TorchSession(decoder_of_codes(config, weights, precision, device))
    else:
        # The checkpoint's own head, at the length that was exported: the surgery on the head is examined with the rest.
        opened = TorchSession.open(checkpoint, precision, device, config.max_seq_len)
    with opened as session:
        said = ask(session, num_steps, most_rows, chosen)
        if not extras.is_dissected:
            return said
        return replace(said, passes={graph: recorded_passes(session.decoder, graph) for graph in graphs})


def ask(
    session: Session, num_steps: int = NUM_DECODE_STEPS, most_rows: int | None = None, chosen: Sequence[Scenario] = ()
) -> Expectation:
    """Everything that P4 and P5 will want to know.

    Args:
        session: the reference.
        num_steps: decode steps of the usual scenarios.
        most_rows: of a batch; what is examined may take no more.
        chosen: scenarios beside the usual ones.
    """
    usual = scenarios(session.config, num_steps=num_steps)
    said_to_usual = _said(session, usual, most_rows)
    said = [*said_to_usual, *_said(session, chosen, most_rows)]
    if (sampled := sampled_scenario(session)) is not None:
        said += _said(session, [sampled], most_rows)
    calibration = Calibration(session.precision, expected_difference(session.config, session.precision))
    if session.config.max_seq_len > 2:
        calibration = calibrate(session, usual[-2], said_to_usual)
    return Expectation(
        name=f"{session.backend}, {session.precision}",
        scenarios=tuple(said),
        plans=tuple((plan, greedy(session, plan.prompt, plan.modalities)) for plan in plans(session.config)),
        calibration=calibration,
    )


def _said(session: Session, asked: Sequence[Scenario], most_rows: int | None) -> list[tuple[Scenario, list[Observation]]]:
    """What the reference says to each, in batches that what is examined takes too."""
    batches = [part for one in asked for part in in_batches(one, min(MOST_ROWS, most_rows or MOST_ROWS))]
    said = list(zip(batches, observe_together(session, batches), strict=True))
    _refuse_nothing(said, session)
    return said


def _refuse_nothing(said: Sequence[tuple[Scenario, list[Observation]]], reference: Session) -> None:
    """Raise where the reference itself gives no numbers: nothing can be compared with that."""
    names = reference.config.modality_names
    for scenario, observations in said:
        for one in observations:
            if not np.isfinite(one.logits).all():
                raise CheckpointError(
                    f"the reference itself ({reference.backend}, {reference.precision}) gives no number, first in "
                    f"'{scenario.name}', row {one.row}, position {one.position}, for {names[one.predicted]}"
                    f"{_first_without_numbers(reference)}: the checkpoint's weights are at fault"
                )


def _first_without_numbers(reference: Session) -> str:
    """The part of the decoder that makes no numbers of numbers, in words."""
    decoder = getattr(reference, "decoder", None)
    for one in recorded_passes(decoder) if decoder is not None else ():
        if (part := first_without_numbers(parts(reference.config), one.values)) is not None:
            return f" ({part})"
    return ""


def _laws_and_answers(session: Session, answers: list[PlainAnswers]) -> list[Finding]:
    """The laws that a session alone shows; ``answers`` is given what it says, for those that want weights replaced."""
    found = law_findings(session)
    if len(session.config.modalities) > 1:
        answers.append(answers_of(session))
    return found


def _laws_of_weights(answers: PlainAnswers, replacement: Replacement) -> list[Finding]:
    """The laws that are seen by replacing weights."""
    absence = [absence_of(answers, replacement, modality) for modality in range(len(answers.config.modalities))]
    return [*absence, swap_of(answers, replacement)]
