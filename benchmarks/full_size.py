"""The whole road at full size, from files in the formats they are found in to generated audio: times and peak memory.

    .venv/bin/python benchmarks/full_size.py --work /somewhere/with/60GB --json benchmarks/results/full_size_cpu.json

Each step is a process of its own, so that its peak resident memory is its own. Weights are random, in bfloat16, at the
shapes of Llama-3.2-1B with MusicGen-small's experts. Nothing here is used by the package.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
MOTRT = [sys.executable, "-m", "motrt"]
MAKE = [sys.executable, str(HERE / "make_checkpoints.py"), "--preset", "llama-3.2-1b"]


@dataclass(frozen=True)
class Measured:
    """One step: what was run, how long it took, its peak resident memory, its exit code."""

    step: str
    command: str
    seconds: float
    peak_gb: float
    exit_code: int
    output: Any = None


def measure(step: str, command: list[str], cwd: Path) -> Measured:
    """Run ``command`` in ``cwd`` and read its peak memory from the kernel when it ends."""
    print(f"{step}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with (cwd / "stdout").open("w+") as captured:
        process = subprocess.Popen(command, cwd=cwd, stdout=captured)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        captured.seek(0)
        text = captured.read()
    seconds = time.perf_counter() - started
    print(f"  {seconds:.1f} s, {usage.ru_maxrss * 1024 / 1e9:.2f} GB, exit {process.returncode}", file=sys.stderr, flush=True)
    shown = [Path(part).name if part.endswith(".py") else part for part in command if part not in (sys.executable, "-m")]
    peak = usage.ru_maxrss * 1024 / 1e9
    return Measured(step, " ".join(shown), round(seconds, 1), round(peak, 2), process.returncode, told_by(text))


# Of what a command prints with --json, what the figures need: no table of keys, no list of tokens.
KEPT = ("verdict", "findings", "phases", "bytes", "total_parameters", "bytes_read_per_step", "dtype")


def told_by(text: str) -> dict[str, Any] | None:
    """The figures in a command's JSON document; None where it printed none."""
    try:
        document = json.loads(text)
    except ValueError:
        return None
    kept = {name: document[name] for name in KEPT if name in document}
    if isinstance(document.get("seconds"), dict):
        kept["seconds"] = document["seconds"]
    return kept


def steps(head: str, precisions: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """The road: files, native checkpoint, bundles with and without proof, generation."""
    convert = ["convert", "model", "--llama", "llama", "--musicgen", "musicgen", "--adapter", "adapter/adapter.pt"]
    road = [
        (f"write {kind} files", [*MAKE, "--kind", kind, "--out", kind.split("-")[0]])
        for kind in ("llama-meta", "musicgen", "adapter")
    ]
    road.append(("convert", [*MOTRT, *convert, "--head", head, "--dtype", "bfloat16", "--json"]))
    road.append(("inspect the checkpoint", [*MOTRT, "inspect", "model", "--json"]))
    for one in precisions:
        export = [*MOTRT, "export", "model", f"bundle-{one}", "--precision", one, "--json"]
        road.append((f"export {one}, not verified", [*export, "--no-verify"]))
        road.append((f"verify {one}", [*MOTRT, "verify", f"bundle-{one}", "--json"]))
        road.append(
            (f"export {one} with its proof", [*MOTRT, "export", "model", f"proven-{one}", "--precision", one, "--json"])
        )
        say = [*MOTRT, "generate", f"bundle-{one}", "--prompt-ids", "128000,9906,11,1917", "--audio-frames", "50", "--json"]
        road.append((f"generate 50 audio frames, {one}", say))
        say = [*MOTRT, "generate", f"bundle-{one}", "--prompt-ids", "128000,9906,11,1917", "--max-tokens", "50", "--json"]
        road.append((f"generate 50 text tokens, {one}", say))
    return road


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="An empty or new folder with 60 GB of room.")
@click.option("--head", type=click.Choice(["split", "shared"]), default="split", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("fp32", "fp16"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures.")
@click.option("--keep", is_flag=True, help="Leave the files that were made.")
def main(work: Path, head: str, precisions: tuple[str, ...], json_file: Path | None, keep: bool) -> None:
    """Walk the road and print its figures; exits with 1 where a step failed (3, AMBIGUOUS, is no failure)."""
    work.mkdir(parents=True, exist_ok=True)
    measured: list[Measured] = []
    for step, command in steps(head, precisions):
        measured.append(measure(step, command, work))
        if measured[-1].exit_code not in (0, 3):
            break
    if not keep:
        shutil.rmtree(work)
    packages = {name: version(name) for name in ("motrt", "torch", "onnx", "onnxruntime", "numpy")}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), **packages}
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine, "head": head, "steps": [asdict(one) for one in measured]}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for one in measured:
        print(f"| {one.step} | {one.seconds:.1f} | {one.peak_gb:.2f} | {one.exit_code} |")
    sys.exit(0 if measured[-1].exit_code in (0, 3) else 1)


if __name__ == "__main__":
    main()
