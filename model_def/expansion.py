"""A trained model given one more modality: new ids, an expert, attention weights, and not a word of what it says changed.

What the model had is kept bit for bit. What is new starts so that training can begin, and the first step does no harm:

- attention of the new modality is a *copy* of the first modality's, as `motrt convert` makes it; where attention is shared it
  stays shared;
- the expert is drawn at random, well scaled, except its last product (``up_proj``, or ``w2``), which is zero: the new expert
  adds nothing until it is trained, as in LoRA (Hu et al. 2021), and nothing in front of it has to be unlearnt;
- the new rows of the head are zero: each new id is as likely as any other, and the loss is the logarithm of their number;
- the new rows of the embedding are copies of rows that are there, chosen at random, none twice while there are enough: the
  layers can tell such inputs apart, whatever else they mean. ``random`` draws them with the mean and the deviation of each
  column instead; ``zero`` leaves them zero: then every new id is the same input until they are trained.

Nothing is read until it is asked for. This file knows no file format and no module: a model is a configuration and a function
from names to tensors, as in ``head_surgery``.
"""

from typing import Literal, get_args

import torch

from motrt.errors import ConfigError
from motrt.model_def.config import AdapterExpert, Modality, ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.initialize import random_tensor, tensor_generator
from motrt.model_def.parameters import EMBEDDING, SHARED_HEAD, Parameter, parameters, split_head

Rows = Literal["copied", "random", "zero"]


def with_modality(
    config: ModelConfig, read: Read, modality: Modality, embedding: Rows = "copied", seed: int = 0
) -> tuple[ModelConfig, Read]:
    """Return the same model with ``modality`` behind those that it has.

    The head stays of its kind, and a tied head stays tied: then its new rows are the embedding's. ``head_surgery.with_head``
    gives it another kind.

    Args:
        config: the model as it is.
        read: its weights.
        modality: what it is to learn.
        embedding: how the new rows of the embedding start.
        seed: of what is drawn.

    Returns:
        The configuration with that modality, and its weights.

    Raises:
        ConfigError: when the model has a modality of that name, or ``embedding`` is none of ``Rows``.
    """
    if embedding not in get_args(Rows):
        raise ConfigError(f"embedding must be one of {', '.join(get_args(Rows))} ({embedding!r} came)")
    grown = config.replace(modalities=(*config.modalities, modality))
    new = {parameter.name: parameter for parameter in parameters(grown) if _is_new(parameter, modality)}

    def read_grown(name: str) -> torch.Tensor:
        if name == EMBEDDING:
            known = read(EMBEDDING)
            return torch.cat([known, _new_rows(known, modality.vocab_size, embedding, seed)])
        if name == SHARED_HEAD:
            known = read(SHARED_HEAD)
            return torch.cat([known, torch.zeros(modality.vocab_size, config.model_width, dtype=known.dtype)])
        return _new_weight(grown, read, new[name], modality, seed) if name in new else read(name)

    return grown, read_grown


def _is_new(parameter: Parameter, modality: Modality) -> bool:
    return parameter.modality == modality.name


def _new_weight(grown: ModelConfig, read: Read, parameter: Parameter, modality: Modality, seed: int) -> torch.Tensor:
    """Return the first value of a weight that the new modality alone reads."""
    if parameter.part == "attention":
        return read(parameter.name.replace(f".{modality.name}.", f".{grown.modality_names[0]}."))
    last = "up_proj.weight" if isinstance(modality.expert, AdapterExpert) else "w2.weight"
    if parameter.name == split_head(modality.name) or parameter.name.endswith(last):
        return torch.zeros(parameter.shape)
    return random_tensor(grown, parameter, seed)


def _new_rows(known: torch.Tensor, count: int, start: Rows, seed: int) -> torch.Tensor:
    """First values of an embedding's new rows. Shapes: known [rows, m] -> [count, m]."""
    generator = tensor_generator(seed, EMBEDDING)
    if start == "copied":
        orders = [torch.randperm(len(known), generator=generator) for _ in range(-(-count // len(known)))]
        return known[torch.cat(orders)[:count]]
    if start == "zero":
        return torch.zeros(count, known.shape[1], dtype=known.dtype)
    deviation, mean = torch.std_mean(known.float(), dim=0)
    return torch.randn(count, known.shape[1], generator=generator).mul_(deviation).add_(mean).to(known.dtype)
