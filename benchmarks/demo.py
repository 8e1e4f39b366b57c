"""``make demo``: a small model from nothing to tokens, and a table of what happened.

Every step is the command that a user would type, run as one. What it makes stays in ``demo/`` to look at.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
PROMPT = "Play me a short tune, please."

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def run(*arguments: str) -> tuple[dict[str, Any], float]:
    """Run one motrt command with --json; its document and its seconds. A failure ends the demo with its exit code."""
    console.print(f"[bold]$ motrt {' '.join(map(repr_if_spaced, arguments))}[/bold]")
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "motrt", *arguments, "--json"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        console.print(done.stderr)
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document, time.perf_counter() - started


def repr_if_spaced(argument: str) -> str:
    return repr(argument) if " " in argument else argument


def write_tokenizer(file: Path) -> None:
    """A byte-level tokenizer of its 256 bytes alone: enough to read a prompt and to print what a random model says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(file))


def speeds(said: dict[str, Any]) -> str:
    return ", ".join(f"{one['phase']} {one['tokens_per_s']:.0f}/s" for one in said["phases"][1:])


def main() -> None:
    """Make, export, prove, generate; then say what happened."""
    started = time.perf_counter()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    rows: list[tuple[str, str, str, float]] = []

    made, seconds = run("init", "demo/model", "--preset", "small", "--seed", "1")
    write_tokenizer(DEMO / "model" / "tokenizer.json")
    console.print("(a tokenizer of 256 bytes is laid beside the model, to read prompts: of 16384 text ids it can print 256)")
    rows.append(("make a model", "init", f"{made['parameters']:,} random parameters, two modalities", seconds))

    exported, seconds = run("export", "demo/model", "demo/bundle")
    outcomes = [finding["outcome"] for finding in exported["parity"]["findings"]]
    skipped = f", {outcomes.count('SKIPPED')} does not apply" if "SKIPPED" in outcomes else ""
    proof = f"parity {exported['parity']['verdict']}: {outcomes.count('PASS')} questions pass{skipped}"
    rows.append(("export and prove it", "export", f"{exported['bytes'] / 1e6:.0f} MB; {proof}", seconds))

    text, seconds = run(
        "generate", "demo/bundle", "--prompt", PROMPT, "--max-tokens", "64", "--temperature", "0.8", "--seed", "1"
    )
    rows.append(("say text", "generate", f"{len(text['tokens'])} tokens, {speeds(text)}", seconds))

    audio, seconds = run("generate", "demo/bundle", "--prompt", PROMPT, "--audio-frames", "50")
    first = " ".join(map(str, audio["frames"][0]["codes"]))
    rows.append(("say audio", "generate", f"{len(audio['frames'])} frames (first: {first}), {speeds(audio)}", seconds))

    both, seconds = run("generate", "demo/bundle", "--prompt", PROMPT, "--schedule", "text:16,audio:10f,text:16")
    rows.append(("change over and back", "generate", f"{len(both['tokens'])} tokens, {speeds(both)}", seconds))

    table = Table(title="what happened", title_justify="left", title_style="bold", header_style="bold")
    for name in ("step", "command", "result"):
        table.add_column(name, overflow="fold")
    table.add_column("seconds", justify="right")
    for step, command, result, took in rows:
        table.add_row(step, command, result, f"{took:.1f}")
    console.print(table)
    console.print(
        f"In all {time.perf_counter() - started:.0f} s. Look around: motrt inspect demo/bundle, motrt verify demo/bundle"
    )


if __name__ == "__main__":
    main()
