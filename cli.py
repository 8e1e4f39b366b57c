"""The command line: parse, call one function, print where the result is.

Results go to standard output, progress and errors to standard error; with --json, the document is all that standard output
gets, whatever libraries print. Exit codes: 0 done (``verify``: PASS), 1 it could not be done (``verify``: FAIL), 2 wrong usage
or input out of range, 3 ``verify`` says AMBIGUOUS. Heavy packages are imported inside the commands that need them.
"""

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from motrt import __version__
from motrt.errors import BackendError, CheckpointError, InputError, LossError, MotrtError, ParityError
from motrt.export.report import printable

if TYPE_CHECKING:
    from motrt.export.report import DrawnSteps
    from motrt.runtime.decoding import Step
    from motrt.runtime.sampling import Sampling
    from motrt.runtime.schedule import Schedule
    from motrt.runtime.session import Session

EXIT_FAILED, EXIT_USAGE, EXIT_AMBIGUOUS, EXIT_LOSS = 1, 2, 3, 4

PRESETS = ("tiny", "tiny64", "small", "llama-3.2-1b", "llama-3.2-1b-text")
DTYPES = ("float32", "bfloat16", "float16")
PROMPT_BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "cuda", "onnxruntime", "torch")
CHECKS = ("size", "hash", "answer")
CHECK_HELP = "Repeatable: answer alone may miss a damaged weight, which hash finds."

# So that a command line without a limit ends soon.
DEFAULT_MAX_TOKENS = 64

# Tables that are not read on a terminal are given room: a file has no width.
results = Console(highlight=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 140)
progress = Console(stderr=True, highlight=False)

# Under this name click's context keeps the stream that is the document's alone.
OUTPUT = "motrt.output"

# What the system answers where a write has no room or no place; which file it was, it does not say.
TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

Command = Callable[..., None]


class Program(click.Group):
    """The commands, for a standard output that may be full or closed: that is a sentence, too, and exit code 1."""

    def main(self, *arguments: Any, **named: Any) -> Any:
        """Run the command that the arguments name, as click does."""
        if sys.stderr is None:
            os.open(os.devnull, os.O_WRONLY)  # else the next file has its number, and what is said there
        if sys.stdout is None:
            refuse_output("standard output is closed:")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding has no letters for
        try:
            return super().main(*arguments, **named)
        except OSError as failure:
            if failure.filename is not None or failure.errno not in TAKES_NO_MORE:
                raise
            refuse_output(f"{failure.strerror}, on standard output or where files were being written: make room, or")


def refuse_output(why: str) -> NoReturn:
    """Say what takes no more, and leave; what is still held for standard output is let go."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    progress.print(f"[bold red]Error:[/bold red] {why} send it elsewhere", soft_wrap=True)
    sys.exit(EXIT_FAILED)


def mends(command: Command) -> Command:
    """Turn what the user can mend into a sentence and an exit code; a bug keeps its traceback."""

    @wraps(command)
    def mended(*args: Any, **kwargs: Any) -> None:
        try:
            with output_for_the_document() if kwargs.get("as_json") else nullcontext():
                command(*args, **kwargs)
        except MotrtError as failure:
            report = {"report": failure.report} if isinstance(failure, ParityError) and failure.report else {}
            tell_failure(type(failure).__name__, str(failure), kwargs, report)
            codes = {InputError: EXIT_USAGE, LossError: EXIT_LOSS}
            sys.exit(next((code for kind, code in codes.items() if isinstance(failure, kind)), EXIT_FAILED))
        except OSError as failure:  # the machine's answer about a path: not ours to mend, and no bug
            if failure.filename is None:
                raise
            tell_failure("OSError", f"{failure.filename}: {failure.strerror}; mend that, or give another path", kwargs, {})
            sys.exit(EXIT_FAILED)

    return mended


def tell_failure(kind: str, message: str, options: dict[str, Any], report: dict[str, Any]) -> None:
    """A sentence on standard error; for machines, the same as the one JSON document."""
    progress.print(f"[bold red]Error:[/bold red] {escape(printable(message))}", soft_wrap=True)
    if options.get("as_json"):
        print_json({"error": kind, "message": message, **report})


def print_json(values: Any) -> None:
    """One JSON document on standard output."""
    echo_document(json.dumps(values, indent=2, default=str))


@contextmanager
def output_for_the_document() -> Iterator[None]:
    """Keep standard output for ``echo_document``: what libraries print goes to standard error."""
    click.get_current_context().meta[OUTPUT] = sys.stdout
    with redirect_stdout(sys.stderr):
        yield


def echo_document(text: str) -> None:
    """Text on the standard output that the program was given."""
    click.echo(text, file=click.get_current_context().meta.get(OUTPUT))


max_loss_option = click.option(
    "--max-loss",
    type=click.FloatRange(min=0, min_open=True),
    help="Budget of what quantization may lose: mean KL in nats, by modality.  [default: 0.5 at 4 bits, 0.05 at 8]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
out_argument = click.argument("out", type=click.Path(path_type=Path))
path_argument = click.argument("path", type=click.Path(path_type=Path))


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="motrt", message="%(prog)s %(version)s")
def main() -> None:
    """Export, run and prove routed text/audio expert models."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        # Leaves as an interrupt does, so that half-written folders are removed on the way.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def tell_backends(as_json: bool) -> None:
    from motrt.export.report import table
    from motrt.runtime.backends import probe_all
    from motrt.runtime.gpu import find_gpus

    gpus, probes = find_gpus(), [one.to_dict() for one in probe_all()]
    if as_json:
        print_json({"gpus": [asdict(one) for one in gpus.found], "driver": gpus.driver, "backends": probes})
        return
    say(f"GPU: {', '.join(map(str, gpus.found)) or gpus.reason}")
    rows = [(one["backend"], "yes" if one["usable"] else "no", one["detail"] or one["reason"]) for one in probes]
    results.print(table("backends, best first", ["backend", "usable", "what runs it, or why not"], rows))


def needs_export_packages() -> None:
    """Say what is missing or too old before anything is done, where torch or onnx are not installed."""
    from motrt.runtime.versions import EXPORT_PACKAGES, refuse_older

    refuse_older(*EXPORT_PACKAGES)
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401

        for name in ("onnx_ir", "onnxscript"):  # only looked for: importing them takes a second, and most commands need neither
            if find_spec(name) is None:
                raise ImportError(f"No module named {name!r}")
    except ImportError as missing:
        raise BackendError(f"this command needs PyTorch and ONNX ({missing}): pip install 'motrt[export,cpu]'") from None


def drawn_steps() -> "DrawnSteps":
    from motrt.export.report import DrawnSteps

    return DrawnSteps(progress)


@main.command()
@out_argument
@click.option("--preset", type=click.Choice(PRESETS), default="small", show_default=True, help="What to make.")
@click.option("--head", type=click.Choice(["split", "shared"]), help="Output head; the preset's where not said.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Stored dtype.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@json_option
@mends
def init(out: Path, preset: str, head: str | None, dtype: str, seed: int, as_json: bool) -> None:
    """Make a checkpoint of random, well-scaled weights in OUT."""
    needs_export_packages()
    from motrt.export.report import size
    from motrt.model_def.config import ModelConfig
    from motrt.model_def.initialize import init_checkpoint
    from motrt.model_def.parameters import parameters

    config = ModelConfig.preset(preset)
    if head is not None:
        config = config.replace(head=head)
    count = sum(one.numel for one in parameters(config))
    num_bytes = count * (4 if dtype == "float32" else 2)
    with drawn_steps().step(f"make {preset}", num_bytes) as advance:
        init_checkpoint(out, config, dtype, seed, advance)
    if as_json:
        print_json({"checkpoint": str(out), "parameters": count, "bytes": num_bytes, "dtype": dtype, "seed": seed})
    else:
        say(f"{out}: {preset}, {count:,} parameters, {size(num_bytes)} in {dtype}, seed {seed}")


def say(sentence: str) -> None:
    """A line on standard output, never broken."""
    results.print(escape(printable(sentence)), soft_wrap=True)


@main.command()
@out_argument
@click.option(
    "--mot", type=click.Path(path_type=Path), help="Mixture-of-Transformers state: .pt, .pth, .safetensors, DCP folder."
)
@click.option("--params", type=click.Path(path_type=Path), help="The state's params.json; its vocab_size is the text's.")
@click.option("--llama", type=click.Path(path_type=Path), help="Llama folder, Meta's or Hugging Face's.")
@click.option(
    "--lora", type=click.Path(path_type=Path), help="PEFT folder of a LoRA adapter, merged into --llama (Hugging Face's)."
)
@click.option("--gguf", type=click.Path(path_type=Path), help="GGUF file of a Llama; its blocks are dequantized.")
@click.option("--musicgen", type=click.Path(path_type=Path), help="Hugging Face MusicGen folder: the audio expert.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file, laid over the assembled model.")
@click.option("--native", type=click.Path(path_type=Path), help="Native checkpoint, to change its head or dtype.")
@click.option("--head", type=click.Choice(["split", "shared"]), help="Head to give the result, exactly.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Stored dtype; the narrowest exact one where not said.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of projections that no source brings.")
@click.option(
    "--rope-theta", type=float, help="Base of RoPE, where a configuration does not give it (Llama 2: 10000, 3: 500000)."
)
@click.option("--rope-factor", type=float, help="Factor of RoPE scaling, where it is not given (Llama 3.1, 3.3: 8; 3.2: 32).")
@click.option(
    "--rope-scaling/--no-rope-scaling",
    default=None,
    help="Whether RoPE is scaled.  [default: as the Llama's configuration says; not for a --mot state]",
)
@json_option
@mends
def convert(
    out: Path,
    mot: Path | None,
    params: Path | None,
    llama: Path | None,
    lora: Path | None,
    gguf: Path | None,
    musicgen: Path | None,
    adapter: Path | None,
    native: Path | None,
    head: Any,
    dtype: str | None,
    seed: int,
    rope_theta: float | None,
    rope_factor: float | None,
    rope_scaling: bool | None,
    as_json: bool,
) -> None:
    """Assemble the native checkpoint OUT from checkpoints in other formats.

    Give one of --mot (with --params), --llama (with --lora, --musicgen and --adapter where there are), --gguf (with --musicgen
    and --adapter), or --native.
    """
    if sum(source is not None for source in (mot, llama, gguf, native)) != 1:
        raise click.UsageError("give one of --mot, --llama, --gguf or --native")
    if (mot is None) != (params is None):
        raise click.UsageError("--mot and --params belong together: the state does not say its own sizes")
    if llama is None and (lora or (gguf is None and (musicgen or adapter))):
        raise click.UsageError("--lora, --musicgen and --adapter are laid over --llama; the latter two over --gguf, too")
    if native is not None and (rope_theta, rope_factor, rope_scaling) != (None, None, None):
        raise click.UsageError("a native checkpoint's RoPE is in its config.json: --rope-... are for --mot, --llama and --gguf")
    needs_export_packages()
    from motrt.export.report import accounting_tables
    from motrt.model_def.checkpoint.assemble import convert_gguf, convert_llama, convert_mot, convert_native
    from motrt.model_def.checkpoint.rope import RopeChoices

    rope = RopeChoices(rope_theta, rope_factor, rope_scaling)
    if mot is not None and params is not None:
        assembly = convert_mot(mot, params, head, rope)
    elif llama is not None:
        assembly = convert_llama(llama, musicgen, adapter, head, seed, rope, lora)
    elif gguf is not None:
        assembly = convert_gguf(gguf, musicgen, adapter, head, seed, rope)
    else:
        assembly = convert_native(native or Path(), head)
    accounting = assembly.accounting.to_dict()
    if not as_json:
        for one in accounting_tables(accounting):
            results.print(one)
        for note in accounting["notes"]:
            say(note)
    with drawn_steps().step("write the checkpoint") as advance:
        assembly.write(out, dtype, advance)
    if as_json:
        print_json({"checkpoint": str(out), "config": assembly.config.to_dict(), "accounting": accounting})
    else:
        say(f"{out}: {dtype or assembly.dtype}; look at it with `motrt inspect {out}`")


@main.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--backends", is_flag=True, help="Tell which backends can be used on this machine, and why not the others.")
@json_option
@mends
def inspect(path: Path | None, backends: bool, as_json: bool) -> None:
    """Tell of a checkpoint, a bundle or an ONNX file at PATH, or with --backends of this machine."""
    if backends == (path is not None):
        raise click.UsageError("give a PATH, or --backends")
    if path is None:
        tell_backends(as_json)
        return
    needs_export_packages()
    from motrt.export.inspection import inspect as look
    from motrt.export.report import inspection_tables

    found = look(path, drawn_steps())
    if as_json:
        print_json(found)
    else:
        for one in inspection_tables(found):
            results.print(one)


ENGINE_OPTIONS = (
    click.option("--compute-capability", help="Of the GPUs that will run it: 8.9, or 8.6,8.9,12.0."),
    click.option("--batch", help="Rows: BEST,MOST, or one number.  [default: 1,8]"),
    click.option("--prefill-tokens", help="Prompt ids of one pass: BEST,MOST, or one number.  [default: 128,512]"),
    click.option("--workspace", type=click.FloatRange(0.001, 10_000), help="Most scratch memory of a layer, in GB."),
    click.option("--version-compatible", is_flag=True, help="For later versions of the library too (tensorrt)."),
    click.option("--hardware-compatible", is_flag=True, help="For other GPUs, Ampere and later, too (tensorrt)."),
    click.option("--timing-cache", type=click.Path(path_type=Path), help="Keep measurements of kernels here (tensorrt)."),
)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """What the builder of engines takes, for targets that are compiled."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def chosen_engine_options(target: str, given: dict[str, Any]) -> Any:
    """What was said of engines; None for targets that have none."""
    from motrt.export.engine_from_onnx import EngineOptions
    from motrt.export.trt_profile import USUAL_BATCH, USUAL_NEW_TOKENS, Sizes, parse_range

    said = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False)]
    if target not in ("tensorrt", "tensorrt-rtx"):
        if said:
            raise click.UsageError(f"{', '.join(said)}: for --target tensorrt and tensorrt-rtx alone")
        return None
    capabilities = [part.strip() for part in (given["compute_capability"] or "").split(",")]
    if given["compute_capability"] is None:
        capabilities = []
    sizes = Sizes(
        parse_range(given["batch"]) if given["batch"] is not None else USUAL_BATCH,
        parse_range(given["prefill_tokens"]) if given["prefill_tokens"] is not None else USUAL_NEW_TOKENS,
    )
    return EngineOptions(
        target,
        sizes,
        tuple(capabilities),
        None if given["workspace"] is None else int(given["workspace"] * 1e9),
        given["version_compatible"],
        given["hardware_compatible"],
        given["timing_cache"],
    )


QUANTIZE_OPTIONS = (
    click.option(
        "--block-size",
        type=click.IntRange(1),
        help="Weights that share a scale.  [default: 128, or what the widths allow; 32 in narrow models]",
    ),
    click.option("--asymmetric", is_flag=True, help="A zero point for every block, too; it does not always lose less."),
    click.option("--part", multiple=True, help="Store a part otherwise: head=int8, expert.audio=int4:32, embedding=none."),
    click.option("--scales", type=click.Choice(["search", "absmax"]), help="How scales are chosen.  [default: search]"),
    click.option(
        "--calibrate",
        metavar="FILE|none",
        help="JSON lines of ids or text, by whose activations int4 scales are chosen.  [default: sampled from the model]",
    ),
    click.option("--activations", type=click.Choice(["fp32", "fp16", "bf16"]), help="What codes are multiplied in."),
)
QUANTIZE_NAMES = ("block_size", "asymmetric", "part", "scales", "calibrate", "activations")


def quantize_options(command: Callable[..., None]) -> Callable[..., None]:
    """What is said of weights that are stored as codes."""
    for option in reversed(QUANTIZE_OPTIONS):
        command = option(command)
    return command


def chosen_quantize_options(precision: str, given: dict[str, Any]) -> Any:
    """What was said of quantised weights; None for precisions that quantise nothing."""
    from motrt.export.bundle_from_checkpoint import QUANTIZED, QuantizeOptions

    said = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False, ())]
    if precision not in QUANTIZED:
        if said:
            raise click.UsageError(f"{', '.join(said)}: for --precision {', '.join(QUANTIZED)} alone")
        return None
    return QuantizeOptions(
        block_size=given["block_size"],
        symmetric=not given["asymmetric"],
        parts=given["part"],
        scales=given["scales"] or "search",
        calibrate=given["calibrate"],
        activations=given["activations"],
    )


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4", "fp8"]),
    default="fp32",
    show_default=True,
    help="Of everything; int8, int4 and fp8 of the weights alone.",
)
@click.option("--max-seq-len", type=click.IntRange(1), help="Most positions per row; the checkpoint's where not said.")
@click.option("--allow-untrained", is_flag=True, help="Go on though a modality's rows were never trained.")
@click.option("--no-verify", is_flag=True, help="Do not climb the parity ladder; the manifest says so.")
@click.option(
    "--target",
    type=click.Choice(["onnx", "cuda", "tensorrt", "tensorrt-rtx"]),
    default="onnx",
    show_default=True,
    help="What to make the bundle for; the canonical graph is in every one.",
)
@click.option(
    "--operators",
    type=click.Choice(["standard", "onnxruntime"]),
    help="Of the steps of --target cuda. onnxruntime has some of its own, each for several standard ones: the default in bf16.",
)
@quantize_options
@max_loss_option
@engine_options
@json_option
@mends
def export(
    checkpoint: Path,
    bundle: Path,
    precision: str,
    max_seq_len: int | None,
    allow_untrained: bool,
    no_verify: bool,
    target: Any,
    operators: Any,
    max_loss: float | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Export CHECKPOINT to the folder BUNDLE, and prove that it is still the model.

    --target tensorrt builds on the GPU that will run the engines; --target tensorrt-rtx builds anywhere, for RTX GPUs. Both
    compute in fp16 or bf16. --target cuda adds graphs for onnxruntime on a GPU.

    --precision int8 and int4 store weights as codes and scales: smaller, and faster on a CPU.

    Exit code 0: the bundle is there. 1: the graph is not the model, or cannot be made. 2: usage. 4: the graph is right, and its
    format loses more of the model than --max-loss. Nothing is left behind but by 0.
    """
    needs_export_packages()
    from motrt.export.bundle_from_checkpoint import export_bundle
    from motrt.export.report import parity_table, seconds_table, size, verdict_line

    exported = export_bundle(
        checkpoint,
        bundle,
        precision,
        max_seq_len,
        allow_untrained,
        not no_verify,
        drawn_steps(),
        target,
        chosen_engine_options(target, {name: value for name, value in chosen.items() if name not in QUANTIZE_NAMES}),
        chosen_quantize_options(precision, {name: chosen[name] for name in QUANTIZE_NAMES}),
        operators,
        max_loss,
    )
    num_bytes = sum(one.num_bytes for one in exported.bundle.manifest.files.values())
    report = None if exported.report is None else exported.report.to_dict()
    if as_json:
        engines = [one.to_dict() for one in exported.bundle.manifest.engines]
        told = {"bundle": str(bundle), "bytes": num_bytes, "seconds": exported.seconds, "parity": report}
        print_json({**told, "engines": engines})
        return
    results.print(seconds_table(exported.seconds))
    if report is not None:
        results.print(parity_table(report))
    verdict = "not verified" if report is None else verdict_line(report)
    results.print(f"{escape(str(bundle))}: {precision}, {size(num_bytes)}, parity {verdict}", soft_wrap=True)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="What it was made of; found by itself where it lay.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "cuda", "tensorrt", "tensorrt-rtx"]),
    default="onnxruntime",
    show_default=True,
    help="What to examine: every graph on the CPU, the graphs on a GPU, or the engines.",
)
@click.option("--threads", type=click.IntRange(0, 4096), default=0, help="For products; 0: one per core.")
@click.option("--data", type=click.Path(path_type=Path), help='Your own sequences too: lines of [1, 2, 3] or {"text": ...}.')
@click.option("--bisect", is_flag=True, help="Ask every part of the graph alone, and name the first that fails.")
@click.option("--report", "report_folder", type=click.Path(path_type=Path), help="Write report.html and report.json there.")
@click.option("--explain", is_flag=True, help="Say where the limits come from, with this model's numbers.")
@max_loss_option
@json_option
@mends
def verify(
    bundle: Path,
    checkpoint: Path | None,
    backend: str,
    threads: int,
    data: Path | None,
    bisect: bool,
    report_folder: Path | None,
    explain: bool,
    max_loss: float | None,
    as_json: bool,
) -> None:
    """Climb the parity ladder with BUNDLE, every byte of it checked first.

    The reference in PyTorch and what is examined are in memory one after the other.

    Exit code 0 PASS, 1 FAIL or a damaged bundle, 2 usage (also where the checkpoint is not to be had or nothing here runs the
    bundle), 3 AMBIGUOUS (near-ties that rounding may decide), 4 the graph is right and loses more than --max-loss.
    """
    needs_export_packages()
    from motrt.export.verification import VerifyOptions, verify_bundle

    try:
        options = VerifyOptions(data, bisect, report_folder, max_loss)
        report = verify_bundle(bundle, checkpoint, drawn_steps(), threads, backend, options).to_page()
    except (CheckpointError, BackendError) as failure:
        tell_failure(type(failure).__name__, str(failure), {"as_json": as_json}, {})
        sys.exit(EXIT_USAGE)
    if as_json:
        hidden = {"positions", "drift", "greedy", "environment", "made_with"}
        hidden |= {name for name, is_wanted in (("bisect", bisect), ("explanation", explain)) if not is_wanted}
        print_json({name: value for name, value in report.items() if name not in hidden})
    else:
        tell_parity(bundle, report, explain, bisect)
        if report_folder is not None:
            say(f"the report: {report_folder / 'report.html'}")
    if report["verdict"] != "FAIL" and report["loss"] == "over":
        sys.exit(EXIT_LOSS)
    sys.exit({"PASS": 0, "FAIL": EXIT_FAILED, "AMBIGUOUS": EXIT_AMBIGUOUS}[report["verdict"]])


def tell_parity(bundle: Path, report: dict[str, Any], explain: bool, bisect: bool) -> None:
    """A climb as tables and sentences."""
    from motrt.export.report import bisect_table, parity_table, verdict_line

    results.print(parity_table(report))
    for note in report["notes"]:
        say(f"note: {note}")
    if explain:
        for line in report["explanation"]:
            say(line)
    if bisect and "bisect" in report:
        if report["bisect"]["parts"]:
            results.print(bisect_table(report["bisect"]))
        say(f"bisect: {report['bisect']['sentence']}")
        if report["bisect"]["folder"]:
            say(f"the part that fails, to be run alone: {report['bisect']['folder']}")
    results.print(f"{escape(str(bundle))}: parity {verdict_line(report)}", soft_wrap=True)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text; the bundle must carry a tokenizer.")
@click.option("--prompt-ids", help="Unified ids, as in 1,2,3.")
@click.option("--audio-frames", type=click.IntRange(1), help="Go on in audio for so many frames.")
@click.option(
    "--schedule", "schedule_text", help="Which modality comes when: 'text:20,audio:50f', 'interleave:text=13,audio=26'."
)
@click.option("--max-tokens", type=click.IntRange(0), help=f"Most tokens; {DEFAULT_MAX_TOKENS} where nothing else says.")
@click.option("--stop-id", "stop_ids", type=int, multiple=True, help="Finish after this id; may be given more than once.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Keep the k likeliest ids.")
@click.option("--top-p", type=float, help="Keep the likeliest ids that reach this probability together.")
@click.option("--min-p", type=float, help="Keep ids at least this likely relative to the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Where chance starts; a fresh one where not said.")
@click.option("--backend", type=click.Choice(PROMPT_BACKENDS), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(0, 4096), default=0, help="For products; 0: one per core.")
@click.option(
    "--check",
    type=click.Choice(CHECKS),
    multiple=True,
    default=("size",),
    show_default=True,
    help=f"Of the bundle's files; answer: of what the session says to the bundle's question, too. {CHECK_HELP}",
)
@json_option
@mends
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_ids: str | None,
    audio_frames: int | None,
    schedule_text: str | None,
    max_tokens: int | None,
    stop_ids: tuple[int, ...],
    backend: str,
    threads: int,
    check: tuple[str, ...],
    as_json: bool,
    **sampling: Any,
) -> None:
    """Say what comes after a prompt, as it comes, with the speed of each phase at the end."""
    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("give one of --prompt and --prompt-ids")
    if audio_frames is not None and schedule_text is not None:
        raise click.UsageError("give one of --audio-frames and --schedule")
    from motrt.runtime.decoding import encode
    from motrt.runtime.load import load
    from motrt.runtime.sampling import Sampling
    from motrt.runtime.schedule import total_tokens

    chosen = Sampling(**sampling)
    with load(bundle, backend, check, threads) as session:
        schedule = chosen_schedule(session, audio_frames, schedule_text)
        if max_tokens is None and (schedule is None or total_tokens(schedule, session.config) is None):
            max_tokens = DEFAULT_MAX_TOKENS
        start = encode(prompt, session) if prompt is not None else parse_ids(prompt_ids or "")
        told = Told(session, len(start))
        steps = session.generate(start, schedule=schedule, sampling=chosen, max_tokens=max_tokens, stop_ids=stop_ids)
        for step in steps:
            told.hear(step, quiet=as_json)
    if as_json:
        print_json(told.to_dict(chosen))
    else:
        click.echo()
        results.print(told.speed_table())


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="A file of text; the model must carry a tokenizer.")
@click.option("--data", type=click.Path(path_type=Path), help='A file of sequences: lines of [1, 2, 3] or {"text": ...}.')
@click.option("--context", type=int, help="Ids of a chunk, which begins with an empty cache.  [default: 300]")
@click.option("--max-tokens", type=click.IntRange(2), help="Read no more ids than this.")
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle or checkpoint to compare with.")
@click.option("--backend", type=click.Choice(PROMPT_BACKENDS), default="auto", show_default=True)
@click.option("--threads", "num_threads", type=click.IntRange(0, 4096), default=0, help="For products; 0: one per core.")
@click.option("--record", is_flag=True, help="Write the figures into the bundle's manifest, for `motrt inspect`.")
@json_option
@mends
def evaluate(model: Path, text: Path | None, data: Path | None, as_json: bool, **chosen: Any) -> None:
    """Measure how well MODEL, a bundle or a checkpoint, predicts a text: perplexity, and the distance to another model."""
    if (text is None) == (data is None):
        raise click.UsageError("give one of --text and --data")
    from motrt.export.evaluation import EvaluateOptions
    from motrt.export.evaluation import evaluate as measure
    from motrt.export.report import evaluation_table

    found = measure(model, EvaluateOptions(text, data, **chosen), drawn_steps()).to_dict()
    if as_json:
        print_json({"model": str(model), **found})
    else:
        results.print(evaluation_table(found))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt", "num_prompt", type=click.IntRange(1, 1 << 16), default=128, show_default=True, help="Ids of a prompt."
)
@click.option(
    "--tokens", "num_tokens", type=click.IntRange(1, 1 << 16), default=48, show_default=True, help="Decode steps of each case."
)
@click.option("--batch", "batch_size", type=click.IntRange(1, 1 << 10), default=1, show_default=True, help="Rows of each case.")
@click.option("--backend", type=click.Choice(PROMPT_BACKENDS), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(0, 4096), default=0, help="For products; 0: one per core.")
@json_option
@mends
def bench(bundle: Path, num_prompt: int, num_tokens: int, batch_size: int, backend: str, threads: int, as_json: bool) -> None:
    """Measure BUNDLE: prefill and decode of each modality and of a mixed batch, and the share of what memory allows.

    The last line is one JSON document (with --json the only one). Nothing else should run beside it.
    """
    from motrt.runtime.benchmark import benchmark, num_parts
    from motrt.runtime.bundle import is_bundle, open_bundle
    from motrt.runtime.load import load

    quantization = open_bundle(bundle).manifest.quantization if is_bundle(bundle) and backend != "torch" else None
    with load(bundle, backend, "size", threads) as session, bench_bar(num_parts(session, num_tokens)) as advance:
        found = benchmark(session, quantization, num_prompt, num_tokens, batch_size, advance)
    if not as_json:
        for one in bench_tables(found):
            results.print(one)
    echo_document(json.dumps(found))


@contextmanager
def bench_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing else needs the packages that exports draw theirs with."""
    from rich.progress import Progress

    with Progress(console=progress, transient=True, disable=not progress.is_terminal) as bars:
        task = bars.add_task("measure", total=total)
        yield lambda count: bars.advance(task, count)


def bench_tables(found: dict[str, Any]) -> list[Any]:
    from motrt.export.report import size, table

    def spread(one: dict[str, float]) -> tuple[str, str]:
        low, high = one["tokens_per_s_quartile_1"], one["tokens_per_s_quartile_3"]
        return f"{one['tokens_per_s']:.1f}", f"{low:.1f} to {high:.1f}"

    prefill = [(f"{name} prefill", *spread(one), "", "", "") for name, one in found["prefill"].items()]
    decode = [
        (
            f"{name} decode, {one['rows']} row{'s' if one['rows'] > 1 else ''}",
            *spread(one),
            size(one["weight_bytes_per_step"]),
            size(one["cache_bytes_per_step"]),
            f"{one['share_of_limit']:.0%}",
        )
        for name, one in found["decode"].items()
    ]
    columns = ["case", "tokens/s>", "quartiles>", "weights read a step>", "cache>", "of memory's limit>"]
    facts = [
        ("prompt, then tokens", f"{found['prompt']}, {found['tokens']}"),
        ("time to the first token", f"{found['seconds_to_first_token'] * 1e3:.0f} ms"),
        ("memory reads", f"{found['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"),
        ("most memory", "unknown" if found["peak_rss_bytes"] is None else size(found["peak_rss_bytes"])),
    ]
    facts += [
        (f"{name.removesuffix('_seconds_per_s')}", f"{value:.2f} seconds a second")
        for name, value in found.items()
        if name.endswith("_seconds_per_s")
    ]
    title = f"{found['backend']}, {found['weights']}"
    return [table(title, columns, prefill + decode), table("beside", ["", ">"], facts)]


SERVE_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."),
    click.option("--root-path", default="", help="What a proxy has before every path, as in /llm."),
    click.option(
        "--allowed-host", "allowed_hosts", multiple=True, help="A name that requests may ask for; *: any. Repeatable."
    ),
    click.option(
        "--trusted-proxy", "trusted_proxies", multiple=True, help="Address or network whose X-Forwarded-For counts. Repeatable."
    ),
    click.option(
        "--cors-origin", "cors_origins", multiple=True, help="https://site.example, whose pages may ask; *: all. Repeatable."
    ),
    click.option("--model-name", help="What requests call the model; the folder's name where not said."),
    click.option("--max-batch", type=int, default=8, show_default=True, help="Rows that decode together."),
    click.option("--max-queue", type=int, default=64, show_default=True, help="Requests that wait beside them."),
    click.option(
        "--prefill-chunk", type=int, default=64, show_default=True, help="Prompt ids read between two steps; at least 2 a row."
    ),
    click.option("--max-prompt-tokens", type=int, help="Of a request; as many as the model holds where not said."),
    click.option("--max-tokens", type=int, help="Of an answer; likewise."),
    click.option("--max-body-bytes", type=int, default=1 << 20, show_default=True, help="Of a request."),
    click.option("--max-connections", type=int, default=1000, show_default=True, help="At once; fewer where `ulimit -n` says."),
    click.option("--header-seconds", type=float, default=10.0, show_default=True, help="For a request's headers to come."),
    click.option("--body-seconds", type=float, default=10.0, show_default=True, help="For a request's body to come."),
    click.option("--keep-alive-seconds", type=int, default=5, show_default=True, help="Of silence after an answer."),
    click.option("--request-seconds", type=float, default=600.0, show_default=True, help="Most time for an answer."),
    click.option("--requests-per-minute", type=int, default=0, show_default=True, help="Of one key or address; 0: no limit."),
    click.option("--max-priority", type=int, default=0, show_default=True, help="The highest that a request can have."),
    click.option("--drain-seconds", type=float, default=30.0, show_default=True, help="For requests to end after SIGTERM."),
    click.option("--api-key-file", type=click.Path(path_type=Path), help="One key a line; requests must bring one."),
    click.option("--backend", type=click.Choice(PROMPT_BACKENDS), default="auto", show_default=True),
    click.option("--threads", type=click.IntRange(0, 4096), default=0, help="For products; 0: one per core."),
    click.option(
        "--check",
        type=click.Choice(CHECKS),
        multiple=True,
        help=f"Of the bundle; its known answer where it carries one. {CHECK_HELP}",
    ),
)


def serve_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(SERVE_OPTIONS):
        command = option(command)
    return command


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@serve_options
@mends
def serve(bundle: Path, model_name: str | None, **options: Any) -> None:
    """Serve BUNDLE over HTTP as OpenAI's completions do, text and audio, until SIGTERM. See docs/serving.md."""
    try:
        from motrt.serve.options import ServeOptions
        from motrt.serve.server import serve as run
    except ImportError as missing:
        raise BackendError(f"serving needs FastAPI and more ({missing}): pip install 'motrt[serve]'") from None
    options["check"] = options["check"] or None
    run(bundle, ServeOptions(model_name=model_name or bundle.resolve().name or "motrt", **options))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@json_option
@mends
def triton(bundle: Path, repository: Path, as_json: bool) -> None:
    """Write a Triton model repository: the graph, its engines, and the generation loop, as models of their own."""
    from motrt.serve.triton import write_repository

    models = write_repository(bundle, repository)
    if as_json:
        print_json({"repository": str(repository), "models": models})
        return
    say(f"{repository}: {', '.join(models)}")


def parse_ids(text: str) -> list[int]:
    """``1,2,3`` as ids."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--prompt-ids must be whole numbers with commas between, as in 1,2,3 ({text!r} came)") from None


def chosen_schedule(session: "Session", audio_frames: int | None, text: str | None) -> "Schedule | None":
    """What the options say comes next; None: the prompt's own modality."""
    from motrt.runtime.schedule import parse_schedule, then

    if audio_frames is not None:
        framed = [one.name for one in session.config.modalities if one.codes_per_frame > 1]
        if not framed:
            raise InputError("--audio-frames needs a model with a modality of several codes per frame; this one has none")
        return then(framed[0], frames=audio_frames)
    return None if text is None else parse_schedule(text)


class Told:
    """Prints steps as they come, and keeps what the summary says: tokens, frames, and the time of each phase."""

    def __init__(self, session: "Session", num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self.backend, self.precision = session.backend, session.weights or session.precision
        self.has_text = session.tokenizer is not None
        self.framed = {one.name for one in session.config.modalities if one.codes_per_frame > 1}
        self.steps: list[Step] = []
        self.started = time.perf_counter()
        self.at: list[float] = []

    def hear(self, step: "Step", quiet: bool) -> None:
        self.at.append(time.perf_counter())
        self.steps.append(step)
        if quiet:
            return
        if step.frame is not None:
            click.echo(f"[{' '.join(map(str, step.frame.codes))}] ", nl=step.frame.index % 8 == 7)
        elif step.text:
            click.echo(printable(step.text), nl=False)
        elif not self.has_text and step.modality not in self.framed:
            click.echo(f"{step.token_id} ", nl=False)

    def phases(self) -> list[dict[str, Any]]:
        """Tokens, seconds and their quotient: the prompt's ids until the first token, then each modality's decode steps."""
        if not self.at:
            return []
        found: list[dict[str, Any]] = [
            {"phase": "prefill, to the first token", "tokens": self.num_prompt, "seconds": self.at[0] - self.started}
        ]
        for name in dict.fromkeys(step.modality for step in self.steps[1:]):
            spans = [
                later - earlier
                for earlier, later, step in zip(self.at, self.at[1:], self.steps[1:], strict=False)
                if step.modality == name
            ]
            found.append({"phase": f"{name} decode", "tokens": len(spans), "seconds": sum(spans)})
        return [{**one, "tokens_per_s": one["tokens"] / max(one["seconds"], 1e-9)} for one in found]

    def to_dict(self, sampling: "Sampling") -> dict[str, Any]:
        return {
            "backend": self.backend,
            "precision": self.precision,
            "sampling": asdict(sampling),
            "tokens": [step.token_id for step in self.steps],
            "modalities": [step.modality for step in self.steps],
            "text": "".join(step.text for step in self.steps),
            "frames": [asdict(step.frame) for step in self.steps if step.frame],
            "finish": self.steps[-1].finish if self.steps else None,
            "phases": self.phases(),
        }

    def speed_table(self) -> Any:
        from rich.table import Table

        made = Table(title=f"{self.backend}, {self.precision}", title_justify="left", title_style="bold", header_style="bold")
        made.add_column("phase")
        for name in ("tokens", "seconds", "tokens/s"):
            made.add_column(name, justify="right")
        for one in self.phases():
            made.add_row(one["phase"], str(one["tokens"]), f"{one['seconds']:.3f}", f"{one['tokens_per_s']:.1f}")
        return made


if __name__ == "__main__":
    main(prog_name="motrt")
