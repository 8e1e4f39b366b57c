"""Climb the ladder, rung by rung, and say whether what runs is the model.

The reference runs first and is let go before the backend is loaded: the two are never in memory together. For the laws that
replace weights (P3) a second session stands beside the first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from motrt.errors import BackendError, CheckpointError
from motrt.export.parity.agreement import Compared, agreement_findings, compare, evidence_of, noise_of, typical_finding
from motrt.export.parity.bisect import Bisection, RecordedPass, bisect, recorded_passes
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.contract import contract_findings
from motrt.export.parity.derived import derived_contract_findings, named_for, own_consistency_findings, served, use_finding
from motrt.export.parity.findings import Finding, Outcome, Report
from motrt.export.parity.generation import (
    Generated,
    Greedy,
    Plan,
    as_scenario,
    generate_plans,
    generation_findings,
    greedy,
    judge_generated,
    plans,
)
from motrt.export.parity.hostile import brought_scenarios, hostile_scenarios, remarkable_ids, sampled_scenario
from motrt.export.parity.part_values import first_without_numbers, parts
from motrt.export.parity.quantization_loss import deployed_decoder, measure_losses
from motrt.export.parity.replacement import OnnxReplacement
from motrt.export.parity.routing_laws import PlainAnswers, Replacement, absence_of, answers_of, law_findings, swap_of
from motrt.export.parity.row_noise import RowLimits, logits_by_row, measure_limits, observations_of
from motrt.export.parity.scenarios import (
    NUM_DECODE_STEPS,
    Int64,
    Observation,
    Scenario,
    in_batches,
    scenarios,
)
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Steps
from motrt.export.streamed_decoder import StreamedDecoder
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Session
from motrt.runtime.tolerances import CODE_ERROR
from motrt.runtime.torch_session import TorchSession

# On a GPU steps are cheap, and errors of half precision have further to travel.
NUM_GPU_STEPS = 64

# Of a model with more parameters the reference in float64 holds one weight at a time.
LARGEST_IN_MEMORY = 400_000_000


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
        max_loss: budget of what quantization may lose, a mean KL divergence in nats; None: by the fewest bits of a weight.
    """

    brought: tuple[Int64, ...] = ()
    is_dissected: bool = False
    failing_part: Path | None = None
    max_loss: float | None = None


@dataclass(frozen=True)
class Expectation:
    """What the reference gave for everything that will be asked.

    Attributes:
        name: of the reference, for people.
        scenarios: each with the reference's logits.
        plans: each with the reference's greedy tokens.
        limits: how far from that a right graph may be, row by row.
        passes: by graph, every part's inputs and outputs, where the graph is to be taken apart.
    """

    name: str
    scenarios: tuple[tuple[Scenario, list[Observation]], ...]
    plans: tuple[tuple[Plan, Greedy], ...]
    limits: RowLimits
    passes: Mapping[Graph, Sequence[RecordedPass]] = field(default_factory=dict)


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
        losses = measure_losses(config, checkpoint, weights, steps, extras.brought, extras.max_loss)
    with steps.step("reference in PyTorch"):
        # An operator that holds several parts can not be taken apart; its graph is compared as a whole.
        apart = [graph for graph in subject.graphs if graph.operators == "standard"]
        expected = reference(config, checkpoint, subject.precision, weights=weights, extras=extras, graphs=(CANONICAL, *apart))
    limits = expected.limits
    with subject.open(num_threads) as session:
        with steps.step("P2 self-consistency"):
            findings += asked("P2", lambda: consistency_findings(session, limits))
        with steps.step("P3 routing laws"):
            answers: list[PlainAnswers] = []
            findings += asked("P3", partial(_laws_and_answers, session, limits, answers))
            for said in answers:
                findings += asked("P3", partial(_laws_of_weights, said, subject.replacement(num_threads)))
        with steps.step("P4 agreement with the reference"):
            compared: list[Compared] = []
            findings += asked("P4", lambda: _agreement(session, expected, compared))
        with steps.step("P5 generation"):
            generated = generate_plans(session, expected.plans)
            findings += [judge_generated(one, noise_of(compared), limits) for one in generated]
        backend, evidence = session.backend, _evidence(session, expected, compared, generated)
    for graph in subject.graphs:
        with steps.step(f"P2 to P5 of {graph.name}"):
            findings += named_for(graph, _climb_derived(subject, graph, expected, num_threads))
    if weights is not None and quantization is not None and quantization.activation_blocks(config):
        with steps.step("P2 to P4 with rounded activations"):
            findings += _climb_rounded(subject, weights, quantization, expected, num_threads)
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
    session: Session, expected: Expectation, compared: Sequence[Compared], generated: Sequence[Generated]
) -> dict[str, Any]:
    """What a report for people shows beside the findings."""
    return {
        "limit": expected.limits.worst,
        "explanation": expected.limits.explanation(),
        "noise": expected.limits.to_dict(),
        "positions": evidence_of(session, compared),
        "greedy": [one.to_dict(session.config) for one in generated],
    }


def asked(rung: str, ask: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``ask`` finds; where a pass can not be done at all, that is the finding, and not the end of the climb."""
    try:
        return ask()
    except BackendError as failure:
        return [Finding(rung, "every pass can be done", Outcome.FAIL, str(failure).strip())]


def _agreement(session: Session, expected: Expectation, compared: list[Compared]) -> list[Finding]:
    """P4; ``compared`` is given every position, for the rungs behind it."""
    compared += compare(session, expected.scenarios, expected.limits)
    return agreement_findings(session, compared)


def _climb_derived(subject: Subject, graph: Graph, expected: Expectation, num_threads: int) -> list[Finding]:
    """P2 to P5 of one derived graph, the canonical one behind it for what it does not serve."""
    with subject.open(num_threads, (graph, CANONICAL)) as session:
        findings = asked("P2", lambda: own_consistency_findings(session, graph, expected.limits))
        answers: list[PlainAnswers] = []
        if not graph.is_step:  # prompts of any mix; the weights that a step must not read are not in it at all
            findings += asked("P3", partial(_laws_and_answers, session, expected.limits, answers))
        wanted = served(graph, [scenario for scenario, _ in expected.scenarios], subject.config)
        chosen = {id(one) for one in wanted}  # scenarios hold arrays, which do not compare to one answer
        its_own = replace(expected, scenarios=tuple(one for one in expected.scenarios if id(one[0]) in chosen))
        compared: list[Compared] = []
        findings += asked("P4", lambda: _agreement(session, its_own, compared))
        findings += generation_findings(session, expected.plans, noise_of(compared), expected.limits)
        findings.append(use_finding(session.passes[graph.name]))
    # Two graphs with every weight, twice, would be more memory than anything else takes: the first two are closed by now.
    replacement = subject.replacement(num_threads, (graph, CANONICAL))
    for said in answers:
        findings += asked("P3", partial(_laws_of_weights, said, replacement))
    return findings


def _climb_rounded(
    subject: Subject, weights: QuantizedWeights, quantization: Quantization, expected: Expectation, num_threads: int
) -> list[Finding]:
    """P2 to P4 of the canonical graph as it is deployed, whose products round activations to 8 bits.

    The reference rounds in the same way, so that what is left is a fault, and no loss. Rounding to codes makes small errors
    large now and then, where an activation lies between two of them: that too is each row's own noise.
    """
    blocks = quantization.activation_blocks(subject.config)
    rounded = rounded_reference(subject.config, weights, blocks, subject.precision, expected)
    with subject.open(num_threads, exact=False) as session:
        found = asked("P2", lambda: consistency_findings(session, rounded.limits))
        found += asked("P3", lambda: law_findings(session, rounded.limits))
        compared: list[Compared] = []
        found += asked("P4", lambda: _agreement(session, rounded, compared))
    found.append(typical_finding(compared))
    # Near-ties that fall the other way are what such rounding does, and ``loss`` counts them.
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
        most_rows, precision = session.most_rows, session.precision
    findings: list[Finding] = []
    weights = None if subject is None else subject.weights()
    if subject is not None:
        findings = _contract(subject, checkpoint, steps)
    if weights is not None:
        findings += measure_losses(config, checkpoint, weights, steps, extras.brought, extras.max_loss, rounds=False)
    with steps.step("reference in PyTorch"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        expected = reference(config, checkpoint, precision, device, NUM_GPU_STEPS, most_rows, weights, extras)
    with open_it() as session:
        own, evidence = _climbed_session(session, expected, steps)
        findings, backend = findings + own, session.backend
        missing = getattr(session, "no_kernels", "")  # why it ran as it would otherwise, at any time of the climb
    if other_ways and missing:
        findings.append(Finding("P4", "the step kernels were examined", Outcome.SKIPPED, f"they did not run here: {missing}"))
    for name, open_otherwise in (other_ways or {}).items() if not missing else ():
        with open_otherwise() as session:
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
    limits = expected.limits
    with steps.step(f"P2 self-consistency{how}"):
        findings = asked("P2", lambda: consistency_findings(session, limits))
    with steps.step(f"P3 routing laws{how}"):
        findings += asked("P3", lambda: law_findings(session, limits))
    with steps.step(f"P4 agreement with the reference{how}"):
        compared: list[Compared] = []
        findings += asked("P4", lambda: _agreement(session, expected, compared))
    with steps.step(f"P5 generation{how}"):
        generated = generate_plans(session, expected.plans)
        findings += [judge_generated(one, noise_of(compared), limits) for one in generated]
    passes: Mapping[str, int] = getattr(session, "passes", {})
    findings += [replace(use_finding(count), graph=name) for name, count in passes.items() if name != CANONICAL.name]
    return findings, _evidence(session, expected, compared, generated)


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
        found.append(bisect(file, config, passes, expected.limits.conditioning, steps, num_threads, graph, place))
    told = next((one for one in found if one.first or one.broken), found[0])
    return {"drift": dict(found[0].drift), "bisect": told.to_dict()}


def reference(
    config: ModelConfig,
    checkpoint: Checkpoint,
    precision: str,
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
    torch.backends.cuda.matmul.allow_tf32 = False
    extras = extras or Extras()
    chosen = [*hostile_scenarios(config, remarkable_ids(config, checkpoint.read)), *brought_scenarios(config, extras.brought)]
    # The checkpoint's own head, at the length that was exported: the surgery on the head is examined with the rest.
    own, read = (checkpoint.config.replace(max_seq_len=config.max_seq_len), checkpoint.read)
    if weights is not None:
        own, read = config, weights.read
    with (
        TorchSession(_exact_decoder(own, read, device)) as exact,
        TorchSession(Decoder.from_tensors(own, read, torch.float32, device)) as noisy,
    ):
        said = ask(exact, noisy, precision, num_steps, most_rows, chosen)
        if not extras.is_dissected:
            return said
        whole = noisy if isinstance(exact.decoder, StreamedDecoder) else exact
        return replace(said, passes={graph: recorded_passes(whole.decoder, graph) for graph in graphs})


def _exact_decoder(config: ModelConfig, read: Read, device: str) -> Decoder:
    """The reference in float64, where its errors are none; a large one with a single weight in memory at a time."""
    if device != "cpu" or sum(one.numel for one in parameters(config)) < LARGEST_IN_MEMORY:
        return Decoder.from_tensors(config, read, torch.float64, device)
    return StreamedDecoder(config, read, torch.float64)


def ask(
    exact: TorchSession,
    noisy: TorchSession | None = None,
    precision: str = "fp32",
    num_steps: int = NUM_DECODE_STEPS,
    most_rows: int | None = None,
    chosen: Sequence[Scenario] = (),
) -> Expectation:
    """Ask for everything that P2 to P5 will want to know.

    Args:
        exact: the reference; it is asked for whole rows, in one pass.
        noisy: the same in float32: it is given errors, and generates; None: a copy of ``exact``.
        precision: of what will be compared with it.
        num_steps: decode steps of the usual scenarios.
        most_rows: of a batch; what is examined may take no more.
        chosen: scenarios beside the usual ones.
    """
    if noisy is None:
        with in_float32(exact) as copy:
            return ask(exact, copy, precision, num_steps, most_rows, chosen)
    config, most = exact.config, min(MOST_ROWS, most_rows or MOST_ROWS)
    batches = [part for one in (*scenarios(config, num_steps=num_steps), *chosen) for part in in_batches(one, most)]
    logits = logits_by_row(exact, batches)
    _refuse_nothing([(one, observations_of(one, logits, config)) for one in batches], noisy)
    sampled = sampled_scenario(noisy)
    written = [] if sampled is None else in_batches(sampled, most)
    going_on = tuple((plan, greedy(noisy, plan.prompt, plan.modalities)) for plan in plans(config))
    generated = [as_scenario(plan, expected) for plan, expected in going_on]
    logits |= logits_by_row(exact, [*written, *generated])
    watched, batches = [*batches, *written, *generated], [*batches, *written]
    said = tuple((one, observations_of(one, logits, config)) for one in batches)
    return Expectation(f"{exact.backend}, {exact.precision}", said, going_on, measure_limits(logits, noisy, precision, watched))


@contextmanager
def in_float32(session: TorchSession) -> Iterator[TorchSession]:
    """The same decoder in float32: itself, or a copy for as long as this is open."""
    if session.precision == "fp32":
        yield session
        return
    with TorchSession(deepcopy(session.decoder).float()) as copy:
        yield copy


def rounded_reference(
    config: ModelConfig, weights: QuantizedWeights, blocks: Mapping[str, int], precision: str, expected: Expectation
) -> Expectation:
    """What the reference gives where products round their activations to 8 bits, as those of onnxruntime on a CPU.

    In float32: next to what rounding to codes makes of any error, float32's own are nothing.

    Args:
        config: what the graph computes.
        weights: what its codes stand for.
        blocks: by weight, how many activations before it share a scale.
        precision: that the graph computes in.
        expected: what the reference gave without that rounding.
    """
    wanted = [scenario for scenario, _ in expected.scenarios]
    with TorchSession(deployed_decoder(config, weights.read, blocks)) as session:
        logits = logits_by_row(session, wanted)
        limits = measure_limits(logits, session, precision, wanted, CODE_ERROR)
    said = tuple((one, observations_of(one, logits, config)) for one in wanted)
    return Expectation(f"{expected.name}, activations rounded", said, (), limits)


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


def _laws_and_answers(session: Session, limits: RowLimits, answers: list[PlainAnswers]) -> list[Finding]:
    """The laws that a session alone shows; ``answers`` is given what it says, for those that want weights replaced."""
    found = law_findings(session, limits)
    if len(session.config.modalities) > 1:
        answers.append(answers_of(session, limits))
    return found


def _laws_of_weights(answers: PlainAnswers, replacement: Replacement) -> list[Finding]:
    """The laws that are seen by replacing weights."""
    absence = [absence_of(answers, replacement, modality) for modality in range(len(answers.config.modalities))]
    return [*absence, swap_of(answers, replacement)]
