"""A LoRA adapter in PEFT's folder (``adapter_config.json``, ``adapter_model.safetensors``), merged into a Llama base.

W becomes W + (alpha / r) B A, computed in float32 and stored in W's dtype, one weight at a time as it is read (Hu et al. 2021;
alpha / sqrt(r) with ``use_rslora``). Fields and their meaning: ``LoraConfig`` of peft 0.21.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from motrt.errors import CheckpointError, ConfigError, raise_all
from motrt.model_def.checkpoint.fields import fixed_field_problems, read_json_object, shown
from motrt.model_def.checkpoint.llama import HF_TABLE, LlamaBase
from motrt.model_def.checkpoint.pickle_file import load_pickle
from motrt.model_def.checkpoint.raw_state import RawState, state_from_mapping, state_from_safetensors

CONFIG_FILE, SAFETENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"

# Fields with one value that is plain LoRA. Every other field that is set to something is refused by name.
_FIXED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
}
_USED = ("r", "lora_alpha", "use_rslora")
# Where the matrices are is read off their names; how they began, and what trained them, changes nothing now.
_WITHOUT_EFFECT = frozenset(
    """
    task_type base_model_name_or_path revision inference_mode lora_dropout target_modules exclude_modules
    layers_to_transform layers_pattern peft_version megatron_core auto_mapping runtime_config qalora_group_size
    """.split()  # noqa: SIM905 - a list would take a line a name
)
# Initialisations that leave the base's weights alone.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_LARGEST = 1 << 16  # of r and alpha


@dataclass(frozen=True)
class _Delta:
    """The matrices, by their names, whose product is added to one weight: ``up`` [out, r] times ``down`` [r, in]."""

    down: str
    up: str


def merge_lora(base: LlamaBase, folder: Path) -> LlamaBase:
    """Return ``base`` with the adapter in ``folder`` merged into its weights as they are read.

    Raises:
        CheckpointError: when the adapter is missing, damaged, twice there, or its names or shapes do not fit the base.
        ConfigError: when it is not plain LoRA, or the base is Meta's, whose rows are in another order.
    """
    if base.table is not HF_TABLE:
        raise ConfigError(
            "--lora is merged into a Hugging Face folder: PEFT trains in its order of rows, and Meta's is another"
        )
    rank, scale = _rank_and_scale(folder / CONFIG_FILE)
    raw = _open_matrices(folder)
    deltas, problems = _deltas(raw, base.raw, rank)
    problems += [f"{name} gives no matrix: {why}" for name, why in raw.others.items()]
    raise_all(
        CheckpointError, f"{folder} does not fit {base.raw.source}:", problems or ([] if deltas else ["it holds no matrix"])
    )
    note = f"{folder.name}: LoRA merged into {len(deltas)} weights, scale {scale:g}"
    read = _merged(base.raw.read, raw.read, deltas, scale)
    return replace(base, raw=replace(base.raw, read=read, notes=(*base.raw.notes, *raw.notes, note)))


def _rank_and_scale(file: Path) -> tuple[int, float]:
    """Return r, and alpha / r, of an adapter that is plain LoRA."""
    values = read_json_object(file)
    problems = fixed_field_problems(values, _FIXED)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= _LARGEST
    is_scaled = isinstance(alpha, int | float) and not isinstance(alpha, bool) and -_LARGEST <= alpha <= _LARGEST
    if not (is_rank and is_scaled):
        problems.append(
            f"r must be a positive whole number and lora_alpha a number, up to {_LARGEST} (got {shown(rank)}, {shown(alpha)})"
        )
    began = values.get("init_lora_weights", True)
    if began is not None and began not in _PLAIN_INITIALISATIONS:
        problems.append(
            f"init_lora_weights ({shown(began)}) changes the base's weights: merge it with PEFT, merge_and_unload()"
        )
    if not isinstance(values.get("use_rslora"), bool | None):
        problems.append(f"use_rslora must be true or false (got {shown(values['use_rslora'])})")
    known = {*_FIXED, *_USED, *_WITHOUT_EFFECT, "init_lora_weights"}
    problems += [
        f"{name} ({shown(value)}) is not plain LoRA: merge it with PEFT, merge_and_unload(), and convert the result"
        for name, value in values.items()
        if name not in known and value is not None and value is not False and value not in ({}, [])
    ]
    raise_all(ConfigError, f"{file}:", problems)
    assert isinstance(rank, int) and isinstance(alpha, int | float)
    return rank, alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank


def _open_matrices(folder: Path) -> RawState:
    safetensors, pickle = folder / SAFETENSORS, folder / PICKLE
    if safetensors.is_file() and pickle.is_file():
        raise CheckpointError(f"{folder} holds {SAFETENSORS} and {PICKLE}: remove the one that is not meant")
    if safetensors.is_file():
        return state_from_safetensors(folder.name, [safetensors])
    if pickle.is_file():
        return state_from_mapping(folder.name, load_pickle(pickle), str(pickle))
    raise CheckpointError(f"{folder} holds no LoRA adapter: expected {CONFIG_FILE} with {SAFETENSORS} or {PICKLE}")


def _deltas(raw: RawState, base: RawState, rank: int) -> tuple[dict[str, _Delta], list[str]]:
    """What is added to each weight of the base, and what does not fit."""
    found: dict[str, _Delta] = {}
    problems = []
    for name in raw.tensors:
        if not name.endswith((_DOWN, _UP)):
            problems.append(f"{name} is no LoRA matrix: merge it with PEFT, merge_and_unload(), and convert the result")
            continue
        stem = name.removesuffix(_DOWN).removesuffix(_UP)
        target, down, up = f"{stem.removeprefix(_PREFIX)}.weight", stem + _DOWN, stem + _UP
        if down not in raw.tensors or up not in raw.tensors:
            problems.append(f"{name} has no counterpart: lora_A and lora_B belong together")
        elif target not in base.tensors:
            problems.append(f"{name}: the base holds no {target}")
        elif target in found and found[target].down != down:
            problems.append(f"{name}: {found[target].down} is added to {target}, too")
        elif not (raw.tensors[down].is_float and raw.tensors[up].is_float):
            problems.append(f"{name} is no matrix of floating point ({raw.tensors[name].dtype})")
        elif problem := _shape_problem(raw.tensors[down].shape, raw.tensors[up].shape, base.tensors[target].shape, rank):
            problems.append(f"{name}: {problem}")
        else:
            found[target] = _Delta(down, up)
    return found, problems


def _shape_problem(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...], rank: int) -> str | None:
    if len(weight) == 2 and (up, down) == ((weight[0], rank), (rank, weight[1])):
        return None
    return f"lora_B {list(up)} times lora_A {list(down)}, of rank {rank}, is not {list(weight)}"


def _merged(
    read_base: Callable[[str], torch.Tensor],
    read_lora: Callable[[str], torch.Tensor],
    deltas: Mapping[str, _Delta],
    scale: float,
) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        weight, delta = read_base(name), deltas.get(name)
        if delta is None:
            return weight
        merged = weight.float() + scale * (read_lora(delta.up).float() @ read_lora(delta.down).float())
        stored = merged.to(weight.dtype)
        if not bool(stored.isfinite().all()):
            raise CheckpointError(f"{delta.up} and {delta.down} make {name} infinite in {weight.dtype}: train them again")
        return stored

    return read
