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
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Delta:
    """What is added to one weight: ``scale`` times ``up`` [out, r] times ``down`` [r, in], by their names."""

    down: str
    up: str
    scale: float


def merge_lora(base: LlamaBase, folder: Path) -> LlamaBase:
    """Return ``base`` with the adapter in ``folder`` merged into its weights as they are read.

    Raises:
        CheckpointError: when the adapter is missing, damaged, or its names or shapes do not fit the base.
        ConfigError: when it is not plain LoRA, or the base is Meta's, whose rows are in another order.
    """
    if base.table is not HF_TABLE:
        raise ConfigError(
            "--lora is merged into a Hugging Face folder: PEFT trains in its order of rows, and Meta's is another"
        )
    scale = _scale(folder / CONFIG_FILE)
    raw = _open_matrices(folder)
    deltas, problems = _deltas(raw, base.raw, scale)
    raise_all(CheckpointError, f"{folder} does not fit {base.raw.source}:", problems)
    note = f"{folder.name}: LoRA merged into {len(deltas)} weights, scale {scale:g}"
    read = _merged(base.raw.read, raw.read, deltas)
    return replace(base, raw=replace(base.raw, read=read, notes=(*base.raw.notes, *raw.notes, note)))


def _scale(file: Path) -> float:
    """Return alpha / r of an adapter that is plain LoRA."""
    values = read_json_object(file)
    problems = fixed_field_problems(values, _FIXED)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    is_scaled = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not isinstance(rank, int) or rank < 1 or not is_scaled:
        problems.append(f"r must be a positive whole number and lora_alpha a number (got {shown(rank)}, {shown(alpha)})")
    began = values.get("init_lora_weights", True)
    if began is not None and began not in _PLAIN_INITIALISATIONS:
        problems.append(
            f"init_lora_weights ({shown(began)}) changes the base's weights: merge it with PEFT, merge_and_unload()"
        )
    known = {*_FIXED, *_USED, *_WITHOUT_EFFECT, "init_lora_weights"}
    problems += [
        f"{name} ({shown(value)}) is not plain LoRA: merge it with PEFT, merge_and_unload(), and convert the result"
        for name, value in values.items()
        if value and name not in known
    ]
    raise_all(ConfigError, f"{file}:", problems)
    assert isinstance(rank, int) and isinstance(alpha, int | float)
    return alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank


def _open_matrices(folder: Path) -> RawState:
    safetensors, pickle = folder / SAFETENSORS, folder / PICKLE
    if safetensors.is_file():
        return state_from_safetensors(folder.name, [safetensors])
    if pickle.is_file():
        return state_from_mapping(folder.name, load_pickle(pickle), str(pickle))
    raise CheckpointError(f"{folder} holds no LoRA adapter: expected {CONFIG_FILE} with {SAFETENSORS} or {PICKLE}")


def _deltas(raw: RawState, base: RawState, scale: float) -> tuple[dict[str, _Delta], list[str]]:
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
        elif problem := _shape_problem(raw.tensors[down].shape, raw.tensors[up].shape, base.tensors[target].shape):
            problems.append(f"{name}: {problem}")
        else:
            found[target] = _Delta(down, up, scale)
    return found, problems


def _shape_problem(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
    fits = len(down) == len(up) == 2 and down[0] == up[1] and (up[0], down[1]) == weight
    return None if fits else f"lora_B {list(up)} times lora_A {list(down)} is not {list(weight)}"


def _merged(
    read_base: Callable[[str], torch.Tensor], read_lora: Callable[[str], torch.Tensor], deltas: Mapping[str, _Delta]
) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        weight, delta = read_base(name), deltas.get(name)
        if delta is None:
            return weight
        added = read_lora(delta.up).float() @ read_lora(delta.down).float()
        return (weight.float() + delta.scale * added).to(weight.dtype)

    return read
