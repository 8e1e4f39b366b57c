"""Ours beside the others, on a CPU, in one run: turns of a few steps, ratios with their spread, one JSON document, one chart.

    .venv/bin/pip install -c constraints.txt matplotlib
    .venv/bin/motrt init model --preset llama-3.2-1b --dtype bfloat16
    for p in int4 int8 fp32; do .venv/bin/motrt export model $p --precision $p --no-verify; done
    .venv/bin/python benchmarks/side_by_side.py --int4 int4 --int8 int8 --fp32 fp32 --checkpoint model --work WORK \
        --peers PEERS/bin/python --gguf llama1b-q4_0.gguf --genai genai_int4 \
        --json benchmarks/results/side_by_side_cpu.json --chart docs/side_by_side.svg

What is not given is left out. ``--peers`` is the Python of an environment with llama-cpp-python and onnxruntime-genai; they run
the plain text backbone (Llama-3.2-1B's shapes), because neither knows a routed model. Two groups, so that all fit into memory:
our int4 is in both, and every ratio is to it, in its own group. Tokens/s compare within a group alone.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from motrt.benchmarks.contender import CASES
from motrt.benchmarks.dense import write_dense
from motrt.benchmarks.document import leave, machine
from motrt.runtime.benchmark import measure_bandwidth
from motrt.runtime.bundle import open_bundle

OURS = "motrt int4"
SLOW = {"motrt fp32", "PyTorch fp32"}  # the second group


@dataclass
class Process:
    """One contender's process, and what it took: by case, a list of seconds per turn."""

    name: str
    command: list[str]
    tokens: dict[str, int] = field(default_factory=dict)
    turns: dict[str, list[list[float]]] = field(default_factory=dict)
    running: Any = None

    def start(self) -> None:
        self.running = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if "ready" not in (self._line() or {}):
            raise click.ClickException(f"{self.name} did not start: {' '.join(self.command)}")

    def stop(self) -> None:
        if self.running is not None:
            self.running.stdin.close()
            self.running.wait()
            self.running = None

    def turn(self, case: str, steps: int) -> None:
        self.running.stdin.write(json.dumps({"case": case, "steps": steps}) + "\n")
        self.running.stdin.flush()
        answer = self._line()
        if answer is None:
            raise click.ClickException(f"{self.name} ended in the middle of {case}")
        if "seconds" in answer:
            self.tokens[case] = answer["tokens_per_step"]
            self.turns.setdefault(case, []).append(answer["seconds"])

    def rate(self, case: str) -> float:
        """Tokens per second, the median over all steps."""
        return self.tokens[case] / float(np.median(np.concatenate(self.turns[case])))

    def _line(self) -> dict[str, Any] | None:
        """The next line that is ours; libraries print what they like."""
        for line in self.running.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        return None


def take_turns(group: list[Process], rounds: int) -> list[float]:
    """Every case of every contender, round after round; returns the bandwidths that were measured between."""
    bandwidths = [measure_bandwidth()]
    for process in group:
        process.start()
    try:
        for _ in range(rounds):
            for case, (_, _, before) in CASES.items():
                for process in group:
                    process.turn(case, 4 if before else 1)
            click.echo(".", nl=False, err=True)
    finally:
        for process in group:
            process.stop()
    return [*bandwidths, measure_bandwidth()]


def ratios(process: Process, ours: Process, case: str) -> dict[str, float]:
    """How many times faster ours is, turn by turn: median and quartiles."""
    pairs = zip(process.turns[case], ours.turns[case], strict=True)
    scale = ours.tokens[case] / process.tokens[case]
    low, middle, high = np.percentile([scale * np.median(one) / np.median(other) for one, other in pairs], [25, 50, 75])
    return {"ratio": round(float(middle), 3), "quartile_1": round(float(low), 3), "quartile_3": round(float(high), 3)}


def compared(group: list[Process]) -> dict[str, Any]:
    ours = next(one for one in group if one.name == OURS)
    return {
        process.name: {
            case: {"tokens_per_s": round(process.rate(case), 2), "ours_is_faster_by": ratios(process, ours, case)}
            for case in process.turns
        }
        for process in group
    }


def draw(found: dict[str, Any], file: Path) -> None:
    """Bars of tokens per second, a panel for each case; of those that ran at the same time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "motrt"  # the same figures give the same file
    shown = ["text decode", "audio decode", "text prefill of 128", "audio decode, 8 rows"]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(15, 3.6), constrained_layout=True)
    for panel, case in zip(panels, shown, strict=True):
        bars = {name: one[case]["tokens_per_s"] for name, one in found.items() if case in one and name not in SLOW}
        names = sorted(bars, key=lambda name: bars[name])
        colours = ["#1f6f8b" if name == OURS else "#99c1cf" if name.startswith("motrt") else "#b8b8b8" for name in names]
        drawn = panel.barh(names, [bars[name] for name in names], color=colours)
        panel.bar_label(drawn, fmt="%.1f", padding=3)
        panel.set_title(case, loc="left")
        panel.set_xlabel("tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.18)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


PATH = click.Path(path_type=Path)


@click.command()
@click.option("--int4", type=PATH, required=True, help="Our int4 bundle.")
@click.option("--int8", type=PATH, help="Our int8 bundle.")
@click.option("--fp32", type=PATH, help="Our fp32 bundle.")
@click.option("--checkpoint", type=PATH, help="For PyTorch.")
@click.option("--work", type=PATH, help="Where the dense graph is kept from run to run.")
@click.option("--peers", type=PATH, help="Python of the peers' environment.")
@click.option("--gguf", type=PATH, help="The text backbone for llama.cpp.")
@click.option("--genai", type=PATH, help="The text backbone for onnxruntime-genai.")
@click.option("--rounds", type=click.IntRange(2, 40), default=8, show_default=True)
@click.option("--json", "json_file", type=PATH)
@click.option("--chart", type=PATH)
def main(rounds: int, json_file: Path | None, chart: Path | None, work: Path | None, **paths: Path | None) -> None:
    """Measure, print a table, and one JSON document last."""
    here, script = sys.executable, str(Path(__file__).with_name("contender.py"))
    peers = str(paths["peers"])
    known = [
        (OURS, here, "motrt", paths["int4"]),
        ("motrt int8", here, "motrt", paths["int8"]),
        ("every expert, int4", here, "dense", work and work / "dense"),
        ("llama.cpp Q4_0", peers, "llama.cpp", paths["peers"] and paths["gguf"]),
        ("onnxruntime-genai int4", peers, "onnxruntime-genai", paths["peers"] and paths["genai"]),
        ("motrt fp32", here, "motrt", paths["fp32"]),
        ("PyTorch fp32", here, "torch", paths["checkpoint"]),
    ]
    if work is not None and not (work / "dense").exists():
        write_dense(open_bundle(paths["int4"] or ""), work / "dense")
    contenders = [Process(name, [python, script, kind, str(path)]) for name, python, kind, path in known if path]
    first = [one for one in contenders if one.name not in SLOW]
    second = [Process(OURS, first[0].command), *(one for one in contenders if one.name in SLOW)]
    bandwidths = take_turns(first, rounds)
    found = compared(first)
    if len(second) > 1:
        bandwidths += take_turns(second, max(2, rounds // 2))
        found |= {name: one for name, one in compared(second).items() if name != OURS}
    click.echo(err=True)
    for name, one in found.items():
        for case, figures in one.items():
            ratio = figures["ours_is_faster_by"]
            spread = f"{ratio['ratio']:6.2f}  ({ratio['quartile_1']:.2f} to {ratio['quartile_3']:.2f})"
            click.echo(f"{name:24} {case:26} {figures['tokens_per_s']:9.1f} tokens/s   int4 is faster by {spread}")
    document = {
        "machine": machine("motrt", "torch", "onnxruntime", "numpy"),
        "memory_bandwidth_bytes_per_s": float(np.median(bandwidths)),
        "rounds": rounds,
        "contenders": found,
    }
    if chart is not None:
        draw(found, chart)
    leave(document, json_file)


if __name__ == "__main__":
    main()
