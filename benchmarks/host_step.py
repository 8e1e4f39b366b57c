"""One decode step of the step kernels at full size beside PyTorch, without a GPU: compiled for the host, every layer.

    python benchmarks/host_step.py --preset llama-3.2-1b --rows 1 --rows 8

Random weights, rounded to bfloat16 for both; PyTorch computes in float32. The 1B model takes eight minutes, a C++ compiler, and
16 GB. What it cannot tell: see ``tests/runtime/host_cuda.h``.
"""

import sys
import time
from typing import Any

import click
import numpy as np
import torch

from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import plan_for
from motrt.tests.runtime.test_step_kernels import Conversation

MAX_ERROR = 0.02  # relative L2: bfloat16 between kernels, and in the cache


def error_of(config: ModelConfig, rows: int, modality: int) -> float:
    """The worst row's relative L2 between the kernels' logits and PyTorch's."""
    from motrt.runtime.step_inputs import StepInputs

    talk = Conversation(config, "bfloat16", rows, modality)
    ids = config.id_ranges[modality]
    graph = next(one for one in plan_for("cuda", config) if one.tokens == one.predicts == modality)
    tokens = [ids[(11 + 31 * row) % len(ids)] for row in range(rows)]
    fed: list[Any] = [[[one] for one in tokens], [], talk.cache.lengths.copy(), range(rows), []]
    got = talk.kernels.run(talk.capture(graph), StepInputs(*map(np.array, fed)))
    expected = talk.reference.decode_step(tokens, talk.name, talk.cache)
    pairs = zip(got[:, ids.start : ids.stop], expected[:, ids.start : ids.stop], strict=True)
    return max(float(np.linalg.norm(one - right) / np.linalg.norm(right)) for one, right in pairs)


@click.command()
@click.option("--preset", default="llama-3.2-1b", show_default=True)
@click.option("--rows", multiple=True, type=click.IntRange(1, 8), default=(1, 8), show_default=True)
@click.option("--max-seq-len", type=int, default=1024, show_default=True)
def main(preset: str, rows: tuple[int, ...], max_seq_len: int) -> None:
    """Print a line a case; exits with 1 where one is further from PyTorch than rounding explains."""
    config, worst = ModelConfig.preset(preset).replace(max_seq_len=max_seq_len), 0.0
    with torch.inference_mode():
        for count in rows:
            for modality, name in enumerate(config.modality_names):
                started = time.perf_counter()
                error = error_of(config, count, modality)
                worst = max(worst, error)
                click.echo(f"{name:8} {count} rows: relative L2 {error:.5f}, {time.perf_counter() - started:.0f} s")
    sys.exit(0 if worst < MAX_ERROR else 1)


if __name__ == "__main__":
    main()
