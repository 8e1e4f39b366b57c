"""Decode steps on a GPU, every backend side by side with PyTorch in one process: milliseconds a step, and the ratios.

    .venv/bin/python benchmarks/gpu_decode.py --model MODEL --bundle cuda=BUNDLE --bundle tensorrt-rtx=BUNDLE

Steps of the backends are interleaved, so that a noisy machine is noisy for all. The last line is one JSON document.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime.bundle import open_bundle
from motrt.runtime.load import open_session
from motrt.runtime.session import Session
from motrt.runtime.torch_session import TorchSession

PROMPT_LENGTH, NUM_WARM, NUM_TIMED = 128, 8, 48


def stepper(session: Session, modality: str, rows: int) -> Callable[[], None]:
    """A conversation of ``rows`` rows in one modality; each call is one decode step."""
    ids = session.config.id_ranges[session.config.modality_index(modality)]
    prompt = (np.arange(PROMPT_LENGTH) % len(ids) + ids.start).tolist()
    _, cache = session.prefill([prompt] * rows, modality)

    def step() -> None:
        session.decode_step([ids.start + 1] * rows, modality, cache)

    return step


def measure(sessions: dict[str, Session], modality: str, rows: int) -> dict[str, float]:
    """Median milliseconds of a step, by backend."""
    steps = {name: stepper(one, modality, rows) for name, one in sessions.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(NUM_WARM + NUM_TIMED):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= NUM_WARM:
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: median(values) for name, values in taken.items()}


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="The checkpoint that the bundles are made of.")
@click.option("--bundle", "bundles", multiple=True, required=True, help="BACKEND=FOLDER")
@click.option("--rows", multiple=True, type=int, default=(1, 8), show_default=True)
def main(model: Path, bundles: tuple[str, ...], rows: tuple[int, ...]) -> None:
    """Measure, and print a line a case."""
    sessions: dict[str, Session] = {}
    for one in bundles:
        backend, _, folder = one.partition("=")
        sessions[backend] = open_session(open_bundle(folder), backend)
    longest = min(session.config.max_seq_len for session in sessions.values())
    sessions["torch"] = TorchSession.open(open_checkpoint(model), "bf16", "cuda", longest)
    cases: list[dict[str, Any]] = []
    for modality in sessions["torch"].config.modality_names:
        for count in rows:
            found = measure(sessions, modality, count)
            ratios = {name: found["torch"] / value for name, value in found.items()}
            cases.append({"modality": modality, "rows": count, "ms_per_step": found, "times_torch": ratios})
            shown = ", ".join(f"{name} {value:.2f} ms ({ratios[name]:.2f}x)" for name, value in found.items())
            click.echo(f"{modality}, {count} rows: {shown}", err=True)
    click.echo(json.dumps({"prompt": PROMPT_LENGTH, "cases": cases}))


if __name__ == "__main__":
    main()
