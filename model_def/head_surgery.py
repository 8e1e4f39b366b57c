"""A shared head cut into split ones, and split ones joined into a shared one: exactly, in both directions.

A position that predicts modality m may only yield ids of m's range, so computing m's rows alone gives the same logits as
computing all rows and filtering. Rows are moved, never changed. Nothing is read until it is asked for. This file knows no
file format and no module: a model is a configuration and a function from names to tensors.
"""

from collections.abc import Callable

import torch

from motrt.errors import ConfigError
from motrt.model_def.config import HeadKind, ModelConfig
from motrt.model_def.parameters import EMBEDDING, SHARED_HEAD, split_head

Read = Callable[[str], torch.Tensor]
"""A weight's name -> its value; called again for each use, so that nothing need be held."""


def with_head(config: ModelConfig, read: Read, head: HeadKind) -> tuple[ModelConfig, Read]:
    """The same model with a ``split`` or ``shared`` head.

    A tied head that is split becomes weights of its own (copies of the embedding's rows); a tied head asked to be shared is
    shared already and stays tied.

    Args:
        config: the model as it is.
        read: its weights.
        head: the head that is wanted.

    Returns:
        The configuration with that head, and its weights.

    Raises:
        ConfigError: when ``head`` is neither.
    """
    if head not in ("split", "shared"):
        raise ConfigError(f"head must be 'split' or 'shared' ({head!r} came)")
    if head == config.head:
        return config, read
    if head == "split":
        return config.replace(head="split", tied_embeddings=False), _split(config, read)
    return config.replace(head="shared"), _joined(config, read)


def _split(config: ModelConfig, read: Read) -> Read:
    whole = EMBEDDING if config.tied_embeddings else SHARED_HEAD
    rows = {split_head(modality.name): ids for modality, ids in zip(config.modalities, config.id_ranges, strict=True)}

    def read_split(name: str) -> torch.Tensor:
        if name not in rows:
            return read(name)
        # Cloned: a slice would keep every row of the shared head in memory.
        return read(whole)[rows[name].start : rows[name].stop].clone()

    return read_split


def _joined(config: ModelConfig, read: Read) -> Read:
    pieces = [split_head(modality.name) for modality in config.modalities]

    def read_joined(name: str) -> torch.Tensor:
        return torch.cat([read(piece) for piece in pieces]) if name == SHARED_HEAD else read(name)

    return read_joined
