"""Random weights that behave: for demos, tests and measurements of speed, where a trained model is not at hand.

How the scales are chosen. Every block reads a normalised stream, so a product whose weights have standard deviation
``1/sqrt(fan_in)`` gives values of order one: ``wq wk wv w1 w3 down_proj fc1 fc2``. The three products that write back to the
residual stream, ``wo w2 up_proj``, are divided by ``sqrt(2 * num_layers)`` as well: 2 * num_layers writes of variance at most
``1 / (2 * num_layers)`` add at most one to the unit variance of the embedding, however many layers there are. The head has
standard deviation ``2/sqrt(m)``, so logits spread over a few units and the best one stands clear of rounding. A tied table
is a head first and has the head's scale.

Norms are one with noise and biases small but not zero, so that a graph which drops a norm weight or a bias is visibly
another model. Each tensor has a generator of its own, seeded by (seed, name): neither the order of the tensors nor the other
tensors change it, and it is drawn in float32 whatever it is stored in. This file knows no module and no training.
"""

import hashlib
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import torch

from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.native import Progress, write_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import Parameter, parameters

NORM_NOISE = 0.1
BIAS_SCALE = 0.1
HEAD_GAIN = 2.0
_RESIDUAL_WRITERS = frozenset(("wo", "w2", "up_proj"))
_CHUNK = 1 << 22  # elements drawn at a time: a table is never held in float32 as a whole


def random_tensor(config: ModelConfig, parameter: Parameter, seed: int, dtype: str = "float32") -> torch.Tensor:
    """One parameter's random value, of ``parameter.shape``."""
    mean, scale = mean_and_scale(config, parameter)
    generator = tensor_generator(seed, parameter.name)
    tensor = torch.empty(parameter.shape, dtype=TORCH_DTYPES[dtype])
    for chunk in torch.split(tensor.view(-1), _CHUNK):
        chunk.copy_(torch.randn(chunk.shape, generator=generator).mul_(scale).add_(mean))
    return tensor


def random_tensors(config: ModelConfig, seed: int, dtype: str = "float32") -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, random value), in the order of ``parameters(config)``, each made when it is asked for."""
    for parameter in parameters(config):
        yield parameter.name, random_tensor(config, parameter, seed, dtype)


def init_checkpoint(
    out: str | Path, config: ModelConfig, dtype: str = "float32", seed: int = 0, progress: Progress | None = None
) -> None:
    """Write a native checkpoint of random weights.

    Raises:
        CheckpointError: as ``write_checkpoint``.
    """
    # An unknown dtype is refused by the writer, before the first tensor is asked of the iterator.
    write_checkpoint(out, config, random_tensors(config, seed, dtype), dtype, progress=progress)


def mean_and_scale(config: ModelConfig, parameter: Parameter) -> tuple[float, float]:
    """The mean and standard deviation of one parameter's values; see the head of this file."""
    if parameter.name.endswith(".bias"):
        return 0.0, BIAS_SCALE
    if len(parameter.shape) == 1:
        return 1.0, NORM_NOISE
    fan_in = parameter.shape[1]
    if parameter.part == "head" or (parameter.part == "embedding" and config.tied_embeddings):
        return 0.0, HEAD_GAIN / sqrt(fan_in)
    if parameter.part == "embedding":
        return 0.0, 1.0
    writes_back = not _RESIDUAL_WRITERS.isdisjoint(parameter.name.split("."))
    return 0.0, 1.0 / sqrt(fan_in) / (sqrt(2 * config.num_layers) if writes_back else 1.0)


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """The generator of one tensor's values: its own, whatever else is drawn and in what order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
