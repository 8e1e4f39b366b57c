"""Which weights a training run may change: four policies, their exact counts, and whether they can teach a modality.

Growing a text model by a modality adds rows to the embedding and to the head. Grown by zeros, they are dead until they are
trained: a head row of zeros gives every new id the same logit, an embedding row of zeros makes every new id the same input.

============================ ==================================================================== ======================
policy                       what it trains                                                       full size, both heads
============================ ==================================================================== ======================
``adapters``                 ``down_proj`` and ``up_proj`` of every adapter expert                67,108,864
``adapters+head``            and the whole head, text rows too                                    + 266,862,592
``adapters+new-rows``        and the new modalities' rows of head *and* embedding                 + 8,388,608
``adapters+audio-head``      and the new modalities' split heads                                  + 4,194,304
============================ ==================================================================== ======================

``adapters`` is broken: it never moves the new rows. It is kept so that it can be shown, and refused. ``adapters+new-rows``
covers the embedding because it is the one policy that is enough after an expansion by zeros; the two head policies leave the
embedding as it is, and need rows that were trained, or at least drawn at random, before. "New" is every modality but the
first. This file knows no training loop.
"""

from dataclasses import dataclass
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle

from motrt.errors import ConfigError
from motrt.model_def.config import AdapterExpert, ModelConfig
from motrt.model_def.parameters import EMBEDDING, Parameter, parameters

Policy = Literal["adapters", "adapters+head", "adapters+new-rows", "adapters+audio-head"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

# The hooks that a module carries, so that a second policy replaces the first instead of masking what it frees.
_HOOKS: WeakKeyDictionary[torch.nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Trained:
    """What is trained of one parameter: these rows, or all of it where ``rows`` is None."""

    parameter: Parameter
    rows: range | None = None

    @property
    def numel(self) -> int:
        row_size = self.parameter.numel // self.parameter.shape[0]
        return self.parameter.numel if self.rows is None else len(self.rows) * row_size


def trainable_parameters(config: ModelConfig, policy: Policy) -> dict[str, int]:
    """How many elements of each trained parameter the policy may change: name -> count, in the order of the forward pass.

    Raises:
        ConfigError: when the policy is unknown or does not fit the model (no adapter expert, no split head).
    """
    return {trained.parameter.name: trained.numel for trained in _trained(config, policy)}


def count(config: ModelConfig, policy: Policy) -> int:
    """How many elements the policy may change, exactly.

    Raises:
        ConfigError: as ``trainable_parameters``.
    """
    return sum(trainable_parameters(config, policy).values())


def can_learn(config: ModelConfig, policy: Policy, modality: str) -> tuple[bool, str]:
    """Whether the policy can teach the model to say ``modality``, and why: its head rows must be free to move.

    Raises:
        ConfigError: as ``trainable_parameters``, and for a modality that the model does not have.
    """
    ids = config.id_ranges[config.modality_index(modality)]
    trained = _trained(config, policy)
    head_moves = any(_covers(one, modality, ids) for one in trained if _is_head(config, one))
    embedding_moves = any(_covers(one, modality, ids) for one in trained if one.parameter.part == "embedding")
    if not head_moves:
        return False, f"{policy} never changes the {modality} rows of the head ({ids.start} to {ids.stop - 1})"
    if not embedding_moves:
        return True, (
            f"{policy} trains the {modality} rows of the head; those of the embedding stay as they are, and must not be zero: "
            f"where they are, use adapters+new-rows"
        )
    return True, f"{policy} trains the {modality} rows of the head and of the embedding"


def apply_policy(module: torch.nn.Module, config: ModelConfig, policy: Policy) -> None:
    """Set ``requires_grad`` on every parameter of ``module``, and mask the gradient where only some rows are trained.

    Applied again, it replaces the earlier policy. A masked row has a gradient of zero, which an optimiser with weight decay
    still shrinks: give masked tables a decay of zero.

    Args:
        module: the decoder; its parameters have the names of ``parameters(config)``.
        config: what it is a model of.
        policy: one of ``POLICIES``.

    Raises:
        ConfigError: as ``trainable_parameters``, and when the module's parameters are not the configuration's.
    """
    trained = {one.parameter.name: one for one in _trained(config, policy)}
    named = dict(module.named_parameters())
    missing = sorted(trained.keys() - named.keys())
    if missing:
        raise ConfigError(f"this module is not the model of the configuration: it has no parameter {', '.join(missing)}")
    for handle in _HOOKS.pop(module, []):
        handle.remove()
    handles = []
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
        rows = trained[name].rows if name in trained else None
        if rows is not None:
            handles.append(parameter.register_hook(_RowMask(rows)))  # type: ignore[no-untyped-call]
    _HOOKS[module] = handles


@dataclass(frozen=True)
class _RowMask:
    """A gradient hook: [rows, m] -> the same, zero outside ``rows``."""

    rows: range

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        masked = torch.zeros_like(gradient)
        masked[self.rows.start : self.rows.stop] = gradient[self.rows.start : self.rows.stop]
        return masked


def _trained(config: ModelConfig, policy: Policy) -> list[_Trained]:
    if policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)} ({policy!r} came)")
    if not any(isinstance(modality.expert, AdapterExpert) for modality in config.modalities):
        raise ConfigError(f"policy {policy} trains adapter experts, and this model has none: train it whole")
    if policy == "adapters+audio-head" and config.head != "split":
        raise ConfigError("policy adapters+audio-head needs a split head: `motrt convert --head split` makes one, exactly")
    found = []
    for parameter in parameters(config):
        one = _trained_of(config, policy, parameter)
        if one is not None and one.numel:
            found.append(one)
    return found


def _trained_of(config: ModelConfig, policy: Policy, parameter: Parameter) -> _Trained | None:
    """What ``policy`` trains of one parameter, or None."""
    if parameter.part == "expert":
        is_projection = not {"down_proj", "up_proj"}.isdisjoint(parameter.name.split("."))
        return _Trained(parameter) if is_projection else None
    if parameter.part not in ("embedding", "head"):
        return None
    is_head = parameter.part == "head" or config.tied_embeddings
    is_new = parameter.modality is not None and parameter.modality != config.modality_names[0]
    new_rows = range(config.modalities[0].vocab_size, config.vocab_size)
    if policy == "adapters+head":
        return _Trained(parameter) if is_head else None
    if policy == "adapters+audio-head":
        return _Trained(parameter) if is_new else None
    if policy == "adapters+new-rows" and parameter.modality is None:
        return _Trained(parameter, new_rows)
    return _Trained(parameter) if policy == "adapters+new-rows" and is_new else None


def _is_head(config: ModelConfig, trained: _Trained) -> bool:
    return trained.parameter.part == "head" or (config.tied_embeddings and trained.parameter.name == EMBEDDING)


def _covers(trained: _Trained, modality: str, ids: range) -> bool:
    """Whether the trained rows of a table are those of ``modality``."""
    if trained.parameter.modality is not None:
        return trained.parameter.modality == modality
    return trained.rows is None or (ids.start >= trained.rows.start and ids.stop <= trained.rows.stop)
