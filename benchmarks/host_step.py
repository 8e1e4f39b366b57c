"""Decode steps of the step kernels beside PyTorch, without a GPU: compiled for the host, every layer of a real model's size.

    python benchmarks/host_step.py --preset llama-3.2-1b --rows 1 --rows 8
    python benchmarks/host_step.py --model model --dtype float16 --dtype bfloat16 --steps 6

Weights are random, or a checkpoint's, rounded to the dtype for both; PyTorch computes in float32. The 1B model takes eight
minutes, a C++ compiler, and 16 GB. What it cannot tell: see ``tests/runtime/host_cuda.h``.
"""

import sys
import time
from pathlib import Path

import click
import torch

from motrt.errors import MotrtError
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import PRESETS, ModelConfig
from motrt.model_def.parameters import parameters
from motrt.runtime.step_kernels import why_not
from motrt.tests.runtime.host_kernels import COMPILER, Conversation

# Relative L2 of logits: what is rounded between kernels, and in the cache.
MAX_ERROR = {"bfloat16": 0.03, "float16": 0.006}


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llama-3.2-1b", show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="A native checkpoint, in the place of random weights.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(MAX_ERROR)), default=("bfloat16",), show_default=True)
@click.option("--rows", multiple=True, type=click.IntRange(1, 8), default=(1, 8), show_default=True)
@click.option("--steps", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--max-seq-len", type=click.IntRange(128, 8192), default=1024, show_default=True)
def main(preset: str, model: Path | None, dtypes: tuple[str, ...], rows: tuple[int, ...], steps: int, max_seq_len: int) -> None:
    """Print a line a case; exits with 1 where one is further from PyTorch than rounding explains."""
    if COMPILER is None:
        raise click.ClickException("this compiles the kernels for the host, and finds no g++ or clang++: install one")
    try:
        checkpoint = None if model is None else open_checkpoint(model)
    except MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    config = (ModelConfig.preset(preset) if checkpoint is None else checkpoint.config).replace(max_seq_len=max_seq_len)
    is_right = True
    with torch.inference_mode():
        for dtype in dtypes:
            if reason := why_not(config, dtype, [one.name for one in parameters(config)]):
                raise click.ClickException(f"the step kernels cannot do this model: {reason}")
            for count in rows:
                for modality, name in enumerate(config.modality_names):
                    started = time.perf_counter()
                    talk = Conversation(config, dtype, count, modality, None if checkpoint is None else checkpoint.read)
                    captured, worst, num_same = talk.capture(modality), 0.0, 0
                    for number in range(steps):
                        errors, same = talk.errors(captured, number)
                        worst, num_same = max(worst, *errors), num_same + same
                    is_right &= worst < MAX_ERROR[dtype]
                    click.echo(
                        f"{dtype:8} {name:6} {count} rows: relative L2 {worst:.5f}, best id the same in {num_same} of "
                        f"{steps * count}, {time.perf_counter() - started:.0f} s"
                    )
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
