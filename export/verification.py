"""``motrt verify``: whether a finished bundle is still the model, and what a report tells of it.

The questions are the ladder's (``parity``); this file opens what they are asked of, and writes down what came.
"""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from motrt.errors import BackendError, CheckpointError, InputError
from motrt.export.parity.failing_part import FAILING_PART, PART_FILE
from motrt.export.parity.findings import Report
from motrt.export.parity.gate import Extras, Subject, climb, climb_session
from motrt.export.parity.token_file import read_token_file
from motrt.export.report_page import check_writable, write_report
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint
from motrt.model_def.graph import CANONICAL
from motrt.runtime.bundle import Bundle, open_bundle
from motrt.runtime.load import RUNNING_BACKENDS, open_session, other_ways, source_of
from motrt.runtime.tokenizer import read_tokenizer
from motrt.runtime.versions import EXPORT_PACKAGES, installed_versions, refuse_older, version_differences


@dataclass(frozen=True)
class VerifyOptions:
    """What is wanted of ``verify_bundle`` beside the ladder.

    Attributes:
        data: a file of sequences to compare besides (``parity.token_file``).
        bisect: ask every part of the graph alone, and name the first that fails.
        report: the folder for ``report.json``, ``report.html`` and, with a part that fails, ``failing_part``; a report asks the
            parts too.
        max_loss: budget of what quantization may lose, a mean KL divergence in nats; None: by the fewest bits of a weight.
    """

    data: Path | None = None
    bisect: bool = False
    report: Path | None = None
    max_loss: float | None = None


def verify_bundle(
    path: str | Path,
    checkpoint_path: str | Path | None = None,
    steps: Steps | None = None,
    num_threads: int = 0,
    backend: str = "onnxruntime",
    options: VerifyOptions | None = None,
) -> Report:
    """Climb the parity ladder with a finished bundle, every byte of it read first.

    Backends on a GPU are compared with PyTorch on the same GPU; the laws that replace weights are asked on the CPU alone.

    Args:
        path: the bundle.
        checkpoint_path: what it was made of; None: where the manifest says that lay.
        steps: told of progress.
        num_threads: onnxruntime's; 0: one per core.
        backend: ``onnxruntime`` (every graph, on the CPU), ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
        options: what is wanted besides.

    Raises:
        InputError: for another backend, a file of sequences that can not be used, or a report's folder that can not be written.
        BundleError: for a bundle that is damaged.
        CheckpointError: when the checkpoint is not there, is not the one that the bundle was made of, or makes no numbers.
        BackendError: when nothing here can run the bundle.
    """
    refuse_older(*EXPORT_PACKAGES, "onnxruntime")
    if backend not in RUNNING_BACKENDS:
        raise InputError(f"backend must be one of {', '.join(RUNNING_BACKENDS)} ({backend!r} came)")
    steps, options = steps or Steps(), options or VerifyOptions()
    if options.report is not None:
        check_writable(options.report)
    with steps.step("hash the bundle", open_bundle(path).num_bytes) as advance:
        bundle = open_bundle(path, "hash", advance)
    extras = _extras(bundle, options)
    if backend == "onnxruntime":
        refuse_unverifiable(bundle.manifest.precision)
    checkpoint = open_checkpoint(source_of(bundle) if checkpoint_path is None else checkpoint_path)
    with steps.step("hash the checkpoint", checkpoint.num_bytes) as advance:
        came = checkpoint.sha256(advance)
    if came != bundle.manifest.source["sha256"]:
        raise CheckpointError(
            f"{checkpoint.path} is not the checkpoint that {bundle.path} was made of (its hash differs): "
            "name the right one with --checkpoint, or export again"
        )
    if backend == "onnxruntime":
        with steps.step("open what is examined"):
            _refuse_what_can_not_run(subject_of(bundle), num_threads)
    report = _climbed(bundle, checkpoint, steps, num_threads, backend, extras)
    report = replace(report, evidence={**_circumstances(bundle), **report.evidence})
    if options.report is not None:
        write_report(report.to_page(), options.report)
    return report


def _refuse_what_can_not_run(subject: Subject, num_threads: int) -> None:
    """Open each graph once: P1 asks its questions of graphs that are valid, and onnxruntime says of others what is wrong."""
    for graph in (CANONICAL, *subject.graphs):
        subject.open(num_threads, (graph,)).close()


def _extras(bundle: Bundle, options: VerifyOptions) -> Extras:
    brought: tuple[Any, ...] = ()
    if options.data is not None:
        tokenizer = None if bundle.tokenizer_path is None else read_tokenizer(bundle.tokenizer_path)
        brought = read_token_file(options.data, bundle.config, tokenizer)
    place = None if options.report is None else options.report / FAILING_PART
    if place is not None and (place / PART_FILE).is_file():
        shutil.rmtree(place)  # an earlier run's: its fault may be mended
    return Extras(brought, options.bisect or options.report is not None, place, options.max_loss)


def _climbed(bundle: Bundle, checkpoint: Checkpoint, steps: Steps, num_threads: int, backend: str, extras: Extras) -> Report:
    subject = subject_of(bundle)
    if backend == "onnxruntime":
        return climb(subject, checkpoint, steps, num_threads, extras)
    opened = partial(open_session, bundle, backend, num_threads)
    ways = other_ways(bundle, backend)
    return climb_session(opened, bundle.config, checkpoint, steps, subject.files, extras, subject, ways)


def subject_of(bundle: Bundle) -> Subject:
    """The graphs of a bundle, for the ladder."""
    manifest = bundle.manifest
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return Subject(bundle.model_path, bundle.config, manifest.precision, files, manifest.graphs, manifest.quantization)


def _circumstances(bundle: Bundle) -> dict[str, Any]:
    """What a report for people says of where it was made."""
    return {
        "bundle": str(bundle.path),
        "notes": version_differences(bundle.manifest.versions),
        "environment": installed_versions(),
        "made_with": dict(bundle.manifest.versions),
    }


def refuse_unverifiable(precision: str) -> None:
    """Raise BackendError for a precision that no backend on the CPU computes in."""
    if precision == "bf16":
        raise BackendError(
            "a bf16 bundle can not be verified here: onnxruntime's CPU kernels have no bfloat16. Export it with --no-verify "
            "and verify it where a backend runs it, or choose fp32 or fp16 as --precision (--activations where quantised)"
        )
