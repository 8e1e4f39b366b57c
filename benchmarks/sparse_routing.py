"""What sparse routing is worth: decode steps of each modality, against the same model with every expert computed.

    .venv/bin/python benchmarks/sparse_routing.py --preset llama-3.2-1b --work /somewhere/with/20GB \
        --json benchmarks/results/sparse_routing_cpu.json

Two graphs of the same random weights are traced: the product's, which gathers rows by modality, and a dense one, which
sends every row through every expert and projection and keeps the wanted result with ``Where``. Both run in one process,
their steps interleaved, so that a noisy machine is noisy for both. The last line is one JSON document.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from motrt.benchmarks.dense import DENSE
from motrt.benchmarks.document import leave, machine
from motrt.export.onnx_from_module import attach_weights, trace, write_onnx
from motrt.model_def.config import PRESETS, ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.initialize import random_tensor
from motrt.model_def.parameters import num_parameters_read, parameters
from motrt.runtime.bundle import MODEL_FILE
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_session import OnnxSession

PROMPT_LENGTH = 16


def write_graph(config: ModelConfig, dtype: str, folder: Path, graph: Graph) -> Path:
    """Trace and write one of the two graphs; the same weights in both."""
    table = {parameter.name: parameter for parameter in parameters(config)}
    folder.mkdir(parents=True)
    model = trace(config, dtype, graph)
    attach_weights(model, config, dtype, lambda name: random_tensor(config, table[name], seed=0))
    write_onnx(model, folder)
    return folder / MODEL_FILE


@dataclass
class Case:
    """One session saying one modality, a step at a time."""

    name: str
    session: OnnxSession
    modality: str
    rows: int
    cache: KVCache
    seconds: list[float]

    def step(self) -> None:
        """One timed decode step of all rows."""
        ids = self.session.config.id_ranges[self.session.config.modality_index(self.modality)]
        started = time.perf_counter()
        self.session.decode_step([ids.start + 1] * self.rows, self.modality, self.cache)
        self.seconds.append(time.perf_counter() - started)


def prepared(name: str, session: OnnxSession, modality: str, rows: int) -> Case:
    ids = session.config.id_ranges[session.config.modality_index(modality)]
    _, cache = session.prefill([list(range(ids.start, ids.start + PROMPT_LENGTH))] * rows, modality)
    return Case(name, session, modality, rows, cache, [])


def measured(case: Case) -> dict[str, float]:
    """Median and spread over the steps, the first three left out."""
    quarter, median, three_quarters = np.percentile(case.seconds[3:], [25, 50, 75])
    return {
        "ms_per_step": round(float(median) * 1e3, 3),
        "ms_quartile_1": round(float(quarter) * 1e3, 3),
        "ms_quartile_3": round(float(three_quarters) * 1e3, 3),
        "tokens_per_s": round(case.rows / float(median), 1),
    }


@click.command()
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="small", show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="A new folder for the two graphs; removed at the end."
)
@click.option("--steps", type=click.IntRange(8, 40), default=20, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where to write the figures besides.")
def main(preset: str, work: Path, steps: int, json_file: Path | None) -> None:
    """Measure, print a table, and one JSON document last."""
    config = ModelConfig.preset(preset)
    try:
        graphs = {"sparse": CANONICAL, "dense": DENSE}
        files = {kind: write_graph(config, "float32", work / kind, graph) for kind, graph in graphs.items()}
        sessions = {kind: OnnxSession(file, config) for kind, file in files.items()}
        cases = [
            prepared(f"{kind}, {modality}, batch {rows}", session, modality, rows)
            for rows in (1, 4)
            for kind, session in sessions.items()
            for modality in config.modality_names
        ]
        for _ in range(steps):
            for case in cases:
                case.step()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = {case.name: measured(case) for case in cases}
    for name, one in found.items():
        click.echo(f"{name:28} {one['ms_per_step']:9.2f} ms  ({one['ms_quartile_1']:.2f} to {one['ms_quartile_3']:.2f})")
    text, audio = (found[f"sparse, {name}, batch 1"]["ms_per_step"] for name in config.modality_names[:2])
    dense = found[f"dense, {config.modality_names[1]}, batch 1"]["ms_per_step"]
    document = {
        "preset": preset,
        "dtype": "float32",
        "machine": machine("motrt", "torch", "onnxruntime"),
        "cases": found,
        "text_over_audio": round(text / audio, 2),
        "dense_over_sparse_audio": round(dense / audio, 2),
        "parameters_read": {name: num_parameters_read(config, name) for name in config.modality_names},
    }
    leave(document, json_file)


if __name__ == "__main__":
    main()
